"""Awaiting handles: one descriptor for each event loop, written to when an operation ends."""

import asyncio
import os
import weakref

from . import _core


class _Watch:
    """The handles that one loop awaits. Touched by the loop's thread only."""

    def __init__(self, loop):
        self.waker, self.descriptor = _core._waker()
        self.waiting = []
        loop.add_reader(self.descriptor, self.wake)

    def add(self, handle, future):
        self.waiting.append((handle, future))
        handle._wake(self.waker)

    def wake(self):
        try:
            os.read(self.descriptor, 4096)
        except BlockingIOError:
            pass  # another wake-up has emptied it
        still = []
        for handle, future in self.waiting:
            if future.done():  # the await was cancelled
                continue
            if handle.done():
                future.set_result(None)
            else:
                still.append((handle, future))
        self.waiting = still


_watches = weakref.WeakKeyDictionary()


async def finish(handle):
    """Wait for a handle in the running loop, then return or raise as `handle.wait()` does."""
    loop = asyncio.get_running_loop()
    watch = _watches.get(loop)
    if watch is None:
        watch = _watches[loop] = _Watch(loop)
    future = loop.create_future()
    watch.add(handle, future)
    await future
    handle.wait()
