"""Every allocation fails once, and the other fault points do: what is left is a store that works.

A scenario prepares a store and then makes one call. The call is made again and again, on a fresh
store each time, with the first, the second, … allocation failing, until it comes through without
meeting the fault. Each time it raises MemoryError, or has found another way and done its work in
full; nothing is half done, unless the error says how far the call came; nothing has leaked (the
`nothing_left` fixture looks at every test's end, `leak_free` after every try); and the next call
works.
"""

import contextlib
import gc
import re
import time

import numpy as np
import pytest
from helpers import LONG, Worker, contents, held, pulled, same, sparse

import kvstore
from kvstore import _core

MOST = 400  # allocations of one call
BIG = 20_000  # elements: enough for the GIL to be dropped


@contextlib.contextmanager
def fault(point, nth):
    """In the block the nth pass of the point fails; gives a function that tells whether it did."""
    _core.fault_set(point, nth)
    passed = []
    try:
        yield lambda: passed[0] >= nth
    finally:
        passed.append(_core.fault_set(point, 0))


@contextlib.contextmanager
def leak_free():
    gc.collect()
    kvstore.wait_all()
    before = _core.counters()
    yield
    gc.collect()
    kvstore.wait_all()
    after = _core.counters()
    assert after == before, {k: after[k] - before[k] for k in after if after[k] != before[k]}


def ones(shape=3, dtype=np.float64):
    return np.ones(shape, dtype)


def adding(kv):
    def updater(key, recv, stored):
        stored += recv

    kv.set_updater(updater)
    return kv


def nd(number=1, size=3):
    return kvstore.full(size, number, "float64")


def rows(number=1, ids=(1, 4), shape=(6, 3)):
    return sparse(dict.fromkeys(ids, number), shape)


def adding_rows(kv):
    def updater(key, recv, stored):
        stored[...] = np.asarray(stored) + np.asarray(recv)

    kv.set_updater(updater)
    return kv


def assign(array):
    for value in (rows(), ones((6, 3)), nd(1, (6, 3)), 0):
        array[:] = value


ROWS = range(6)

