"""All optimizers, element types, dense and row-sparse, against their formulas in NumPy."""

import inspect

import ml_dtypes
import numpy as np
import pytest
from helpers import pulled, refused
from reference import Reference

import kvstore
from kvstore import _core, optimizer

# name: several sets of numbers, apart from the defaults.
VARIANTS = {
    "test": [{}],
    "sgd": [{}, {"momentum": 0.9}],
    "nag": [{}, {"momentum": 0.9}],
    "signum": [{}, {"momentum": 0.0}, {"wd_lh": 0.02}],
    "adam": [{}, {"beta1": 0.8, "beta2": 0.95, "epsilon": 1e-6}],
    "adamw": [{"eta": 0.7}, {"correct_bias": False}],
    "adagrad": [{}, {"eps": 1e-4}],
    "groupadagrad": [{}],
    "rmsprop": [{}, {"clip_weights": 0.9}, {"centered": True, "gamma2": 0.7}],
    "adadelta": [{}, {"rho": 0.8}],
    "ftrl": [{"lamda1": 0.05}],
    "adamax": [{}],
    "nadam": [{}],
    "ftml": [{}],
    "lamb": [{}, {"bias_correction": False, "lower_bound": 0.5, "upper_bound": 2.0}],
    "lars": [{"momentum": 0.9, "eta": 0.3}],
    "lbsgd": [{"momentum": 0.9}, {"batch_scale": 2, "warmup_epochs": 1, "updates_per_epoch": 5}],
    "dcasgd": [{}, {"momentum": 0.8}],
}
CASES = [(name, own) for name, variants in VARIANTS.items() for own in variants]
COMMON = [{}, {"wd": 0.05, "rescale_grad": 0.5, "clip_gradient": 0.4}]
NO_DECAY = {"groupadagrad"}
NO_CLIP = {"test"}

# Relative to the largest weight: a few roundings of each type in each of six steps.
TOLERANCE = {np.float64: 1e-12, np.float32: 2e-5, np.float16: 2e-2, ml_dtypes.bfloat16: 1e-1}


def ids(case):
    return "-".join([case[0], *(f"{k}={v}" for k, v in case[1].items())])


def test_every_class_is_in_the_table():
    assert {*VARIANTS, "sgld"} == set(_core.optimizer_classes())


def numbers_of(name, own, common):
    numbers = {"learning_rate": 0.02, **own, **common}
    if name in NO_DECAY:
        numbers.pop("wd", None)
    if name in NO_CLIP:
        numbers.pop("clip_gradient", None)
    return numbers


def defaults_of(name):
    common = {p[0]: p[2] for p in _core.optimizer_common()}
    return {**common, **{p[0]: p[2] for p in _core.optimizer_classes()[name]["params"]}}


def rows_of(dense, rows):
    return kvstore.RowSparse(dense[rows], rows, dense.shape)


def close(kv, key, reference, dtype):
    with np.errstate(over="ignore"):
        scale = max(np.abs(reference.weight).max(), 1e-3)
        worst = np.abs(pulled(kv, key).astype(np.float64) - reference.weight).max()
    assert worst <= TOLERANCE[dtype] * scale, (key, worst / scale)


@pytest.mark.parametrize("common", COMMON, ids=["plain", "all"])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=lambda t: t.__name__)
@pytest.mark.parametrize("case", CASES, ids=ids)
def test_dense_pushes_do_what_the_formula_says(kv, case, dtype, common):
    name, own = case
    numbers = numbers_of(name, own, common)
    half = np.dtype(dtype).itemsize == 2
    kv.set_optimizer(optimizer.create(name, **numbers, multi_precision=half))
    random, whole = np.random.default_rng(3), {}
    numbers = {**defaults_of(name), **numbers}
    references = {}
    for key, shape in (("a", (5, 7)), ("b", (40, 30))):
        weight = random.normal(size=shape).astype(dtype)
        references[key] = Reference(name, numbers, weight, whole)
        kv.init(key, weight)
    for step in range(6):
        for key, reference in references.items():
            values = [random.normal(size=reference.weight.shape).astype(dtype) for _ in range(3)]
            values = values[: 1 + step % 3]
            kv.push(key, values if len(values) > 1 else values[0])
            reference.push(sum(v.astype(np.float64) for v in values))
            close(kv, key, reference, dtype)


