"""Optimizers on servers: a dist_sync store computes what a local store does that gets the values
of all workers in one list, bit for bit."""

import ml_dtypes
import numpy as np
import pytest
from beside import beside
from helpers import pulled, same
from inside import Cluster, each
from test_optimizers import VARIANTS

import kvstore
from kvstore import lr_scheduler, optimizer

FLOATS = {"f8": np.float64, "f4": np.float32, "f2": np.float16, "bf": ml_dtypes.bfloat16}
SHAPES = {"none": (0,), "one": (1,), "some": (20, 50), "zero": (), "no rows": (0, 3)}
# Norms over many slices are added up in another order: test_dist_norms.py has their tolerance.
NORMS = {"lamb", "lars"}
ALL = {"wd": 0.05, "rescale_grad": 0.5, "clip_gradient": 0.4}
HOW = ("push", "pushpull", "handle")


def variants(name):
    """The numbers of a class, without and with decay, factor and limit."""
    for i, own in enumerate(VARIANTS[name]):
        common = dict(ALL) if i % 2 == 0 else {}
        if name == "test":
            common.pop("clip_gradient", None)
        if name == "groupadagrad":
            common.pop("wd", None)
        yield {"learning_rate": 0.02, **own, **common}


def shapes_of(name):
    two = {"none": (0, 4), "one": (1, 1), "no rows": (0, 3)}
    return {**SHAPES, **two, "zero": (1, 3)} if name == "groupadagrad" else SHAPES


def weights(shapes, dtypes, seed=1):
    random = np.random.default_rng(seed)
    return {
        f"{label} {code}": random.normal(size=shape).astype(dtype)
        for label, shape in shapes.items()
        for code, dtype in dtypes.items()
    }


@pytest.mark.parametrize("workers", [1, 3])
@pytest.mark.parametrize("name", VARIANTS)
def test_every_class_and_floating_type(name, workers):
    with beside(workers) as pair:
        for number, numbers in enumerate(variants(name)):
            for precise in (False, True):
                dtypes = {c: FLOATS[c] for c in ("f2", "bf")} if precise else FLOATS
                values = weights(shapes_of(name), dtypes, number)
                pair.init(values)
                pair.set_optimizer(
                    lambda n=numbers, p=precise: optimizer.create(name, **n, multi_precision=p)
                )
                for step in range(4):
                    pair.push(list(values), HOW[step % 3])
                pair.check()
                pair.delete(list(values))


