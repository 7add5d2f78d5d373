"""Handles as objects, and how event loops wait for them."""

import asyncio
import gc
import inspect
import itertools
import os
import sys
import threading
import weakref

import numpy as np
import pytest
from helpers import LONG, Worker, assert_clean, held, pulled, run_script

import kvstore
from kvstore import _await, _core


@pytest.fixture
def w(kv):
    kv.init("w", np.zeros(3))
    return kv


def push(kv):
    return kv.push("w", np.ones(3), async_op=True)


def failed(kv, *, held_in=None):
    """A handle whose operation has failed, and nobody has been told."""
    _core.fault_set("engine.run", 1)
    with held(kv, "w"):
        handle = push(kv)
        if held_in is not None:
            held_in(handle)
    while not handle.done():
        pass
    assert _core.fault_set("engine.run", 0) >= 1
    return handle


async def awaited(handle):
    return await handle


# ------------------------------------------------------------------------------------ objects


def test_a_handle_is_made_by_calls_only():
    with pytest.raises(TypeError):
        kvstore.Handle()
    with pytest.raises(TypeError):
        type("Mine", (kvstore.Handle,), {})


def test_signatures_can_be_read():
    assert str(inspect.signature(kvstore.Handle.wait)) == "(self, /, timeout=None)"
    assert str(inspect.signature(kvstore.Handle.done)) == "(self, /)"
    assert str(inspect.signature(kvstore.Handle.exception)) == "(self, /)"


def test_a_pending_handle_says_so(w):
    with held(w, "w"):
        handle = push(w)
        assert repr(handle) == "<kvstore.Handle pending>"
        assert not handle.done()
        assert handle.exception() is None
    handle.wait()
    assert repr(handle) == "<kvstore.Handle done>"
    assert handle.done()
    assert handle.exception() is None


def test_a_failed_handle_raises_one_exception_again_and_again(w):
    handle = failed(w)
    error = handle.exception()
    assert isinstance(error, MemoryError)
    for _ in range(3):
        with pytest.raises(MemoryError) as info:
            handle.wait()
        assert info.value is error is handle.exception()
    assert repr(handle) == f"<kvstore.Handle failed: {error!r}>"
    kvstore.wait_all()


def test_an_updaters_exception_is_raised_as_it_is(w):
    mine = ZeroDivisionError("mine")

    def updater(key, recv, stored):
        raise mine

    w.set_updater(updater)
    handle = push(w)
    assert handle.exception() is mine
    assert repr(handle) == "<kvstore.Handle failed: ZeroDivisionError('mine')>"
    for _ in range(2):
        with pytest.raises(ZeroDivisionError) as info:
            handle.wait()
        assert info.value is mine
    mine.__traceback__ = None


@pytest.mark.parametrize("look", [repr, kvstore.Handle.done], ids=["repr", "done"])
def test_who_only_looks_at_a_failed_handle_has_not_been_told(w, look):
    handle = failed(w)
    look(handle)
    with pytest.raises(MemoryError):
        kvstore.wait_all()
    assert repr(handle).startswith("<kvstore.Handle failed: MemoryError(")


@pytest.mark.parametrize("ask", ["wait", "exception"])
def test_who_has_asked_a_failed_handle_is_not_told_again(w, ask):
    handle = failed(w)
    if ask == "wait":
        with pytest.raises(MemoryError):
            handle.wait()
    else:
        handle.exception()
    kvstore.wait_all()
    assert pulled(w, "w").tolist() == [0, 0, 0]


@pytest.mark.parametrize("timeout", [0, -1, float("nan"), float("-inf")])
def test_a_timeout_that_is_no_time_is_refused(w, timeout):
    with pytest.raises(kvstore.InvalidArgumentError, match="timeout"):
        push(w).wait(timeout)


@pytest.mark.parametrize("timeout", ["1", [1]])
def test_a_timeout_that_is_no_number_is_a_type_error(w, timeout):
    with pytest.raises(TypeError, match="timeout"):
        push(w).wait(timeout)


def test_a_handle_with_the_traceback_of_its_own_wait_is_collected(w):
    handle = failed(w)

    def wait(mine):
        mine.wait()

    with pytest.raises(MemoryError):
        wait(handle)
    alive = weakref.ref(handle)
    del handle
    gc.collect()
    assert alive() is None


