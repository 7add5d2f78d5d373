"""Calls that return before they are done: handles, NDArrays, awaiting."""

import asyncio
import gc
import threading
import time

import numpy as np
import pytest
from helpers import LONG, Worker, held, pulled

import kvstore


@pytest.fixture
def w(kv):
    kv.init("w", np.zeros(3))
    return kv


def full(number):
    return np.full(3, float(number))


CALLS = {
    "push": (lambda kv: kv.push("w", [full(1), full(2)], async_op=True), 3),
    "pushpull": (lambda kv: kv.pushpull("w", full(4), out=full(0), async_op=True), 4),
    "pushpull in place": (lambda kv: kv.pushpull("w", full(5), async_op=True), 5),
    "pull": (lambda kv: kv.pull("w", out=full(9), async_op=True), 0),
    "list": (lambda kv: kv.push(["w"], [full(6)], async_op=True), 6),
    "strided": (lambda kv: kv.push("w", np.full(6, 7.0)[::2], async_op=True), 7),
    "NDArray": (lambda kv: kv.push("w", kvstore.full(3, 8, "float64"), async_op=True), 8),
    "nothing": (lambda kv: kv.push([], [], async_op=True), 0),
}


@pytest.mark.parametrize(("call", "result"), CALLS.values(), ids=CALLS)
def test_async_op_gives_a_handle_of_a_call_that_gets_done(w, call, result):
    handle = call(w)
    assert isinstance(handle, kvstore.Handle)
    assert handle.wait() is None
    assert handle.done()
    assert handle.exception() is None
    assert pulled(w, "w").tolist() == [result] * 3


@pytest.mark.parametrize(("call", "result"), CALLS.values(), ids=CALLS)
def test_async_op_returns_at_once_while_the_key_is_held(w, call, result):
    with held(w, "w"):
        handle = call(w)
        if handle.done():
            assert result == 0, "only a call without keys is done before its turn"
        assert handle.exception() is None
    handle.wait()
    assert pulled(w, "w").tolist() == [result] * 3


def test_broadcast_with_async_op_gives_a_handle(kv):
    out = np.empty(3)
    kv.broadcast("w", full(3), out, async_op=True).wait()
    assert out.tolist() == [3, 3, 3]


def test_a_handle_tells_whether_it_is_done(w):
    with held(w, "w"):
        handle = w.push("w", full(1), async_op=True)
        assert handle.done() is False
        assert handle.exception() is None
    handle.wait()
    assert handle.done() is True


def test_a_wait_that_times_out_leaves_the_operation_running(w):
    with held(w, "w"):
        handle = w.push("w", full(1), async_op=True)
        start = time.monotonic()
        with pytest.raises(kvstore.TimeoutError, match=r"0\.0?5"):
            handle.wait(0.05)
        assert 0.04 < time.monotonic() - start < LONG / 2
        assert not handle.done()
    handle.wait(LONG)
    assert pulled(w, "w").tolist() == [1, 1, 1]


def test_a_handle_can_be_waited_for_again_and_by_many(w):
    with held(w, "w"):
        handle = w.push("w", full(1), async_op=True)
        workers = [Worker(handle.wait) for _ in range(4)]
    for worker in workers:
        worker.result()
    handle.wait()
    handle.wait(1)


def test_a_dropped_handle_lets_the_operation_go_on(w):
    with held(w, "w"):
        for i in range(10):
            w.push("w", full(i), async_op=True)
        gc.collect()
    assert pulled(w, "w").tolist() == [9, 9, 9]


def test_the_operation_holds_the_arrays(w):
    with held(w, "w"):
        values = [full(1), full(2)]
        handle = w.push("w", values, async_op=True)
        values.clear()
        del values
        gc.collect()
        junk = [full(50) for _ in range(100)]
    handle.wait()
    del junk
    assert pulled(w, "w").tolist() == [3, 3, 3]


def test_a_list_call_has_one_handle_for_all_its_keys(kv):
    kv.init([1, 2, 3], [full(0)] * 3)
    with held(kv, 2):
        handle = kv.push([1, 2, 3], [full(1), full(2), full(3)], async_op=True)
        assert pulled(kv, 1)[0] == 1
        assert pulled(kv, 3)[0] == 3
        assert not handle.done()
    handle.wait()
    assert pulled(kv, 2)[0] == 2


