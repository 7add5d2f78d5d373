"""Threads that cannot be started: a call says so, or does without."""

import pytest
from helpers import assert_clean, run_script

import kvstore
from kvstore import _core

THREAD_START = """
import threading
import numpy as np, kvstore
from kvstore import _core

kv = kvstore.create("local")
kv.init(["a", "big"], [np.zeros(3), np.zeros(2_000_000)])
entered, release = threading.Event(), threading.Event()
def updater(key, recv, stored):
    entered.set()
    release.wait()
kv.set_updater(updater)
holder = threading.Thread(target=kv.push, args=("a", np.ones(3)))
holder.start()
entered.wait()
kv.set_updater(None)

met = refused = 0
for nth in range(1, 9):
    _core.fault_set("thread.start", nth)
    try:
        CALL
    except MemoryError:
        refused += 1
    met += _core.fault_set("thread.start", 0) >= nth
assert met >= 1, "no thread was started"
handles = [kv.push("a", np.full(3, 7.0), async_op=True) for _ in range(3)]
release.set()
holder.join()
for handle in handles:
    handle.wait()
assert kv.pull("a").asnumpy().tolist() == [7, 7, 7]
kv.pushpull("big", [np.ones(2_000_000), np.ones(2_000_000)])
kvstore.wait_all()
assert not {n: c for n, c in _core.counters().items() if n in ("tasks", "holds") and c}
"""


@pytest.mark.parametrize(
    "call",
    [
        "kv.push('a', np.ones(3), async_op=True)",
        "kv.push('a', kvstore.ones(3, 'float64'))",
        "kv.pull('a')",
        "kv.push(['big', 'a'], [np.ones(2_000_000), np.ones(3)], async_op=True)",
    ],
)
def test_a_thread_of_the_engine_that_cannot_start_is_a_memory_error(call):
    done = run_script(THREAD_START.replace("CALL", call), KVSTORE_ENGINE="threaded")
    assert_clean(done)


def test_a_sum_goes_on_without_a_thread_that_cannot_start():
    done = run_script(
        """
import numpy as np, kvstore
from kvstore import _core

size = 2_000_000
kv = kvstore.create("local", num_threads=8)
kv.init("big", np.zeros(size))
for nth in range(1, 12):
    _core.fault_set("thread.start", nth)
    try:
        kv.push("big", [np.full(size, float(nth)), np.ones(size)])
    except MemoryError:
        continue
    finally:
        _core.fault_set("thread.start", 0)
    assert (kv.pull("big").asnumpy() == nth + 1).all()
kv.push("big", [np.ones(size), np.ones(size)])
assert (kv.pull("big").asnumpy() == 2).all()
"""
    )
    assert_clean(done)


def test_an_unknown_fault_point_is_refused():
    with pytest.raises(kvstore.InvalidArgumentError, match="nosuch"):
        _core.fault_set("nosuch", 1)
