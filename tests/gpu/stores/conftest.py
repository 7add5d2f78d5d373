"""Tests of stores over CUDA memory. They run in processes of their own, with KVSTORE_CUDA_PLUGIN
set (../test_cuda_stores.py, and on a real device `python tests/run.py gpu`): the core opens a
plug-in once in a process.

On the emulation every test runs for several seeds: each orders what is queued in another way.
"""

import contextlib
import gc
import operator
import os
import sys
import time
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import cuda_tensor as cuda

import kvstore

SEEDS = int(os.environ.get("KVSTORE_CUDA_SEEDS", "2")) if cuda.emu is not None else 1
QUIET_S = 10.0


def pytest_report_header():
    what = "emulated" if cuda.emu is not None else "real"
    return f"CUDA: {cuda.num_devices} {what} devices, {SEEDS} seeds"


def pytest_collection_modifyitems(items):
    for item in items:
        if item.get_closest_marker("emulated") and cuda.emu is None:
            item.add_marker(pytest.mark.skip(reason="asks the emulation, and this is a device"))
        if item.get_closest_marker("devices") and cuda.num_devices < 2:
            item.add_marker(pytest.mark.skip(reason="needs two devices"))


def pytest_configure(config):
    config.addinivalue_line("markers", "emulated: asks the emulation for counts or failures")
    config.addinivalue_line("markers", "devices: needs two devices")


def pytest_generate_tests(metafunc):
    metafunc.parametrize("seed", range(SEEDS))


FAILED = pytest.StashKey[bool]()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    report = yield
    if report.failed:
        item.stash[FAILED] = True
    return report


def count(name):
    return cuda.emu.counter(name) if cuda.emu is not None else 0


def in_use():
    """What consumers hold, and blocks of device memory."""
    kvstore.wait_all()
    return len(cuda.held), count("live_allocations")


@pytest.fixture(autouse=True)
def nothing_left_on_devices(seed, request):
    """A seed's order; in every second one the current streams are no default ones. In the end no
    consumer holds a tensor, no memory of a device is in use, and no mistake was told."""
    if cuda.emu is not None:
        cuda.emu.seed(seed)
    before, mistakes = in_use(), count("mistakes")
    with contextlib.ExitStack() as own:
        for device in range(cuda.num_devices) if seed % 2 == 1 else ():
            own.enter_context(cuda.Stream(device))
        yield
    request.node.funcargs.clear()
    gc.collect()
    if cuda.emu is not None:
        cuda.emu.fail_alloc(0, 0)
    told, deadline = cuda.settle(), time.monotonic() + QUIET_S
    if request.node.stash.get(FAILED, False):
        return  # its traceback keeps its objects alive
    while not (done := all(map(operator.le, in_use(), before))) and time.monotonic() < deadline:
        told += cuda.settle()
    assert told == []
    assert count("mistakes") == mistakes, cuda.emu.report()
    assert done, "tensors or memory of devices are held"