def test_many_threads_may_finish_a_failed_handle(w):
    def waited(handle):
        with pytest.raises(MemoryError) as info:
            handle.wait()
        return info.value

    workers = []
    handle = failed(w, held_in=lambda h: workers.extend(Worker(waited, h) for _ in range(8)))
    errors = {id(worker.result()) for worker in workers}
    assert errors == {id(handle.exception())}


def test_any_allocation_of_an_asynchronous_call_may_fail(w):
    for nth in itertools.count(1):
        assert nth < 100
        _core.fault_set("alloc", nth)
        try:
            push(w).wait()
        except MemoryError:
            continue
        finally:
            _core.fault_set("alloc", 0)
        break
    assert nth > 1
    kvstore.wait_all()
    push(w).wait()


def test_a_forked_childs_calls_on_a_handle_raise_closed_error():
    assert_clean(
        run_script(
            """
import os, sys, numpy as np, kvstore
kv = kvstore.create("local")
kv.init("w", np.zeros(3))
handles = [kv.push("w", np.ones(3), async_op=True)]
kv.set_updater(lambda key, recv, stored: None)
handles.append(kv.push("w", np.ones(3), async_op=True))

def calls():
    for handle in handles:
        for call in (handle.wait, handle.done, handle.exception,
                     lambda: handle.__await__().send(None)):
            try:
                call()
            except kvstore.ClosedError as error:
                assert "fork" in str(error)
            else:
                raise AssertionError(call)
        assert repr(handle) == "<kvstore.Handle of the parent process>"
    handles.clear()

pid = os.fork()
if pid == 0:
    try:
        calls()
    except BaseException as error:
        print(repr(error), file=sys.stderr)
        os._exit(1)
    os._exit(0)
assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
for handle in handles:
    handle.wait()
"""
        )
    )


# ------------------------------------------------------------------------------------- awaiting


def descriptors():
    return len(os.listdir("/dev/fd"))


def test_awaiting_a_handle_that_is_done_needs_no_loop(w):
    handle = push(w)
    handle.wait()
    with pytest.raises(StopIteration) as info:
        handle.__await__().send(None)
    assert info.value.value is None


def test_awaiting_a_pending_handle_without_a_loop_raises(w):
    with held(w, "w"):
        handle = push(w)
        with pytest.raises(RuntimeError, match="no running event loop"):
            handle.__await__().send(None)
    handle.wait()


def test_one_handle_may_be_awaited_many_times_in_a_loop(w):
    async def main(release):
        handle = push(w)
        gathered = asyncio.gather(*[awaited(handle) for _ in range(5)])
        await asyncio.sleep(0)
        release.set()
        assert await asyncio.wait_for(gathered, LONG) == [None] * 5

    with held(w, "w") as release:
        asyncio.run(main(release))


def test_the_awaits_that_are_left_go_on_when_one_is_cancelled(w):
    async def main(release):
        handle = push(w)
        tasks = [asyncio.ensure_future(awaited(handle)) for _ in range(3)]
        await asyncio.sleep(0)
        tasks[1].cancel()
        await asyncio.sleep(0)
        release.set()
        await asyncio.wait_for(asyncio.gather(tasks[0], tasks[2]), LONG)
        assert tasks[1].cancelled()

    with held(w, "w") as release:
        asyncio.run(main(release))


def test_an_awaited_operation_that_fails_raises_once(w):
    async def main(handle):
        with pytest.raises(MemoryError):
            await handle

    asyncio.run(main(failed(w)))
    kvstore.wait_all()

    async def waiting(release):
        handle = push(w)
        task = asyncio.ensure_future(awaited(handle))
        await asyncio.sleep(0)
        release.set()
        with pytest.raises(MemoryError):
            await asyncio.wait_for(task, LONG)

    _core.fault_set("engine.run", 1)
    with held(w, "w") as release:
        asyncio.run(waiting(release))
    _core.fault_set("engine.run", 0)
    kvstore.wait_all()