@pytest.mark.parametrize("name", sorted({*VARIANTS} - NORMS))
def test_values_in_many_slices(name):
    """700 000 elements, of a type and a number of workers that the class's name chooses."""
    number = sorted(VARIANTS).index(name)
    code, workers = [*FLOATS][number % 4], (1, 3)[number // 4 % 2]
    numbers = [*variants(name)][-1]
    with beside(workers) as pair:
        pair.set_optimizer(lambda: optimizer.create(name, **numbers, multi_precision=True))
        pair.init(weights({"large": (70_001, 10), "small": (3, 1)}, {code: FLOATS[code]}))
        for step in range(3):
            pair.push([f"large {code}", f"small {code}"], HOW[step])
        pair.check()
        assert sum(node.counters()["slices"] for node in pair.cluster.servers) > 2


SCHEDULES = {
    "factor": lambda: lr_scheduler.FactorScheduler(
        3, 0.5, base_lr=0.2, warmup_steps=4, warmup_begin_lr=0.01
    ),
    "factor, constant": lambda: lr_scheduler.FactorScheduler(
        2, 0.9, stop_factor_lr=0.1, base_lr=0.2, warmup_steps=3, warmup_mode="constant"
    ),
    "multi": lambda: lr_scheduler.MultiFactorScheduler([2, 5, 7], 0.5, warmup_steps=3),
    "poly": lambda: lr_scheduler.PolyScheduler(8, 0.3, warmup_steps=2, warmup_begin_lr=0.1),
    "cosine": lambda: lr_scheduler.CosineScheduler(7, 0.3, 0.01, warmup_steps=2),
}


@pytest.mark.parametrize("name", ["sgd", "adam", "lars", "lbsgd", "nadam"])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_schedules(schedule, name):
    own = {"momentum": 0.9} if name in ("sgd", "lars", "lbsgd") else {}
    with beside(2) as pair:
        pair.init(weights({"a": (5,), "b": (7,)}, {"f4": np.float32}))
        pair.set_optimizer(
            lambda: optimizer.create(name, **own, lr_scheduler=SCHEDULES[schedule]()),
            ranks=[0] if name == "sgd" else None,
        )
        for step in range(10):  # one is pushed oftener than the other, and both in one call
            pair.push("a f4" if step % 3 else ["b f4", "a f4"], HOW[step % 3])
            pair.check()


def test_a_new_rate_goes_into_the_schedule():
    with beside(2) as pair:
        pair.init(weights({"a": (5,)}, FLOATS))
        pair.set_optimizer(lambda: optimizer.SGD(lr_scheduler=SCHEDULES["factor"]()))
        for step in range(12):
            if step in (5, 9):
                pair.set_params(lr=0.5 / step, ranks=None if step == 5 else [0])
            pair.push(pair.local.keys())
        pair.check()


@pytest.mark.parametrize("kind", ["text", "number"])
@pytest.mark.parametrize("name", ["sgd", "lars", "adamw"])
def test_multipliers_and_names(name, kind):
    keys = ["w", "fc_bias", "bn_gamma", "third"] if kind == "text" else [3, -1, 0, 2**62]
    arguments = {
        "lr_mult": {keys[0]: 0.5, "by name": 3.0},
        "wd_mult": {keys[1]: 2.0, keys[2]: 0},
        "names": {keys[3]: "by name", keys[2]: "some_bias"},
    }
    with beside(3) as pair:
        random = np.random.default_rng(5)
        pair.init({key: random.normal(size=(4, 3)).astype(np.float32) for key in keys})
        pair.set_optimizer(lambda: optimizer.create(name, lr=0.1, wd=0.1, **arguments))
        for _ in range(2):
            pair.push(keys)
        pair.set_params(lr_mult={keys[3]: 7.0, keys[1]: 0.1})
        pair.push(keys[::-1])
        pair.check()


@pytest.mark.parametrize("name", ["adam", "nadam", "lamb", "lbsgd", "adamax"])
def test_counts_begin_where_they_are_told(name):
    with beside(2) as pair:
        pair.init(weights({"a": (5,), "b": (2, 3)}, FLOATS))
        pair.set_optimizer(
            lambda: optimizer.create(
                name, begin_num_update=5, lr_scheduler=SCHEDULES["multi"](), wd=0.01
            )
        )
        for step in range(4):
            pair.push(pair.local.keys()[step % 2 :])
        pair.check()


CHANGES = [
    {"lr": 0.5},
    {"momentum": 0.5},
    {"wd": 0.1, "rescale_grad": 0.25},
    {"momentum": 0.9, "lr": 0.125, "clip_gradient": 0.5},
    {"momentum": 0},
    {"clip_gradient": None, "wd_mult": {"a f4": 3}},
    {"momentum": 0.25},
]


@pytest.mark.parametrize("ranks", [None, [0]], ids=["all", "0"])
@pytest.mark.parametrize("name", ["sgd", "nag", "lars", "dcasgd"])
def test_numbers_change_while_training(name, ranks):
    with beside(2) as pair:
        pair.init(weights({"a": (5,), "b": (300,)}, FLOATS))
        pair.set_optimizer(lambda: optimizer.create(name, lr=0.1), ranks)
        for numbers in CHANGES:
            for step in range(2):
                pair.push(pair.local.keys(), HOW[step])
            pair.set_params(ranks, **numbers)
        pair.push(pair.local.keys())
        pair.check()


def test_multi_precision_is_switched_while_training():
    with beside(2) as pair:
        pair.init(weights({"a": (5,), "b": (300,)}, FLOATS))
        for precise in (True, True, False, True, False, False):
            pair.set_optimizer(
                lambda p=precise: optimizer.SGD(lr=0.001, momentum=0.5, multi_precision=p)
            )
            for _ in range(2):
                pair.push(pair.local.keys())
            pair.check()


SEQUENCES = {
    "the same again": ["sgd", "sgd"],
    "another": ["sgd", "adam"],
    "there and back": ["sgd", "adam", "sgd"],
    "unpushed": ["sgd", "nag unpushed", "sgd"],
    "unpushed twice": ["adam", "sgd unpushed", "nag unpushed", "adam", "adam"],
}


@pytest.mark.parametrize("size", [3, 200_000])
@pytest.mark.parametrize("ranks", [None, [0]], ids=["all", "0"])
@pytest.mark.parametrize("sequence", SEQUENCES)
def test_the_same_class_again_keeps_the_state_and_another_begins_anew(sequence, ranks, size):
    own = {"sgd": {"momentum": 0.5}, "nag": {"momentum": 0.5}, "adam": {}}
    with beside(2) as pair:
        pair.init(weights({"a": (size,)}, {"f4": np.float32}))
        for step in SEQUENCES[sequence]:
            name, _, unpushed = step.partition(" ")
            pair.set_optimizer(lambda n=name: optimizer.create(n, lr=0.1, **own[n]), ranks)
            for _ in range(0 if unpushed else 2):
                pair.push("a f4")
            pair.check()
            kept = [kv._states_export()["keys"] for kv in (pair.stores[0], pair.local)]
            for (_, count, _, slots), (_, local_count, _, local_slots) in zip(*kept, strict=True):
                assert count == local_count
                assert all(same(slots[name], local_slots[name]) for name in {*slots, *local_slots})


def test_a_key_that_was_not_pushed_meanwhile_begins_anew_too():
    with beside(2) as pair:
        pair.init(weights({"a": (3,), "b": (3,)}, {"f4": np.float32}))
        for name in ("sgd", "nag", "sgd"):
            pair.set_optimizer(lambda n=name: optimizer.create(n, lr=0.1, momentum=0.5))
            pair.push(["a f4", "b f4"] if name == "sgd" else "a f4")
            pair.push("a f4")
        pair.check()


def test_before_an_optimizer_the_sum_is_assigned():
    with beside(3) as pair:
        pair.init(weights({"a": (5,), "b": (200_000,)}, FLOATS))
        for step in range(2):
            pair.push(pair.local.keys(), HOW[step])
            pair.check()
        pair.set_optimizer(lambda: optimizer.Adam(lr=0.1), ranks=[0])
        for step in range(2):
            pair.push(pair.local.keys(), HOW[step])
        pair.check()


@pytest.mark.parametrize("size", [3, 200_000])
def test_deleting_a_key_forgets_its_state_and_its_count(size):
    with beside(2) as pair:
        pair.set_optimizer(lambda: optimizer.Adam(lr=0.1))
        for seed in range(3):
            pair.init(weights({"a": (size,)}, {"f4": np.float32}, seed))
            for _ in range(2 + seed):
                pair.push("a f4")
            pair.check()
            pair.delete(["a f4"])


def test_pushes_under_way_keep_the_step_that_they_were_counted_with():
    """Rank 0 goes ahead with handles, changing the numbers meanwhile; the others follow later."""
    with Cluster(2, 2) as cluster, kvstore.create("local") as local:
        first, second = cluster.all_stores()
        each([first, second], lambda kv: kv.init("w", np.zeros(3, np.float32)))
        local.init("w", np.zeros(3, np.float32))
        one, handles = np.ones(3, np.float32), []
        for rate in (0.5, 0.25, 2.0):
            for kv in (first, local):
                kv.set_optimizer(optimizer.SGD(learning_rate=rate, momentum=0.5))
            handles.append(first.push("w", one, async_op=True))
            local.push("w", [one, one])
        for _ in range(3):
            second.push("w", one)
        for handle in handles:
            handle.wait()
        assert pulled(second, "w").tolist() == pulled(local, "w").tolist()


@pytest.mark.parametrize("size", [3, 200_000])
def test_a_push_under_way_is_of_the_training_in_which_it_was_made(size):
    """Rank 0 comes back to an equal optimizer before its last push of the first one is applied."""
    one = np.ones(size, np.float32)
    with Cluster(2, 2) as cluster, kvstore.create("local") as local:
        first, second = cluster.all_stores()
        each([first, second, local], lambda kv: kv.init("w", 0 * one))
        for kv in (first, local):
            kv.set_optimizer(optimizer.SGD(learning_rate=1.0, momentum=0.5))
        for kv in (first, second):
            kv.push("w", one)
        local.push("w", [one, one])
        assert same(pulled(first, "w"), pulled(local, "w"))
        first.push("w", one)
        local.push("w", [one, one])
        for kv in (first, local):
            kv.set_optimizer(optimizer.NAG())
            kv.set_optimizer(optimizer.SGD(learning_rate=1.0, momentum=0.5))
        first.push("w", one)
        local.push("w", [one, one])
        for _ in range(2):
            second.push("w", one)
        assert same(pulled(second, "w"), pulled(local, "w"))
        assert same(pulled(first, "w"), pulled(local, "w"))


def test_value_lists_of_each_worker_are_summed_before():
    rounds = [[(1.0, 2.0), (0.5,)], [(4.0,), (0.25, 0.25, 8.0)]]
    with Cluster(2, 2) as cluster, kvstore.create("local") as local:
        stores = cluster.all_stores()
        for kv in (stores[0], local):
            kv.set_optimizer(optimizer.SGD(learning_rate=0.5, momentum=0.5))
        each([*stores, local], lambda kv: kv.init("w", np.ones(3, np.float32)))
        for lists in rounds:
            each(
                stores, lambda kv, n=lists: kv.push("w", [np.full(3, x, "f4") for x in n[kv.rank]])
            )
            local.push("w", [np.full(3, x, "f4") for numbers in lists for x in numbers])
        assert pulled(stores[1], "w").tolist() == pulled(local, "w").tolist()


def test_integers_are_refused_on_every_worker_and_nothing_is_sent():
    with Cluster(3, 2) as cluster:
        stores = cluster.all_stores(timeout=5)
        keys = ["n", "w"]
        each(stores, lambda kv: kv.init(keys, [np.ones(2, np.int32), np.ones(2, np.float32)]))
        each(stores, lambda kv: kv.push("n", np.ones(2, np.int32)))
        each(stores, lambda kv: kv.set_optimizer(optimizer.SGD(learning_rate=1.0)))
        values = [np.ones(2, np.int32), np.ones(2, np.float32)]
        for kv in stores:
            for call in (
                lambda kv=kv: kv.push("n", values[0]),
                lambda kv=kv: kv.push(keys, values),
                lambda kv=kv: kv.push("n", values[0], async_op=True).wait(),
                lambda kv=kv: kv.pushpull(keys, values, out=[v.copy() for v in values]),
            ):
                with pytest.raises(kvstore.ArrayTypeError, match=r"'n'.*int32.*SGD"):
                    call()
        each(stores, lambda kv: kv.push("w", np.ones(2, np.float32)))
        for kv in stores:
            assert pulled(kv, "n").tolist() == [3, 3]
            assert pulled(kv, "w").tolist() == [-2, -2]


def test_group_adagrad_needs_two_dimensions_on_every_worker():
    with Cluster(2, 2) as cluster:
        stores = cluster.all_stores(timeout=5)
        each(stores, lambda kv: kv.init("v", np.ones(2, np.float32)))
        each(stores, lambda kv: kv.set_optimizer(optimizer.GroupAdaGrad()))
        for kv in stores:
            with pytest.raises(kvstore.InvalidArgumentError, match=r"'v'.*two dimensions"):
                kv.push("v", np.ones(2, np.float32))


# -------------------------------------------------------------------------------------- SGLD


@pytest.mark.parametrize("workers", [1, 3])
def test_sgld_draws_what_its_formula_says(workers):
    """In every slice and every step anew."""
    n, rate = 400_000, 0.04
    with Cluster(workers, 2) as cluster:
        stores = cluster.all_stores()
        keys = ["a", "b"]
        each(stores, lambda kv: kv.init(keys, [np.full(n, 0.3)] * 2))
        each(
            stores,
            lambda kv: kv.set_optimizer(optimizer.SGLD(lr=rate, wd=0.1, rescale_grad=0.5)),
        )
        before, noises = np.full(n, 0.3), []
        for _ in range(2):
            each(stores, lambda kv: kv.push(keys, [np.full(n, 0.2 / workers)] * 2))
            found = [pulled(kv, "a") for kv in stores]
            assert all((one == found[0]).all() for one in found)
            noises.append(found[0] - before + rate / 2 * (0.1 + 0.1 * before))
            before = found[0]
        noises.append(pulled(stores[0], "b"))
        parts = [part for noise in noises for part in np.split(noise, 8)]
        for part in parts[:16]:
            assert abs(part.mean()) < 4 * 0.2 / np.sqrt(part.size)
            assert abs(part.std() / 0.2 - 1) < 0.02
        related = np.corrcoef(parts) - np.eye(len(parts))
        assert np.abs(related).max() < 0.03
