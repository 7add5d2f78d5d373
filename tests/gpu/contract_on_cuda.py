"""The contract's tests with their values in CUDA memory: a pytest plug-in, `-p contract_on_cuda`,
with KVSTORE_CUDA_PLUGIN set as for the tests of stores/.

The tests stay as they are. Every store that they make hands on CUDA tensors where it is given NumPy
arrays, and what is in the tensors afterwards comes back into the arrays. Left where they are:
arrays that no device takes (strides, other element types), and all that share memory with one.
Of the contract those tests run that have a store of each kind. KVSTORE_TESTS_KINDS names the kinds.
"""

import contextlib
import functools
import itertools
import os
import zlib

import cuda_tensor as cuda
import numpy as np
import pytest
from left_on_devices import (  # noqa: F401, for pytest looks for them here
    nothing_left_on_devices,
    pytest_report_header,
    pytest_runtest_makereport,
)

import kvstore

SEEDS = 16
DEVICES = min(cuda.num_devices, 2)  # with more, NCCL adds in an order of its own
STORES = {"kv", "hasty"}  # the fixtures that are one
KINDS = os.environ.get("KVSTORE_TESTS_KINDS", "device").split()
WITH_OUTS = ("pull", "pushpull", "broadcast")
CALLS = ("init", "push", *WITH_OUTS)
FACES = (cuda.TableTensor, cuda.MethodTensor, cuda.InterfaceTensor)

# Tests that say nothing of CUDA memory, or not as they stand, and why.
AT_ONCE = "a call with CUDA arrays does not return before its turn: only then is its work in order"
LATER = "what was not finite is known after the work: a later call warns"
FRAMES = "looks for the caller's own frame where the one of this file is"
CHANGED = "changes an array in the middle of the call, which is after it was copied to a device"
PYTHON = "an optimizer in Python is for host memory, and refuses CUDA arrays"
LEFT_OUT = {
    "test_async.py": AT_ONCE,
    "test_async.py::test_wait_without_a_number_has_the_stores_timeout": AT_ONCE,
    "test_async.py::test_a_list_call_that_times_out_says_how_far_it_came": (
        "a list with CUDA arrays waits for all its keys, and then begins"
    ),
    "test_compressed_push.py::test_what_is_not_finite_is_warned_of_once_a_key": LATER,
    "test_optimizers.py::test_deleting_a_key_forgets_what_an_optimizer_in_python_keeps": PYTHON,
    "test_row_sparse.py::test_a_pull_skips_row_sparse_outs_with_one_warning_for_a_key": FRAMES,
    "test_row_sparse.py::"
    "test_an_array_that_is_reshaped_while_the_warning_is_shown_is_looked_at_again": CHANGED,
    "test_row_sparse_async.py": AT_ONCE,
    "test_row_sparse_bad.py::test_a_dense_out_in_the_memory_of_a_row_sparse_value_is_refused": (
        "the out's tensor is not in the memory of the rows"
    ),
    "test_threads.py::test_a_key_deleted_by_another_thread_is_unknown_or_still_there": (
        "threads that never pause give the emulation more work than it does"
    ),
    "test_threads.py::test_a_waiting_call_keeps_its_arrays_when_the_list_is_emptied": FRAMES,
    "test_threads.py::test_an_array_reshaped_by_a_later_value_of_the_call_is_seen_as_it_is": (
        CHANGED
    ),
    "test_training_threads.py::"
    "test_a_push_of_an_optimizer_that_was_replaced_meanwhile_finds_other_rows": FRAMES,
    "test_training_threads.py::"
    "test_an_assignment_from_before_the_optimizer_may_replace_the_rows": FRAMES,
    "test_training_threads.py::"
    "test_waiting_states_and_python_optimizers_know_a_key_by_its_number": PYTHON,
    "test_updater_inside.py::test_wait_for_a_handle_queued_behind_the_updater_raises": AT_ONCE,
}


@pytest.fixture
def seed(request):
    """Another order of the work for each test, and the same whenever it runs."""
    return zlib.crc32(request.node.nodeid.encode()) % SEEDS


def pytest_configure(config):
    import inside

    for owner, name in ((kvstore, "create"), (inside.Cluster, "store")):
        setattr(owner, name, on_cuda(getattr(owner, name)))


def on_cuda(make):
    return functools.wraps(make)(lambda *args, **options: Store(make(*args, **options)))