# name: (what is done before, the call, the keys that it may change, and what they are then: a
# number for every element, or the rows {row id: number} of a row-sparse key)
SCENARIOS = {
    "init": (None, lambda kv: kv.init("new", ones()), {"new": 1}),
    "init of a list": (
        None,
        lambda kv: kv.init([f"n{i}" for i in range(12)], [ones()] * 12),
        {f"n{i}": 1 for i in range(12)},
    ),
    "init of strided": (None, lambda kv: kv.init("new", ones(6)[::2]), {"new": 1}),
    "init of an NDArray": (None, lambda kv: kv.init("new", nd()), {"new": 1}),
    "broadcast": (None, lambda kv: kv.broadcast("new", ones(), ones()), {"new": 1}),
    "push": (None, lambda kv: kv.push("a", ones()), {"a": 1}),
    "push of many values": (None, lambda kv: kv.push("a", [ones()] * 100), {"a": 100}),
    "push of a list": (None, lambda kv: kv.push(["a", "b"], [ones(), ones()]), {"a": 1, "b": 1}),
    "push of a key twice": (
        None,
        lambda kv: kv.push(["a", "b", "a"], [ones(), [ones()] * 20, ones()]),
        {"a": 2, "b": 20},
    ),
    "push of strided": (None, lambda kv: kv.push("a", [ones(6)[::2], ones()]), {"a": 2}),
    "push of a buffer": (None, lambda kv: kv.push("a", memoryview(ones())), {"a": 1}),
    "push of a large value": (None, lambda kv: kv.push("big", [ones(BIG)] * 3), {"big": 3}),
    "push of an NDArray": (None, lambda kv: kv.push("a", nd()), {"a": 1}),
    "push of NDArrays": (
        None,
        lambda kv: kv.push(["a", "b"], [[nd(), nd()], nd()]),
        {"a": 2, "b": 1},
    ),
    "push of a large NDArray": (None, lambda kv: kv.push("big", nd(1, BIG)), {"big": 1}),
    "async push": (None, lambda kv: kv.push("a", ones(), async_op=True).wait(), {"a": 1}),
    "async push of a list": (
        None,
        lambda kv: kv.push(["a", "b", "c"], [ones(), ones(6)[::2], [ones()] * 9], async_op=True),
        {"a": 1, "b": 1, "c": 9},
    ),
    "push with an updater": (adding, lambda kv: kv.push("a", ones()), {"a": 1}),
    "push of a list with an updater": (
        adding,
        lambda kv: kv.push(["a", "b"], [[ones()] * 40, nd()]),
        {"a": 40, "b": 1},
    ),
    "async push with an updater": (
        adding,
        lambda kv: kv.push("a", ones(), async_op=True).wait(),
        {"a": 1},
    ),
    "pushpull": (None, lambda kv: kv.pushpull("a", ones(), out=ones()), {"a": 1}),
    "pushpull of NDArrays": (None, lambda kv: kv.pushpull("a", nd(), out=nd()), {"a": 1}),
    "pushpull with an updater": (
        adding,
        lambda kv: kv.pushpull(["a", "b"], [ones(), nd()], out=[nd(), ones(6)[::2]]),
        {"a": 1, "b": 1},
    ),
    "pull": (None, lambda kv: kv.pull("a", out=ones()), {}),
    "pull of a list": (None, lambda kv: kv.pull(["a", "b"], out=[ones(), [ones(), nd()]]), {}),
    "pull into strided": (None, lambda kv: kv.pull("a", out=ones(6)[::2]), {}),
    "pull without out": (None, lambda kv: kv.pull("a").asnumpy(), {}),
    "pull of a list without out": (None, lambda kv: kv.pull(["a", "b", "big"]), {}),
    "set_updater": (None, lambda kv: adding(kv).push("a", ones()), {"a": 1}),
    "delete": (None, lambda kv: kv.delete("c"), {"c": None}),
    "keys": (None, lambda kv: kv.keys(), {}),
    "describe": (None, lambda kv: (kv.shape("a"), kv.dtype("a"), kv.stype("a"), "a" in kv), {}),
    "a store": (None, lambda kv: kvstore.create("device", num_threads=2).close(), {}),
    "arrays": (
        None,
        lambda kv: (nd(), kvstore.zeros(3), kvstore.array(ones(6)[::2]), kvstore.empty((2, 2))),
        {},
    ),
    "views of an array": (
        None,
        lambda kv: (np.asarray(nd()), memoryview(nd()), np.from_dlpack(nd()), nd().asnumpy()),
        {},
    ),
    "wait_all": (None, lambda kv: kvstore.wait_all(), {}),
    "init of rows": (None, lambda kv: kv.init("new", rows()), {"new": {1: 1, 4: 1}}),
    "broadcast of rows": (
        None,
        lambda kv: kv.broadcast(["new", "more"], [rows(), ones()], [[ones((6, 3)), rows()], nd()]),
        {"new": {1: 1, 4: 1}, "more": 1},
    ),
    "push of rows": (None, lambda kv: kv.push("s", rows()), {"s": {1: 1, 4: 1}}),
    "push of more rows": (
        None,
        lambda kv: kv.push("s", [rows(1, ROWS), rows(0, ROWS), rows(0, [])]),
        {"s": dict.fromkeys(ROWS, 1)},
    ),
    "push of many row-sparse values": (
        None,
        lambda kv: kv.push("s", [rows(1, [i]) for i in ROWS] * 10),
        {"s": dict.fromkeys(ROWS, 10)},
    ),
    "push of rows to a dense key": (
        None,
        lambda kv: kv.push("t", [rows(1, [i]) for i in ROWS]),
        {"t": 1},
    ),
    "push of a list with rows": (
        None,
        lambda kv: kv.push(["s", "a", "t", "s"], [rows(), ones(), rows(1, ROWS), rows(2)]),
        {"s": {1: 3, 4: 3}, "a": 1, "t": 1},
    ),
    "push of rows in the user's memory": (
        None,
        lambda kv: kv.push("s", kvstore.RowSparse(ones((1, 3)), [2], (6, 3), copy=False)),
        {"s": {2: 1}},
    ),
    "async push of rows": (
        None,
        lambda kv: kv.push("s", [rows(), rows(2)], async_op=True),
        {"s": {1: 3, 4: 3}},
    ),
    "push of rows with an updater": (
        adding_rows,
        lambda kv: kv.push("s", [rows(), rows()]),
        {"s": {0: 5, 1: 2, 4: 2}},
    ),
    "push of a list of rows with an updater": (
        adding_rows,
        lambda kv: kv.push(["s", "t"], [rows(), [rows(1, [i]) for i in ROWS]]),
        {"s": {0: 5, 1: 1, 4: 1}, "t": 1},
    ),
    "pushpull of rows": (
        None,
        lambda kv: kv.pushpull("s", [rows(), rows(1, [4])], out=[rows(), ones((6, 6))[:, ::2]]),
        {"s": {1: 1, 4: 2}},
    ),
    "pushpull of rows in place": (
        None,
        lambda kv: kv.pushpull("t", [rows(1, ROWS), rows(0, ROWS)]),
        {"t": 1},
    ),
    "pushpull of rows with an updater": (
        adding_rows,
        lambda kv: kv.pushpull(
            "s", [rows(), rows()], out=[rows(), ones((6, 3)), nd(1, (6, 3)), rows()]
        ),
        {"s": {0: 5, 1: 2, 4: 2}},
    ),
    "pull of rows": (
        None,
        lambda kv: kv.pull(
            ["s", "t", "s"],
            out=[[rows(), ones((6, 3))], rows(), ones((3, 6)).T],
            ignore_sparse=False,
        ),
        {},
    ),
    "pull of rows without out": (None, lambda kv: kv.pull(["s", "a"])[0].data, {}),
    "row_sparse_pull": (
        None,
        lambda kv: kv.row_sparse_pull("s", out=rows(), row_ids=np.array([4, 0, 4])),
        {},
    ),
    "row_sparse_pull of a list": (
        None,
        lambda kv: kv.row_sparse_pull(
            ["s", "t", "s"],
            out=[rows(), [rows(), rows()], rows()],
            row_ids=[list(ROWS), [[1, 2], np.array([3], np.uint16)], np.arange(6)[::2]],
        ),
        {},
    ),
    "async row_sparse_pull": (
        None,
        lambda kv: kv.row_sparse_pull(
            ["s", "t"], out=[rows(), rows()], row_ids=np.arange(6, dtype=np.int8), async_op=True
        ),
        {},
    ),
    "row_sparse_pull without out": (
        None,
        lambda kv: kv.row_sparse_pull(["s", "t"], row_ids=[5, 0])[1].data,
        {},
    ),
    "row-sparse arrays": (
        None,
        lambda kv: (
            rows(),
            rows(1, []),
            kvstore.RowSparse(ones((2, 6))[:, ::2], np.array([0, 3], np.int32), (6, 3)),
            kvstore.RowSparse(ones((2, 3)), [0, 3], (6, 3), copy=False),
            kvstore.RowSparse(nd(1, (2, 3)), kvstore.array(np.array([1, 5])), (6, 3)),
            kvstore.RowSparse.zeros((6, 3)),
            kvstore.RowSparse.from_dense(ones((6, 3))[::-1]),
            kvstore.RowSparse.from_dense(nd(1, (6, 3))),
        ),
        {},
    ),
    "views of rows": (
        None,
        lambda kv: (rows().data, rows().indices, rows().asnumpy(), rows().copy(), repr(rows())),
        {},
    ),
    "assignment of rows": (None, lambda kv: assign(rows()), {}),
}


