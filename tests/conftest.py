"""What every Python test gets: a store of each kind, and the demand to leave nothing behind."""

import gc
import os
import sys
import time

import pytest
from inside import Cluster

import kvstore
from kvstore import _core
from kvstore.cluster import entry

# Set by the sanitizers' runs: PyTorch is much code that no sanitizer has seen.
if os.environ.get("KVSTORE_TESTS_WITHOUT_TORCH"):
    sys.modules["torch"] = None

# These run in processes of their own, which open a plug-in for devices (gpu/test_cuda_stores.py).
if "KVSTORE_CUDA_PLUGIN" not in os.environ:
    collect_ignore = ["gpu/stores"]

KINDS = os.environ.get("KVSTORE_TESTS_KINDS", "local device dist_sync").split()
# Where a store of a dist kind joins, but for tests marked `one_process`. The other files are about
# what servers do not do: updaters, and as yet optimizers and compression.
EVERYWHERE = {
    "test_arrays_in",
    "test_create",
    "test_dlpack",
    "test_dtypes",
    "test_errors",
    "test_init_push_pull",
    "test_layouts",
    "test_lists",
    "test_order",
    "test_row_sparse",
    "test_row_sparse_async",
    "test_row_sparse_bad",
    "test_threads",
}
QUIET_S = 5.0  # how long a worker thread may take to drop the last reference of finished work


def pytest_report_header():
    info = _core.build_info()
    return f"kvstore {kvstore.__version__}: {info['flavour']} build, {_core.__file__}"


def pytest_collection_modifyitems(items):
    """Tests marked `ucx` are left out where stores of a dist kind cannot be made."""
    try:
        entry.check_ucx()
    except kvstore.NotBuiltError as error:
        skip = pytest.mark.skip(reason=str(error))
        for item in items:
            if item.get_closest_marker("ucx"):
                item.add_marker(skip)


def forget_modules():
    """What pytest keeps and what was imported is not looked at again by each of the collections
    below: PyTorch alone makes one take 0.2 s."""
    if len(sys.modules) > FROZEN[-1]:
        FROZEN.append(len(sys.modules))
        gc.collect()
        gc.freeze()


FROZEN = [0]  # how many modules there were


def pytest_collection_finish(session):
    forget_modules()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    report = yield
    if report.failed:
        item.stash[FAILED] = True
    return report


FAILED = pytest.StashKey[bool]()


def left_over(before):
    """What the counters show beyond `before`, or below zero."""
    now = _core.counters()
    return {name: n - before[name] for name, n in now.items() if n > before[name] or n < 0}


@pytest.fixture(autouse=True)
def nothing_left(request):
    """Objects and bytes made by the test are gone after it, and the order of locks was kept."""
    forget_modules()
    gc.collect()
    before, violations = _core.counters(), _core.lock_violations()
    yield
    request.node.funcargs.clear()  # they hold what the fixtures have made
    gc.collect()
    kvstore.wait_all()
    assert _core.lock_violations() == violations, "locks were taken out of order"
    if request.node.stash.get(FAILED, False):
        return  # its traceback keeps its objects alive
    deadline = time.monotonic() + QUIET_S
    while left_over(before) and time.monotonic() < deadline:
        time.sleep(0.001)
    assert not left_over(before), "the test left objects behind"


def pytest_generate_tests(metafunc):
    if "kv" in metafunc.fixturenames:
        everywhere = metafunc.module.__name__ in EVERYWHERE
        local = metafunc.definition.get_closest_marker("one_process") or not everywhere
        kinds = [kind for kind in KINDS if not (local and kind.startswith("dist"))]
        metafunc.parametrize("kv", kinds, indirect=True)


@pytest.fixture
def kv(request):
    """A store of each kind that does what the test asks for; of a dist kind in a cluster inside
    this process."""
    if not request.param.startswith("dist"):
        with kvstore.create(request.param) as store:
            yield store
        return
    with Cluster(1, 2, request.param) as cluster:
        yield cluster.store()
