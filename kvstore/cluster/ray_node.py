"""The actors of a `RayCluster`: what its maker (ray_cluster.py) calls in processes of Ray's.

Each settles the environment of its process first, as a launcher does for what it starts. Functions
of users run in the main thread of their process. The secret of a session comes as an argument and
goes into no setting of Ray's, which would be shown by its tools.
"""

import contextlib
import importlib
import io
import os
import pickle
import signal
from concurrent.futures import Future
from typing import Any

from .. import server
from . import control, entry, member, settings, worker_main
from .processes import CHUNK, Announced, environment
from .scheduler import Scheduler


class Node:
    """What all have in common; Ray puts the `repr` before each line that they print."""

    def __init__(self, role: str, rank: int | None, num_workers: int, num_servers: int) -> None:
        self._name = role if rank is None else f"{role} {rank}"
        self._has_servers = num_servers > 0
        with contextlib.suppress(ValueError):  # not in the main thread, where nothing waits for it
            # Some tools send a Ctrl-C to every process below them; it is the maker's business.
            signal.signal(signal.SIGINT, signal.SIG_IGN)
        own = environment(role, rank, num_workers, num_servers, bind=None)
        for name in set(os.environ) - set(own):
            del os.environ[name]
        os.environ.update(own)

    def __repr__(self) -> str:
        return self._name

    def about(self) -> tuple[str, int]:
        """Host and process id, if this machine can be part of a cluster."""
        if self._has_servers:
            entry.check_ucx()
        return _own_address(), os.getpid()


class SchedulerNode(Node):
    """Calls run side by side: one of them waits for the end."""

    def __init__(self, *place: Any) -> None:
        super().__init__(*place)
        self._announced = Announced()
        self._pipe = -1
        self._end: Future[None] | None = None

    def listen(self, token: str) -> tuple[str, int]:
        """Begin a session; where it is."""
        if self._pipe >= 0:
            os.close(self._pipe)
        self._announced = Announced()
        self._pipe, write_fd = os.pipe()
        os.set_blocking(self._pipe, False)
        os.environ["KVSTORE_ANNOUNCE_FD"] = str(write_fd)  # the scheduler's from now on
        where = settings.join_address(_own_address(), 0)
        own = settings.read({"role": "scheduler", "scheduler": where, "token": token})
        server._allow_many_files()
        scheduler = Scheduler(own)
        control.run(scheduler.listen())
        self._end = control.start(scheduler.run())
        assert scheduler.address is not None
        return scheduler.address

    def state(self) -> tuple[bool, bool]:
        """Whether all nodes had joined at some time, and whether all workers have left."""
        with contextlib.suppress(BlockingIOError):
            while not self._announced.over:
                self._announced.take(os.read(self._pipe, CHUNK))
        return self._announced.complete, self._announced.over

    def served(self) -> None:
        """Wait for the end of the session."""
        assert self._end is not None
        control.wait(self._end)


class ServerNode(Node):
    """A server of one session after the other."""

    def serve(self, scheduler: str, token: str, controller: bytes, allow_import: str) -> None:
        """Be part of a session until it ends."""
        place = {"role": "server", "scheduler": scheduler, "token": token}
        own = settings.read({**place, "allow_import": allow_import or None})
        server._serve(own, pickle.loads(controller))


class WorkerNode(Node):
    """Calls what users have given to ``run``."""

    def run(self, variables: dict[str, str], function: bytes) -> bytes:
        """Call a function; the answer is as worker_main.py would write it."""
        os.environ.update(variables)
        kind, parts = worker_main.answer_to(io.BytesIO(function))
        return b"".join([worker_main.HEADER.pack(kind, sum(map(len, parts))), *parts])

    def leave(self) -> None:
        """Leave the cluster if a store was kept, as at the end of a process."""
        member.leave_all()


def _own_address() -> str:
    address: str = importlib.import_module("ray").util.get_node_ip_address()
    return address
