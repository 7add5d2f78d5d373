"""Awaiting handles: one descriptor for each event loop, written to when an operation ends."""

import asyncio
import contextlib
import os
import weakref

from . import _core


class _Watch:
    """The handles that one loop awaits. Touched by the loop's thread only."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.waker: object
        self.waker, self.descriptor = _core._waker()
        self.waiting: dict[asyncio.Future[None], _core.Handle] = {}
        loop.add_reader(self.descriptor, self.wake)

    async def wait(self, handle: _core.Handle, future: "asyncio.Future[None]") -> None:
        self.waiting[future] = handle
        try:
            handle._wake(self.waker)
            await future
        finally:  # also when the await is cancelled
            self.waiting.pop(future, None)

    def wake(self) -> None:
        with contextlib.suppress(BlockingIOError):  # another wake-up has emptied it
            os.read(self.descriptor, 4096)
        for future, handle in list(self.waiting.items()):
            if not future.done() and handle.done():
                future.set_result(None)


_watches: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, _Watch]
_watches = weakref.WeakKeyDictionary()


def _forget_closed_loops() -> None:
    # A loop that was closed in the middle of an await would stay for ever: its watch holds the
    # future, which holds the loop; and each handle has room for a few wakers only.
    for loop in [reference() for reference in _watches.keyrefs()]:
        if loop is not None and loop.is_closed():
            watch = _watches.pop(loop, None)
            if watch is not None:
                watch.waiting.clear()
                watch.waker = None


def _watch(loop: asyncio.AbstractEventLoop) -> _Watch:
    watch = _watches.get(loop)
    if watch is None:
        _forget_closed_loops()
        watch = _watches[loop] = _Watch(loop)
    return watch


async def finish(handle: _core.Handle) -> None:
    """Wait for a handle in the running loop, then return or raise as `handle.wait()` does."""
    if not handle.done():
        loop = asyncio.get_running_loop()
        await _watch(loop).wait(handle, loop.create_future())
    handle.wait()