def pytest_collection_modifyitems(config, items):
    kept, left, found = [], [], set()
    for item in items:
        names = {f"{item.path.name}::{item.originalname}"}
        if "kv" in item.fixturenames:
            names.add(item.path.name)
        found |= names
        kinds = [item.callspec.params.get(name) for name in STORES & {*item.fixturenames}]
        out = names & {*LEFT_OUT} or not any(kind in KINDS for kind in kinds)
        (left if out else kept).append(item)
    unknown = {name for name in LEFT_OUT if name.split("::")[0] in found and name not in found}
    if unknown:
        raise pytest.UsageError(f"contract_on_cuda.py leaves out what is not there: {unknown}")
    config.hook.pytest_deselected(items=left)
    items[:] = kept


# --------------------------------------------------------------------------------------- the store


class Store:
    """A store that is given CUDA tensors for NumPy arrays."""

    def __init__(self, store):
        self._store, self._numbers = store, itertools.count()

    def __getattr__(self, name):
        found = getattr(self._store, name)
        return functools.partial(self._call, found) if name in CALLS else found

    def _call(self, call, *arguments, **options):
        moved = Moved((arguments[1:], options), self._numbers)
        try:
            result = call(*arguments[:1], *moved.give(arguments[1:]), **moved.give(options))
            if isinstance(result, kvstore.Handle) and not result.done():
                with contextlib.suppress(kvstore.KVStoreError):
                    result.wait()  # what it raises it raises again
            return result
        finally:
            moved.back(call.__name__ in WITH_OUTS)

    def set_updater(self, updater):
        self._store.set_updater(OnHost(updater) if callable(updater) else updater)

    _set_updater = set_updater

    def __contains__(self, key):
        return key in self._store

    def __enter__(self):
        self._store.__enter__()
        return self

    def __exit__(self, *exception):
        self._store.__exit__(*exception)


class OnHost:
    """An updater for NumPy arrays, as one for CUDA tensors."""

    def __init__(self, updater):
        self.updater = updater

    def __call__(self, key, *given):
        arrays = [each.numpy() if isinstance(each, cuda.Tensor) else each for each in given]
        try:
            return self.updater(key, *arrays)
        finally:
            if isinstance(given[1], cuda.Tensor):
                given[1].fill_(arrays[1].reshape(given[1].shape))


class Moved:
    """The arrays of one call as tensors. Those that share memory share it there too; the others are
    on one device after the other, by `numbers`, and as libraries show them in turn."""

    def __init__(self, given, numbers):
        groups = {}
        for array in leaves(given):
            groups.setdefault(id(owner(array)), []).append(array)
        self.groups = []  # memory, and the arrays there
        self.tensors = {}  # by the array's id
        for group in groups.values():
            if all(map(fits, group)):
                self.move(group, next(numbers))

    def move(self, group, number):
        base = owner(group[0])
        whole = np.ndarray(base.nbytes, np.uint8, base.tobytes("A"))
        memory = cuda.Tensor(whole, number % DEVICES)
        self.groups.append((memory, group))
        for array in group:
            face = FACES[number % len(FACES)] if array.dtype.kind != "V" else FACES[0]
            self.tensors[id(array)] = face.over(
                memory.storage,
                array.shape,
                array.dtype,
                byte_offset=address(array) - address(base),
                readonly=not array.flags.writeable,
            )

    def give(self, given, depth=5):
        """The same nested lists with the tensors in them."""
        if isinstance(given, dict):
            return {name: self.give(each, depth - 1) for name, each in given.items()}
        if isinstance(given, (list, tuple)) and depth > 0:
            return type(given)(self.give(each, depth - 1) for each in given)
        return self.tensors.get(id(given), given)

    def back(self, outs):
        """After the call: what the tensors hold comes back if some are outs. Then they are spoilt,
        in order behind the store's work."""
        for memory, group in self.groups:
            whole = memory.numpy() if outs else None
            for array in group if outs else ():
                offset = self.tensors[id(array)].byte_offset
                there = np.ndarray(array.shape, array.dtype, whole, offset)
                if there.tobytes() != array.tobytes():
                    array[...] = there
            if memory.shape != (0,):
                handle = memory.used().handle
                cuda.call("zero", memory.device, handle, memory.shape[0], memory.pointer)
        self.groups.clear()
        self.tensors.clear()


def leaves(given, depth=5):
    if isinstance(given, dict):
        given = tuple(given.values())
    if type(given) is np.ndarray:
        yield given
    elif isinstance(given, (list, tuple)) and depth > 0:
        for each in given:
            yield from leaves(each, depth - 1)


def owner(array):
    """The array whose memory it is."""
    while isinstance(array.base, np.ndarray):
        array = array.base
    return array


def address(array):
    return array.__array_interface__["data"][0]


def fits(array):
    known = array.dtype.isnative and array.dtype.name in cuda.DTYPES
    return known and array.flags.c_contiguous and owner(array).flags.forc
