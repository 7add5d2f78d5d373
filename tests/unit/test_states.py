"""Saving and loading what training has left: training goes on as if it had not stopped."""

import json

import numpy as np
import pytest
from helpers import same

import kvstore
from kvstore import _core, _optimizer, lr_scheduler, optimizer
from kvstore.optimizer import SGD, Adam, Optimizer

numpy_io = pytest.importorskip("safetensors.numpy", reason="mlkvstore[state] is not installed")

ONES = np.ones(2, np.float32)


def refused(match):
    return pytest.raises(kvstore.InvalidArgumentError, match=match)


def about(data):
    length = int.from_bytes(data[:8], "little")
    return json.loads(json.loads(data[8 : 8 + length])["__metadata__"]["kvstore"])


@pytest.fixture
def path(tmp_path):
    return tmp_path / "file.safetensors"


def train(kv, steps, keys=("w", "b")):
    for step in steps:
        for i, key in enumerate(keys):
            kv.push(key, ONES * np.float32(0.25 * (step + i + 1)))


def begin(kv, keys=("w", "b")):
    kv.init(list(keys), [ONES] * len(keys))


def values(kv):
    return {key: kv.pull(key).asnumpy().tobytes() for key in kv.keys()}  # noqa: SIM118


def carry(kv, other):
    """The values themselves, which are not in the file."""
    for key in kv.keys():  # noqa: SIM118
        other.init(key, kv.pull(key))


CLASSES = [entry["title"] for entry in _core.optimizer_classes().values()]


def sample(title):
    more = {"GroupAdaGrad": {}, "LBSGD": {"batch_scale": 2, "momentum": 0.5}}
    keywords = more.get(title, {"wd": 0.125})
    if "momentum" in optimizer.create(title).__dict__["_numbers"]:
        keywords = {"momentum": 0.5, **keywords}
    return optimizer.create(title, lr=0.25, **keywords)


@pytest.mark.parametrize("dump", [False, True], ids=["states", "dump"])
@pytest.mark.parametrize("title", CLASSES)
def test_training_goes_on_as_if_it_had_not_stopped(path, title, dump):
    shape = (2, 3)
    grads = np.random.default_rng(3).normal(size=(7, *shape)).astype(np.float32)
    with kvstore.create() as kv, kvstore.create() as other:
        kv.set_optimizer(sample(title))
        kv.init("w", np.ones(shape, np.float32))
        for grad in grads[:3]:
            kv.push("w", grad)
        kv.save_optimizer_states(path, dump_optimizer=dump)
        carry(kv, other)
        if not dump:
            other.set_optimizer(sample(title))
        other.load_optimizer_states(path)
        for grad in grads[3:]:
            kv.push("w", grad)
            other.push("w", grad)
        assert other.optimizer == kv.optimizer
        assert values(other) == values(kv)
        exported, again = kv._states_export(), other._states_export()
        assert exported["num_update"] == again["num_update"] == 7
        assert exported["draws"] == again["draws"]


def test_keys_that_come_later_get_their_state_at_their_init(kv, path):
    kv.set_optimizer(Adam(lr=0.25))
    begin(kv)
    train(kv, range(3))
    kv.save_optimizer_states(path)
    with kvstore.create() as other:
        other.set_optimizer(Adam(lr=0.25))
        other.load_optimizer_states(path)
        carry(kv, other)
        train(kv, range(3, 6))
        train(other, range(3, 6))
        assert values(other) == values(kv)


def test_a_key_that_the_file_has_not_begins_anew(kv, path):
    kv.set_optimizer(Adam(lr=0.25))
    begin(kv, ["w"])
    kv.save_optimizer_states(path)
    train(kv, range(3), ["w"])
    kv.load_optimizer_states(path)
    assert kv._states_export()["keys"] == []
    assert kv._states_export()["num_update"] == 0


def test_loading_goes_back_in_time(kv, path):
    kv.set_optimizer(SGD(lr=0.25, momentum=0.5))
    begin(kv)
    train(kv, range(2))
    kv.save_optimizer_states(path)
    before = {key: slots["m"].copy() for key, _, _, slots in kv._states_export()["keys"]}
    train(kv, range(2, 5))
    kv.load_optimizer_states(path)
    states = kv._states_export()
    assert states["num_update"] == 2
    assert {key: count for key, count, *_ in states["keys"]} == {"w": 2, "b": 2}
    assert all(same(slots["m"], before[key]) for key, _, _, slots in states["keys"])


