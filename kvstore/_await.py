"""Awaiting handles: one descriptor for each event loop, written to when an operation ends."""

import asyncio
import contextlib
import os
import weakref

from . import _core


class _Watch:
    """The handles that one loop awaits. Touched by the loop's thread only."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.waker, self.descriptor = _core._waker()
        self.waiting: list[tuple[_core.Handle, asyncio.Future[None]]] = []
        loop.add_reader(self.descriptor, self.wake)

    def add(self, handle: _core.Handle, future: "asyncio.Future[None]") -> None:
        self.waiting.append((handle, future))
        handle._wake(self.waker)

    def wake(self) -> None:
        with contextlib.suppress(BlockingIOError):  # another wake-up has emptied it
            os.read(self.descriptor, 4096)
        still = []
        for handle, future in self.waiting:
            if future.done():  # the await was cancelled
                continue
            if handle.done():
                future.set_result(None)
            else:
                still.append((handle, future))
        self.waiting = still


_watches: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, _Watch]
_watches = weakref.WeakKeyDictionary()


async def finish(handle: _core.Handle) -> None:
    """Wait for a handle in the running loop, then return or raise as `handle.wait()` does."""
    loop = asyncio.get_running_loop()
    watch = _watches.get(loop)
    if watch is None:
        watch = _watches[loop] = _Watch(loop)
    future: asyncio.Future[None] = loop.create_future()
    watch.add(handle, future)
    await future
    handle.wait()
