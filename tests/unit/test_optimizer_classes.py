"""The optimizers as objects: their checks, and what a store does with them."""

import copy
import inspect
import pickle

import numpy as np
import pytest
from samples import Momentum, Plain

import kvstore
from kvstore import _core, _optimizer, lr_scheduler, optimizer
from kvstore.optimizer import SGD, Adam, Optimizer

BUILT_IN = [getattr(optimizer, entry["title"]) for entry in _core.optimizer_classes().values()]
ONES = np.ones(2, np.float32)


def refused(*, match, of=kvstore.InvalidArgumentError):
    return pytest.raises(of, match=match)


def value(kv, key="w"):
    return kv.pull(key).asnumpy().tolist()


@pytest.fixture
def registry():
    before = dict(_optimizer.registered)
    yield _optimizer.registered
    _optimizer.registered.clear()
    _optimizer.registered.update(before)


# ------------------------------------------------------------------------------- the classes


def test_every_class_of_the_core_has_a_python_class_and_no_other():
    exported = {getattr(optimizer, name) for name in optimizer.__all__}
    assert {c for c in exported if isinstance(c, type)} == {*BUILT_IN, Optimizer}
    assert {c.__name__.lower() for c in BUILT_IN} == _core.optimizer_classes().keys()


@pytest.mark.parametrize("klass", BUILT_IN, ids=lambda c: c.__name__)
def test_keywords_and_defaults_are_those_of_the_core(klass):
    table = _core.optimizer_classes()[klass.__name__.lower()]
    expected = {name: default for name, _, default, *_ in table["params"]}
    signature = inspect.signature(klass).parameters
    own = {name: p.default for name, p in signature.items() if name != "common"}
    lazy = own.pop("lazy_update", True)
    assert lazy is True
    assert own == expected
    assert all(p.kind is p.KEYWORD_ONLY for n, p in signature.items() if n != "common")
    assert klass().learning_rate == table["learning_rate"]
    for name, default in expected.items():
        assert getattr(klass(), name) == default


def test_only_the_classes_that_can_be_lazy_have_the_keyword():
    lazy = {c.__name__ for c in BUILT_IN if "lazy_update" in inspect.signature(c).parameters}
    assert lazy == {"SGD", "LARS", "Adam"}
    with refused(match="NAG has no argument 'lazy_update'"):
        optimizer.NAG(lazy_update=False)


def test_repr_shows_what_is_not_the_default():
    schedule = lr_scheduler.FactorScheduler(step=3, factor=0.5)
    assert repr(SGD()) == "SGD()"
    assert repr(SGD(lr=0.1, momentum=0.9, multi_precision=True)) == (
        "SGD(learning_rate=0.1, momentum=0.9, multi_precision=True)"
    )
    shown = repr(Adam(lr_scheduler=schedule, lr_mult={3: 2}, names={3: "x_weight"}))
    assert shown == f"Adam(lr_scheduler={schedule!r}, lr_mult={{3: 2.0}}, names={{3: 'x_weight'}})"
    assert repr(SGD(learning_rate=0.01)) == "SGD()"


def test_equality_is_of_class_and_numbers():
    assert SGD(lr=0.5) == SGD(learning_rate=0.5)
    assert SGD(lr=0.5) != SGD(lr=0.25)
    assert SGD() != optimizer.NAG()
    assert SGD(lr_mult={1: 2}) != SGD()
    assert SGD(begin_num_update=3) != SGD()
    one, other = (lr_scheduler.FactorScheduler(step=3) for _ in range(2))
    assert SGD(lr_scheduler=one) == SGD(lr_scheduler=other)
    assert Plain() != Plain()
    with pytest.raises(TypeError):
        hash(SGD())


@pytest.mark.parametrize(
    "again", [copy.copy, copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))]
)
def test_copies_are_equal(again):
    schedule = lr_scheduler.PolyScheduler(max_update=9)
    given = Adam(beta1=0.5, lr_scheduler=schedule, wd_mult={"a": 0})
    assert again(given) == given


@pytest.mark.parametrize("name", ["lr", "learning_rate", "wd", "momentum", "lr_mult", "anything"])
def test_objects_do_not_change(name):
    given = SGD(momentum=0.5)
    with pytest.raises(AttributeError, match=r"fixed.*kv\.set_optimizer_params"):
        setattr(given, name, 0.25)
    assert given == SGD(momentum=0.5)
    given.lr_mult["w"] = 3  # of a copy
    assert given.lr_mult == {}


