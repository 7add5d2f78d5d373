"""When calls on row-sparse values return, what waits for them, and many threads on one key."""

import gc
import weakref

import numpy as np
import pytest
from helpers import Worker, has_rows, held, pulled, same, sparse

import kvstore

SHAPE = (6, 2)


def zeros():
    return kvstore.RowSparse.zeros(SHAPE, "float64")


@pytest.fixture
def s(kv):
    kv.init("s", sparse({1: 10, 4: 40}))
    return kv


CALLS = {
    "push": lambda kv, out: kv.push("s", sparse({2: 5}), async_op=True),
    "pull": lambda kv, out: kv.pull("s", out=out, ignore_sparse=False, async_op=True),
    "pushpull": lambda kv, out: kv.pushpull("s", sparse({2: 5}), out=out, async_op=True),
    "row_sparse_pull": lambda kv, out: kv.row_sparse_pull(
        "s", out=out, row_ids=np.array([4, 2]), async_op=True
    ),
}
OUTS = {"pull": {1: 10, 4: 40}, "pushpull": {2: 5}, "row_sparse_pull": {2: 0, 4: 40}}


@pytest.mark.parametrize("call", CALLS)
def test_async_op_gives_a_handle_of_a_call_that_gets_done(s, call):
    out = sparse({5: 9})
    handle = CALLS[call](s, out)
    assert isinstance(handle, kvstore.Handle)
    handle.wait()
    assert has_rows(out, OUTS.get(call, {5: 9}))
    assert has_rows(s.pull("s"), {2: 5} if "push" in call else {1: 10, 4: 40})


@pytest.mark.one_process
@pytest.mark.parametrize("call", CALLS)
def test_async_op_returns_at_once_while_the_key_is_held(kv, call):
    kv.init("s", sparse({1: 10, 4: 40}))
    out = sparse({5: 9})
    with held(kv, "s") as release:
        handle = CALLS[call](kv, out)
        assert not handle.done()
        release.set()
        handle.wait()
    assert has_rows(out, OUTS.get(call, {5: 9}))


def test_broadcast_with_async_op_gives_a_handle(kv):
    out = zeros()
    kv.broadcast("s", sparse({1: 1}), out, async_op=True).wait()
    assert has_rows(out, {1: 1})


def test_a_list_call_has_one_handle(s):
    s.init("d", np.zeros(SHAPE))
    outs = [zeros(), np.empty(SHAPE)]
    values = [sparse({1: 2}), [sparse({2: 3}), sparse({2: 1})]]
    s.pushpull(["s", "d"], values, out=outs, async_op=True).wait()
    assert has_rows(outs[0], {1: 2})
    assert outs[1][2].tolist() == [4, 4]


@pytest.mark.one_process
def test_a_push_of_row_sparse_arrays_returns_at_once_and_holds_them(s):
    with held(s, "s"):
        value = sparse({2: 5})
        gone = weakref.ref(value)
        s.push("s", [value, sparse({3: 6})])
        s.push("s", [value, sparse({3: 7})])
        del value
        gc.collect()
    assert has_rows(s.pull("s"), {2: 5, 3: 7})
    assert gone() is None


@pytest.mark.one_process
def test_a_row_sparse_out_is_waited_for_when_it_is_read(s):
    def later():
        s.pull("s", out=outs[0], ignore_sparse=False)
        s.row_sparse_pull("s", out=outs[1], row_ids=[4, 0])
        s.pushpull("s", value, out=outs[2])
        return s.pull("s")

    reads = [
        lambda a: a.data.tolist(),
        lambda a: a.indices.tolist(),
        lambda a: a.num_rows,
        lambda a: a.asnumpy().tolist(),
        lambda a: np.asarray(a).tolist(),
        lambda a: a.copy().indices.tolist(),
        lambda a: a.wait_to_read(),
    ]
    for read in reads:
        value, outs = sparse({2: 5}), [sparse({5: 9}) for _ in range(3)]
        s.push("s", sparse({1: 10, 4: 40}))
        with held(s, "s") as release:
            outs.append(later())
            readers = [Worker(read, out) for out in outs]
            readers[0].wait_in_call(read)
            release.set()
            found = [reader.result() for reader in readers]
        right = [sparse({1: 10, 4: 40}), sparse({0: 0, 4: 40}), sparse({2: 5}), sparse({2: 5})]
        assert found == [read(r) for r in right]


@pytest.mark.one_process
def test_the_rows_of_a_value_are_those_at_the_time_of_the_call(s):
    """A value that a pull is about to write is pushed with what the pull gives."""
    s.init("t", sparse({0: 1}))
    passed = zeros()
    with held(s, "s"):
        s.push("s", sparse({3: 3}))
        s.pull("s", out=passed, ignore_sparse=False)
        s.push("t", [passed, sparse({3: 1})])
        s.pull("t", out=passed, ignore_sparse=False)
    assert has_rows(passed, {3: 4})


@pytest.mark.one_process
def test_changes_of_a_value_wait_until_it_has_been_read(s):
    value = sparse({2: 5})
    with held(s, "s") as release:
        s.push("s", value)

        def change():
            value[:] = 0

        writer = Worker(change)
        writer.wait_in_call(change)
        release.set()
        writer.result()
    assert has_rows(s.pull("s"), {2: 5})
    assert has_rows(value, {})


@pytest.mark.one_process
def test_an_array_of_which_a_view_is_alive_counts_as_the_users_memory(s):
    value, out = sparse({2: 5}), zeros()
    views = [value.data, out.indices]

    def push():
        s.push("s", value)
        return True

    def pull():
        s.pull("s", out=out, ignore_sparse=False)
        return True

    for call in (push, pull):
        with held(s, "s") as release:
            worker = Worker(call)
            worker.wait_in_call(call)
            release.set()
            assert worker.result()
    views.clear()
    with held(s, "s"):
        assert push()
        assert pull()
    assert has_rows(out, {2: 5})


