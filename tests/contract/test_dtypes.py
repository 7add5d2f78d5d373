"""Element types: what is stored, how it is summed."""

import numpy as np
import pytest
from helpers import pulled, refused, same
from model import DTYPES, HALF, total

import kvstore

BFLOAT16 = next(d for d in DTYPES if d.name == "bfloat16")
INTEGERS = [d for d in DTYPES if d.kind in "iu"]


def by_name(dtype):
    return dtype.name


every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=by_name)


def random(dtype, count, rng):
    """Values over the whole range of an integer type; of a float type with many exponents."""
    if dtype.kind in "iu":
        limits = np.iinfo(dtype)
        return rng.integers(limits.min, limits.max, count, dtype, endpoint=True)
    return (rng.standard_normal(count) * np.exp2(rng.integers(-8, 8, count))).astype(dtype)


@every_dtype
def test_every_element_type_comes_back_as_it_was(kv, dtype):
    value = random(dtype, 1000, np.random.default_rng(1))
    kv.init("w", value)
    assert np.dtype(kv.dtype("w")) == dtype
    assert same(pulled(kv, "w"), value)
    assert same(kv.pull("w").asnumpy(), value)


@every_dtype
@pytest.mark.parametrize("number", [1, 2, 3, 5, 9])
@pytest.mark.parametrize("count", [1, 15, 67, 5000])
def test_sums_run_left_to_right_and_16_bit_floats_are_rounded_once(kv, dtype, number, count):
    rng = np.random.default_rng(number * count)
    values = [random(dtype, count, rng) for _ in range(number)]
    kv.init("w", np.zeros(count, dtype))
    kv.push("w", values)
    assert same(pulled(kv, "w"), total(values))


@pytest.mark.parametrize("dtype", INTEGERS, ids=by_name)
def test_integers_wrap(kv, dtype):
    limits = np.iinfo(dtype)
    kv.init("w", np.zeros(2, dtype))
    kv.push("w", [np.array([limits.max, limits.min], dtype), np.array([2, limits.max], dtype)])
    wrapped = [limits.min + 1, limits.max if limits.min == 0 else -1]
    assert pulled(kv, "w").tolist() == wrapped


def test_int64_is_exact_above_2_to_the_53(kv):
    kv.init("w", np.zeros(1, np.int64))
    kv.push("w", [np.array([2**53]), np.array([1]), np.array([2**62])])
    assert pulled(kv, "w").tolist() == [2**53 + 1 + 2**62]


def test_float16_is_summed_in_float32(kv):
    kv.init("w", np.zeros(1, np.float16))
    kv.push("w", [np.array([x], np.float16) for x in (2048, 1, 1, 1)])
    assert pulled(kv, "w").tolist() == [2052]
    kv.push("w", [np.array([x], np.float16) for x in (60000, 60000, -60000)])
    assert pulled(kv, "w").tolist() == [60000]


def test_bfloat16_is_summed_in_float32(kv):
    kv.init("w", np.zeros(1, BFLOAT16))
    kv.push("w", [np.array([x], BFLOAT16) for x in (256, 1, 1)])
    assert pulled(kv, "w").astype(float).tolist() == [258]


def test_float32_is_summed_left_to_right_not_in_groups(kv):
    kv.init("w", np.zeros(1, np.float32))
    kv.push("w", [np.array([x], np.float32) for x in (1e8, 3, 3)])
    assert pulled(kv, "w").tolist() == [np.float32(1e8) + np.float32(3) + np.float32(3)]


@pytest.mark.parametrize("dtype", [d for d in DTYPES if d.kind not in "iu"], ids=by_name)
def test_special_numbers_travel_unchanged(kv, dtype):
    value = np.array([np.inf, -np.inf, np.nan, -0.0, 0.0, 1e-7], dtype)
    kv.init("w", np.zeros(6, dtype))
    kv.push("w", value)
    assert same(pulled(kv, "w"), value)
    kv.push("w", [value, value])
    result = pulled(kv, "w").astype(np.float64)
    assert result[:2].tolist() == [np.inf, -np.inf]
    assert np.isnan(result[2])
    assert np.signbit(result[3])
    assert not np.signbit(result[4])


@pytest.mark.parametrize("dtype", sorted(HALF, key=str), ids=by_name)
def test_every_16_bit_pattern_is_widened_and_rounded_as_numpy_does(kv, dtype):
    every = np.arange(2**16, dtype=np.uint16).view(dtype)
    finite = every[np.isfinite(every.astype(np.float32))]
    kv.init("w", np.zeros(finite.shape, dtype))
    for other in (finite[::-1].copy(), np.full(finite.shape, 0.0625, dtype)):
        kv.push("w", [finite, other])
        assert same(pulled(kv, "w"), total([finite, other]))


