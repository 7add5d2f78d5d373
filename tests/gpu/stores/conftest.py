"""Tests of stores over CUDA memory. They run in processes of their own, with KVSTORE_CUDA_PLUGIN
set (../test_cuda_stores.py, and on a real device `python tests/run.py gpu`): the core opens a
plug-in once in a process.

On the emulation every test runs for several seeds: each orders what is queued in another way.
"""

import os
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import cuda_tensor as cuda
from left_on_devices import (  # noqa: F401, for pytest looks for them here
    nothing_left_on_devices,
    pytest_report_header,
    pytest_runtest_makereport,
)

SEEDS = int(os.environ.get("KVSTORE_CUDA_SEEDS", "2")) if cuda.emu is not None else 1


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
