"""What goes wrong in a store of kind `nccl` is told, by every later call too where values may be
wrong, and the process goes on."""

import ctypes.util
import os
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import cuda_tensor as cuda
import numpy as np
import pytest
from check_order import full, is_full
from nccl_twin import ALL, emu

import kvstore
from kvstore import optimizer

pytestmark = [pytest.mark.emulated, pytest.mark.devices]
SHORT = 0.3


@pytest.fixture(autouse=True)
def no_faults():
    yield
    for what in ("init", "init never", "call", "put", "put never", "work never", "async"):
        emu.fault(what, 0)


def given(number=1):
    return [full(number, d) for d in ALL]


def store_of(**options):
    kv = kvstore.create("nccl", **options)
    kv.init(["w", "v"], [full(7), full(7)])
    return kv


def refuses_all(kv, *patterns):
    """Each call names what was lost, without waiting."""
    began = time.monotonic()
    for call in (
        lambda: kv.push("w", given()),
        lambda: kv.push("w", full(1)),
        lambda: kv.push("v", np.ones(50, np.float32)),
        lambda: kv.push(["v", "w"], [given(), given()]),
        lambda: kv.pull("w", out=np.zeros(50, np.float32)),
        lambda: kv.pull("w", out=given()),
        lambda: kv.pushpull("v", given()),
    ):
        with pytest.raises(kvstore.DeviceError) as info:
            call()
        for pattern in patterns:
            assert pattern in str(info.value)
        del info
    assert time.monotonic() - began < 60


def works(kv, before=7):
    assert is_full(kv.pull("w"), before)
    outs = given(0)
    kv.push(["w", "v"], [given(2), given(3)])
    kv.pull("w", out=outs)
    assert all(is_full(out, 2 * len(ALL)) for out in outs)
    assert is_full(kv.pull("v"), 3 * len(ALL))


# ---------------------------------------------------------------------------------- the beginning


@pytest.mark.skipif(
    ctypes.util.find_library("nccl") is not None, reason="the system of this machine has NCCL"
)
def test_without_nccl_a_store_says_what_to_install():
    script = """if True:
        import kvstore
        import kvstore._about
        kvstore._about.nccl_folder = lambda: None
        try:
            kvstore.create("nccl")
        except kvstore.NotBuiltError as error:
            print(error)
        with kvstore.create("device"):
            pass
    """
    env = {name: text for name, text in os.environ.items() if name != "KVSTORE_NCCL"}
    told = subprocess.run(
        [sys.executable, "-c", script], env=env, capture_output=True, text=True, timeout=120
    )
    assert told.stderr == ""
    assert told.stdout.startswith("a store of kind 'nccl' cannot be had here: NCCL is not on this")
    assert "pip install nvidia-nccl-cu12" in told.stdout and "'device'" in told.stdout


def test_devices_that_do_not_begin_are_told_of_and_the_next_push_begins_again():
    with store_of() as kv:
        emu.fault("init")
        with pytest.raises(kvstore.DeviceError, match=r"'w'.*NCCL could not begin on devices 0"):
            kv.push("w", given())
        works(kv)


def test_a_beginning_that_never_ends_is_over_by_the_timeout():
    with store_of(timeout=SHORT) as kv:
        emu.fault("init never")
        with pytest.raises(kvstore.TimeoutError, match=r"'w'.*NCCL could not begin on devices 0"):
            kv.push("w", given())
    with store_of() as kv:
        works(kv)


# ------------------------------------------------------------------------------------------- a push


@pytest.mark.parametrize("what", ["call", "put"])
@pytest.mark.parametrize("n", [1, 2])
def test_a_sum_that_fails_loses_the_devices(what, n):
    with store_of() as kv:
        works(kv)
        emu.fault(what, n)
        with pytest.raises(kvstore.DeviceError, match="NCCL could not sum on devices 0"):
            kv.push(["w", "v"], [given(), given()])
        refuses_all(kv, "lost to this store", "make a new one", "asked for")
    with store_of() as kv:
        works(kv)


