"""A device that is lost is named, the store closes, and the other one goes on. Each case in a
process of its own: what is lost stays so."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.emulated, pytest.mark.devices]
PRELUDE = """
import sys, gc
sys.path.insert(0, GPU)
import numpy as np
import cuda_tensor as cuda
import kvstore
from kvstore import optimizer

def full(number, device=0):
    return cuda.TableTensor(np.full(4, number, np.float32), device)

def attempt(call, *arguments, **named):
    try:
        call(*arguments, **named)
    except kvstore.KVStoreError as error:
        return f"{type(error).__name__}: {error}"
    return ""

def until_told(call):
    for _ in range(200):
        told = attempt(call)
        if told:
            return told
    raise SystemExit("a device is dead and nobody is told")

cuda.emu.seed(SEED)
kv = kvstore.create("device")
kv.init("zero", full(1))
kv.init("one", full(2, 1))
kv.init("host", np.ones(4, np.float32))
kv.pull("zero").asnumpy(), kv.pull("one").asnumpy()
"""
EPILOGUE = """
kv.push("one", full(7, 1))
assert kv.pull("one").asnumpy().tolist() == [7] * 4
kv.push("host", np.full(4, 3, np.float32))
assert kv.pull("host").asnumpy().tolist() == [3] * 4
kv.close()
with kvstore.create("device") as other:
    other.init("w", full(5, 1))
    assert other.pull("w").asnumpy().tolist() == [5] * 4
    told = attempt(other.init, "dead", np.ones(4, np.float32)) # no device is asked for
    other.push("w", [full(1, 1), full(1, 1)])
    assert other.pull("w").asnumpy().tolist() == [2] * 4
print("survived")
"""


def survives(body, seed, epilogue=EPILOGUE):
    gpu = str(Path(__file__).resolve().parents[1])
    prelude = PRELUDE.replace("GPU", repr(gpu)).replace("SEED", str(seed))
    environ = {**os.environ, "EMU_DEVICES": "2"}
    done = subprocess.run(
        [sys.executable, "-c", prelude + body + epilogue],
        env=environ,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0 and done.stdout.endswith("survived\n"), done.stdout + done.stderr


@pytest.mark.parametrize("n", [0, 1, 3])
def test_a_device_that_dies_is_named(seed, n):
    body = f"""
value = full(3)
kv.set_optimizer(optimizer.SGD(learning_rate=1.0))
cuda.emu.kill_device(0, {n})
told = until_told(lambda: kv.push("zero", [value, value]))
assert told.startswith("DeviceError: ") and "device 0" in told, told
for call in (
    lambda: kv.push("zero", value),
    lambda: kv.pull("zero", out=np.zeros(4, np.float32)),
    lambda: kv.pull("zero", out=value),
):
    told = attempt(call)
    assert told.startswith("DeviceError: ") and "device 0" in told, told
kv.set_updater(None)
"""
    survives(body, seed)


def test_a_store_closes_when_its_device_has_died(seed):
    body = """
out = full(0)
kv.push("zero", full(3))
kv.pull("zero", out=out)
cuda.emu.kill_device(0)
del out
gc.collect()
"""
    survives(body, seed)


def test_a_wait_for_a_device_that_dies_is_told(seed):
    body = """
cuda.current_stream(0).busy(50)
kv.push("zero", [full(1), full(1)])
kv.push("zero", [full(2), full(2)])
cuda.emu.kill_device(0, 1)
told = until_told(lambda: kv.pull("zero", out=np.zeros(4, np.float32)))
assert told.startswith("DeviceError: ") and "device 0" in told, told
"""
    survives(body, seed)


def test_a_push_over_both_devices_tells_of_the_lost_one(seed):
    body = """
cuda.emu.kill_device(0)
value = cuda.TableTensor.over(cuda.Storage(1, 16), (4,), np.float32)
told = attempt(kv.push, "zero", value)
assert told.startswith("DeviceError: ") and "device 0" in told, told
"""
    survives(body, seed)


def test_the_process_ends_in_order_with_work_under_way(seed):
    body = """
cuda.current_stream(0).busy(50)
value = full(3)
kv.push("zero", value)
kv.pull("zero", out=value)
print("survived")
"""
    survives(body, seed, epilogue="")