SPARSE_TYPES = {np.float64: 1e-12, np.float32: 2e-5}


@pytest.mark.parametrize("stored", ["dense", "row_sparse"])
@pytest.mark.parametrize("dtype", SPARSE_TYPES, ids=lambda t: t.__name__)
@pytest.mark.parametrize("case", CASES, ids=ids)
def test_row_sparse_pushes_do_what_the_formula_says(kv, case, dtype, stored):
    name, own = case
    numbers = numbers_of(name, own, {"wd": 0.05, "rescale_grad": 0.5})
    kv.set_optimizer(optimizer.create(name, **numbers))
    random = np.random.default_rng(4)
    shape = (9, 4)
    weight = random.normal(size=shape).astype(dtype)
    sparse = stored == "row_sparse"
    numbers = {**defaults_of(name), **numbers}
    reference = Reference(name, numbers, weight, {}, sparse_weight=sparse)
    kv.init("w", rows_of(weight, np.arange(9)) if sparse else weight)
    for step in range(6):
        total, touched, values = np.zeros(shape), set(), []
        for _ in range(1 + step % 3):
            rows = np.sort(random.choice(9, size=random.integers(0, 6), replace=False))
            value = np.zeros(shape, dtype)
            value[rows] = random.normal(size=(len(rows), 4))
            values.append(rows_of(value, rows))
            total += value
            touched |= set(rows.tolist())
        kv.push("w", values if len(values) > 1 else values[0])
        reference.push(total, sorted(touched))
        close(kv, "w", reference, dtype)


@pytest.mark.parametrize("name", ["sgd", "adam"])
def test_a_gradient_that_is_not_lazy_decays_every_row(kv, name):
    kv.set_optimizer(optimizer.create(name, learning_rate=0.1, wd=0.1, lazy_update=False))
    kv.init("w", np.ones((4, 2), np.float32))
    kv.push("w", rows_of(np.zeros((4, 2), np.float32), [1]))
    assert (pulled(kv, "w") < 1).all()


def test_rows_that_are_not_stored_are_zeros_that_the_optimizer_may_move(kv):
    kv.set_optimizer(optimizer.SGD(learning_rate=1.0, momentum=0.5))
    kv.init("w", rows_of(np.ones((6, 2), np.float32), [2, 4]))
    kv.push("w", rows_of(np.ones((6, 2), np.float32), [0, 2, 5]))
    kv.push("w", rows_of(np.ones((6, 2), np.float32), [2, 3]))
    out = kv.pull("w")
    assert out.indices.tolist() == [0, 2, 3, 4, 5]
    assert out.data[:, 0].tolist() == [-1, -1.5, -1, 1, -1]


@pytest.mark.parametrize("shape", [(), (0,), (3, 0), (1,), (0, 3)])
def test_shapes_without_much_in_them_can_be_updated(kv, shape):
    for name in VARIANTS:
        if name == "groupadagrad" and len(shape) != 2:
            continue
        kv.set_optimizer(optimizer.create(name, learning_rate=0.1))
        kv.init(name, np.ones(shape, np.float32))
        kv.push(name, np.ones(shape, np.float32))
        assert pulled(kv, name).shape == shape
        assert np.isfinite(pulled(kv, name)).all()


def test_pushpull_gives_the_updated_weight(kv):
    kv.set_optimizer(optimizer.Adam(learning_rate=0.1))
    for size in (5, 300_000):
        kv.init(str(size), np.ones(size, np.float32))
        values = [np.ones(size, np.float32), np.full(size, 2, np.float32)]
        out, strided = np.empty(size, np.float32), np.empty((size, 2), np.float32)[:, 0]
        kv.pushpull(str(size), values, out=[out, strided])
        assert (out == pulled(kv, str(size))).all() and (strided == out).all()
        assert out[0] != 1
        kv.pushpull(str(size), values)
        assert (values[0] == pulled(kv, str(size))).all() and (values[1] == values[0]).all()


