"""The control plane's loop: one daemon thread in a process, and how other threads wait for it.

The thread is a daemon: one that is not is joined before the exit hooks run, and those still need
it. A forked child has no such thread; it gets a fresh one if it ever asks.
"""

import asyncio
import concurrent.futures
import os
import threading
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

_Result = TypeVar("_Result")

# A signal may be taken by another thread and then wakes nobody here: look so often.
STEP_S = 0.1


class _Thread:
    """The loop of one process; `loop` is None until somebody asks."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.loop: asyncio.AbstractEventLoop | None = None


# The last one is this process's, the others those of its forefathers. They are kept: were a loop
# collected, it would take its descriptors out of the epoll set, which the processes share.
_threads = [_Thread()]


def loop() -> asyncio.AbstractEventLoop:
    """The loop of this process, started when first asked for."""
    own = _threads[-1]
    with own.lock:
        if own.loop is None:
            own.loop = asyncio.new_event_loop()
            threading.Thread(
                target=own.loop.run_forever, name="kvstore-control", daemon=True
            ).start()
        return own.loop


os.register_at_fork(after_in_child=lambda: _threads.append(_Thread()))


def start(work: Coroutine[Any, Any, _Result]) -> "concurrent.futures.Future[_Result]":
    """Begin a coroutine on the loop."""
    return asyncio.run_coroutine_threadsafe(work, loop())


def wait(future: "concurrent.futures.Future[_Result]") -> _Result:
    """Wait for what `start` gave; Ctrl-C cancels it. The coroutine has its own deadline."""
    try:
        while not future.done():
            concurrent.futures.wait([future], timeout=STEP_S)
    except BaseException:
        future.cancel()
        raise
    return future.result()


def run(work: Coroutine[Any, Any, _Result]) -> _Result:
    """Run a coroutine on the loop and wait for its result."""
    return wait(start(work))


async def in_thread(function: Callable[..., _Result], *arguments: Any) -> _Result:
    """Run a function that blocks in a daemon thread: asyncio's own are joined at the exit, which
    would then wait for a name server that does not answer."""
    running = asyncio.get_running_loop()
    ended: asyncio.Future[None] = running.create_future()
    results: list[_Result] = []
    errors: list[Exception] = []

    def work() -> None:
        try:
            results.append(function(*arguments))
        except Exception as error:
            errors.append(error)
        running.call_soon_threadsafe(tell)

    def tell() -> None:
        if not ended.done():  # a cancelled wait is
            ended.set_result(None)

    threading.Thread(target=work, name="kvstore-resolve", daemon=True).start()
    await ended
    if errors:
        raise errors[0]
    return results[0]
