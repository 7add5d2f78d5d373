"""NDArrays: what they tell, the ways to their memory, and errors that wait in them."""

import copy
import gc
import inspect
import pickle
import sys
import threading
import weakref

import ml_dtypes
import numpy as np
import pytest
from helpers import LONG, Worker, assert_clean, held, pulled, run_script, same

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


@pytest.fixture
def w(kv):
    kv.init("w", np.zeros(3, np.float32))
    return kv


def poisoned(kv):
    """An NDArray whose last write has failed, and nobody has been told."""
    out = kvstore.zeros(3)
    _core.fault_set("engine.run", 1)
    with held(kv, "w"):
        kv.pull("w", out=out)
    while _core.counters()["tasks"] > 0:
        pass
    assert _core.fault_set("engine.run", 0) >= 1
    return out


# ------------------------------------------------------------------------------------- the type


def test_the_type_is_not_called_but_says_what_to_call():
    with pytest.raises(TypeError, match=r"kvstore\.array\(\)"):
        kvstore.NDArray([1, 2])
    with pytest.raises(TypeError):
        type("Mine", (kvstore.NDArray,), {})
    with pytest.raises(TypeError):
        kvstore.NDArray.mine = 1
    assert (kvstore.NDArray.__module__, kvstore.NDArray.__qualname__) == ("kvstore", "NDArray")


def test_signatures_can_be_read():
    expected = {
        kvstore.array: "(object, dtype=None)",
        kvstore.zeros: "(shape, dtype='float32')",
        kvstore.ones: "(shape, dtype='float32')",
        kvstore.empty: "(shape, dtype='float32')",
        kvstore.full: "(shape, fill_value, dtype='float32')",
        kvstore.NDArray.asnumpy: "(self, /)",
        kvstore.NDArray.wait_to_read: "(self, /, timeout=None)",
        kvstore.NDArray.wait_to_write: "(self, /, timeout=None)",
        kvstore.NDArray.__array__: "(self, /, dtype=None, copy=None)",
        kvstore.NDArray.__dlpack__: (
            "(self, /, *, stream=None, max_version=None, dl_device=None, copy=None)"
        ),
    }
    for function, signature in expected.items():
        assert str(inspect.signature(function)) == signature, function


def test_an_array_can_be_referenced_weakly_and_is_freed_at_once():
    a = kvstore.ones(3)
    alive = weakref.ref(a)
    before = _core.counters()["arrays"]
    del a
    assert alive() is None
    assert _core.counters()["arrays"] == before - 1


def test_what_would_lose_the_contents_is_refused():
    a = kvstore.ones(3)
    for call in (copy.copy, copy.deepcopy, pickle.dumps):
        with pytest.raises(TypeError, match="pickle"):
            call(a)


def test_an_attribute_tells_what_the_array_is():
    a = kvstore.zeros((4, 3, 2), "int64")
    assert (a.shape, a.dtype, a.ndim, a.size) == ((4, 3, 2), np.dtype("int64"), 3, 24)
    assert (a.itemsize, a.nbytes, a.device, len(a)) == (8, 192, "cpu", 4)
    assert isinstance(a.dtype, np.dtype)
    assert kvstore.zeros(2, "bfloat16").dtype == BFLOAT16
    with pytest.raises(AttributeError):
        a.shape = (24,)


def test_an_array_without_dimensions_has_no_length():
    with pytest.raises(TypeError, match="len"):
        len(kvstore.zeros(()))
    assert len(kvstore.zeros((0, 4))) == 0


def test_an_array_has_no_truth_value():
    for a in (kvstore.zeros(()), kvstore.zeros(0), kvstore.ones(3)):
        with pytest.raises(ValueError, match="truth value"):
            bool(a)


# ----------------------------------------------------------------------------------------- NumPy