@every_dtype
@pytest.mark.parametrize("shape", [(), (0,), (3, 0, 2), (1,), (1, 1, 1), (2, 3, 4), (1,) * 20])
def test_zero_dimensional_empty_and_deep_arrays_work(kv, dtype, shape):
    value = np.ones(shape, dtype)
    out = np.zeros(shape, dtype)
    kv.init("w", np.zeros(shape, dtype))
    assert kv.shape("w") == shape
    kv.push("w", [value, value])
    kv.pull("w", out=out)
    assert same(out, total([value, value]))
    kv.pushpull("w", [value, value, value], out=out)
    assert same(out, total([value, value, value]))
    new = kv.pull("w")
    assert new.shape == shape
    assert same(new.asnumpy(), out)
    kv.broadcast("v", value, out)
    assert same(out, value)


@pytest.mark.one_process
@every_dtype
def test_an_updater_sees_every_element_type(kv, dtype):
    kv.init("w", np.full(5, 3, dtype))
    seen = []

    def updater(key, recv, stored):
        seen.append((recv.dtype, stored.dtype))
        stored += recv

    kv.set_updater(updater)
    kv.push("w", [np.ones(5, dtype), np.ones(5, dtype)])
    assert seen == [(dtype, dtype)]
    assert same(pulled(kv, "w"), np.full(5, 5, dtype))


@every_dtype
def test_ndarrays_of_every_element_type_are_pushed_and_pulled(kv, dtype):
    kv.init("w", kvstore.array(np.full(4, 2, dtype)))
    out = kvstore.zeros(4, dtype)
    kv.push("w", [kvstore.ones((4,), dtype), kvstore.full((4,), 2, dtype)])
    kv.pull("w", out=out)
    assert same(out.asnumpy(), np.full(4, 3, dtype))


@every_dtype
def test_no_element_type_is_cast_to_another(kv, dtype):
    kv.init("w", np.zeros(3, dtype))
    for other in DTYPES:
        if other == dtype:
            continue
        with refused(kv, kvstore.ArrayTypeError, "'w'", dtype.name, other.name):
            kv.push("w", np.ones(3, other))
        with refused(kv, kvstore.ArrayTypeError, "'w'", dtype.name, other.name):
            kv.pull("w", out=np.ones(3, other))


FOREIGN = {
    "uint16": np.ones(3, np.uint16),
    "int16": np.ones(3, np.int16),
    "uint32": np.ones(3, np.uint32),
    "uint64": np.ones(3, np.uint64),
    "bool": np.ones(3, bool),
    "complex64": np.ones(3, np.complex64),
    "complex128": np.ones(3, np.complex128),
    "longdouble|float128": np.ones(3, np.longdouble),
    "str|<U1": np.array(["a", "b", "c"]),
    "bytes|S1": np.array([b"a", b"b", b"c"]),
    "datetime64": np.zeros(3, "M8[s]"),
    "timedelta64": np.zeros(3, "m8[s]"),
    r"void|\[\(": np.zeros(3, [("a", "f4"), ("b", "i4")]),
    "object": np.array([1, 2, 3], object),
}


@pytest.mark.parametrize("name", FOREIGN)
def test_an_element_type_that_no_store_holds_is_refused_by_name(kv, name):
    kv.init("w", np.zeros(3))
    with refused(kv, kvstore.ArrayTypeError, "'w'", name):
        kv.push("w", FOREIGN[name])
    with refused(kv, kvstore.ArrayTypeError, "'w'", name):
        kv.pull("w", out=FOREIGN[name].copy())
    with refused(kv, kvstore.ArrayTypeError, "'v'", name):
        kv.init("v", FOREIGN[name])
    assert "v" not in kv


@pytest.mark.parametrize("dtype", [d for d in DTYPES if d.itemsize > 1], ids=by_name)
def test_the_other_byte_order_is_refused(kv, dtype):
    if dtype == BFLOAT16:
        swapped = np.ones(3, np.float32).astype(">f4")
        kv.init("w", np.zeros(3, np.float32))
    else:
        swapped = np.ones(3, dtype.newbyteorder())
        kv.init("w", np.zeros(3, dtype))
    with refused(kv, kvstore.ArrayTypeError, "'w'", "byte|>|big"):
        kv.push("w", swapped)
    with refused(kv, kvstore.ArrayTypeError, "'w'", "byte|>|big"):
        kv.pull("w", out=swapped)
    with refused(kv, kvstore.ArrayTypeError, "'v'", "byte|>|big"):
        kv.init("v", swapped)
