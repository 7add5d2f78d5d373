"""`LocalCluster`: a whole cluster on this machine, from a script or a notebook cell.

Its processes all run worker_main.py and end with this one, whatever ends it (processes.py). One
daemon thread moves output, answers and news of deaths; everything shared is under one lock, whose
condition it notifies. What workers print is written by the thread that waits in `run`, so that it
comes out under the notebook cell that runs, and by the daemon thread while nobody waits.

The scheduler holds the pipe by which it has told its address until all workers have left, and lets
go of it before the last worker's `close` returns: the end of that pipe is found here by the run
after it.
"""

import os
import pickle
import sys
import threading
import time

from ..errors import KVStoreError, PeerLostError
from . import entry
from .maker import CLOSE_S, TICK_S, AllowImport, Controller, MadeCluster, Maker, Session
from .processes import Announced, Process, Processes, address_variables, environment
from .run import Answer, Run, WorkerTraceback
from .worker_main import BOOT, HEADER, READY, RUN, SERVE, dumps

__all__ = ["LocalCluster", "Run", "WorkerTraceback"]

MOST_LINES = 10_000


class LocalCluster(MadeCluster):
    """A scheduler, servers and workers as processes of this machine.

    A context manager: leaving the block closes the cluster. The workers are idle until `run` or
    `submit` gives them a function. A store that the function keeps somewhere is there in the next
    run; one that it has neither kept nor closed is left at the end of the run. After a run that was
    interrupted, or that did not end in all workers after it had failed in one, the cluster has
    ended: its ``repr`` tells.

    Parameters
    ----------
    num_workers, num_servers
        How many there are. No servers: for stores of kind nccl, which need none.
    controller
        What each server calls with (head, body) for ``send_command_to_servers``.
    allow_import
        The module, or modules, that servers may import optimizers of your own from, with those
        below them. By default as ``KVSTORE_ALLOW_IMPORT`` says, or none.
    timeout
        Seconds that starting, joining and every call on a store may take, by default as
        ``KVSTORE_TIMEOUT`` says, or 300. It does not limit a run.
    join
        Make this process the worker of rank 0: only the other ranks become processes. It joins
        with ``kvstore.create('dist_sync', **cluster.options)`` after `submit`, for joining waits
        for all workers.

    Examples
    --------
    >>> def train():
    ...     with kvstore.create("dist_sync") as kv:
    ...         kv.init("w", np.zeros(3))
    ...         kv.push("w", np.ones(3))
    ...         return kv.pull("w").asnumpy()
    >>> with kvstore.LocalCluster(2, 1) as cluster:
    ...     results = cluster.run(train)
    """

    def __init__(
        self,
        num_workers: int = 1,
        num_servers: int = 1,
        *,
        controller: Controller | None = None,
        allow_import: AllowImport = None,
        timeout: float | None = None,
        join: bool = False,
    ) -> None:
        if num_servers != 0:
            entry.check_ucx()
        self._begin(LocalMaker(num_workers, num_servers, controller, allow_import, timeout, join))


class _Session(Session, Announced):
    """A scheduler with its servers, and what the scheduler has told."""

    def __init__(self) -> None:
        Session.__init__(self)
        Announced.__init__(self)
        self.processes: list[Process] = []