def test_asnumpy_is_a_copy():
    a = kvstore.ones(3)
    b = a.asnumpy()
    b[0] = 5
    assert b.flags.owndata and b.flags.writeable
    assert a.asnumpy().tolist() == [1, 1, 1]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_a_numpy_view_is_the_arrays_memory(shape, dtype):
    expected = numbers(shape, dtype)
    a = kvstore.array(expected)
    for view in (np.asarray(a), a.__array__()):
        assert same(view, expected)
        assert view.flags.writeable and view.flags.c_contiguous and not view.flags.owndata
        if view.size:
            view[...] = 7
            expected[...] = 7
            assert same(a.asnumpy(), expected)


def test_numpy_functions_work_on_an_array():
    a = kvstore.array([[1.0, 2.0], [3.0, 4.0]])
    assert np.sum(a) == 10 and np.add(a, 1).tolist() == [[2, 3], [4, 5]]
    assert (np.ones((2, 2)) @ np.asarray(a)).tolist() == [[4, 6], [4, 6]]
    assert np.array_equal(a, a.asnumpy())


def test_the_array_protocols_keywords():
    a = kvstore.array([1.0, 2.0])
    assert not np.shares_memory(a.__array__(copy=True), np.asarray(a))
    assert np.shares_memory(a.__array__(copy=False), np.asarray(a))
    assert np.shares_memory(a.__array__("float64", copy=False), np.asarray(a))
    assert np.shares_memory(a.__array__(np.float64), np.asarray(a))
    assert same(a.__array__("int32"), np.array([1, 2], "int32"))
    assert same(a.__array__(np.float32, True), np.array([1, 2], "float32"))
    assert same(np.asarray(a, np.int8), np.array([1, 2], "int8"))
    assert same(np.asarray(kvstore.ones(2, "bfloat16"), "float32"), np.ones(2, "float32"))
    with pytest.raises(ValueError, match="without a copy"):
        a.__array__("float32", copy=False)
    with pytest.raises(TypeError):
        a.__array__("no type")


@pytest.mark.parametrize(
    "view", [np.asarray, memoryview, kvstore.NDArray.__array__, np.from_dlpack]
)
def test_a_view_keeps_the_array_alive(view):
    a = kvstore.full(BIG, 3)
    alive, shown = weakref.ref(a), view(a)
    del a
    gc.collect()
    assert alive() is not None and shown[BIG - 1] == 3
    del shown
    kvstore.wait_all()
    assert alive() is None


@pytest.mark.parametrize(
    "view",
    [np.asarray, memoryview, kvstore.NDArray.__array__, np.from_dlpack, kvstore.NDArray.__dlpack__],
)
def test_while_a_view_is_alive_the_memory_is_the_users(w, view):
    a = kvstore.ones(3)
    shown = view(a)
    with held(w, "w") as release:
        pusher = Worker(w.push, "w", a)
        pusher.wait_in_call(Worker.run)  # a value that the user may change at any time
        release.set()
        pusher.result()
    del shown
    kvstore.wait_all()
    with held(w, "w"):
        w.push("w", a)


@pytest.mark.parametrize(
    "view",
    [np.asarray, memoryview, kvstore.NDArray.__array__, np.from_dlpack, kvstore.NDArray.__dlpack__],
)
@pytest.mark.parametrize("pending", ["reads", "writes"])
def test_a_view_is_given_when_nothing_is_pending(w, view, pending):
    a = kvstore.ones(3)
    with held(w, "w") as release:
        if pending == "reads":
            w.push("w", a)
        else:
            w.pull("w", out=a)
        viewer = Worker(view, a)
        viewer.wait_in_call(Worker.run)
        release.set()
        shown = viewer.result()
    assert a.asnumpy().tolist() == ([1, 1, 1] if pending == "reads" else [0, 0, 0])
    assert pulled(w, "w").tolist() == ([1, 1, 1] if pending == "reads" else [0, 0, 0])
    del shown


# ------------------------------------------------------------------------------- buffer protocol


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_the_buffer_of_an_array(shape, dtype):
    expected = numbers(shape, dtype)
    a = kvstore.array(expected)
    if dtype == "bfloat16":
        with pytest.raises(BufferError, match="bfloat16"):
            memoryview(a)
        return
    view = memoryview(a)
    like = memoryview(expected)
    assert (view.shape, view.ndim, view.nbytes) == (shape, len(shape), expected.nbytes)
    assert (view.format, view.itemsize, view.readonly) == (like.format, like.itemsize, False)
    assert view.c_contiguous and view.obj is a
    assert view.tobytes() == expected.tobytes()
    assert 0 in shape or view.strides == like.strides
    assert same(view, expected)


