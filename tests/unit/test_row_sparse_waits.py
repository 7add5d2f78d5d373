"""RowSparse: waits, stored errors, threads, fork, exit, and no memory."""

import sys

import numpy as np
import pytest
from helpers import (
    Worker,
    assert_clean,
    has_rows,
    held,
    poisoned_rows,
    run_script,
    sparse,
    sparse_ones,
)

import kvstore
from kvstore import RowSparse, _core

SHAPE = (6, 2)
BAD = kvstore.InvalidArgumentError


# ----------------------------------------------------------------------------- waits and errors


def test_waits_return_when_what_was_called_before_is_done(s):
    read, written = sparse_ones(0), sparse_ones(0)
    with held(s, "s") as release:
        s.push("s", read)
        s.pull("s", out=written, ignore_sparse=False)
        read.wait_to_read()
        waiters = [Worker(read.wait_to_write), Worker(written.wait_to_read)]
        for waiter in waiters:
            waiter.wait_in_call(Worker.run)
        release.set()
        assert [waiter.result() for waiter in waiters] == [None, None]
    assert has_rows(written, {0: 1})


@pytest.mark.parametrize("wait", ["wait_to_read", "wait_to_write"])
def test_a_wait_has_a_timeout(s, wait):
    x = sparse_ones(0)
    with held(s, "s"):
        s.pull("s", out=x, ignore_sparse=False)
        with pytest.raises(kvstore.TimeoutError):
            getattr(x, wait)(0.01)
    getattr(x, wait)(timeout=None)
    for wrong in (0, -1, float("nan")):
        with pytest.raises(BAD, match="timeout"):
            getattr(x, wait)(wrong)


def test_pending_reads_delay_the_view_that_can_be_written_and_no_other(s):
    x = sparse_ones(0)
    with held(s, "s") as release:
        s.push("s", x)
        assert x.indices.tolist() == [0] and x.num_rows == 1 and x.asnumpy().sum() == 2
        viewer = Worker(getattr, x, "data")
        viewer.wait_in_call(Worker.run)
        release.set()
        viewer.result()[:] = 9
    assert has_rows(s.pull("s"), {0: 1})


USES = {
    "asnumpy": lambda x: x.asnumpy(),
    "todense": lambda x: x.todense(),
    "data": lambda x: x.data,
    "indices": lambda x: x.indices,
    "num_rows": lambda x: x.num_rows,
    "nbytes": lambda x: x.nbytes,
    "copy": lambda x: x.copy(),
    "wait_to_read": lambda x: x.wait_to_read(),
    "wait_to_write": lambda x: x.wait_to_write(),
    "asarray": np.asarray,
    "converted": lambda x: np.asarray(x, "int8"),
    "sum": np.sum,
    "from_dense": RowSparse.from_dense,
    "array": kvstore.array,
    "assigned": lambda x: sparse_ones(2).__setitem__(..., x),
}


@pytest.mark.parametrize("use", USES)
def test_each_use_raises_the_error_of_a_failed_write_once(s, use):
    x = poisoned_rows(s)
    with pytest.raises(MemoryError):
        USES[use](x)
    USES[use](x)
    kvstore.wait_all()


def test_ctrl_c_ends_a_wait_for_the_rows():
    assert_clean(
        run_script(
            """
import os, signal, threading
import numpy as np, kvstore
kv = kvstore.create("local")
kv.init("s", kvstore.RowSparse(np.ones((1, 2)), [0], (6, 2)))
entered, release = threading.Event(), threading.Event()
def updater(key, recv, stored):
    entered.set()
    release.wait()
kv.set_updater(updater)
zeros = kvstore.RowSparse.zeros((6, 2), "float64")
threading.Thread(target=kv.push, args=("s", zeros), daemon=True).start()
entered.wait()
kv.set_updater(None)
x = kvstore.RowSparse.zeros((6, 2), "float64")
kv.pull("s", out=x, ignore_sparse=False)
for use in (lambda: x.data, lambda: x.indices, lambda: x.num_rows, x.asnumpy, x.copy):
    timer = threading.Timer(0.05, os.kill, (os.getpid(), signal.SIGINT))
    try:
        timer.start()
        use()
    except KeyboardInterrupt:
        pass
    else:
        raise AssertionError(use)
    timer.join()
release.set()
assert x.indices.tolist() == [0]
"""
        )
    )


