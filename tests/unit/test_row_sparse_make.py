"""RowSparse: how one is made, of what, and what is refused."""

import gc
import sys
import weakref

import ml_dtypes
import numpy as np
import pytest
from helpers import has_rows, held, same, sparse

import kvstore
from kvstore import RowSparse, _core

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
DTYPES = ["float64", "float32", "float16", "bfloat16", "int8", "uint8", "int32", "int64"]
SHAPES = [(9,), (9, 3), (9, 2, 2), (9, 0), (9, 0, 3)]
SHAPE = (6, 2)
BIG = (40_000, 4)  # more than a call copies with the GIL
BAD, TYPE = kvstore.InvalidArgumentError, kvstore.ArrayTypeError


def numpy_dtype(name):
    return BFLOAT16 if name == "bfloat16" else np.dtype(name)


def numbers(shape, dtype):
    """No row of it is zero."""
    count = np.arange(np.prod(shape, dtype=int)).reshape(shape)
    return (count % 100 + 1).astype(numpy_dtype(dtype))


def dense(data, indices, shape):
    whole = np.zeros(shape, np.asarray(data).dtype)
    whole[indices] = data
    return whole


def ones(*ids):
    return sparse(dict.fromkeys(ids, 1))


@pytest.fixture
def s(kv):
    kv.init("s", sparse({1: 10, 4: 40}))
    return kv


# ---------------------------------------------------------------------------- data and indices


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("copies", [True, False])
def test_an_array_has_the_rows_that_it_was_made_of(shape, dtype, copies):
    for ids in ([], [0], [8], [0, 3, 8], list(range(9))):
        data = numbers((len(ids), *shape[1:]), dtype)
        x = RowSparse(data, np.array(ids, np.int64), shape, copy=copies)
        assert same(x.data, data)
        assert same(x.indices, np.array(ids, np.int64))
        assert same(x.asnumpy(), dense(data, np.array(ids, np.int64), shape))
        assert same(x.todense(), x.asnumpy()) and same(np.asarray(x), x.asnumpy())
        assert x.num_rows == len(ids) and x.shape == shape


INDICES = {
    **{kind: np.array([0, 2, 5], kind) for kind in ("i1", "i2", "i4", "i8", "u1", "u2", "u4")},
    "uint64": np.array([0, 2, 5], np.uint64),
    "big-endian": np.array([0, 2, 5], ">i8"),
    "strided": np.array([0, 9, 2, 9, 5, 9])[::2],
    "strided int32": np.array([0, 9, 2, 9, 5, 9], np.int32)[::2],
    "backwards": np.array([5, 2, 0], np.int16)[::-1],
    "not aligned": np.frombuffer(b"." + np.array([0, 2, 5]).tobytes(), np.int64, offset=1),
    "read-only": np.frombuffer(np.array([0, 2, 5]).tobytes(), np.int64),
    "list": [0, 2, 5],
    "tuple": (0, 2, 5),
    "NDArray": kvstore.array([0, 2, 5]),
    "NDArray of int8": kvstore.array([0, 2, 5], "int8"),
    "memoryview": memoryview(np.array([0, 2, 5])),
}


@pytest.mark.parametrize("indices", INDICES.values(), ids=INDICES)
def test_indices_are_integers_of_any_kind(indices):
    x = RowSparse(np.ones((3, 2)), indices, SHAPE)
    assert x.indices.dtype == np.int64 and x.indices.tolist() == [0, 2, 5]


DATA = {
    "transposed": np.arange(6.0).reshape(2, 3).T,
    "every second": np.arange(12.0).reshape(3, 4)[:, ::2],
    "backwards": np.arange(6.0).reshape(3, 2)[::-1],
    "broadcast": np.broadcast_to(7.0, (3, 2)),
    "not aligned": np.frombuffer(b"." + np.arange(6.0).tobytes(), offset=1).reshape(3, 2),
    "read-only": np.frombuffer(np.arange(6.0).tobytes()).reshape(3, 2),
    "NDArray": kvstore.array(np.arange(6.0).reshape(3, 2)),
    "memoryview": memoryview(np.arange(6.0).reshape(3, 2)),
    "bfloat16": kvstore.ones((3, 2), "bfloat16"),
}