def test_the_kinds_of_buffers(tmp_path):
    a = kvstore.array(np.arange(6.0).reshape(2, 3))
    assert bytes(a) == np.arange(6.0).tobytes()  # no format, no shape
    (tmp_path / "written").write_bytes(a)
    with open(tmp_path / "written", "rb") as file:
        b = kvstore.zeros((2, 3), "float64")
        assert file.readinto(b) == 48
    assert same(b, a)
    assert np.frombuffer(a).tolist() == [0, 1, 2, 3, 4, 5]


def test_each_buffer_is_given_back(w):
    a = kvstore.ones(3)
    before = sys.getrefcount(a)
    views = [memoryview(a) for _ in range(5)]
    for view in views:
        view.release()
    assert sys.getrefcount(a) == before
    with held(w, "w"):
        w.push("w", a)


# ---------------------------------------------------------------------------------------- DLPack


def test_dlpack_keywords():
    a = kvstore.array([1.0, 2.0])
    assert a.__dlpack_device__() == (1, 0)
    assert np.shares_memory(np.from_dlpack(a), np.asarray(a))
    assert not np.shares_memory(np.from_dlpack(a, copy=True), np.asarray(a))
    assert np.from_dlpack(a, device="cpu", copy=False).tolist() == [1, 2]
    assert '"dltensor"' in repr(a.__dlpack__())
    assert '"dltensor"' in repr(a.__dlpack__(max_version=(0, 8), dl_device=(1, 0)))
    assert '"dltensor_versioned"' in repr(a.__dlpack__(max_version=(1, 0), copy=False))
    assert '"dltensor_versioned"' in repr(a.__dlpack__(max_version=(2, 0), copy=True))
    with pytest.raises(BufferError, match=r"device \(1, 0\)"):
        a.__dlpack__(dl_device=(2, 0))
    with pytest.raises(ValueError, match="stream"):
        a.__dlpack__(stream=1)
    for wrong in (
        {"max_version": 1},
        {"max_version": ("1", "0")},
        {"dl_device": 1},
        {"dl_device": (1,)},
        {"dl_device": ("cpu", 0)},
        {"other": 1},
    ):
        with pytest.raises(TypeError):
            a.__dlpack__(**wrong)
    with pytest.raises(TypeError):
        a.__dlpack__(None)


def test_a_dlpack_copy_is_of_its_own(w):
    a = kvstore.ones(3)
    shown = np.from_dlpack(a, copy=True)
    with held(w, "w"):
        w.push("w", a)  # so no view of `a` is alive
    a = weakref.ref(a)
    assert a() is None
    assert shown.tolist() == [1, 1, 1]


# ------------------------------------------------------------------------------------------ repr


@pytest.mark.parametrize(
    "made, text",
    [
        ([[1.0, 2.0], [3.0, 4.0]], "([[1., 2.],\n{0}[3., 4.]], shape=(2, 2), dtype=float64"),
        (2.5, "(2.5, shape=(), dtype=float64"),
        ([1, 2, 3], "([1, 2, 3], shape=(3,), dtype=int64"),
        (np.zeros((0, 2), "int8"), "([], shape=(0, 2), dtype=int8"),
        (numbers((2,), "bfloat16"), "([0, 1], shape=(2,), dtype=bfloat16"),
        (np.arange(5000), "([   0,    1,    2, ..., 4997, 4998, 4999], shape=(5000,), dtype=int64"),
    ],
)
def test_repr(made, text):
    shown = repr(kvstore.array(made))
    assert shown == "kvstore.NDArray" + text.format(" " * 17) + ", device=cpu)"
    assert str(kvstore.array(made)) == shown


