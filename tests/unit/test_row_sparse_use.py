"""RowSparse: the type, its views, assignment, text, and errors that wait in it."""

import copy
import gc
import inspect
import pickle
import sys
import weakref

import ml_dtypes
import numpy as np
import pytest
from helpers import Worker, has_rows, held, poisoned_rows, sparse, sparse_ones

import kvstore
from kvstore import RowSparse, _core

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
SHAPE = (6, 2)
BIG = (40_000, 4)  # more than a call copies with the GIL
BAD = kvstore.InvalidArgumentError


def dense(data, indices, shape):
    whole = np.zeros(shape, np.asarray(data).dtype)
    whole[indices] = data
    return whole


# ------------------------------------------------------------------------------------- the type


def test_the_type_is_final():
    with pytest.raises(TypeError):
        type("Mine", (RowSparse,), {})
    with pytest.raises(TypeError):
        RowSparse.mine = 1
    assert (RowSparse.__module__, RowSparse.__qualname__) == ("kvstore", "RowSparse")
    assert "RowSparse" in kvstore.__all__


def test_signatures_can_be_read():
    expected = {
        RowSparse: "(data, indices, shape, *, copy=True)",
        RowSparse.zeros: "(shape, dtype='float32')",
        RowSparse.from_dense: "(array, /)",
        RowSparse.from_scipy: "(matrix, /)",
        RowSparse.from_torch: "(tensor, /)",
        RowSparse.asnumpy: "(self, /)",
        RowSparse.todense: "(self, /)",
        RowSparse.toscipy: "(self, /)",
        RowSparse.to_torch: "(self, /)",
        RowSparse.copy: "(self, /)",
        RowSparse.wait_to_read: "(self, /, timeout=None)",
        RowSparse.wait_to_write: "(self, /, timeout=None)",
        RowSparse.__array__: "(self, /, dtype=None, copy=None)",
    }
    for function, signature in expected.items():
        assert str(inspect.signature(function)) == signature, function


def test_an_attribute_tells_what_the_array_is():
    x = RowSparse(np.ones((2, 3, 4), "int32"), [1, 5], (7, 3, 4))
    assert (x.shape, x.dtype, x.ndim, x.size) == ((7, 3, 4), np.dtype("int32"), 3, 84)
    assert (x.num_rows, x.nbytes, x.stype, x.device) == (2, 2 * (8 + 48), "row_sparse", "cpu")
    assert len(x) == 7
    assert isinstance(x.dtype, np.dtype)
    assert RowSparse.zeros(2, "bfloat16").dtype == BFLOAT16
    for name in ("shape", "data", "indices", "num_rows"):
        with pytest.raises(AttributeError):
            setattr(x, name, getattr(x, name))


def test_an_array_has_no_truth_value_no_items_and_no_iterator():
    x = sparse_ones(0)
    with pytest.raises(ValueError, match="truth value"):
        bool(x)
    with pytest.raises(TypeError):
        x[0]
    with pytest.raises(TypeError):
        iter(x)


def test_an_array_can_be_referenced_weakly_and_is_freed_at_once():
    before = _core.counters()
    x = sparse_ones(0, 3)
    alive = weakref.ref(x)
    assert _core.counters()["arrays"] == before["arrays"] + 1
    del x
    assert alive() is None
    assert _core.counters() == before


def test_an_array_is_not_pickled():
    for call in (copy.copy, copy.deepcopy, pickle.dumps):
        with pytest.raises(TypeError, match="pickle"):
            call(sparse_ones(0))


def test_arrays_are_compared_by_identity():
    x = sparse_ones(0)
    assert x == x and x != sparse_ones(0) and len({x, x}) == 1


# ---------------------------------------------------------------------------------------- views


@pytest.mark.parametrize("name", ["data", "indices"])
def test_a_view_is_of_the_same_memory(name):
    x = sparse_ones(0, 3)
    first, second = getattr(x, name), getattr(x, name)
    assert np.shares_memory(first, second)
    assert first.flags.c_contiguous and first.flags.aligned and not first.flags.owndata
    assert first.flags.writeable == (name == "data")