def test_row_sparse_keys_are_saved_with_their_full_shape(kv, path):
    rows = kvstore.RowSparse(np.ones((2, 3), np.float32), [1, 4], (6, 3))
    kv.set_optimizer(Adam(lr=0.25))
    kv.init("r", rows)
    kv.push("r", rows)
    kv.save_optimizer_states(path)
    stored = numpy_io.load_file(path)
    assert stored["r/m"].shape == (6, 3)
    assert np.flatnonzero(stored["r/m"].any(axis=1)).tolist() == [1, 4]
    assert about(path.read_bytes())["keys"] == [["r", 1, "row_sparse"]]
    kv.load_optimizer_states(path)
    kv.push("r", rows)
    assert kv._states_export()["num_update"] == 2


def test_residuals_of_compression_are_part_of_it(path):
    def run(kv, steps):
        for step in steps:
            kv.push("w", [ONES * np.float32(0.3 * (step + 1)), ONES * np.float32(0.2)])

    with kvstore.create("device") as kv, kvstore.create("device") as other:
        kv.set_gradient_compression({"type": "2bit", "threshold": 0.5})
        kv.set_optimizer(SGD(lr=0.25))
        kv.init("w", ONES)
        run(kv, range(3))
        kv.save_optimizer_states(path, dump_optimizer=True)
        assert {"w/residual.0", "w/residual.1"} <= numpy_io.load_file(path).keys()
        carry(kv, other)
        other.load_optimizer_states(path)  # turns the compression on as well
        run(kv, range(3, 6))
        run(other, range(3, 6))
        assert values(other) == values(kv)
        assert other._states_export()["compression"] == {"type": "2bit", "threshold": 0.5}
        other.set_gradient_compression({"type": "1bit"})
        with refused("written with 2bit compression, the store's is 1bit"):
            other.load_optimizer_states(path)


def test_the_position_of_a_schedule_is_always_part_of_it(kv, path):
    def make():
        return lr_scheduler.FactorScheduler(step=1, factor=0.5, base_lr=0.5)

    kv.set_optimizer(SGD(lr_scheduler=make()))
    begin(kv)
    train(kv, range(3))
    kv.save_optimizer_states(path)
    other = SGD(lr_scheduler=make())
    kv.set_optimizer(other)
    kv.load_optimizer_states(path)
    assert other.lr_scheduler.state_dict() == {"base_lr": 0.125, "count": 2}
    # Another class of schedule keeps its own.
    poly = lr_scheduler.PolyScheduler(max_update=9, base_lr=0.5)
    kv.set_optimizer(SGD(lr_scheduler=poly))
    kv.load_optimizer_states(path)
    assert poly.base_lr == 0.5


def test_a_dump_restores_everything(path):
    schedule = lr_scheduler.MultiFactorScheduler([1, 3], factor=0.5, base_lr=0.5, warmup_steps=1)
    given = optimizer.RMSProp(
        gamma1=0.5,
        centered=True,
        clip_weights=3,
        wd=0.1,
        clip_gradient=2,
        multi_precision=True,
        lr_scheduler=schedule,
        lr_mult={1: 0.5, -3: 2},
        wd_mult={2: 0},
        names={1: "a_weight"},
        begin_num_update=4,
    )
    with kvstore.create() as kv, kvstore.create() as other:
        kv.set_optimizer(given)
        begin(kv, [1, 2])
        train(kv, range(2), [1, 2])
        kv.save_optimizer_states(path, dump_optimizer=True)
        other.load_optimizer_states(path)
        assert other.optimizer == given
        assert other.optimizer is not given
        assert other.optimizer.lr_scheduler.state_dict() == schedule.state_dict()


class Constant(lr_scheduler.LRScheduler):
    def __call__(self, num_update):
        return self.base_lr


@pytest.mark.parametrize("schedule", [lambda n: 0.5, Constant()])
def test_a_schedule_of_ones_own_cannot_be_dumped(kv, path, schedule):
    kv.set_optimizer(SGD(lr_scheduler=schedule))
    with refused("a schedule of your own cannot be written"):
        kv.save_optimizer_states(path, dump_optimizer=True)
    assert not path.exists()
    kv.save_optimizer_states(path)
    kv.load_optimizer_states(path)