def test_repr_of_an_array_that_is_being_written_does_not_wait_for_long(w):
    a = kvstore.ones(3)
    with held(w, "w"):
        w.pull("w", out=a)
        assert Worker(repr, a).result() == (
            "kvstore.NDArray(<pending>, shape=(3,), dtype=float32, device=cpu)"
        )
    assert repr(a) == "kvstore.NDArray([0., 0., 0.], shape=(3,), dtype=float32, device=cpu)"


def test_repr_inside_the_updater_that_it_would_wait_for(w):
    a, b, shown = kvstore.ones(3), kvstore.ones(3), []
    entered, queued = threading.Event(), threading.Event()

    def updater(key, recv, stored):
        entered.set()
        assert queued.wait(LONG)
        shown.extend([repr(a), repr(b)])

    w.set_updater(updater)
    pusher = Worker(w.push, "w", np.ones(3, np.float32))
    assert entered.wait(LONG)
    w.set_updater(None)
    w.pull("w", out=a)
    queued.set()
    pusher.result()
    assert shown[0].startswith("kvstore.NDArray(<pending>, ")
    assert shown[1].startswith("kvstore.NDArray([1., 1., 1.], ")


def test_repr_leaves_a_stored_error_where_it_is(w):
    a = poisoned(w)
    for _ in range(2):
        assert repr(a) == "kvstore.NDArray(<failed>, shape=(3,), dtype=float32, device=cpu)"
    with pytest.raises(MemoryError):
        a.wait_to_read()
    assert repr(a).startswith("kvstore.NDArray([0., 0., 0.], ")


# ----------------------------------------------------------------------------- waits and errors


def test_waits_return_when_what_was_called_before_is_done(w):
    read, written = kvstore.ones(3), kvstore.ones(3)
    with held(w, "w") as release:
        w.push("w", read)
        w.pull("w", out=written)
        read.wait_to_read()
        waiters = [Worker(read.wait_to_write), Worker(written.wait_to_read)]
        for waiter in waiters:
            waiter.wait_in_call(Worker.run)
        release.set()
        assert [waiter.result() for waiter in waiters] == [None, None]
    assert written.asnumpy().tolist() == [1, 1, 1]


@pytest.mark.parametrize("wait", ["wait_to_read", "wait_to_write"])
def test_a_wait_has_a_timeout(w, wait):
    a = kvstore.ones(3)
    with held(w, "w"):
        w.pull("w", out=a)
        with pytest.raises(kvstore.TimeoutError):
            getattr(a, wait)(0.01)
        with pytest.raises(kvstore.TimeoutError):
            getattr(a, wait)(timeout=0.01)
    getattr(a, wait)(timeout=None)
    for wrong in (0, -1, float("nan")):
        with pytest.raises(kvstore.InvalidArgumentError, match="timeout"):
            getattr(a, wait)(wrong)


USES = {
    "asnumpy": "a.asnumpy()",
    "wait_to_read": "a.wait_to_read()",
    "wait_to_write": "a.wait_to_write()",
    "asarray": "np.asarray(a)",
    "numpy.sum": "np.sum(a)",
    "__array__": "a.__array__()",
    "converted": "np.asarray(a, 'float64')",
    "memoryview": "memoryview(a)",
    "from_dlpack": "np.from_dlpack(a)",
    "array": "kvstore.array(a)",
}


@pytest.mark.parametrize("use", USES.values(), ids=USES)
def test_each_use_raises_the_error_of_a_failed_write_once(w, use):
    names = {"a": poisoned(w), "np": np, "kvstore": kvstore}
    with pytest.raises(MemoryError):
        eval(use, names)
    eval(use, names)
    kvstore.wait_all()