@pytest.mark.parametrize("data", DATA.values(), ids=DATA)
def test_data_is_any_array(data):
    x = RowSparse(data, [0, 2, 5], SHAPE)
    assert same(x.data, np.asarray(data))
    assert x.data.flags.c_contiguous and x.data.flags.writeable


def test_large_arrays_are_copied_whole():
    ids = np.arange(0, BIG[0], 2)
    for data in (numbers((len(ids), 4), "float32"), numbers((4, len(ids)), "float64").T):
        x = RowSparse(data, ids[::-1][::-1].astype(np.int32), BIG)
        assert same(x.data, data) and same(x.indices, ids)
        assert same(x.asnumpy(), dense(data, ids, BIG))
        assert same(x.copy().data, data) and same(x.copy().indices, ids)
        back = RowSparse.from_dense(x.asnumpy())
        assert same(back.data, data) and same(back.indices, ids)


def test_the_callers_arrays_are_copied():
    data, ids = np.ones((2, 2)), np.array([0, 3])
    counts = sys.getrefcount(data), sys.getrefcount(ids)
    x = RowSparse(data, ids, SHAPE)
    assert (sys.getrefcount(data), sys.getrefcount(ids)) == counts
    data[:], ids[:] = 9, 1
    assert has_rows(x, {0: 1, 3: 1})


