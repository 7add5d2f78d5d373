"""What the tests of the store share."""

import contextlib
import os
import re
import subprocess
import sys
import threading
import time

import numpy as np
import pytest

import kvstore

# How long a test waits for something that is due at once: long enough for a loaded machine.
LONG = 30

# What a Python user would catch, by what the store raises.
ALSO = {
    kvstore.KeyNotFoundError: KeyError,
    kvstore.InvalidArgumentError: ValueError,
    kvstore.ArrayTypeError: TypeError,
    kvstore.TimeoutError: TimeoutError,
    kvstore.NotBuiltError: ImportError,
    kvstore.ClosedError: RuntimeError,
}


def pulled(kv, key):
    out = np.empty(kv.shape(key), kv.dtype(key))
    kv.pull(key, out=out)
    return out


def same(a, b):
    """Equal in type, shape and every bit."""
    a, b = np.asarray(a), np.asarray(b)
    return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()


def contents(kv):
    """Type, shape and bytes of every value; of a row-sparse one the bytes of its row ids too."""
    found = {}
    for key in kv.keys():  # noqa: SIM118
        if kv.stype(key) == "row_sparse":
            value = kv.pull(key)
            bytes_ = value.data.tobytes(), value.indices.tobytes()
        else:
            value = pulled(kv, key)
            bytes_ = (value.tobytes(),)
        found[key] = (np.dtype(value.dtype), value.shape, *bytes_)
    return found


def sparse(rows, shape=(6, 2), dtype="float64"):
    """A RowSparse with the rows given as {row id: number or row}."""
    rows = dict(sorted(rows.items()))
    data = [np.broadcast_to(np.asarray(row, dtype), shape[1:]) for row in rows.values()]
    data = np.array(data, dtype).reshape(len(rows), *shape[1:])
    return kvstore.RowSparse(data, np.array(list(rows), np.int64), shape)


def has_rows(array, rows):
    """Whether a RowSparse has exactly the rows {row id: number or row}."""
    rows = dict(sorted(rows.items()))
    data, ids = array.data, array.indices.tolist()
    return ids == list(rows) and all((data[i] == row).all() for i, row in enumerate(rows.values()))


@contextlib.contextmanager
def refused(kv, error, *patterns):
    """The block raises `error`, its message matches every pattern, and the store is as before."""
    before = contents(kv)
    with pytest.raises(error) as info:
        yield
    assert isinstance(info.value, kvstore.KVStoreError)
    assert isinstance(info.value, ALSO[error])
    for pattern in patterns:
        assert re.search(pattern, str(info.value), re.IGNORECASE), (pattern, str(info.value))
    assert contents(kv) == before


class Worker(threading.Thread):
    """A thread whose result, or exception, comes out of `result()`."""

    def __init__(self, function, *args, **kwargs):
        super().__init__(daemon=True)
        self.job = function, args, kwargs
        self.value = self.error = None
        self.start()

    def run(self):
        function, args, kwargs = self.job
        try:
            self.value = function(*args, **kwargs)
        except BaseException as error:
            self.error = error
        finally:
            del self.job

    def result(self):
        self.join(LONG)
        assert not self.is_alive(), "a thread hangs"
        error, self.error = self.error, None
        if error is not None:
            raise error
        return self.value

    def wait_in_call(self, function):
        """Returns when the thread's innermost Python frame has been `function`, at the same
        instruction, for a while: it waits in a C call made there."""
        place, since = None, time.monotonic()
        end = since + LONG
        while time.monotonic() < end:
            assert self.is_alive(), "the call did not wait"
            frame = sys._current_frames().get(self.ident)
            now = (frame.f_code, frame.f_lasti) if frame is not None else None
            del frame
            if now != place or now is None or now[0] is not function.__code__:
                place, since = now, time.monotonic()
            elif time.monotonic() - since > 0.05:
                return
            time.sleep(0.001)
        raise AssertionError("the thread never came to the call")


@contextlib.contextmanager
def held(kv, key):
    """In the block the key is held by an updater of another thread, which leaves it as it is."""
    entered, release = threading.Event(), threading.Event()

    def updater(key, recv, stored):
        entered.set()
        release.wait(LONG)

    kv.set_updater(updater)
    zeros = kvstore.RowSparse.zeros if kv.stype(key) == "row_sparse" else np.zeros
    holder = Worker(kv.push, key, zeros(kv.shape(key), kv.dtype(key)))
    assert entered.wait(LONG)
    kv.set_updater(None)
    try:
        yield release
    finally:
        release.set()
        holder.result()


def run_script(script, *args, timeout=60, **env):
    """Runs a Python script in a process of its own."""
    return subprocess.run(
        [sys.executable, "-X", "faulthandler", "-c", script, *args],
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
        env={**os.environ, **env},
    )


def assert_clean(done):
    """The script succeeded and said nothing on stderr."""
    assert (done.returncode, done.stderr) == (0, ""), done.stdout + done.stderr


# What the scripts about processes and signals start with; KIND is the kind of the store.
PRELUDE = """
import gc, os, signal, sys, threading, time
import numpy as np, kvstore

kv = kvstore.create(KIND)
kv.init(["v", "w"], [np.zeros(3), np.zeros(3)])

def hold(key):
    '''Holds the key in a daemon thread until the event that it returns is set.'''
    entered, release = threading.Event(), threading.Event()
    def updater(key, recv, stored):
        entered.set()
        release.wait()
    kv.set_updater(updater)
    threading.Thread(target=kv.push, args=(key, np.ones(3)), daemon=True).start()
    entered.wait()
    kv.set_updater(None)
    return release
"""


def sparse_ones(*ids):
    return sparse(dict.fromkeys(ids, 1))


def poisoned_rows(kv):
    """A RowSparse whose last write has failed, and nobody has been told."""
    out = sparse_ones(0)
    kvstore._core.fault_set("engine.run", 1)
    with held(kv, "s"):
        kv.pull("s", out=out, ignore_sparse=False)
    while kvstore._core.counters()["tasks"] > 0:
        pass
    assert kvstore._core.fault_set("engine.run", 0) >= 1
    return out