@pytest.mark.parametrize("use", USES.values(), ids=USES)
def test_ctrl_c_ends_each_use_that_waits(use):
    assert_clean(
        run_script(
            f"""
import os, signal, sys, threading, time
import numpy as np, kvstore
kv = kvstore.create("local")
kv.init("w", np.zeros(3, np.float32))
entered, release, started = threading.Event(), threading.Event(), threading.Event()
def updater(key, recv, stored):
    entered.set()
    release.wait()
kv.set_updater(updater)
threading.Thread(target=kv.push, args=("w", np.ones(3, np.float32)), daemon=True).start()
entered.wait()
kv.set_updater(None)
a = kvstore.ones(3)
kv.pull("w", out=a)

def interrupt():
    '''Sends SIGINT when the main thread has stood at one instruction for a while.'''
    main, place, since = threading.main_thread().ident, None, time.monotonic()
    started.wait()
    while time.monotonic() - since < 0.2:
        frame = sys._current_frames()[main]
        now = frame.f_code, frame.f_lasti
        if now != place:
            place, since = now, time.monotonic()
        time.sleep(0.001)
    global sent
    sent = time.monotonic()
    os.kill(os.getpid(), signal.SIGINT)

thread = threading.Thread(target=interrupt)
thread.start()
try:
    started.set()
    {use}
except KeyboardInterrupt:
    took = time.monotonic() - sent
else:
    raise AssertionError("no KeyboardInterrupt")
thread.join()
assert took < 1, took
release.set()
assert np.asarray(a).tolist() == [0, 0, 0]
"""
        )
    )


def test_an_error_that_a_buffer_raised_is_not_raised_by_a_later_array_call(w):
    a = poisoned(w)
    with pytest.raises(MemoryError):
        memoryview(a)
    a.wait_to_read()
    assert a.__array__().tolist() == [0, 0, 0]


def test_an_error_that_a_buffer_raised_is_not_raised_in_another_thread(w):
    a = poisoned(w)
    with pytest.raises(MemoryError):
        memoryview(a)
    assert Worker(a.__array__).result().tolist() == [0, 0, 0]


def test_an_array_that_holds_its_own_traceback_is_collected(w):
    def use(mine):
        memoryview(mine)

    a = poisoned(w)
    with pytest.raises(MemoryError):
        use(a)
    alive = weakref.ref(a)
    del a
    gc.collect()
    assert alive() is None


def test_a_forked_childs_calls_on_an_array_raise_closed_error():
    assert_clean(
        run_script(
            """
import os, sys, numpy as np, kvstore
a, b = kvstore.ones(3), kvstore.ones(3, "bfloat16")
view = np.asarray(a)

def calls():
    for call in (a.asnumpy, a.wait_to_read, a.wait_to_write, a.__array__, a.__dlpack__,
                 lambda: np.asarray(a), lambda: np.asarray(b), lambda: memoryview(a),
                 lambda: kvstore.array(a), lambda: kvstore.array(b, "int8"),
                 lambda: np.from_dlpack(a, copy=True)):
        try:
            call()
        except kvstore.ClosedError as error:
            assert "fork" in str(error)
        else:
            raise AssertionError(call)
    assert a.shape == (3,) and len(a) == 3 and a.dtype == np.float32
    assert repr(a) == (
        "kvstore.NDArray(<of the parent process>, shape=(3,), dtype=float32, device=cpu)")
    view[0] = 5
    new = kvstore.array(view)
    assert new.asnumpy().tolist() == [5, 1, 1] == np.asarray(new).tolist()

pid = os.fork()
if pid == 0:
    try:
        calls()
        del a, b, view
    except BaseException as error:
        print(repr(error), file=sys.stderr)
        os._exit(1)
    os._exit(0)
assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
assert view.tolist() == [1, 1, 1] == a.asnumpy().tolist()
"""
        )
    )


def test_arrays_are_used_by_many_threads_at_once(kv):
    kv.init("w", np.zeros(64, np.float32))
    a = kvstore.ones(64)

    def use(i):
        for n in range(100):
            if (i + n) % 4 == 0:
                kv.push("w", a)
            elif (i + n) % 4 == 1:
                np.asarray(a)[:] = 1
            elif (i + n) % 4 == 2:
                assert (kvstore.array(a).asnumpy() == 1).all()
            else:
                assert memoryview(a)[5] == 1

    for worker in [Worker(use, i) for i in range(4)]:
        worker.result()
    assert (a.asnumpy() == 1).all()