def test_what_cannot_be_saved_or_loaded_says_so(kv, path):
    with refused("no optimizer, so it has no states to save"):
        kv.save_optimizer_states(path)
    kv.set_optimizer(SGD())
    kv.save_optimizer_states(path)
    kv.set_updater(None)
    with refused("call set_optimizer with a SGD first"):
        kv.load_optimizer_states(path)
    kv.set_optimizer(Adam())
    with refused("it is of the optimizer SGD, the store's is a Adam"):
        kv.load_optimizer_states(path)


def change(path, **optimizer):
    """Forge the description of the optimizer in a file."""
    data = path.read_bytes()
    right = about(data)
    right["optimizer"].update(optimizer)
    tensors = numpy_io.load(data)
    path.write_bytes(numpy_io.save(tensors, {"kvstore": json.dumps(right)}))


@pytest.mark.parametrize(
    "dump, message",
    [
        (3, "this makes no SGD"),
        ({}, "this makes no SGD"),
        ({"numbers": {"momentum": -1}}, "momentum=-1"),
        ({"numbers": {"momentum": "x"}}, "momentum is a number"),
        ({"numbers": {"other": 1}}, "has no argument 'other'"),
        ({"numbers": []}, "this makes no SGD"),
        ({"begin": -1}, "begin_num_update"),
        ({"begin": 2**70}, "begin_num_update"),
        ({"lr_mult": [[[], 1]]}, "this makes no SGD"),
        ({"lr_mult": [["a", None]]}, "lr_mult"),
        ({"lr_mult": [[1.5, 1]]}, "lr_mult has keys of the store"),
        ({"names": {"a": 1}}, "this makes no SGD|names"),
        ({"schedule": {"class": "Other"}}, "describes no schedule"),
        ({"schedule": 3}, "describes no schedule"),
    ],
)
def test_a_forged_optimizer_is_refused_and_changes_nothing(kv, path, dump, message):
    given = SGD(lr=0.25, momentum=0.5)
    kv.set_optimizer(given)
    begin(kv)
    train(kv, range(2))
    kv.save_optimizer_states(path, dump_optimizer=True)
    right = about(path.read_bytes())["optimizer"]["dump"]
    change(path, dump={**right, **dump} if isinstance(dump, dict) and dump else dump)
    with pytest.raises((kvstore.InvalidArgumentError, kvstore.ArrayTypeError), match=message):
        kv.load_optimizer_states(path)
    assert kv.optimizer is given
    assert kv._states_export()["num_update"] == 2


@pytest.mark.parametrize("name", [None, 3, "nothing", "os.system", "kvstore.optimizer.SGD"])
def test_a_class_is_never_imported_because_a_file_says_so(kv, path, name):
    kv.set_optimizer(SGD())
    kv.save_optimizer_states(path, dump_optimizer=True)
    change(path, **{"class": name})
    with refused("neither built in nor registered nor set"):
        kv.load_optimizer_states(path)


@pytest.mark.parametrize("dump", [False, True])
def test_a_shape_that_disagrees_changes_nothing(path, dump):
    with kvstore.create() as kv:
        kv.set_optimizer(Adam(lr=0.25))
        kv.init(["w", "b"], [np.ones(3, np.float32), ONES])
        kv.push(["w", "b"], [np.ones(3, np.float32), ONES])
        kv.save_optimizer_states(path, dump_optimizer=dump)
    with kvstore.create() as kv:
        for given in (Adam(lr=0.5), SGD(lr=0.5, momentum=0.5)) if dump else (Adam(lr=0.5),):
            kv.set_optimizer(given)
            if "w" not in kv:
                begin(kv)
            train(kv, range(2))
            before = kv._states_export()
            with refused("state '[mv]' of key 'w'.*another shape than the key"):
                kv.load_optimizer_states(path)
            after = kv._states_export()
            assert kv.optimizer is given
            assert after["num_update"] == before["num_update"]
            for (key, count, _, slots), (key2, count2, _, slots2) in zip(
                before["keys"], after["keys"], strict=True
            ):
                assert (key, count, slots.keys()) == (key2, count2, slots2.keys())
                assert all(same(slots[slot], slots2[slot]) for slot in slots)