def test_results_do_not_depend_on_the_number_of_threads():
    random = np.random.default_rng(5)
    gradients = [random.normal(size=(700, 301)).astype(np.float32) for _ in range(3)]
    for name in [*VARIANTS, "sgld"]:
        results = []
        for threads in (1, 2, 4):
            with kvstore.create("local", num_threads=threads) as kv:
                kv.set_optimizer(optimizer.create(name, learning_rate=0.01))
                kv.init("w", np.ones((700, 301), np.float32))
                for _ in range(2):
                    kv.push("w", gradients)
                results.append(pulled(kv, "w").tobytes())
        assert results[0] == results[1] == results[2], name


def test_sgld_draws_what_its_formula_says(kv):
    kv.set_optimizer(optimizer.SGLD(learning_rate=0.04, wd=0.1, rescale_grad=0.5))
    n = 200_000
    kv.init("w", np.full(n, 0.3, np.float64))
    kv.push("w", np.full(n, 0.2, np.float64))
    change = pulled(kv, "w") - 0.3
    assert abs(change.mean() + 0.02 * (0.1 + 0.03)) < 3 * 0.2 / np.sqrt(n)
    assert abs(change.std() / 0.2 - 1) < 0.02
    before = pulled(kv, "w")
    kv.push("w", np.full(n, 0.2, np.float64))
    again = pulled(kv, "w") - before
    assert abs(np.corrcoef(change, again)[0, 1]) < 0.02


def test_counts_are_those_of_each_key_and_the_schedule_sees_the_largest(kv):
    asked = []

    def schedule(num_update):
        asked.append(num_update)
        return 0.5

    kv.set_optimizer(optimizer.SGD(lr_scheduler=schedule))
    kv.init(["a", "b"], [np.zeros(1, np.float32)] * 2)
    for key in ("a", "a", "b", "a", "b"):
        kv.push(key, np.ones(1, np.float32))
    kv.push(["a", "b"], [np.ones(1, np.float32)] * 2)
    assert asked == [1, 2, 2, 3, 3, 4, 4]
    assert pulled(kv, "a")[0] == -2 and pulled(kv, "b")[0] == -1.5


def test_a_schedule_that_raises_changes_nothing(kv):
    kv.init("w", np.ones(2, np.float32))

    def schedule(num_update):
        raise RuntimeError("no rate today")

    kv.set_optimizer(optimizer.SGD(momentum=0.9, lr_scheduler=schedule))
    before = kv._states_export()
    for key, value in (("w", np.ones(2, np.float32)), (["w"], [np.ones(2, np.float32)])):
        with pytest.raises(RuntimeError, match="no rate today"):
            kv.push(key, value)
    assert kv._states_export() == before
    assert pulled(kv, "w").tolist() == [1, 1]


@pytest.mark.parametrize("rate", [float("nan"), float("inf"), "fast", None])
def test_a_schedule_that_gives_no_rate_is_refused(kv, rate):
    kv.init("w", np.ones(2, np.float32))
    kv.set_optimizer(optimizer.SGD(lr_scheduler=lambda num_update: rate))
    with refused(kv, kvstore.InvalidArgumentError, "schedule"):
        kv.push("w", np.ones(2, np.float32))


def test_integers_cannot_be_updated(kv):
    kv.init("n", np.ones(2, np.int32))
    kv.set_optimizer(optimizer.SGD())
    kv.init(["m", "w"], [np.ones(2, np.int64), np.ones(2, np.float32)])
    with refused(kv, kvstore.ArrayTypeError, "'n'", "int32", "floating"):
        kv.push("n", np.ones(2, np.int32))
    with refused(kv, kvstore.ArrayTypeError, "'m'", "int64", "floating"):
        kv.push(["w", "m", "n"], [np.ones(2, t) for t in (np.float32, np.int64, np.int32)])


def test_group_adagrad_needs_rows(kv):
    kv.init("v", np.ones(2, np.float32))
    kv.set_optimizer(optimizer.GroupAdaGrad())
    with refused(kv, kvstore.InvalidArgumentError, "'v'", r"\(2,\)", "two dimensions"):
        kv.push("v", np.ones(2, np.float32))