def store(kind):
    kv = kvstore.create(kind)
    for key in "abc":
        kv.init(key, np.zeros(3))
    kv.init("big", np.zeros(BIG))
    kv.init(["s", "t"], [rows(5, [0]), np.zeros((6, 3))])
    return kv


def works_on(kv):
    kv.set_updater(None)
    kv.push(["a", "big"], [[ones(), ones()], np.full(BIG, 5.0)])
    kv.push("b", nd(7))
    out = nd()
    kv.pull("b", out=out)
    kv.init("later", ones())
    kv.delete("later")
    assert pulled(kv, "a").tolist() == [2, 2, 2]
    assert out.asnumpy().tolist() == [7, 7, 7]
    assert (pulled(kv, "big") == 5).all()
    kv.push(["s", "t"], [rows(3), [rows(3), rows(4, [5])]])
    assert pulled(kv, "s")[:, 0].tolist() == [0, 3, 0, 0, 3, 0]
    found = kv.row_sparse_pull("t", row_ids=[5, 1, 0])
    assert found.data[:, 0].tolist() == [0, 3, 4]


def is_done(before, after, key, result):
    """Whether the key is as the call makes it (True), as it was before (False), or an error."""
    if result is None:
        return key not in after
    if after.get(key) == before.get(key):
        return False
    dtype, shape, data, *ids = after[key]
    if ids:
        assert np.frombuffer(ids[0], np.int64).tolist() == list(result), key
        shape = (len(result), *shape[1:])
        result = np.array(list(result.values()))[:, None]
    values = np.frombuffer(data, dtype).reshape(shape)
    assert same(values, np.broadcast_to(result, shape).astype(dtype)), key
    return True