def test_numbers_are_attributes():
    given = Adam(lr=0.5, beta1=0.25, wd=0.125, clip_gradient=2)
    assert (given.lr, given.learning_rate, given.beta1, given.wd) == (0.5, 0.5, 0.25, 0.125)
    assert (given.clip_gradient, given.rescale_grad, given.multi_precision) == (2.0, 1.0, False)
    assert (given.lr_scheduler, given.begin_num_update, given.num_update) == (None, 0, 0)
    assert not hasattr(given, "momentum")


@pytest.mark.parametrize(
    "keywords, message",
    [
        ({"momentun": 0.9}, "SGD has no argument 'momentun'; did you mean 'momentum'"),
        ({"learningrate": 0.9}, "did you mean 'learning_rate'"),
        ({"self": 1}, "multiple values|no argument 'self'"),
        ({"lr": 0.1, "learning_rate": 0.1}, "lr and learning_rate are the same"),
        ({"names": {1: "a"}, "param_idx2name": {1: "a"}}, "param_idx2name and names"),
        ({"momentum": -0.1}, "SGD: momentum=-0.1 must be at least 0"),
        ({"momentum": "0.9"}, "momentum is a number, not '0.9'"),
        ({"momentum": None}, "momentum is a number, not None"),
        ({"momentum": True}, "momentum is a number, not True"),
        ({"momentum": np.ones(1)}, "momentum is a number"),
        ({"momentum": float("nan")}, "momentum=nan"),
        ({"wd": float("inf")}, "wd=inf"),
        ({"wd": 10**400}, "wd=inf"),
        ({"lr": float("nan")}, "learning_rate=nan"),
        ({"clip_gradient": 0}, "clip_gradient=0 must be above 0"),
        ({"clip_gradient": -1}, "clip_gradient"),
        ({"clip_gradient": float("nan")}, "clip_gradient"),
        ({"rescale_grad": "x"}, "rescale_grad"),
        ({"lazy_update": 2}, "lazy_update is True or False, not 2"),
        ({"multi_precision": "yes"}, "multi_precision is True or False"),
        ({"begin_num_update": -1}, "begin_num_update is a whole number from 0, not -1"),
        ({"begin_num_update": 2.5}, "begin_num_update"),
        ({"begin_num_update": 2**63}, "begin_num_update"),
        ({"lr_mult": [1, 2]}, "lr_mult is a dict"),
        ({"lr_mult": {1: "x"}}, r"lr_mult\[1\] is a number, not 'x'"),
        ({"wd_mult": {1: float("inf")}}, r"wd_mult\[1\] is finite"),
        ({"wd_mult": {2**63: 1}}, "64 bits"),
        ({"names": {1: 2}}, r"names\[1\] is a str, not 2"),
        ({"lr_scheduler": 3}, "lr_scheduler is a callable, not 3"),
    ],
)
def test_wrong_arguments_are_refused_at_construction(keywords, message):
    with pytest.raises((kvstore.InvalidArgumentError, TypeError), match=message):
        SGD(**keywords)


@pytest.mark.parametrize("key", ["", None, 1.5, True, (1,)])
def test_multipliers_are_by_keys_of_a_store(key):
    with refused(match="lr_mult has keys of the store", of=kvstore.ArrayTypeError):
        SGD(lr_mult={key: 1})


def test_other_kinds_of_numbers_are_checked_too():
    with refused(match="warmup_strategy"):
        optimizer.LBSGD(warmup_strategy="cubic")
    with refused(match="warmup_strategy is a name, not 2"):
        optimizer.LBSGD(warmup_strategy=2)
    with refused(match="batch_scale"):
        optimizer.LBSGD(batch_scale=0)
    with refused(match="batch_scale"):
        optimizer.LBSGD(batch_scale=1.5)
    with refused(match="GroupAdaGrad has no weight decay"):
        optimizer.GroupAdaGrad(wd=0.1)
    with refused(match="beta1=1 must be below 1"):
        Adam(beta1=1)
    assert optimizer.LBSGD(batch_scale=np.int64(2)).batch_scale == 2
    assert optimizer.LAMB(lower_bound=None, upper_bound=np.float32(2)).upper_bound == 2.0
    assert optimizer.RMSProp(centered=np.True_).centered is True