def test_wrong_arguments_raise_at_the_call_or_the_wait_and_change_nothing(w):
    for call in (
        lambda: w.push("w", np.ones(4), async_op=True),
        lambda: w.pull("w", out=np.ones(4), async_op=True),
        lambda: w.pushpull("w", full(1), out=np.ones(4), async_op=True),
    ):
        with pytest.raises(kvstore.InvalidArgumentError, match=r"\(4,\)"):
            call().wait()
    assert pulled(w, "w").tolist() == [0, 0, 0]


def test_operations_of_a_key_run_in_the_order_of_the_calls(w):
    outs = [np.empty(3) for _ in range(50)]
    with held(w, "w"):
        handles = []
        for i, out in enumerate(outs):
            handles.append(w.push("w", full(i), priority=i % 7, async_op=True))
            handles.append(w.pull("w", out=out, priority=-i % 5, async_op=True))
    for handle in handles:
        handle.wait()
    assert [out[1] for out in outs] == list(range(50))


def test_a_pull_never_sees_a_later_push(w):
    out = full(9)
    with held(w, "w"):
        pull = w.pull("w", out=out, async_op=True)
        push = w.push("w", full(5), priority=100, async_op=True)
    push.wait()
    pull.wait()
    assert out.tolist() == [0, 0, 0]


def test_different_keys_do_not_wait_for_each_other(kv):
    kv.init(["v", "w"], [full(0), full(0)])
    with held(kv, "w"):
        kv.push("v", full(1))
        assert pulled(kv, "v").tolist() == [1, 1, 1]
        kv.pushpull("v", full(2), out=full(0))
        kv.init("new", full(3))
        kv.delete("new")


# ------------------------------------------------------------------------------------ NDArrays


def test_a_push_of_an_ndarray_returns_at_once_and_holds_the_array(w):
    with held(w, "w"):
        w.push("w", kvstore.full(3, 4, "float64"))
        w.push("w", [kvstore.full(3, 5, "float64"), kvstore.full(3, 6, "float64")])
        gc.collect()
    assert pulled(w, "w").tolist() == [11, 11, 11]


def test_a_pull_into_an_ndarray_returns_at_once_and_reads_wait(w):
    out = kvstore.zeros(3, "float64")
    with held(w, "w") as release:
        w.push("w", kvstore.full(3, 4, "float64"))
        w.pull("w", out=out)
        new = w.pull("w")
        reader = Worker(out.asnumpy)
        reader.wait_in_call(Worker.run)
        release.set()
        assert reader.result().tolist() == [4, 4, 4]
    assert out.asnumpy().tolist() == [4, 4, 4]
    assert np.asarray(new).tolist() == [4, 4, 4]


def test_a_pushpull_between_ndarrays_returns_at_once(w):
    value, out = kvstore.full(3, 2, "float64"), kvstore.zeros(3, "float64")
    with held(w, "w"):
        w.pushpull("w", [value, value], out=out)
        w.pushpull("w", value)
    assert out.asnumpy().tolist() == [4, 4, 4]
    assert value.asnumpy().tolist() == [2, 2, 2]


def test_ndarrays_pass_values_from_key_to_key_in_order(kv):
    kv.init(["a", "b"], [full(0), full(0)])
    between = kvstore.zeros(3, "float64")
    with held(kv, "a"):
        for i in range(1, 20):
            kv.push("a", kvstore.full(3, i, "float64"))
            kv.pull("a", out=between)
            kv.push("b", [between, between])
    between.wait_to_write()
    assert pulled(kv, "b").tolist() == [38, 38, 38]


def test_an_ndarray_of_which_a_view_is_alive_counts_as_the_users_memory(w):
    array = kvstore.full(3, 1, "float64")
    view = np.asarray(array)
    w.push("w", array)
    view[:] = 50
    assert pulled(w, "w").tolist() == [1, 1, 1]
    w.pull("w", out=array)
    assert view.tolist() == [1, 1, 1]
    with held(w, "w") as release:
        pusher = Worker(w.push, "w", array)
        pusher.wait_in_call(Worker.run)
        release.set()
        pusher.result()
    del view