def tells_progress(error, done):
    """Whether the error of a call that has changed something says so, and in a list how much."""
    if hasattr(error, "updated_keys"):
        return list(error.updated_keys) == [key for key in done if done[key]]
    if "the call has initialised its keys" in str(error):
        return all(done.values())
    if len(done) == 1:
        return "the value was updated" in str(error)
    return re.search(rf"\b{sum(done.values())} of (its )?{len(done)}\b", str(error))


def tried(kv, call, changes, point, nth):
    """Makes the call with a fault; whether the fault was met."""
    before = contents(kv)
    error = None
    with fault(point, nth) as met:
        try:
            result = call(kv)
            if isinstance(result, kvstore.Handle):
                result.wait()
            del result
            kvstore.wait_all()
        except MemoryError as raised:
            error = raised.with_traceback(None)
    kvstore.wait_all()
    after = contents(kv)
    done = {key: is_done(before, after, key, result) for key, result in changes.items()}
    others = [key for key in before if key not in changes]
    assert [after.get(k) for k in others] == [before[k] for k in others]
    assert set(after) <= set(before) | set(changes)
    if error is None:
        assert all(done.values()), "the call succeeded and did not do all of its work"
    elif any(done.values()):
        assert tells_progress(error, done), (error, done)
    else:
        assert not re.search("was updated|has initialised", str(error)), error
    assert met() or error is None
    return met()


def until_not_met(attempt):
    """Calls attempt(nth) for nth = 1, 2, … until it tells that the fault was not met."""
    for nth in range(1, MOST):
        with leak_free():
            met = attempt(nth)
        if not met:
            return
    raise AssertionError(f"still failing at allocation {nth}")


@pytest.mark.parametrize("kind", ["local", "device"])
@pytest.mark.parametrize("name", SCENARIOS)
def test_any_allocation_may_fail(kind, name):
    prepare, call, changes = SCENARIOS[name]

    def attempt(nth):
        with store(kind) as kv:
            if prepare is not None:
                prepare(kv)
            met = tried(kv, call, changes, "alloc", nth)
            works_on(kv)
        return met

    until_not_met(attempt)


A = range(3)  # all rows of the key 'a'
QUEUED = {
    "NDArray": lambda kv: kv.push("a", nd(4)),
    "async": lambda kv: kv.push("a", np.full(3, 4.0), async_op=True),
    "async strided": lambda kv: kv.push("a", np.full(6, 4.0)[::2], async_op=True),
    "async pushpull": lambda kv: kv.pushpull("a", np.full(3, 4.0), out=ones(), async_op=True),
    "pull": lambda kv: kv.pull("a"),
    "pull into an NDArray": lambda kv: kv.pull("a", out=nd()),
    "async list": lambda kv: kv.push(["b", "a"], [np.zeros(3), np.full(3, 4.0)], async_op=True),
    "async rows": lambda kv: kv.push("a", [rows(1, A, (3,)), rows(3, A, (3,))], async_op=True),
    "rows": lambda kv: kv.push("a", rows(4, A, (3,))),
    "pull into rows": lambda kv: kv.pull("a", out=rows(4, A, (3,)), ignore_sparse=False),
    "row_sparse_pull": lambda kv: kv.row_sparse_pull("a", row_ids=[2, 1]),
    "init of another key": lambda kv: kv.init("z", ones()) or kv.delete("z"),
}


@pytest.mark.parametrize("name", QUEUED)
def test_any_allocation_of_a_queued_operation_may_fail(name):
    pushes = "push" in name or name.startswith(("NDArray", "async", "rows"))

    def attempt(nth):
        error = result = None
        with store("local") as kv:
            with held(kv, "a"), fault("alloc", nth) as met:
                try:
                    result = QUEUED[name](kv)
                except MemoryError as raised:
                    error = raised.with_traceback(None)
            if isinstance(result, kvstore.Handle):
                try:
                    result.wait()
                except MemoryError as raised:
                    error = raised.with_traceback(None)
            kvstore.wait_all()
            assert pulled(kv, "a").tolist() == (
                [4, 4, 4] if pushes and error is None else [0, 0, 0]
            )
            assert met() or error is None
            works_on(kv)
        return met()

    until_not_met(attempt)


WAITING = {
    "push": lambda kv: kv.push("a", np.full(3, 4.0)),
    "pull": lambda kv: kv.pull("a", out=ones()),
    "list": lambda kv: kv.push(["a", "b"], [np.full(3, 4.0), np.zeros(3)]),
}