def test_a_sum_that_is_never_put_is_over_by_the_timeout():
    with store_of(timeout=SHORT) as kv:
        kv.push("w", given())
        emu.fault("put never")
        with pytest.raises(kvstore.TimeoutError, match="NCCL could not sum on devices 0"):
            kv.push("w", given())
        refuses_all(kv, "lost to this store", "make a new one")


@pytest.mark.parametrize("waits", ["pull", "pushpull"])
def test_devices_that_never_end_are_stopped_by_the_timeout(waits):
    with store_of(timeout=SHORT) as kv:
        kv.push("w", given())
        emu.fault("work never")
        out = np.zeros(50, np.float32)
        with pytest.raises(kvstore.TimeoutError, match="has not come to the end of its work"):
            if waits == "pull":
                kv.push("w", given())
                kv.pull("w", out=out)
            else:
                kv.pushpull("w", given(), out=out)
        refuses_all(kv, "lost to this store", "has not come to the end of its work")
    cuda.emu.run_all()
    with store_of() as kv:
        works(kv)


@pytest.mark.parametrize("n", [1, len(ALL), len(ALL) + 1, 2 * len(ALL)])
def test_an_error_that_comes_later_is_no_number(n):
    """Asked for the state, before the pull and after it, a communicator finds its peer gone."""
    with store_of() as kv:
        kv.push("w", given())
        out = np.zeros(50, np.float32)
        emu.fault("async", n)
        with pytest.raises(kvstore.DeviceError, match="the peer is gone"):
            kv.pull("w", out=out)
        refuses_all(kv, "lost to this store", "the peer is gone")


def test_a_wait_for_something_else_loses_nothing():
    """A pull that waits in vain for an updater; the devices are idle."""
    inside, go_on = threading.Event(), threading.Event()

    def wait(key, recv, stored):
        inside.set()
        go_on.wait(60)

    with store_of(timeout=SHORT) as kv:
        works(kv)
        kv.set_updater(wait)
        thread = threading.Thread(target=kv.push, args=("w", full(1)))
        thread.start()
        assert inside.wait(60)
        with pytest.raises(kvstore.TimeoutError):
            kv.pull("w", out=np.zeros(50, np.float32))
        go_on.set()
        thread.join()
        kv.set_updater(None)
        works(kv, 2 * len(ALL))


def test_another_store_lives_when_one_is_lost():
    with store_of() as one, store_of() as other:
        works(one)
        works(other)
        emu.fault("call")
        with pytest.raises(kvstore.DeviceError):
            one.push("w", given())
        refuses_all(one, "lost to this store")
        works(other, 2 * len(ALL))


def test_a_store_that_is_lost_closes_at_once():
    kv = store_of(timeout=SHORT)
    kv.push("w", given())
    emu.fault("work never")
    kv.push("w", given())
    with pytest.raises(kvstore.TimeoutError):
        kv.pull("w", out=np.zeros(50, np.float32))
    before = time.monotonic()
    kv.close()
    assert time.monotonic() - before < 5
    assert emu.counter("live") == 0


# ------------------------------------------------------------------------------------ out of memory


def states_of(kv, key):
    """What each device has."""
    outs = given(0)
    kv.pull(key, out=outs)
    return [out.numpy().tobytes() for out in outs]