def test_indices_stay_read_only():
    x = sparse_ones(0, 3)
    with pytest.raises(ValueError, match="WRITEABLE"):
        x.indices.flags.writeable = True
    with pytest.raises(ValueError, match="read-only"):
        x.indices[0] = 9


def test_what_is_written_to_data_is_the_arrays():
    x = sparse_ones(0, 3)
    x.data[1] = 7
    x.data[:, 0] *= 2
    assert x.asnumpy()[[0, 3]].tolist() == [[2, 1], [14, 7]]


@pytest.mark.parametrize("name", ["data", "indices"])
def test_a_view_keeps_the_array_alive(name):
    x = RowSparse(np.ones(BIG), np.arange(BIG[0]), BIG)
    before, alive = sys.getrefcount(x), weakref.ref(x)
    views = [getattr(x, name) for _ in range(3)]
    assert sys.getrefcount(x) == before + 3
    part = views[0][100:]
    views.clear()
    assert sys.getrefcount(x) == before + 1
    del x
    gc.collect()
    assert alive() is not None and part[7].tolist() == ([1] * 4 if name == "data" else 107)
    del part
    assert alive() is None


def test_a_view_shows_the_old_rows_when_others_come(s):
    x = sparse_ones(0, 3)
    data, ids = x.data, x.indices
    for replace in (
        lambda: s.pull("s", out=x, ignore_sparse=False),
        lambda: x.__setitem__(..., sparse({2: 5, 5: 5})),
        lambda: s.row_sparse_pull("s", out=x, row_ids=[4, 0]),
    ):
        replace()
        data[0, 0] += 1
        assert ids.tolist() == [0, 3]
    assert data.tolist() == [[4, 1], [1, 1]]
    assert has_rows(x, {0: 0, 4: 40})


def test_views_of_no_rows():
    x = RowSparse.zeros((4, 3, 2), "int8")
    assert (x.data.shape, x.data.dtype, x.indices.shape) == ((0, 3, 2), np.int8, (0,))
    empty = RowSparse(np.ones((2, 0)), [1, 2], (4, 0))
    assert (empty.data.shape, empty.indices.tolist(), empty.nbytes) == ((2, 0), [1, 2], 16)


@pytest.mark.parametrize("name", ["data", "indices"])
def test_while_a_view_is_alive_calls_are_synchronous(s, name):
    x = sparse_ones(0)
    view = getattr(x, name)
    with held(s, "s") as release:
        pusher = Worker(s.push, "s", x)
        pusher.wait_in_call(Worker.run)
        release.set()
        pusher.result()
    del view
    with held(s, "s"):
        s.push("s", x)


# ----------------------------------------------------------------------------------- assignment

VALUES = {
    "RowSparse": (lambda: sparse({2: 5, 3: 0}), {2: 5, 3: 0}),
    "no rows": (lambda: RowSparse.zeros(SHAPE, "float64"), {}),
    "array": (lambda: dense(np.full((2, 2), 5.0), [2, 4], SHAPE), {2: 5, 4: 5}),
    "strided": (lambda: dense(np.full((2, 2), 5.0), [2, 4], SHAPE)[::-1], {1: 5, 3: 5}),
    "NDArray": (lambda: kvstore.array(dense(np.full((1, 2), 5.0), [2], SHAPE)), {2: 5}),
    "0": (lambda: 0, {}),
    "0.0": (lambda: 0.0, {}),
}


@pytest.mark.parametrize("case", VALUES)
@pytest.mark.parametrize("key", [slice(None), ...], ids=str)
def test_all_rows_can_be_replaced(case, key):
    make, rows = VALUES[case]
    x, value = sparse_ones(0, 3), make()
    before = sys.getrefcount(value)
    x[key] = value
    assert has_rows(x, rows)
    assert sys.getrefcount(value) == before
    if x.num_rows > 0:
        x.data[:] = 9
        assert not np.any(np.asarray(value) == 9)


def test_an_array_can_be_assigned_to_itself():
    x = sparse_ones(0, 3)
    x[:] = x
    assert has_rows(x, {0: 1, 3: 1})