def test_a_view_of_an_ndarray_waits_for_what_is_pending(w):
    value = kvstore.full(3, 1, "float64")
    with held(w, "w") as release:
        w.push("w", value)
        viewer = Worker(np.asarray, value)
        viewer.wait_in_call(Worker.run)
        release.set()
        view = viewer.result()
        view[:] = 50
    assert pulled(w, "w").tolist() == [1, 1, 1]


def test_numpy_and_ndarrays_may_stand_in_one_list(w):
    out, other = np.empty(3), kvstore.zeros(3, "float64")
    w.pushpull("w", [full(1), kvstore.full(3, 2, "float64")], out=[other, out])
    assert out.tolist() == other.asnumpy().tolist() == [3, 3, 3]


def test_wait_all_waits_for_everything(kv):
    kv.init([0, 1, 2], [full(0)] * 3)
    outs = [kvstore.zeros(3, "float64") for _ in range(3)]
    with held(kv, 1) as release:
        for i in range(3):
            kv.push(i, kvstore.full(3, i + 1, "float64"))
            kv.pull(i, out=outs[i])
        waiter = Worker(kvstore.wait_all)
        waiter.wait_in_call(Worker.run)
        release.set()
        waiter.result()
    assert [o.asnumpy()[0] for o in outs] == [1, 2, 3]


def test_wait_all_has_nothing_to_do_without_work():
    kvstore.wait_all()
    kvstore.wait_all()


def test_close_lets_pending_operations_end(w):
    out = kvstore.zeros(3, "float64")
    with held(w, "w"):
        w.push("w", kvstore.full(3, 4, "float64"))
        handle = w.pull("w", out=out, async_op=True)
        w.close()
        with pytest.raises(kvstore.ClosedError):
            w.push("w", full(1))
    handle.wait()
    assert out.asnumpy().tolist() == [4, 4, 4]


def test_delete_comes_after_pending_operations(w):
    out = kvstore.zeros(3, "float64")
    with held(w, "w") as release:
        w.push("w", kvstore.full(3, 4, "float64"))
        w.pull("w", out=out)
        deleter = Worker(w.delete, "w")
        release.set()
        deleter.result()
    assert "w" not in w
    assert out.asnumpy().tolist() == [4, 4, 4]
    w.init("w", np.zeros(7))


# ------------------------------------------------------------------------------------ deadlines


@pytest.fixture(params=["local", "device"])
def hasty(request):
    with kvstore.create(request.param, timeout=0.2) as kv:
        kv.init(["v", "w"], [full(0), full(0)])
        yield kv


BLOCKING = {
    "push": lambda kv, a: kv.push("w", a),
    "push of a list": lambda kv, a: kv.push(["w"], [[a, a]]),
    "pull": lambda kv, a: kv.pull("w", out=a),
    "pushpull": lambda kv, a: kv.pushpull("w", full(1), out=a),
}


@pytest.mark.parametrize("call", BLOCKING.values(), ids=BLOCKING)
def test_a_call_that_waits_too_long_raises_in_time_and_is_cancelled(hasty, call):
    array = full(9)
    with held(hasty, "w"):
        start = time.monotonic()
        with pytest.raises(kvstore.TimeoutError, match="'w'") as info:
            call(hasty, array)
        assert 0.15 < time.monotonic() - start < 5
        assert isinstance(info.value, TimeoutError)
    assert array.tolist() == [9, 9, 9]
    assert pulled(hasty, "w").tolist() == [0, 0, 0]
    hasty.push("w", full(1))
    assert pulled(hasty, "w").tolist() == [1, 1, 1]


def test_an_updater_that_waits_too_long_for_its_turn_is_not_run(hasty):
    ran = []
    with held(hasty, "w"):
        hasty.set_updater(lambda key, recv, stored: ran.append(key))
        with pytest.raises(kvstore.TimeoutError, match="'w'"):
            hasty.push("w", full(1))
        hasty.push("v", full(1))
    assert ran == ["v"]
    hasty.push("w", full(1))
    assert ran == ["v", "w"]