@pytest.mark.parametrize("name", WAITING)
def test_any_allocation_of_a_waiting_call_may_fail(name):
    def attempt(nth):
        error = None
        with store("local") as kv:
            with held(kv, "a") as release, fault("alloc", nth) as met:
                worker = Worker(WAITING[name], kv)
                release.set()
                try:
                    worker.result()
                except MemoryError as raised:
                    error = raised.with_traceback(None)
            done = error is None and name != "pull"
            assert pulled(kv, "a").tolist() == ([4, 4, 4] if done else [0, 0, 0])
            works_on(kv)
        return met()

    until_not_met(attempt)


# ------------------------------------------------------------------- operations that fail later


@pytest.fixture
def kv_():
    with store("local") as kv:
        yield kv


def queue(kv, call):
    """Makes a call, the first of whose operations behind the held key fails; returns when it has.

    Other keys of the call run in this thread at once, or the fault would be theirs.
    """
    _core.fault_set("engine.run", 1)
    with held(kv, "a"):
        result = call()
    end = time.monotonic() + LONG
    while _core.counters()["tasks"] > 0:
        assert time.monotonic() < end, "the operation does not end"
        time.sleep(0.001)
    assert _core.fault_set("engine.run", 0) >= 1
    return result


def test_a_failed_operation_is_reported_by_its_handle_and_then_by_nobody_else(kv_):
    handle = queue(kv_, lambda: kv_.push("a", ones(), async_op=True))
    assert handle.done()
    for _ in range(2):
        with pytest.raises(MemoryError):
            handle.wait()
        assert isinstance(handle.exception(), MemoryError)
    kvstore.wait_all()
    assert pulled(kv_, "a").tolist() == [0, 0, 0]
    works_on(kv_)


def test_a_failed_operation_without_a_handle_is_reported_once_at_the_next_wait_on_its_key(kv_):
    queue(kv_, lambda: kv_.push("a", nd()))
    with pytest.raises(MemoryError):
        pulled(kv_, "a")
    assert pulled(kv_, "a").tolist() == [0, 0, 0]
    kvstore.wait_all()
    works_on(kv_)


def test_a_failed_operation_whose_handle_was_dropped_is_reported_by_its_key(kv_):
    queue(kv_, lambda: kv_.push("a", ones(), async_op=True) and None)
    with pytest.raises(MemoryError):
        pulled(kv_, "a")
    works_on(kv_)


def test_a_failed_operation_is_reported_once_by_wait_all(kv_):
    queue(kv_, lambda: kv_.push("a", nd()))
    with pytest.raises(MemoryError):
        kvstore.wait_all()
    kvstore.wait_all()
    assert pulled(kv_, "a").tolist() == [0, 0, 0]
    works_on(kv_)


def test_a_failed_pull_poisons_its_out_until_it_is_written_again(kv_):
    out = nd(9)
    queue(kv_, lambda: kv_.pull("a", out=out))
    with pytest.raises(MemoryError):
        out.asnumpy()
    kv_.pull("a", out=out)
    assert out.asnumpy().tolist() == [0, 0, 0]
    kvstore.wait_all()
    works_on(kv_)


def test_an_operation_that_reads_a_poisoned_array_fails_too(kv_):
    out = nd(9)
    queue(kv_, lambda: kv_.pull("a", out=out))
    with pytest.raises(MemoryError):
        kv_.push("b", out, async_op=True).wait()
    with contextlib.suppress(MemoryError):
        kvstore.wait_all()
    assert pulled(kv_, "b").tolist() == [0, 0, 0]
    works_on(kv_)


def test_a_failed_operation_does_not_stop_the_other_keys_of_its_call(kv_):
    handle = queue(kv_, lambda: kv_.push(["b", "a", "c"], [ones(), ones(), ones()], async_op=True))
    with pytest.raises(MemoryError):
        handle.wait()
    assert [pulled(kv_, k)[0] for k in "abc"] == [0, 1, 1]
    works_on(kv_)


def test_later_operations_on_the_key_of_a_failed_one_run(kv_):
    def call():
        handles = [kv_.push("a", ones(), async_op=True)]
        handles.append(kv_.push("a", np.full(3, 2.0), async_op=True))
        return handles

    failed, good = queue(kv_, call)
    with pytest.raises(MemoryError):
        failed.wait()
    good.wait()
    assert pulled(kv_, "a").tolist() == [2, 2, 2]
    works_on(kv_)


def test_errors_that_nobody_asks_for_are_dropped_with_their_objects():
    def fail(kv):
        kv.push("a", nd())
        kv.pull("a", out=nd(9))

    def fail_and_forget():
        with store("local") as kv:
            queue(kv, lambda: fail(kv))

    with leak_free():
        fail_and_forget()
        with contextlib.suppress(MemoryError):
            kvstore.wait_all()