WRONG = {
    "unordered": (lambda: RowSparse(np.ones((2, 2)), [3, 1], SHAPE), BAD, ["id 1", "position 1"]),
    "twice": (lambda: RowSparse(np.ones((2, 2)), [3, 3], SHAPE), BAD, ["id 3", "position 1"]),
    "too large": (lambda: RowSparse(np.ones((2, 2)), [3, 6], SHAPE), BAD, [r"\b6\b", "6 rows"]),
    "negative": (lambda: RowSparse(np.ones((2, 2)), [-1, 3], SHAPE), BAD, ["id -1", "position 0"]),
    "uint64": (
        lambda: RowSparse(np.ones((1, 2)), np.array([2**63], np.uint64), SHAPE),
        BAD,
        ["indices", str(2**63), "position 0"],
    ),
    "beyond 64 bits": (lambda: RowSparse(np.ones((1, 2)), [2**64], SHAPE), TYPE, ["indices"]),
    "floats": (lambda: RowSparse(np.ones((1, 2)), [1.0], SHAPE), TYPE, ["indices", "float64"]),
    "no floats": (
        lambda: RowSparse(np.ones((0, 2)), np.array([], "f4"), SHAPE),
        TYPE,
        ["float32"],
    ),
    "bools": (lambda: RowSparse(np.ones((1, 2)), [True], SHAPE), TYPE, ["indices", "bool"]),
    "objects": (
        lambda: RowSparse(np.ones((1, 2)), np.array([1], object), SHAPE),
        TYPE,
        ["indices", "object"],
    ),
    "no indices": (lambda: RowSparse(np.ones((1, 2)), None, SHAPE), TYPE, ["indices", "None"]),
    "text": (lambda: RowSparse(np.ones((1, 2)), "1", SHAPE), TYPE, ["indices", "str"]),
    "bytes": (lambda: RowSparse(np.ones((1, 2)), b"\1", SHAPE), TYPE, ["indices", "bytes"]),
    "a scalar": (lambda: RowSparse(np.ones((1, 2)), np.int64(1), SHAPE), TYPE, ["indices"]),
    "an integer": (lambda: RowSparse(np.ones((1, 2)), 1, SHAPE), TYPE, ["indices", "int"]),
    "ragged": (lambda: RowSparse(np.ones((1, 2)), [1, [2]], SHAPE), BAD, ["indices"]),
    "sparse indices": (
        lambda: RowSparse(np.ones((1, 2)), RowSparse.zeros(1, "int64"), SHAPE),
        TYPE,
        ["indices", "RowSparse"],
    ),
    "2-d indices": (lambda: RowSparse(np.ones((1, 2)), [[1]], SHAPE), BAD, ["one dimension"]),
    "0-d indices": (lambda: RowSparse(np.ones((1, 2)), np.array(1), SHAPE), BAD, ["dimension"]),
    "more indices than memory": (
        lambda: RowSparse(np.ones((1, 2)), np.broadcast_to(np.int8(1), 2**62), SHAPE),
        BAD,
        ["address space"],
    ),
    "number of rows": (lambda: RowSparse(np.ones((3, 2)), [0, 1], SHAPE), BAD, ["3 rows", "2 ind"]),
    "shape of rows": (
        lambda: RowSparse(np.ones((2, 3)), [0, 1], SHAPE),
        BAD,
        [r"\(2, 3\)", r"\(6, 2\)", r"\(2, 2\)"],
    ),
    "dimensions": (lambda: RowSparse(np.ones(2), [0, 1], SHAPE), BAD, [r"\(2,\)"]),
    "0-d data": (lambda: RowSparse(np.array(1.0), [], SHAPE), BAD, [r"\(6, 2\)"]),
    "0-d shape": (lambda: RowSparse(np.array(1.0), [], ()), BAD, ["at least one dimension"]),
    "negative shape": (lambda: RowSparse.zeros((-1, 2)), BAD, ["negative"]),
    "huge shape": (lambda: RowSparse.zeros((2**40, 2**40)), BAD, ["address space"]),
    "text as shape": (lambda: RowSparse.zeros("ab"), TYPE, ["shape"]),
    "dtype": (lambda: RowSparse.zeros(2, "complex64"), TYPE, ["complex64"]),
    "no dtype": (lambda: RowSparse.zeros(2, "nonsense"), TYPE, ["nonsense"]),
    "complex data": (
        lambda: RowSparse(np.ones((1, 2), "c8"), [0], SHAPE),
        TYPE,
        ["complex64"],
    ),
    "byte order": (lambda: RowSparse(np.ones((1, 2), ">f8"), [0], SHAPE), TYPE, [">f8"]),
    "list as data": (lambda: RowSparse([[1.0, 2.0]], [0], SHAPE), TYPE, ["list"]),
    "no data": (lambda: RowSparse(None, [0], SHAPE), TYPE, ["None"]),
    "sparse data": (lambda: RowSparse(ones(0), [0], SHAPE), TYPE, ["RowSparse"]),
    "masked data": (lambda: RowSparse(np.ma.ones((1, 2)), [0], SHAPE), TYPE, ["masked"]),
    "0-d from_dense": (lambda: RowSparse.from_dense(np.array(1.0)), BAD, ["dimension"]),
    "list to from_dense": (lambda: RowSparse.from_dense([[1]]), TYPE, ["list"]),
    "complex to from_dense": (lambda: RowSparse.from_dense(np.ones(2, "c16")), TYPE, ["complex"]),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_is_wrong_is_refused(case):
    make, error, patterns = WRONG[case]
    before = _core.counters()
    for _ in range(2):
        with pytest.raises(error) as info:
            make()
        for pattern in patterns:
            assert info.match(pattern)
        del info
    gc.collect()
    assert _core.counters() == before


def test_arguments_are_those_of_the_signature():
    for args, options in [
        ((), {}),
        ((np.ones((1, 2)), [0]), {}),
        ((np.ones((1, 2)), [0], SHAPE, False), {}),
        ((np.ones((1, 2)), [0], SHAPE), {"other": 1}),
    ]:
        with pytest.raises(TypeError):
            RowSparse(*args, **options)
    x = RowSparse(shape=6, indices=[2], data=np.ones(1))
    assert (x.shape, x.asnumpy().tolist()) == ((6,), [0, 0, 1, 0, 0, 0])


def test_an_error_of_a_producer_comes_out_and_nothing_is_left():
    class Broken:
        def __dlpack__(self, **options):
            raise RuntimeError("broken")

        def __dlpack_device__(self):
            return 1, 0

    for make in (
        lambda: RowSparse(Broken(), [0], SHAPE),
        lambda: RowSparse(np.ones((1, 2)), Broken(), SHAPE),
        lambda: RowSparse.from_dense(Broken()),
    ):
        with pytest.raises(TYPE, match="RuntimeError") as info:
            make()
        assert isinstance(info.value.__cause__, RuntimeError)
        del info


# ----------------------------------------------------------------------------------- copy=False


def test_memory_is_used_in_its_place():
    data = np.ones((2, 2))
    x = RowSparse(data, [0, 3], SHAPE, copy=False)
    assert np.shares_memory(x.data, data)
    data[1] = 7
    assert has_rows(x, {0: 1, 3: 7})
    x.data[0] = 5
    assert data.tolist() == [[5, 5], [7, 7]]


def test_indices_are_copied_all_the_same():
    """What is out of order or range is found when the array is made, and only then."""
    ids = np.array([0, 3])
    x = RowSparse(np.ones((2, 2)), ids, SHAPE, copy=False)
    ids[:] = 10**12
    assert x.indices.tolist() == [0, 3]
    assert same(x.asnumpy(), dense(np.ones((2, 2)), [0, 3], SHAPE))


def test_memory_that_is_not_contiguous_needs_a_copy():
    for data in (DATA["transposed"], DATA["every second"], DATA["backwards"], DATA["not aligned"]):
        with pytest.raises(BAD, match="contiguous"):
            RowSparse(data, [0, 2, 5], SHAPE, copy=False)


def test_memory_that_is_read_only_stays_so():
    data = np.ones((2, 2))
    data.flags.writeable = False
    x = RowSparse(data, [0, 3], SHAPE, copy=False)
    assert not x.data.flags.writeable
    with pytest.raises(ValueError, match="WRITEABLE"):
        x.data.flags.writeable = True
    assert x.copy().data.flags.writeable


def test_memory_is_held_until_the_rows_are_replaced(s):
    def replacements(x):
        yield lambda: s.pull("s", out=x, ignore_sparse=False)
        yield lambda: s.row_sparse_pull("s", out=x, row_ids=[1])
        yield lambda: x.__setitem__(..., 0)

    for i in range(3):
        data = np.ones((2, 2))
        before = sys.getrefcount(data)
        x = RowSparse(data, [0, 3], SHAPE, copy=False)
        assert sys.getrefcount(data) == before + 1
        list(replacements(x))[i]()
        kvstore.wait_all()
        assert sys.getrefcount(data) == before
        assert data.tolist() == [[1, 1], [1, 1]]


def test_calls_are_asynchronous_again_once_the_rows_are_replaced(s):
    x = RowSparse(np.ones((2, 2)), [0, 3], SHAPE, copy=False)
    s.pull("s", out=x, ignore_sparse=False)
    kvstore.wait_all()
    with held(s, "s"):
        s.push("s", x)
        s.pull("s", out=x, ignore_sparse=False)
    assert has_rows(x, {1: 10, 4: 40})


def test_memory_is_let_go_with_the_array():
    data = np.ones((2, 2))
    before = sys.getrefcount(data)
    x = RowSparse(data, [0, 3], SHAPE, copy=False)
    view = x.data
    del x
    kvstore.wait_all()
    assert sys.getrefcount(data) == before + 1
    view[0] = 4
    del view
    kvstore.wait_all()
    assert sys.getrefcount(data) == before
    assert data[0].tolist() == [4, 4]


def test_the_memory_of_an_ndarray_is_used_in_its_place(s):
    s.init("w", np.full((2, 2), 5.0))
    a = kvstore.array(np.ones((2, 2)))
    x = RowSparse(a, [0, 3], SHAPE, copy=False)
    assert np.shares_memory(x.data, np.asarray(a))
    alive = weakref.ref(a)
    s.pull("w", out=a)  # done when the call returns
    assert has_rows(x, {0: 5, 3: 5})
    del a
    assert alive() is not None
    del x
    kvstore.wait_all()
    assert alive() is None


def test_an_array_without_rows_holds_no_memory():
    data = np.ones((0, 2))
    before = sys.getrefcount(data)
    x = RowSparse(data, [], SHAPE, copy=False)
    assert sys.getrefcount(data) == before and x.num_rows == 0