@pytest.mark.one_process
def test_an_array_made_without_a_copy_counts_as_the_users_memory(s):
    memory = np.ones((1, 2))
    value = kvstore.RowSparse(memory, [3], SHAPE, copy=False)

    def push():
        s.push("s", value)

    with held(s, "s") as release:
        worker = Worker(push)
        worker.wait_in_call(push)
        release.set()
        worker.result()
    memory[:] = 9
    assert has_rows(s.pull("s"), {3: 1})


@pytest.mark.one_process
def test_operations_keep_the_order_of_the_calls(s):
    outs = [zeros() for _ in range(20)]
    with held(s, "s"):
        for number, out in enumerate(outs):
            s.push("s", sparse({number % 6: number}))
            if number % 3:
                s.pull("s", out=out, ignore_sparse=False)
            else:
                s.row_sparse_pull("s", out=out, row_ids=[number % 6])
    for number, out in enumerate(outs):
        assert has_rows(out, {number % 6: number})


@pytest.mark.one_process
def test_a_dense_key_under_way_takes_row_sparse_pushes_and_pulls(kv):
    kv.init("d", np.zeros(SHAPE))
    outs = [zeros(), kvstore.zeros(SHAPE, "float64")]
    with held(kv, "d"):
        kv.push("d", sparse({1: 1}))
        kv.pull("d", out=outs, ignore_sparse=False)
        kv.push("d", [sparse({2: 2}), sparse({2: 1})])
    assert has_rows(outs[0], {1: 1})
    assert outs[1].asnumpy()[1].tolist() == [1, 1]
    assert pulled(kv, "d")[:, 0].tolist() == [0, 0, 3, 0, 0, 0]


@pytest.mark.one_process
def test_ids_are_read_before_the_call_returns(s):
    ids, out = np.array([4, 1]), zeros()
    with held(s, "s"):
        s.row_sparse_pull("s", out=out, row_ids=ids)
        ids[:] = 0
    assert has_rows(out, {1: 10, 4: 40})


@pytest.mark.one_process
def test_close_and_delete_let_pending_operations_end(s):
    out, value = zeros(), sparse({2: 5})
    with held(s, "s"):
        s.push("s", value)
        s.pull("s", out=out, ignore_sparse=False)
        s.delete("s")
        assert "s" not in s
        s.init("s", zeros())
        s.close()
    assert has_rows(out, {2: 5})


# ----------------------------------------------------------------------------------------- threads


def test_many_threads_push_to_and_pull_from_one_key(kv):
    shape, threads, rounds = (40, 8), 6, 60
    kv.init("s", sparse(dict.fromkeys(range(40), 0), shape))

    def work(number):
        ids = np.arange(number, 40, threads)
        out = kvstore.RowSparse.zeros(shape, "float64")
        for turn in range(1, rounds):
            filled = dict.fromkeys(range(40), number * 1000 + turn)
            kv.push("s", sparse(filled, shape), async_op=turn % 2 == 0)
            kv.row_sparse_pull("s", out=out, row_ids=ids)
            assert out.indices.tolist() == ids.tolist()
            data = out.data
            assert (data == data[0, 0]).all(), "rows of two pushes in one pull"
            del data

    workers = [Worker(work, number) for number in range(threads)]
    for worker in workers:
        worker.result()
    kvstore.wait_all()
    last = kv.pull("s")
    assert last.data.min() == last.data.max()
    assert last.data[0, 0] % 1000 == rounds - 1


@pytest.mark.one_process
def test_an_updater_loses_no_push_of_any_thread(kv):
    shape, threads, rounds = (30, 2), 5, 40
    kv.init(["s", "d"], [kvstore.RowSparse.zeros(shape, "float64"), np.zeros(shape)])

    def updater(key, recv, stored):
        stored[...] = np.asarray(stored) + np.asarray(recv)

    kv.set_updater(updater)

    def work(number):
        for turn in range(rounds):
            value = sparse({(number * 7 + turn) % 30: 1}, shape)
            kv.push(["s", "d"], [[value, value], value])
            kv.row_sparse_pull("s", row_ids=[turn % 30])

    workers = [Worker(work, number) for number in range(threads)]
    for worker in workers:
        worker.result()
    right = np.zeros(shape)
    for number in range(threads):
        for turn in range(rounds):
            right[(number * 7 + turn) % 30] += 1
    assert same(pulled(kv, "d"), right)
    assert same(kv.pull("s").asnumpy(), right * 2)


def test_threads_share_one_array_as_value_and_out(kv):
    kv.init(["a", "b"], [sparse({0: 1}), sparse({1: 1})])
    shared = sparse({2: 1, 3: 1})

    def work(key, number):
        for turn in range(100):
            call = (turn + number) % 5
            if call == 0:
                kv.push(key, shared)
            elif call == 1:
                kv.pull(key, out=shared, ignore_sparse=False)
            elif call == 2:
                kv.row_sparse_pull(key, out=shared, row_ids=[turn % 6, 5])
            elif call == 3:
                view = shared.indices
                kv.pushpull(key, shared, out=np.empty(SHAPE))
                del view
            else:
                ids, data = shared.indices, shared.data
                assert (np.diff(ids) > 0).all()
                assert set(np.unique(data)) <= {0, 1}
                del ids, data

    workers = [Worker(work, "ab"[number % 2], number) for number in range(4)]
    for worker in workers:
        worker.result()