def test_the_error_of_an_await_that_was_cancelled_goes_to_wait_all(w):
    async def main(handle):
        task = asyncio.ensure_future(awaited(handle))
        await asyncio.sleep(0)
        task.cancel()
        await asyncio.wait([task])

    handle = failed(w, held_in=lambda h: asyncio.run(main(h)))
    del handle
    with pytest.raises(MemoryError):
        kvstore.wait_all()


def test_an_updaters_stop_iteration_does_not_end_the_awaiting_coroutine(w):
    def updater(key, recv, stored):
        raise StopIteration("mine")

    async def main():
        with pytest.raises(RuntimeError) as info:
            await push(w)
        assert isinstance(info.value.__cause__, StopIteration)

    w.set_updater(updater)
    asyncio.run(main())


def test_awaiting_again_and_again_in_new_loops_leaves_nothing_behind(w):
    async def once(handle):
        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(awaited(handle), 0.001)
        return weakref.ref(asyncio.get_running_loop())

    with held(w, "w"):
        handle = push(w)
        loops = [asyncio.run(once(handle)) for _ in range(3)]
        before = descriptors()
        loops += [asyncio.run(once(handle)) for _ in range(20)]
        gc.collect()
        assert descriptors() <= before
        assert [loop for loop in loops if loop() is not None] == []
    handle.wait()


def abandon(handle, loops):
    """Awaits in a loop that is closed without the await being cancelled."""
    loop = asyncio.new_event_loop()
    task = loop.create_task(awaited(handle))
    task._log_destroy_pending = False
    loop.run_until_complete(asyncio.sleep(0))
    loop.close()
    loops.append(weakref.ref(loop))


def test_a_loop_closed_in_the_middle_of_an_await_is_let_go_by_the_next(w):
    loops = []

    async def other():
        task = asyncio.ensure_future(awaited(push(w)))
        await asyncio.sleep(0)
        task.cancel()
        await asyncio.wait([task])

    with held(w, "w"):
        handle = push(w)
        for _ in range(20):
            abandon(handle, loops)
        asyncio.run(other())
        gc.collect()
        assert [loop for loop in loops if loop() is not None] == []
    handle.wait()


def test_a_completion_for_a_loop_that_was_closed_is_harmless(w):
    loops = []
    with held(w, "w"):
        handle = push(w)
        abandon(handle, loops)
    handle.wait()
    assert pulled(w, "w").tolist() == [1, 1, 1]
    asyncio.run(awaited(push(w)))


def test_more_loops_than_a_handle_has_room_for_are_refused(w):
    ready = threading.Barrier(8)

    async def wait(handle):
        task = asyncio.ensure_future(awaited(handle))
        await asyncio.sleep(0)
        ready.wait(LONG)
        await task

    async def ninth(handle):
        with pytest.raises(kvstore.InvalidArgumentError, match="8 event loops"):
            await handle

    with held(w, "w") as release:
        handle = push(w)
        workers = [Worker(asyncio.run, wait(handle)) for _ in range(7)]
        eighth = Worker(asyncio.run, wait(handle))
        while ready.n_waiting or not _room_is_used(handle, 8):
            pass
        asyncio.run(ninth(handle))
        release.set()
        for worker in [*workers, eighth]:
            worker.result()


def _room_is_used(handle, number):
    return (
        sum(handle in watch.waiting.values() for watch in list(_await._watches.values())) == number
    )


def test_completions_and_awaits_may_meet_in_any_order(kv):
    kv.init("w", np.zeros(20_000))
    value = np.ones(20_000)

    async def work():
        for _ in range(200):
            handle = kv.push("w", value, async_op=True)
            await asyncio.gather(awaited(handle), awaited(handle))

    workers = [Worker(asyncio.run, work()) for _ in range(3)]
    for worker in workers:
        worker.result()
    assert pulled(kv, "w")[0] == 1


def test_any_allocation_of_an_await_may_fail(w):
    async def main(handle):
        await asyncio.wait_for(awaited(handle), 0.001)

    with held(w, "w"):
        handle = push(w)
        for nth in itertools.count(1):
            assert nth < 20
            _core.fault_set("alloc", nth)
            try:
                asyncio.run(main(handle))
            except MemoryError:
                continue
            except asyncio.TimeoutError:
                break
            finally:
                _core.fault_set("alloc", 0)
    assert nth > 1
    handle.wait()
    gc.collect()
    assert sys.getrefcount(handle) == 2