def test_a_dump_of_another_shape_leaves_the_updater(kv, path):
    kv.set_optimizer(Adam(lr=0.25))
    begin(kv, ["w"])
    train(kv, range(1), ["w"])
    kv.save_optimizer_states(path, dump_optimizer=True)
    kv.delete("w")
    kv.init("w", np.ones(3, np.float32))
    seen = []
    kv.set_updater(lambda key, recv, stored: seen.append(key))
    with refused("another shape than the key"):
        kv.load_optimizer_states(path)
    kv.push("w", np.ones(3, np.float32))
    assert seen == ["w"]


def test_keys_of_the_other_type_are_refused(path):
    with kvstore.create() as kv:
        kv.set_optimizer(SGD(momentum=0.5))
        begin(kv, [3])
        train(kv, range(1), [3])
        kv.save_optimizer_states(path)
    with kvstore.create() as kv:
        kv.set_optimizer(SGD(momentum=0.5))
        begin(kv, ["3"])
        with refused("its keys are int, those of the store str"):
            kv.load_optimizer_states(path)


def test_unknown_slots_are_refused(kv, path):
    kv.set_optimizer(SGD(momentum=0.5))
    begin(kv, ["w"])
    train(kv, range(1), ["w"])
    kv.save_optimizer_states(path)
    data = path.read_bytes()
    text = json.dumps(about(data))
    path.write_bytes(numpy_io.save({"w/m": ONES, "w/other": ONES}, {"kvstore": text}))
    with refused("'other' of key 'w'"):
        kv.load_optimizer_states(path)


# ---------------------------------------------------------------------- optimizers in Python


@optimizer.register
class Kept(Optimizer):
    def __init__(self, momentum=0.5, **common):
        super().__init__(**common)
        self.momentum = momentum

    def create_state(self, key, weight):
        return {"m": np.zeros_like(weight), "more": (None, [np.zeros(1)])}

    def update(self, key, weight, grad, state):
        state["m"] *= self.momentum
        state["m"] -= self.get_lr(key) * grad
        state["more"][1][0] += self.update_count(key)
        weight += state["m"]


del _optimizer.registered["kept"]


@pytest.mark.parametrize("dump", [False, True])
@pytest.mark.parametrize("narrow", [False, True])
def test_an_optimizer_in_python_goes_on_too(path, dump, narrow):
    kind = np.float16 if narrow else np.float32
    with kvstore.create() as kv, kvstore.create() as other:
        kv.set_optimizer(Kept(lr=0.3, momentum=0.25, multi_precision=narrow))
        kv.init("w", np.ones(2, kind))
        for step in range(3):
            kv.push("w", np.full(2, 0.3 * step, kind))
        kv.set_optimizer_params(momentum=0.75, lr=0.2)
        kv.save_optimizer_states(path, dump_optimizer=dump)
        names = {"w/state.m", "w/state.more.1.0", *(["w/master"] if narrow else [])}
        assert numpy_io.load_file(path).keys() == names
        other.set_optimizer(Kept(lr=0.2, momentum=0.75, multi_precision=narrow))
        carry(kv, other)
        other.load_optimizer_states(path)
        assert (other.optimizer.momentum, other.optimizer.lr) == (0.75, 0.2)
        for store in (kv, other):
            store.push("w", np.full(2, 0.7, kind))
            store.save_optimizer_states(path)
        assert values(other) == values(kv)
        for a, b in zip(
            kv._optimizer_owner().progress.slots("w").values(),
            other._optimizer_owner().progress.slots("w").values(),
            strict=True,
        ):
            assert same(a, b)


def test_a_registered_class_needs_not_be_set(kv, path):
    kv.set_optimizer(Kept(lr=0.25, momentum=0.0))
    kv.save_optimizer_states(path, dump_optimizer=True)
    kv.set_updater(None)
    with refused("Kept', which is neither built in nor registered nor set"):
        kv.load_optimizer_states(path)
    try:
        optimizer.register(Kept)
        kv.load_optimizer_states(path)
    finally:
        del _optimizer.registered["kept"]
    assert type(kv.optimizer) is Kept
    assert (kv.optimizer.lr, kv.optimizer.momentum) == (0.25, 0.0)


