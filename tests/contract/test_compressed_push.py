"""Compressed pushes: whose residual it is, how long it lives, and what travels as it is."""

import itertools
import warnings

import ml_dtypes
import numpy as np
import pytest
from helpers import pulled, refused

import kvstore
from kvstore import compression, optimizer

TWO = {"type": "2bit", "threshold": 0.5}
ONE = {"type": "1bit", "threshold": 0.5}
FLOATS = [np.float64, np.float32, np.float16, ml_dtypes.bfloat16]


class Position:
    """What one position of a value list sends, by way of the public codec."""

    def __init__(self, shape, dtype, params):
        wide = np.float64 if dtype == np.float64 else np.float32
        self.residual, self.params = np.zeros(shape, wide), params

    def send(self, gradient):
        codes = compression.encode(gradient, self.residual, self.params)
        wide = self.residual.dtype.name
        return compression.decode(codes, gradient.shape, self.params, dtype=wide)


@pytest.mark.parametrize("dtype", FLOATS, ids=lambda t: t.__name__)
@pytest.mark.parametrize("params", [TWO, ONE], ids=["2bit", "1bit"])
@pytest.mark.parametrize("size", [1, 33, 1000, 300_001])
def test_each_position_of_the_list_has_a_residual_of_its_own(kv, size, params, dtype):
    kv.set_gradient_compression(params)
    kv.init("w", np.zeros(size, dtype))
    random = np.random.default_rng(size)
    positions = [Position(size, dtype, params) for _ in range(3)]
    for count in (3, 1, 2, 3):  # a shorter list leaves the other residuals alone
        values = [random.normal(size=size).astype(dtype) for _ in range(count)]
        kv.push("w", values if count > 1 else values[0])
        sent = [p.send(v) for p, v in zip(positions, values, strict=False)]
        assert (pulled(kv, "w") == sum(sent).astype(dtype)).all()


def test_compressed_values_go_to_the_optimizer_and_to_updaters(kv):
    kv.set_gradient_compression(TWO)
    value = np.array([0.7, -0.8, 0.1], np.float32)
    kv.init("w", np.zeros(3, np.float32))
    kv.set_optimizer(optimizer.SGD(learning_rate=2.0))
    kv.push("w", [value, value])
    assert pulled(kv, "w").tolist() == [-2, 2, 0]
    seen = []
    kv.set_updater(lambda key, recv, stored: seen.append(recv.tolist()))
    kv.push("w", [value, value])
    assert seen == [[1, -1, 0]]


def test_pushpull_is_compressed_on_its_way_in_only(kv):
    kv.set_gradient_compression(TWO)
    kv.init("w", np.full(2, 7, np.float32))
    out = np.empty(2, np.float32)
    kv.pull("w", out=out)
    assert out.tolist() == [7, 7]
    value = np.array([0.6, 0.3], np.float32)
    kv.pushpull("w", value)
    assert value.tolist() == [0.5, 0]


def test_strided_values_and_ndarrays_are_compressed_too(kv):
    kv.set_gradient_compression(TWO)
    kv.init("w", np.zeros((2, 3), np.float32))
    kv.push("w", np.full((3, 2), 0.6, np.float32).T)
    assert (pulled(kv, "w") == 0.5).all()
    kv.push("w", kvstore.full((2, 3), 0.3))
    assert (pulled(kv, "w") == 0).all()
    kv.push("w", kvstore.full((2, 3), 0.3))
    assert (pulled(kv, "w") == 0.5).all()


def test_init_and_integers_and_row_sparse_values_travel_as_they_are(kv):
    kv.set_gradient_compression(TWO)
    kv.init("w", np.full((3, 1), 0.3, np.float32))
    assert (pulled(kv, "w") == np.float32(0.3)).all()
    kv.init("n", np.zeros(2, np.int32))
    kv.push("n", np.array([3, 4], np.int32))
    assert pulled(kv, "n").tolist() == [3, 4]
    kv.push("w", kvstore.RowSparse(np.full((1, 1), 0.25, np.float32), [1], (3, 1)))
    assert pulled(kv, "w")[:, 0].tolist() == [0, 0.25, 0]


def residuals(kv):
    return {(key, position): r.tolist() for key, position, r in kv._states_export()["residuals"]}


def test_residuals_live_as_long_as_the_type_of_the_compression(kv):
    value = np.array([0.7], np.float32)
    kept = pytest.approx(0.2, abs=1e-6)

    def push():
        kv.push("w", value)
        return residuals(kv)

    kv.init("w", np.zeros(1, np.float32))
    kv.set_gradient_compression(TWO)
    assert push() == {("w", 0): [kept]}
    kv.set_gradient_compression({"type": "2bit", "threshold": 2.0})
    assert push() == {("w", 0): [pytest.approx(0.9, abs=1e-6)]}
    kv.set_gradient_compression({"type": "none"})
    assert residuals(kv) == {}
    kv.push("w", value)
    assert pulled(kv, "w").tolist() == value.tolist()
    kv.set_gradient_compression(TWO)
    assert push() == {("w", 0): [kept]}
    kv.set_gradient_compression(ONE)
    assert push() == {("w", 0): [pytest.approx(-0.3, abs=1e-6)]}
    kv.delete("w")
    kv.init("w", np.zeros(1, np.float32))
    assert residuals(kv) == {}


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_is_warned_of_once_a_key(kv, bad):
    kv.set_gradient_compression(TWO)
    kv.init(["a", "b"], [np.zeros(3, np.float32)] * 2)
    value = np.array([0.7, bad, 0], np.float32)
    for key, first in itertools.product("ab", [True, False]):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            kv.push(key, value)
        assert len(caught) == first
        if first:
            assert f"'{key}'" in str(caught[0].message)
            assert caught[0].filename == __file__
    assert pulled(kv, "a")[1] == (0 if np.isnan(bad) else np.copysign(0.5, bad))


@pytest.mark.parametrize(
    ("params", "error", "pattern"),
    [
        ({"type": "3bit"}, kvstore.InvalidArgumentError, "3bit"),
        ({"type": "2bit", "treshold": 1}, kvstore.InvalidArgumentError, "treshold.*threshold"),
        ({"type": "2bit", "threshold": 0}, kvstore.InvalidArgumentError, "threshold.*0"),
        ({"type": "2bit", "threshold": -1.0}, kvstore.InvalidArgumentError, "threshold.*-1"),
        ({"type": "2bit", "threshold": float("nan")}, kvstore.InvalidArgumentError, "nan"),
        ({"type": "1bit", "threshold": float("inf")}, kvstore.InvalidArgumentError, "inf"),
        ({"type": "2bit", "threshold": 1e-60}, kvstore.InvalidArgumentError, "1e-60"),
        ({"type": "2bit", "threshold": "0.5"}, kvstore.ArrayTypeError, "threshold"),
        ({"threshold": 0.5}, kvstore.InvalidArgumentError, "type"),
        ("2bit", kvstore.ArrayTypeError, "dict"),
        (None, kvstore.ArrayTypeError, "dict"),
    ],
    ids=str,
)
def test_bad_parameters_change_nothing(kv, params, error, pattern):
    kv.init("w", np.zeros(2, np.float32))
    kv.set_gradient_compression(TWO)
    kv.push("w", np.array([0.7, 0.1], np.float32))
    before = residuals(kv)
    with refused(kv, error, pattern):
        kv.set_gradient_compression(params)
    assert residuals(kv) == before
    kv.push("w", np.array([0.4, 0.1], np.float32))
    assert pulled(kv, "w").tolist() == [0.5, 0]