@pytest.mark.parametrize("rule", [None, "sgd", "adam"])
def test_without_memory_a_push_is_told_of_and_all_devices_stay_the_same(rule):
    """Each allocation fails once. Nothing has changed then, and the push is done again."""

    def calls(kv):
        """The names of those that failed."""
        failed = []
        for number, name in enumerate(("first", "second", "list", "pushpull")):
            keys, values = ["w", "v"], [given(number + 1), given(number + 2)]
            outs = [given(0), given(0)]
            for attempt in range(2):
                try:
                    if name == "list":
                        kv.push(keys, values)
                    elif name == "pushpull":
                        kv.pushpull(keys, values, out=outs)
                    else:
                        kv.push("w", values[0])
                    break
                except (kvstore.DeviceError, MemoryError) as error:
                    assert attempt == 0 and ("memory" in str(error) or "alloc" in str(error))
                    failed.append((name, str(error)))
            for key in keys:
                assert len({*states_of(kv, key)}) == 1, (name, key, failed)
        return failed

    def made():
        kv = store_of()
        if rule is not None:
            kv.set_optimizer(optimizer.create(rule, learning_rate=0.25))
        return kv

    def allocations():
        return cuda.emu.counter("cudaMallocFromPoolAsync") + cuda.emu.counter("cudaHostAlloc")

    kv = made()
    assert calls(kv) == []
    wanted, failures = [states_of(kv, key) for key in "wv"], 0
    kv.close()
    for n in range(1, 1000):
        kv = made()
        before = allocations()
        cuda.emu.fail_alloc(n, 2)  # the second is the one after the pool was trimmed
        try:
            failed = calls(kv)
        except cuda.CudaError:  # the test's own tensors need memory too
            failed = None
        done = allocations() - before
        cuda.emu.fail_alloc(0, 0)
        if failed is not None:
            assert [states_of(kv, key) for key in "wv"] == wanted, (n, failed)
            failures += len(failed)
        kv.close()
        if done < n:
            break
    else:
        raise AssertionError("each of a thousand allocations was needed")
    assert failures > 5


# --------------------------------------------------------------------------- a device that is lost

PRELUDE = """
import sys, gc
sys.path[:0] = PATHS
import numpy as np
import cuda_tensor as cuda
import kvstore
from kvstore import optimizer

def given(number=1):
    return [cuda.TableTensor(np.full(4, number, np.float32), d) for d in range(2)]

def attempt(call, *arguments, **named):
    try:
        call(*arguments, **named)
    except kvstore.KVStoreError as error:
        return f"{type(error).__name__}: {error}"
    return ""

cuda.emu.seed(SEED)
kv = kvstore.create("nccl", timeout=5)
kv.init(["w", "v"], [given(7)[0], given(7)[0]])
kv.set_optimizer(optimizer.SGD(learning_rate=1.0, momentum=0.5))
kv.push(["w", "v"], [given(), given()])
values, outs, host = given(2), given(0), np.zeros(4, np.float32)
kv.pull("w", out=host)
assert host.tolist() == [5] * 4
"""
EPILOGUE = """
def told_now(call):
    told = attempt(call)
    assert told.startswith("DeviceError: ") and f"device {dead}" in told, told

for call in (
    lambda: kv.push("w", values),
    lambda: kv.pull("w", out=host),
    lambda: kv.pull("v", out=outs[1 - dead]),
    lambda: kv.pull("w", out=outs),
    lambda: kv.pushpull("v", values),
):
    told_now(call)
kv.close()
with kvstore.create("device") as other:
    other.init("w", np.full(4, 5, np.float32))
    one = cuda.TableTensor.over(values[1 - dead].storage, (4,), np.float32)
    other.push("w", one)
    assert other.pull("w").asnumpy().tolist() == [2] * 4
del kv
gc.collect()
print("survived")
"""


@pytest.mark.parametrize("dead", [0, 1])
@pytest.mark.parametrize("n", [0, 1, 3])
@pytest.mark.parametrize("way", ["push", "host", "other"])
def test_a_device_that_dies_is_named_by_every_call(seed, dead, n, way):
    """Also by pulls from the other device: its copy may have got half a sum."""
    body = f"""
        dead, way = {dead}, {way!r}
        cuda.emu.kill_device(dead, {n})
        told = ""
        for number in range(200):
            if way == "push" or number < 4:
                told = told or attempt(kv.push, "w", values)
            if way != "push":
                told = told or attempt(kv.pull, "w", out=host if way == "host" else outs[1 - dead])
        assert told.startswith("DeviceError: ") and f"device {{dead}}" in told, told
    """
    here = Path(__file__).resolve().parent
    prelude = PRELUDE.replace("PATHS", repr([str(here), str(here.parent)]))
    code = prelude.replace("SEED", str(seed)) + textwrap.dedent(body) + EPILOGUE
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "EMU_DEVICES": "2"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0 and done.stdout.endswith("survived\n"), done.stdout + done.stderr