def test_a_forked_childs_calls_on_an_array_raise_closed_error():
    assert_clean(
        run_script(
            """
import gc, os, sys, numpy as np, kvstore
RowSparse = kvstore.RowSparse
x, memory = RowSparse(np.ones((2, 2)), [0, 3], (6, 2)), np.ones((1, 2))
y = RowSparse(memory, [2], (6, 2), copy=False)
data, ids = x.data, x.indices

def calls():
    for a in (x, y):
        for call in (a.asnumpy, a.wait_to_read, a.wait_to_write, a.__array__, a.copy,
                     lambda: a.data, lambda: a.indices, lambda: a.num_rows, lambda: a.nbytes,
                     lambda: np.asarray(a), lambda: kvstore.array(a),
                     lambda: RowSparse.from_dense(a),
                     lambda: a.__setitem__(..., 0), lambda: RowSparse.zeros((6, 2), "float64")
                     .__setitem__(..., a)):
            try:
                call()
            except kvstore.ClosedError as error:
                assert "fork" in str(error)
            else:
                raise AssertionError(call)
        assert a.shape == (6, 2) and len(a) == 6 and a.dtype == np.float64
        assert repr(a) == ("kvstore.RowSparse(<of the parent process>, shape=(6, 2), "
                           "dtype=float64, device=cpu)")
    data[0] = 5
    new = RowSparse(data, ids, (6, 2))
    assert new.data.tolist() == [[5, 5], [1, 1]] and new.asnumpy().sum() == 12
    new[:] = 0
    assert new.num_rows == 0

pid = os.fork()
if pid == 0:
    try:
        calls()
        del x, y, data, ids
        gc.collect()
        kvstore.wait_all()
    except BaseException as error:
        print(repr(error), file=sys.stderr)
        os._exit(1)
    os._exit(0)
assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
assert data.tolist() == [[1, 1], [1, 1]] and x.num_rows == 2
"""
        )
    )


def test_an_array_outlives_its_store_and_the_exit(kv):
    kv.init("s", sparse({1: 10}))
    x = kv.pull("s")
    kv.close()
    assert has_rows(x, {1: 10})
    x[:] = 0
    assert x.num_rows == 0
    assert_clean(
        run_script(
            """
import atexit, numpy as np
def late():
    assert view.tolist() == [[1, 1]]
    assert kvstore.RowSparse.zeros(3).shape == (3,)
    for call in (x.asnumpy, lambda: x.data, lambda: x.__setitem__(..., 0)):
        try:
            call()
        except kvstore.ClosedError:
            pass
        else:
            raise AssertionError(call)
    assert repr(x).startswith("kvstore.RowSparse(<closed>, ")
atexit.register(late)  # runs after the module's own
import kvstore
x = kvstore.RowSparse(np.ones((1, 2)), [1], (3, 2), copy=False)
view = x.data
"""
        )
    )


# -------------------------------------------------------------------------------------- threads


def test_an_array_is_used_by_many_threads_at_once(s):
    x = RowSparse.zeros((6, 2), "float64")
    x[:] = sparse_ones(0, 3)
    values = [sparse_ones(0, 3), sparse_ones(1, 2, 4), 0]

    def use(i):
        for n in range(200):
            if (i + n) % 5 == 0:
                x[:] = values[n % 3]
            elif (i + n) % 5 == 1:
                data, ids = x.data, x.indices
                assert set(np.unique(data)) <= {1} and set(ids.tolist()) <= {0, 1, 2, 3, 4}
            elif (i + n) % 5 == 2:
                assert x.asnumpy().sum() in (0, 4, 6)
            elif (i + n) % 5 == 3:
                y = x.copy()
                assert (y.num_rows, len(y.data)) in {(0, 0), (2, 2), (3, 3)}
            else:
                s.push("s", x)

    for worker in [Worker(use, i) for i in range(4)]:
        worker.result()


def test_borrowed_memory_is_let_go_by_any_thread(s):
    def use():
        for _ in range(200):
            data = np.ones((1, 2))
            before = sys.getrefcount(data)
            x = RowSparse(data, [2], SHAPE, copy=False)
            s.push("s", x)
            s.pull("s", out=x, ignore_sparse=False)
            assert x.num_rows == 1 and (data == 1).all()
            del x
            kvstore.wait_all()
            assert sys.getrefcount(data) == before

    for worker in [Worker(use) for _ in range(3)]:
        worker.result()


# ------------------------------------------------------------------------------------ no memory

MAKERS = {
    "copied": lambda: RowSparse(np.ones((2, 4))[:, ::2], np.array([0, 3], np.int32)[:], SHAPE),
    "strided ids": lambda: RowSparse(np.ones((2, 2)), np.array([0, 9, 3], np.int8)[::2], SHAPE),
    "in place": lambda: RowSparse(np.ones((2, 2)), [0, 3], SHAPE, copy=False),
    "of NDArrays": lambda: RowSparse(kvstore.ones((2, 2)), kvstore.array([0, 3]), SHAPE),
    "zeros": lambda: RowSparse.zeros(SHAPE),
    "from_dense": lambda: RowSparse.from_dense(np.ones(SHAPE)[::-1]),
    "copy": lambda: sparse_ones(0, 3).copy(),
    "assigned": lambda: sparse_ones(0, 3).__setitem__(..., np.ones(SHAPE)),
    "views": lambda: (sparse_ones(0).data, sparse_ones(0).indices),
    "dense": lambda: sparse_ones(0).asnumpy(),
}


@pytest.mark.parametrize("case", MAKERS)
def test_each_allocation_may_fail(case):
    before = _core.counters()
    for nth in range(1, 50):
        _core.fault_set("alloc", nth)
        try:
            MAKERS[case]()
        except MemoryError:
            pass
        finally:
            passed = _core.fault_set("alloc", 0)
        kvstore.wait_all()
        assert _core.counters() == before
        if passed < nth:
            return
    raise AssertionError("it never came through")