def test_the_same_class_again_keeps_the_state_and_another_begins_anew(kv):
    one = np.ones(1, np.float32)
    kv.init("w", np.zeros(1, np.float32))
    kv.set_optimizer(optimizer.SGD(learning_rate=1.0, momentum=0.5))
    kv.push("w", one)
    kv.set_optimizer(optimizer.SGD(learning_rate=1.0, momentum=0.5))
    kv.push("w", one)
    assert pulled(kv, "w")[0] == -2.5
    kv.set_optimizer(optimizer.NAG(learning_rate=1.0))
    kv.set_optimizer(optimizer.SGD(learning_rate=1.0, momentum=0.5))
    kv.push("w", one)
    assert pulled(kv, "w")[0] == -3.5
    kv.set_updater(None)
    kv.push("w", one)
    assert pulled(kv, "w")[0] == 1


def test_momentum_may_be_switched_on_while_training(kv):
    one = np.ones(1, np.float32)
    kv.init("w", np.zeros(1, np.float32))
    kv.set_optimizer(optimizer.SGD(learning_rate=1.0))
    kv.push("w", one)
    kv.set_optimizer_params(momentum=0.5)
    kv.push("w", one)
    kv.push("w", one)
    assert pulled(kv, "w")[0] == -3.5


def test_a_float32_copy_goes_when_multi_precision_is_switched_off(kv):
    small = np.full(1, 2**-13, np.float16)
    kv.init("w", np.ones(1, np.float16))

    def steps(multi_precision):
        kv.set_optimizer(optimizer.SGD(learning_rate=1.0, multi_precision=multi_precision))
        for _ in range(4):
            kv.push("w", small)
        return pulled(kv, "w")[0]

    assert steps(True) == 1 - 4 * 2**-13
    before = pulled(kv, "w")[0]
    assert steps(False) == before  # each step is less than half a unit of the weight
    assert [k[3].keys() for k in kv._states_export()["keys"]] == [{}.keys()]


def test_ndarrays_and_lists_of_keys_are_updated_too(kv):
    kv.set_optimizer(optimizer.SGD(learning_rate=0.5))
    keys = [f"k{i}" for i in range(50)]
    kv.init(keys, [np.zeros(3, np.float32)] * 50)
    kv.push(keys, [kvstore.ones(3)] * 50)
    kv.push(keys, [[np.ones(3, np.float32)] * 2] * 50)
    handle = kv.push(keys, [np.ones(3, np.float32)] * 50, async_op=True)
    handle.wait()
    assert all((pulled(kv, key) == -2).all() for key in keys)


def test_deleting_a_key_forgets_its_state(kv):
    kv.set_optimizer(optimizer.SGD(learning_rate=1.0, momentum=0.5))
    for _ in range(2):
        kv.init("w", np.zeros(1, np.float32))
        kv.push("w", np.ones(1, np.float32))
        assert pulled(kv, "w")[0] == -1
        kv.delete("w")


def test_signatures_are_those_of_the_core():
    for name, entry in _core.optimizer_classes().items():
        signature = inspect.signature(getattr(optimizer, entry["title"]))
        for param, _, fallback, *_ in entry["params"]:
            assert signature.parameters[param].default == fallback, (name, param)


def test_a_text_key_that_ends_in_bias_takes_the_rate_of_lars_itself(kv):
    kv.set_optimizer(optimizer.LARS(learning_rate=0.5, eta=0.001))
    for key, moved in (("fc_bias", 0.5), ("bn_gamma", 0.5), ("bn_beta", 0.5), ("fc", 0.0005)):
        kv.init(key, np.ones(4, np.float32))
        kv.push(key, np.ones(4, np.float32))
        assert pulled(kv, key) == pytest.approx(1 - moved, rel=1e-6)


class Counting(optimizer.Optimizer):
    """Adds up its own state, so that a state that lives too long shows."""

    def create_state(self, key, weight):
        return np.zeros_like(weight)

    def update(self, key, weight, grad, state):
        state += grad
        weight[...] = state


def test_deleting_a_key_forgets_what_an_optimizer_in_python_keeps(kv):
    kv.set_optimizer(Counting())
    for _ in range(2):
        kv.init(["v", "w"], [np.zeros(2, np.float32)] * 2)
        for _ in range(3):
            kv.push("w", np.ones(2, np.float32))
        assert pulled(kv, "w").tolist() == [3, 3]
        kv.delete(["v", "w"])