class LocalMaker(Maker):
    """The processes behind a `LocalCluster`."""

    session: _Session

    def __init__(
        self,
        num_workers: int,
        num_servers: int,
        controller: Controller | None,
        allow_import: AllowImport,
        timeout: float | None,
        join: bool,
    ) -> None:
        super().__init__(num_workers, num_servers, controller, allow_import, timeout, join)
        self.workers: list[Process] = []
        self.ready: set[Process] = set()
        self.session = _Session()
        self.processes = Processes(self._take_line)

    @property
    def run_in(self) -> list[Process]:
        return self.workers

    # -------------------------------------------------------------------------- in users' threads

    def begin(self) -> None:
        blob = self._dumps(self.controller)
        threading.Thread(target=self._loop, name="kvstore-local-cluster", daemon=True).start()
        with self.lock:
            for rank in range(self.first, self.num_workers):
                self.workers.append(self._start_locked("worker", rank, {}))
        self._begin_session(blob)
        self._wait_or_end(lambda: len(self.ready.intersection(self.workers)) == len(self.workers))

    def _begin_session(self, controller: bytes) -> None:
        session = _Session()
        variables = {"KVSTORE_TOKEN": session.token, **address_variables("127.0.0.1", 0)}
        with self.lock:
            self._check_locked()
            read_fd, write_fd = os.pipe()
            variables["KVSTORE_ANNOUNCE_FD"] = str(write_fd)
            try:
                scheduler = self._start_locked("scheduler", None, variables, write_fd)
            except BaseException:
                os.close(read_fd)
                raise
            finally:
                os.close(write_fd)
            self.processes.read_from(scheduler, read_fd, session.take)
            self._request_locked([scheduler], SERVE, {}, dumps(None))
            servers = [self._start_locked("server", r, {}) for r in range(self.num_servers)]
            session.processes = [scheduler, *servers]
            for old in self.session.processes:
                if old.status is not None:
                    self.processes.forget(old)
            self.session = session
        self._wait_or_end(lambda: session.port != 0)
        with self.lock:
            self._check_locked()
            variables = {**session.variables(), "KVSTORE_ALLOW_IMPORT": self.allow_import}
            self._request_locked(servers, SERVE, variables, controller)

    def _session_over(self) -> bool:
        return self.session.over

    def _send_run_locked(self, blob: bytes) -> None:
        self._request_locked(self.workers, RUN, self.session.variables(), blob)

    def _close_in_order(self) -> None:
        workers = list(self.workers)
        with self.lock:
            for worker in workers:
                self.processes.close_input(worker)
        self.wait(lambda: all(w.status is not None for w in workers), time.monotonic() + CLOSE_S)
        session = self.session
        if session.over or (session.complete and not self.first):
            others = session.processes
            self.wait(lambda: all(o.status is not None for o in others), time.monotonic() + CLOSE_S)

    def _end_locked(self) -> None:
        self.processes.close()

    # -------------------------------------------------------------------------------- both sides

    def _start_locked(
        self, role: str, rank: int | None, variables: dict[str, str], *pass_fds: int
    ) -> Process:
        own = environment(role, rank, self.num_workers, self.num_servers)
        if role == "worker":
            own["KVSTORE_TIMEOUT"] = f"{self.timeout:g}"
        own.update(variables)
        read_fd, write_fd = os.pipe()
        try:
            process = self.processes.start(
                role if rank is None else f"{role} {rank}",
                [sys.executable, "-c", BOOT.format(path=sys.path), str(write_fd)],
                own,
                keep_input=True,
                pass_fds=[write_fd, *pass_fds],
            )
        except BaseException:
            os.close(read_fd)
            raise
        finally:
            os.close(write_fd)
        answer = Answer(lambda whole: self._take_answer_locked(process, whole))
        self.processes.read_from(process, read_fd, answer.take)
        return process

    def _request_locked(
        self, to: list[Process], kind: bytes, variables: dict[str, str], blob: bytes
    ) -> None:
        settings = pickle.dumps((variables, sys.path))
        for process in to:
            header = HEADER.pack(kind, len(settings) + len(blob))
            self.processes.send(process, header, settings, blob)

    # ------------------------------------------------------------------------ in the daemon thread

    def _loop(self) -> None:
        try:
            self._move()
        except Exception as error:  # or everybody would wait for what nobody moves
            why = f"{type(error).__name__} in the thread that serves it: {error}"
            with self.lock:
                self._kill_locked(why, KVStoreError(why))
        finally:
            self.processes.release()

    def _move(self) -> None:
        while True:
            calls = self.processes.wait(TICK_S)
            with self.lock:
                # What is not written yet holds up those who print, not this process's memory.
                while len(self.lines) > MOST_LINES and self.waiting and self.why_ended is None:
                    self.lock.wait(TICK_S / 10)
                if self.why_ended is not None:
                    return
                for process in self.processes.step(calls):
                    self._take_end_locked(process)
                self._check_run_locked()
                nobody = self.waiting == 0
                self.lock.notify_all()
            if nobody:
                self._print()

    def _take_line(self, process: Process, stream: int, line: bytes) -> None:
        self.lines.append((stream, f"[{process.name}] {line.decode(errors='replace')}"))

    def _take_answer_locked(self, process: Process, answer: bytearray) -> None:
        if answer[:1] == READY:
            self.ready.add(process)
        else:
            # What it printed comes before what it returned.
            self.processes.drain(process)
            self.processes.end_lines(process)
            self._take_answer_of_run_locked(process, answer)

    def _take_end_locked(self, process: Process) -> None:
        if self.why_ended is not None:
            return
        part = process in self.workers or process in self.session.processes
        clean = process.status == 0 and process not in self.workers and self.session.port != 0
        if part and not clean and not self.closed:
            why = f"{process.name} (pid {process.pid}) {process.ending()}"
            self._kill_locked(why, PeerLostError(why))
        elif process.status != 0:
            self.lines.append((2, f"kvstore: {process.name} {process.ending()}\n"))
        if not part:  # of an earlier session
            self.processes.forget(process)