def test_a_list_call_that_times_out_says_how_far_it_came(hasty):
    with (
        held(hasty, "w"),
        pytest.raises(kvstore.TimeoutError, match=r"'w'.*\b1 of (its )?2\b"),
    ):
        hasty.push(["v", "w"], [full(1), full(1)])
    assert pulled(hasty, "v").tolist() == [1, 1, 1]
    assert pulled(hasty, "w").tolist() == [0, 0, 0]


def test_wait_without_a_number_has_the_stores_timeout(hasty):
    with held(hasty, "w"):
        handle = hasty.push("w", full(1), async_op=True)
        start = time.monotonic()
        with pytest.raises(kvstore.TimeoutError):
            handle.wait()
        assert 0.15 < time.monotonic() - start < 5
    handle.wait(LONG)


def test_many_waiters_time_out_and_the_key_works_on(hasty):
    with held(hasty, "w"):
        workers = [Worker(hasty.push, "w", full(i)) for i in range(8)]
        for worker in workers:
            with pytest.raises(kvstore.TimeoutError):
                worker.result()
    hasty.push("w", full(3))
    assert pulled(hasty, "w").tolist() == [3, 3, 3]


# ------------------------------------------------------------------------------------- asyncio


def test_a_handle_can_be_awaited(w):
    async def main():
        out = full(0)
        assert await w.push("w", full(5), async_op=True) is None
        await w.pull("w", out=out, async_op=True)
        return out.tolist()

    assert asyncio.run(main()) == [5, 5, 5]


def test_awaiting_a_handle_of_a_held_key_lets_the_loop_run(w):
    async def main(release):
        handle = w.push("w", full(5), async_op=True)
        waiting = asyncio.ensure_future(awaited(handle))
        await asyncio.sleep(0)
        assert not handle.done()
        release.set()
        await asyncio.wait_for(waiting, LONG)
        await handle

    with held(w, "w") as release:
        asyncio.run(main(release))
    assert pulled(w, "w").tolist() == [5, 5, 5]


async def awaited(handle):
    return await handle


def test_many_handles_can_be_awaited_together(kv):
    keys = list(range(20))
    kv.init(keys, [full(0)] * 20)

    async def main(release):
        handles = [kv.push(k, full(k), async_op=True) for k in keys for _ in range(5)]
        gathered = asyncio.gather(*map(awaited, handles))
        await asyncio.sleep(0)
        release.set()
        await asyncio.wait_for(gathered, LONG)

    with held(kv, 7) as release:
        asyncio.run(main(release))
    assert [pulled(kv, k)[0] for k in keys] == keys


def test_an_awaited_handle_raises_its_error(w):
    def updater(key, recv, stored):
        raise ZeroDivisionError("mine")

    async def main():
        with pytest.raises(ZeroDivisionError, match="mine"):
            await w.push("w", full(1), async_op=True)

    w.set_updater(updater)
    asyncio.run(main())


def test_cancelling_an_await_leaves_the_operation_running(w):
    async def main():
        handle = w.push("w", full(5), async_op=True)
        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(awaited(handle), 0.02)
        assert not handle.done()
        return handle

    with held(w, "w"):
        handle = asyncio.run(main())
    handle.wait(LONG)
    assert pulled(w, "w").tolist() == [5, 5, 5]


def test_two_loops_may_await_one_handle(w):
    async def main(handle):
        await asyncio.wait_for(awaited(handle), LONG)

    with held(w, "w") as release:
        handle = w.push("w", full(5), async_op=True)
        workers = [Worker(asyncio.run, main(handle)) for _ in range(3)]
        release.set()
        for worker in workers:
            worker.result()


def test_a_loop_that_was_closed_is_harmless(w):
    with held(w, "w"):
        handle = w.push("w", full(5), async_op=True)
        loop = asyncio.new_event_loop()
        task = loop.create_task(awaited(handle))
        loop.call_soon(loop.stop)
        loop.run_forever()
        task.cancel()
        loop.run_until_complete(asyncio.gather(task, return_exceptions=True))
        loop.close()
    handle.wait(LONG)
    assert pulled(w, "w").tolist() == [5, 5, 5]


def test_handles_may_be_waited_for_in_another_thread(w):
    handles = [w.push("w", full(i), async_op=True) for i in range(20)]
    done = threading.Event()

    def wait():
        for handle in handles:
            handle.wait()
        done.set()

    Worker(wait).result()
    assert done.is_set()
