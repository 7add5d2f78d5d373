"""For the tests that use CUDA tensors: the order of the work, by a seed, and the demand to leave
nothing on devices. conftest.py of stores/ and contract_on_cuda.py take their fixture and hooks from
here.
"""

import contextlib
import gc
import operator
import time

import cuda_tensor as cuda
import pytest

import kvstore

QUIET_S = 10.0
FAILED = pytest.StashKey[bool]()


def pytest_report_header():
    return f"CUDA: {cuda.num_devices} {'emulated' if cuda.emu is not None else 'real'} devices"


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
def nothing_left_on_devices(seed, request, nothing_left):
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