def test_an_assignment_of_anything_else_is_refused_and_changes_nothing():
    x = sparse_ones(0, 3)
    for key, value, error, pattern in [
        (0, 1, TypeError, r"x\[:\] = value"),
        ([0], 0, TypeError, r"x\[:\] = value"),
        (slice(0, None), 0, TypeError, r"x\[:\] = value"),
        (slice(None, None, 2), 0, TypeError, r"x\[:\] = value"),
        (slice(None), 1, TypeError, r"\b0\b"),
        (slice(None), float("nan"), TypeError, r"\b0\b"),
        (slice(None), None, TypeError, "None"),
        (slice(None), [[0, 0]], TypeError, "list"),
        (slice(None), np.zeros((5, 2)), ValueError, r"\(6, 2\).*\(5, 2\)"),
        (slice(None), np.zeros(SHAPE, "f4"), TypeError, "float64.*float32"),
        (slice(None), sparse({1: 1}, (7, 2)), ValueError, r"\(7, 2\)"),
        (slice(None), sparse({1: 1}, dtype="int8"), TypeError, "int8"),
        (slice(None), np.zeros(SHAPE, "c16"), TypeError, "complex128"),
    ]:
        with pytest.raises(error, match=pattern):
            x[key] = value
    with pytest.raises(TypeError, match=r"x\[:\] = value"):
        del x[:]
    assert has_rows(x, {0: 1, 3: 1})


def test_an_assignment_wipes_out_a_stored_error(s):
    x = poisoned_rows(s)
    x[:] = sparse({2: 5})
    assert has_rows(x, {2: 5})
    with pytest.raises(MemoryError):
        kvstore.wait_all()


# ----------------------------------------------------------------------------------------- repr

REPRS = {
    "rows": (
        lambda: RowSparse(np.array([[1.0, 2.0], [3.0, 4.0]]), [0, 3], (5, 2)),
        "([[1., 2.],\n{0}[3., 4.]], indices=[0, 3], shape=(5, 2), dtype=float64",
    ),
    "one dimension": (
        lambda: RowSparse(np.array([1, 2]), [1, 4], (5,)),
        "([1, 2], indices=[1, 4], shape=(5,), dtype=int64",
    ),
    "no rows": (
        lambda: RowSparse.zeros((3, 2)),
        "([], indices=[], shape=(3, 2), dtype=float32",
    ),
    "bfloat16": (
        lambda: RowSparse(np.ones(1, BFLOAT16), [2], (3,)),
        "([1], indices=[2], shape=(3,), dtype=bfloat16",
    ),
    "many": (
        lambda: RowSparse(np.arange(500), np.arange(500), (500,)),
        "([  0,   1,   2, ..., 497, 498, 499], indices=[  0,   1,   2, ..., 497, 498, 499], "
        "shape=(500,), dtype=int64",
    ),
}


@pytest.mark.parametrize("case", REPRS)
def test_repr(case):
    make, text = REPRS[case]
    assert repr(make()) == "kvstore.RowSparse" + text.format(" " * 19) + ", device=cpu)"
    assert str(make()) == repr(make())


def test_repr_of_many_rows_is_short():
    assert len(repr(RowSparse(np.ones(BIG), np.arange(BIG[0]), BIG)).splitlines()) < 10


def test_repr_of_an_array_that_is_being_written_does_not_wait_for_long(s):
    x = sparse_ones(0)
    pending = "kvstore.RowSparse(<pending>, shape=(6, 2), dtype=float64, device=cpu)"
    with held(s, "s"):
        s.pull("s", out=x, ignore_sparse=False)
        assert Worker(repr, x).result() == pending
    assert "indices=[1, 4]" in repr(x)


def test_repr_leaves_a_stored_error_where_it_is(s):
    x = poisoned_rows(s)
    for _ in range(2):
        assert repr(x) == "kvstore.RowSparse(<failed>, shape=(6, 2), dtype=float64, device=cpu)"
    with pytest.raises(MemoryError):
        x.wait_to_read()
    assert "indices=[0]" in repr(x)
