"""kvstore.array, zeros, ones, empty, full: new NDArrays from numbers and from other arrays."""

import array
import ctypes
import itertools

import ml_dtypes
import numpy as np
import pytest
from helpers import Worker, assert_clean, held, run_script, same

import kvstore
from kvstore import _core

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
DTYPES = ["float64", "float32", "float16", "bfloat16", "int8", "uint8", "int32", "int64"]
SHAPES = [(), (0,), (3,), (2, 3), (2, 0, 3), (4, 3, 2)]
BIG = 200_000  # elements: more than a call copies with the GIL


def numpy_dtype(name):
    return BFLOAT16 if name == "bfloat16" else np.dtype(name)


def numbers(shape, dtype):
    return np.arange(np.prod(shape, dtype=int)).reshape(shape).astype(numpy_dtype(dtype))


# ----------------------------------------------------------------------------- zeros, ones, full


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_arrays_of_one_value(shape, dtype):
    expected = np.empty(shape, numpy_dtype(dtype))
    for made, value in (
        (kvstore.zeros(shape, dtype), 0),
        (kvstore.ones(shape, dtype), 1),
        (kvstore.full(shape, 3, dtype), 3),
        (kvstore.full(shape, np.int64(7), dtype=numpy_dtype(dtype)), 7),
    ):
        expected.fill(value)
        assert same(made.asnumpy(), expected)
    made = kvstore.empty(shape, dtype)
    assert (made.shape, made.dtype) == (expected.shape, expected.dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_large_arrays_of_one_value(dtype):
    for count in (16_383, 16_385, BIG + 1):
        assert (kvstore.full(count, 5, dtype).asnumpy() == 5).all()


def test_float32_is_the_default():
    for a in (kvstore.zeros(1), kvstore.ones(1), kvstore.empty(1), kvstore.full(1, 2)):
        assert a.dtype == np.float32
    assert kvstore.zeros(1, None).dtype == np.float32
    assert kvstore.full(1, 2, None).dtype == np.float32


@pytest.mark.parametrize(
    "shape", [3, np.int32(3), (3,), [3], (np.int64(3),), np.array(3)], ids=repr
)
def test_a_shape_is_an_integer_or_several(shape):
    assert kvstore.zeros(shape).shape == (3,)


def test_an_array_has_up_to_64_dimensions():
    assert kvstore.zeros((1,) * 64).ndim == 64
    with pytest.raises(kvstore.InvalidArgumentError, match="64 dimensions, not 65"):
        kvstore.zeros((1,) * 65)


@pytest.mark.parametrize(
    "shape", [-1, (2, -1), 2**63, -(2**70), (2**40, 2**40), (2**62, 2), (0, 2**62, 2**62)]
)
def test_a_shape_that_cannot_be_is_invalid(shape):
    for make in (kvstore.zeros, kvstore.empty, kvstore.ones):
        with pytest.raises(kvstore.InvalidArgumentError):
            make(shape)
    with pytest.raises(kvstore.InvalidArgumentError):
        kvstore.full(shape, 1)


@pytest.mark.parametrize(
    "shape", [2.0, "3", None, (2.0,), ("3",), {3}, (2, None), np.array([2, 3])]
)
def test_a_shape_that_is_none_is_a_type_error(shape):
    with pytest.raises(kvstore.ArrayTypeError, match="shape"):
        kvstore.zeros(shape)


def test_an_exception_of_an_extent_comes_out():
    class Bad:
        def __index__(self):
            raise ZeroDivisionError("mine")

    with pytest.raises(ZeroDivisionError, match="mine"):
        kvstore.zeros((1, Bad()))


def test_a_shape_that_changes_while_it_is_read():
    class Shrinks:
        def __index__(self):
            shape.clear()
            return 2

    shape = [Shrinks(), 3]
    assert kvstore.zeros(shape).shape == (2, 3)


def test_too_little_memory_is_a_memory_error():
    for make in (kvstore.zeros, kvstore.empty, kvstore.ones):
        with pytest.raises(MemoryError):
            make(2**56, "float64")


@pytest.mark.parametrize("dtype", ["complex64", "float31", np.dtype(">f4"), "bool", 3, "O"])
def test_a_foreign_element_type_is_a_type_error(dtype):
    with pytest.raises(kvstore.ArrayTypeError, match="element type"):
        kvstore.zeros(2, dtype)
    with pytest.raises(kvstore.ArrayTypeError, match="element type"):
        kvstore.array([1, 2], dtype)


@pytest.mark.parametrize(
    "value, dtype, error",
    [
        ("x", "float32", kvstore.InvalidArgumentError),
        ("x", "bfloat16", kvstore.ArrayTypeError),
        (300, "uint8", kvstore.InvalidArgumentError),
        ([1, 2], "float32", kvstore.InvalidArgumentError),
        (10**400, "bfloat16", kvstore.InvalidArgumentError),
        (None, "int8", kvstore.ArrayTypeError),
    ],
)
def test_a_value_that_is_no_element_keeps_the_cause(value, dtype, error):
    with pytest.raises(error) as info:
        kvstore.full(2, value, dtype)
    assert isinstance(info.value.__cause__, (TypeError, ValueError, OverflowError))


@pytest.mark.parametrize("value", [0.1, -0.0, float("nan"), float("inf"), -1e30, 1e-40, 1 + 2**-9])
@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16"])
def test_full_rounds_as_numpy_does(value, dtype):
    made = kvstore.full(1, value, dtype).asnumpy()
    expected = np.full(1, value, numpy_dtype(dtype))
    assert made.dtype == expected.dtype
    assert (np.isnan(value) and np.isnan(made[0])) or made.tobytes() == expected.tobytes()


@pytest.mark.parametrize(
    "call", [kvstore.zeros, kvstore.full, lambda: kvstore.full(1), lambda: kvstore.zeros(1, x=1)]
)
def test_wrong_arguments_are_type_errors(call):
    with pytest.raises(TypeError):
        call()


# --------------------------------------------------------------------------------------- array()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_array_copies_an_array(shape, dtype):
    source = numbers(shape, dtype)
    expected = source.copy()
    made = kvstore.array(source)
    if source.size:
        source[...] = 0
    assert same(made.asnumpy(), expected)
    again = kvstore.array(made)
    assert same(again, expected)
    assert not np.shares_memory(again.asnumpy(), made.asnumpy())


def test_array_copies_what_is_strided_and_large():
    source = np.arange(2 * BIG, dtype=np.float64).reshape(2, BIG)
    for view in (source, source.T, source[:, ::2], source[::-1], np.asfortranarray(source)):
        assert same(kvstore.array(view), view)


@pytest.mark.parametrize(
    "source",
    [
        array.array("d", [1, 2, 3]),
        bytearray(b"abc"),
        memoryview(np.arange(6).reshape(2, 3))[::2],
        (ctypes.c_int * 3)(1, 2, 3),
    ],
    ids=lambda source: type(source).__name__,
)
def test_array_takes_what_has_a_buffer(source):
    assert same(kvstore.array(source), np.asarray(source))


@pytest.mark.parametrize("source", [[1, 2], [[1.5, 2], [3, 4]], (1, 2), 3, 2.5, [], [np.ones(2)]])
def test_array_takes_lists_of_numbers_as_numpy_does(source):
    assert same(kvstore.array(source), np.asarray(source))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("from_dtype", DTYPES)
def test_array_converts_as_numpy_does(from_dtype, dtype):
    source = numbers((2, 3), from_dtype)
    expected = source.astype(numpy_dtype(dtype))
    for form in (source, np.asfortranarray(source), kvstore.array(source)):
        made = kvstore.array(form, dtype)
        assert same(made, expected)
    assert same(kvstore.array(source.tolist(), dtype=numpy_dtype(dtype)), expected)


def test_array_converts_what_a_store_cannot_hold():
    assert same(kvstore.array(np.array([True, False]), "int8"), np.array([1, 0], "int8"))
    assert same(kvstore.array(np.array([1, 2], ">f4"), "float32"), np.array([1, 2], "float32"))
    assert same(kvstore.array([True], "float64"), np.ones(1))


@pytest.mark.parametrize(
    "source", [[True], np.array([True]), np.array([1], ">i4"), [1j], ["x"], [{}]]
)
def test_array_names_the_type_that_it_cannot_hold(source):
    with pytest.raises(kvstore.ArrayTypeError, match=f"{np.asarray(source).dtype}.*dtype="):
        kvstore.array(source)


@pytest.mark.parametrize("source", [None, "abc", object(), {1: 2}, np.ma.zeros(2), np.float32(1)])
def test_array_refuses_what_is_no_array(source):
    with pytest.raises(kvstore.ArrayTypeError):
        kvstore.array(source)
    with pytest.raises(kvstore.ArrayTypeError):
        kvstore.array(source, "float32")


@pytest.mark.parametrize("source", [[[1], [2, 3]], np.array(["x"]), ["x", 1]])
def test_array_keeps_the_cause_of_what_cannot_be_converted(source):
    with pytest.raises(kvstore.InvalidArgumentError) as info:
        kvstore.array(source, "float32")
    assert isinstance(info.value.__cause__, ValueError)


def test_array_of_an_ndarray_waits_for_its_writes(kv):
    kv.init("w", kvstore.zeros(3))
    out = kvstore.zeros(3)
    with held(kv, "w") as release:
        kv.push("w", kvstore.full(3, 4))
        kv.pull("w", out=out)
        copier = Worker(kvstore.array, out)
        copier.wait_in_call(Worker.run)
        release.set()
        assert copier.result().asnumpy().tolist() == [4, 4, 4]


def test_without_ml_dtypes_bfloat16_works_but_as_a_numpy_array():
    assert_clean(
        run_script(
            """
import sys
sys.modules["ml_dtypes"] = None
import numpy as np, kvstore
a = kvstore.full((2, 2), 1 + 2**-9, "bfloat16")
assert a.dtype == "bfloat16" and a.itemsize == 2
assert repr(a) == ("kvstore.NDArray([[1., 1.],\\n                 [1., 1.]], "
                   "shape=(2, 2), dtype=bfloat16, device=cpu)"), repr(a)
for call in (a.asnumpy, a.__array__, lambda: np.asarray(a)):
    try:
        call()
    except kvstore.NotBuiltError as error:
        assert "ml_dtypes" in str(error)
    else:
        raise AssertionError(call)
assert np.asarray(a, np.float64).tolist() == [[1, 1], [1, 1]]
assert a.__array__("float32").dtype == np.float32
b = kvstore.array([1.5, 2.5], "bfloat16")
assert kvstore.array(b, "int8").asnumpy().tolist() == [1, 2]
kv = kvstore.create("local")
kv.init("w", b)
kv.push("w", [b, b])
assert kvstore.array(kv.pull("w"), "float32").asnumpy().tolist() == [3, 5]
"""
        )
    )


MAKES = {
    "zeros": lambda: kvstore.zeros((2, 3)),
    "full": lambda: kvstore.full(3, 2, "bfloat16"),
    "array": lambda: kvstore.array(np.arange(12.0).reshape(3, 4).T),
    "list": lambda: kvstore.array([1, 2, 3], "bfloat16"),
    "converted": lambda: kvstore.array(kvstore.ones(3, "bfloat16"), "int64"),
    "foreign": lambda: kvstore.array(np.array([True, False]), "float32"),
    "buffer": lambda: kvstore.array(array.array("d", [1, 2])),
    "views": lambda: [view(kvstore.ones(3)) for view in (np.asarray, memoryview, np.from_dlpack)],
    "copies": lambda: np.from_dlpack(kvstore.ones(3), copy=True),
}


@pytest.mark.parametrize("make", MAKES.values(), ids=MAKES)
def test_any_allocation_may_fail(make):
    make()
    for nth in itertools.count(1):
        assert nth < 50
        _core.fault_set("alloc", nth)
        try:
            made = make()
        except MemoryError:
            continue
        finally:
            _core.fault_set("alloc", 0)
        break
    assert nth > 1
    del made