def test_users_numbers_are_checked_under_the_users_name():
    with refused(match="Plain: clip_gradient=0 must be above 0"):
        Plain(clip_gradient=0)
    with refused(match="Momentum has no argument 'momemtum'; did you mean 'momentum'"):
        Momentum(momemtum=0.1)


# ------------------------------------------------------------------------- names and registry


def test_create_finds_by_name_letter_case_free():
    assert optimizer.create("sgd", momentum=0.5) == SGD(momentum=0.5)
    assert optimizer.create("GroupAdagrad") == optimizer.GroupAdaGrad()
    with refused(match="no optimizer is called 'adan'; did you mean 'adam'"):
        optimizer.create("adan")
    with refused(match="no optimizer is called 'qqqqq'$"):
        optimizer.create("qqqqq")
    with refused(match="not <class", of=kvstore.ArrayTypeError):
        optimizer.create(SGD)


def test_registered_classes_are_created_by_name(registry):
    assert optimizer.register(Momentum) is Momentum
    assert optimizer.create("MOMENTUM", momentum=0.25).momentum == 0.25
    optimizer.register(Momentum)
    with pytest.warns(UserWarning, match=r"made a .*Momentum and from now on makes a .*Other"):
        Other = type("Other", (Plain,), {"__qualname__": "Other"})
        Other.__name__ = "Momentum"
        optimizer.register(Other)
    assert type(optimizer.create("momentum")) is Other


def test_what_cannot_be_registered(registry):
    with refused(match="derived from", of=kvstore.ArrayTypeError):
        optimizer.register(int)
    with refused(match="has no update"):
        optimizer.register(type("Lazy", (Optimizer,), {}))
    with refused(match="'sgd' is a built-in optimizer"):
        optimizer.register(type("Sgd", (Plain,), {}))


def test_built_in_classes_are_no_bases():
    with refused(match="Mine is derived from SGD"):
        type("Mine", (SGD,), {})
    assert "mine" not in _optimizer.built_in


# ---------------------------------------------------------------- schedules and multipliers


def test_a_rate_given_with_a_schedule_becomes_its_base():
    schedule = lr_scheduler.FactorScheduler(step=1, base_lr=0.25)
    assert SGD(lr_scheduler=schedule).learning_rate == 0.25
    assert SGD(lr_scheduler=schedule, lr=0.5).lr == 0.5
    assert schedule.base_lr == 0.5
    # The class's own rate does not.
    assert Adam(lr_scheduler=schedule).learning_rate == 0.5


def test_a_schedule_without_a_base_takes_no_rate():
    with refused(match="no base_lr takes no learning_rate"):
        SGD(lr=0.5, lr_scheduler=lambda n: 0.5)
    assert SGD(lr_scheduler=lambda n: 0.5).learning_rate is None


def multipliers(**keywords):
    return {key: rest for key, *rest in SGD(**keywords)._multipliers()}


def test_names_decide_about_decay_as_in_mxnet():
    names = {1: "fc_weight", 2: "bn_gamma", 3: "fc_bias", 4: "bn_beta", 5: "other"}
    decay = {key: wd for key, (_, wd, _) in multipliers(names=names).items()}
    assert decay == {
        1: 1,
        2: 1,
        3: 0,
        4: 0,
        5: 0,
        # MXNet's names stand for string keys too.
        "fc_weight": 1,
        "bn_gamma": 1,
        "fc_bias": 0,
        "bn_beta": 0,
        "other": 0,
    }
    lars = optimizer.LARS(param_idx2name=names)._multipliers()
    assert {key: wd for key, _, wd, _ in lars if isinstance(key, int)} == {
        1: 1,
        2: 0,
        3: 0,
        4: 0,
        5: 0,
    }
    assert {key for key, *_, plain in lars if plain} == {2, 3, 4, "bn_gamma", "fc_bias", "bn_beta"}


def test_multipliers_are_by_key_or_by_name():
    given = multipliers(
        lr_mult={1: 2, "b": 3}, wd_mult={"b": 5, 4: 0.5}, names={1: "b", 2: "b", 3: "c_weight"}
    )
    assert given[1] == [2, 5, False]
    assert given[2] == given["b"] == [3, 5, False]
    assert given[3] == [1, 1, False]
    assert given[4] == [1, 0.5, False]