def test_what_of_an_optimizer_in_python_cannot_be_saved(kv, path):
    class Odd(Kept):
        def create_state(self, key, weight):
            return {"m": np.zeros_like(weight), "more": (None, [np.zeros(1)]), "odd": 3}

    kv.set_optimizer(Odd(0.5))
    begin(kv, ["w"])
    kv.save_optimizer_states(path)
    with refused("was not made with keywords alone"):
        kv.save_optimizer_states(path, dump_optimizer=True)
    train(kv, range(1), ["w"])
    with pytest.raises(kvstore.ArrayTypeError, match="the state of key 'w' holds a int"):
        kv.save_optimizer_states(path)
    odd = kv._optimizer_owner().progress.states["w"]
    for wrong, message in (
        (np.ones(1, complex), "is of complex128, which a file cannot hold"),
        ({"a/b": ONES}, "has a part 'a/b'"),
        ({3: ONES}, "has a part 3"),
    ):
        odd["odd"] = wrong
        with pytest.raises(kvstore.ArrayTypeError, match=message):
            kv.save_optimizer_states(path)


def test_states_of_another_shape_are_refused_for_python_too(kv, path):
    kv.set_optimizer(Kept())
    begin(kv, ["w"])
    train(kv, range(1), ["w"])
    kv.save_optimizer_states(path)
    text = json.dumps(about(path.read_bytes()))
    tensors = {"w/state.m": np.ones(3, np.float32), "w/state.more.1.0": np.zeros(1)}
    path.write_bytes(numpy_io.save(tensors, {"kvstore": text}))
    before = kv._optimizer_owner()
    with refused("state 'state.m' of key 'w' is float32 .*, that of the file float32"):
        kv.load_optimizer_states(path)
    assert kv._optimizer_owner() is before
    # A key that has no state yet tells at its push, and keeps telling.
    kv.set_optimizer(SGD())
    kv.set_optimizer(Kept())
    kv.load_optimizer_states(path)
    for _ in range(2):
        with refused("state 'state.m' of key 'w'"):
            train(kv, range(1), ["w"])


class Summing(optimizer.Optimizer):
    def create_state(self, key, weight):
        return np.zeros_like(weight)

    def update(self, key, weight, grad, state):
        state += grad
        weight[...] = state


def compressed(own):
    kv = kvstore.create("device")
    kv.set_optimizer(own)
    kv.set_gradient_compression({"type": "2bit", "threshold": 0.5})
    kv.init("w", np.zeros(3, np.float32))
    return kv


@pytest.mark.parametrize("own", [Summing(), optimizer.SGD()], ids=["in Python", "built in"])
def test_residuals_are_saved_with_any_optimizer(tmp_path, own):
    value = np.array([0.3, 0.7, -0.4], np.float32)
    with compressed(own) as never, compressed(own) as stopped, compressed(own) as later:
        for kv in (never, stopped):
            kv.push("w", [value, value])
        stopped.save_optimizer_states(tmp_path / "states")
        later.load_optimizer_states(tmp_path / "states")
        later.set_updater(None)
        later.set_gradient_compression({"type": "none"})
        later.push("w", stopped.pull("w"))
        later.set_optimizer(own)
        later.load_optimizer_states(tmp_path / "states")
        for kv in (never, later):
            kv.push("w", [value, value])
        assert never.pull("w").asnumpy().tobytes() == later.pull("w").asnumpy().tobytes()


def test_states_that_wait_for_their_init_are_saved_again(tmp_path):
    with compressed(optimizer.Adam()) as kv:
        kv.push("w", np.full(3, 0.7, np.float32))
        before = kv._states_export()
        kv.save_optimizer_states(tmp_path / "states")
    with kvstore.create() as kv:
        kv.set_optimizer(optimizer.Adam())
        kv.load_optimizer_states(tmp_path / "states")
        kv.save_optimizer_states(tmp_path / "again")
    with compressed(optimizer.Adam()) as kv:
        kv.load_optimizer_states(tmp_path / "again")
        after = kv._states_export()
    assert before["keys"][0][:2] == after["keys"][0][:2]
    for name, array in before["keys"][0][3].items():
        assert array.tobytes() == after["keys"][0][3][name].tobytes()
    assert before["residuals"][0][2].tobytes() == after["residuals"][0][2].tobytes()