def test_multipliers_work_in_a_store(kv):
    kv.set_optimizer(SGD(lr=1, wd=0.5, lr_mult={"a": 0.5}, wd_mult={"b": 0}))
    kv.init(["a", "b", "c"], [ONES] * 3)
    kv.push(["a", "b", "c"], [ONES] * 3)
    assert [value(kv, key)[0] for key in "abc"] == [0.25, 0, -0.5]


def test_a_schedule_is_asked_by_the_store(w):
    asked = []

    def schedule(num_update):
        asked.append(num_update)
        return 0.5**num_update

    w.set_optimizer(SGD(lr_scheduler=schedule))
    w.push("w", ONES)
    w.push("w", ONES)
    assert asked == [1, 2]
    assert value(w) == [0.25, 0.25]


def test_a_schedule_that_fails_or_gives_no_number_fails_the_push(w):
    w.set_optimizer(SGD(lr_scheduler=lambda n: 1 // 0))
    with pytest.raises(ZeroDivisionError):
        w.push("w", ONES)
    w.set_optimizer(SGD(lr_scheduler=lambda n: "x"))
    with refused(match="the schedule gave 'x'"):
        w.push("w", ONES)
    assert value(w) == [1, 1]


# ------------------------------------------------------------------------------ in a store


def test_the_optimizer_of_a_store_is_the_object(w):
    assert w.optimizer is None
    given = SGD(lr=0.5)
    w.set_optimizer(given)
    assert w.optimizer is given
    w.set_updater(lambda key, recv, stored: None)
    assert w.optimizer is None
    mine = Plain()
    w.set_optimizer(mine)
    assert w.optimizer is mine
    w.set_updater(None)
    assert w.optimizer is None


@pytest.mark.parametrize("thing", ["sgd", SGD, None, 3, lambda *_: None])
def test_what_is_no_optimizer(w, thing):
    with refused(match="set_optimizer takes an object of a class", of=kvstore.ArrayTypeError):
        w.set_optimizer(thing)


def test_numbers_change_while_training(w):
    given = SGD(lr=0.5, momentum=0.5)
    w.set_optimizer(given)
    w.push("w", ONES)
    assert value(w) == [0.5, 0.5]
    w.set_optimizer_params(lr=0.25, wd=0.0, lr_mult={"w": 2})
    assert w.optimizer == SGD(lr=0.25, momentum=0.5, lr_mult={"w": 2})
    assert given == SGD(lr=0.5, momentum=0.5)
    w.push("w", ONES)  # m = 0.5*-0.5 - 0.25*2
    assert value(w) == [-0.25, -0.25]


@pytest.mark.parametrize(
    "change, message",
    [
        ({"momentun": 1}, "SGD has no number 'momentun'; did you mean 'momentum'"),
        ({"momentum": -1}, "momentum=-1"),
        ({"lr": None}, "learning_rate is a number, not None"),
        ({"lr": 0.5, "learning_rate": 0.5}, "the same"),
        ({"wd": 0.5, "clip_gradient": -1}, "clip_gradient"),
        ({"lr_scheduler": None}, "no number 'lr_scheduler'"),
        ({"lr_mult": 3}, "lr_mult is a dict"),
    ],
)
def test_a_wrong_change_changes_nothing(w, change, message):
    given = SGD(lr=0.25)
    w.set_optimizer(given)
    with refused(match=message):
        w.set_optimizer_params(**change)
    assert w.optimizer is given


def test_numbers_need_an_optimizer(w):
    with refused(match="call set_optimizer first"):
        w.set_optimizer_params(lr=1)


def test_a_changed_rate_goes_to_the_schedule(w):
    schedule = lr_scheduler.FactorScheduler(step=1, factor=0.5, base_lr=0.5)
    w.set_optimizer(SGD(lr_scheduler=schedule))
    w.set_optimizer_params(momentum=0.5)
    assert schedule.base_lr == 0.5
    w.set_optimizer_params(lr=0.25)
    assert schedule.base_lr == w.optimizer.learning_rate == 0.25
    with refused(match="momentum"):
        w.set_optimizer_params(lr=0.125, momentum=-1)
    assert schedule.base_lr == 0.25
    w.set_optimizer(SGD(lr_scheduler=lambda n: 0.5))
    with refused(match="schedule that has no base_lr"):
        w.set_optimizer_params(lr=0.125)
