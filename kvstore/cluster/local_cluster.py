"""`LocalCluster`: a whole cluster on this machine, from a script or a notebook cell.

Its processes all run worker_main.py and end with this one, whatever ends it (processes.py). One
daemon thread moves output, answers and news of deaths; everything shared is under one lock, whose
condition it notifies. What workers print is written by the thread that waits in `run`, so that it
comes out under the notebook cell that runs, and by the daemon thread while nobody waits.

A scheduler and its servers serve one session: from the joining of all workers until all have
closed their stores. The scheduler holds the pipe by which it has told its address until that
moment, and lets go of it before the last worker's `close` returns. So a run that makes stores after
a run that has closed its own finds the end of that pipe here, and gets a new session.
"""

import collections
import contextlib
import json
import operator
import os
import pickle
import secrets
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

from ..errors import (
    ArrayTypeError,
    ClosedError,
    InvalidArgumentError,
    KVStoreError,
    NotBuiltError,
    PeerLostError,
    TimeoutError,
)
from . import settings
from .local_run import INTERRUPTED, Answer, LocalRun, WorkerTraceback
from .processes import Process, Processes, address_variables, environment
from .worker_main import BOOT, HEADER, READY, RUN, SERVE, dumps

__all__ = ["LocalCluster", "LocalRun", "WorkerTraceback"]

CLOSE_S = 5.0  # for workers, then for servers, to end by themselves
TICK_S = 0.1
MOST_LINES = 10_000
MOST_PROCESSES = 4096

Result = TypeVar("Result")


class LocalCluster:
    """A scheduler, servers and workers as processes of this machine.

    A context manager: leaving the block closes the cluster. The workers are idle until `run` or
    `submit` gives them a function. A store that the function keeps somewhere is there in the next
    run; one that it has neither kept nor closed is left at the end of the run. After a run that was
    interrupted, or that did not end in all workers after it had failed in one, the cluster has
    ended: its ``repr`` tells.

    Parameters
    ----------
    num_workers, num_servers
        How many there are.
    controller
        What each server calls with (head, body) for ``send_command_to_servers``.
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
        controller: Callable[[int, Any], object] | None = None,
        timeout: float | None = None,
        join: bool = False,
    ) -> None:
        num_workers = _count("num_workers", num_workers)
        num_servers = _count("num_servers", num_servers)
        if controller is not None and not callable(controller):
            raise ArrayTypeError(f"controller is a function of (head, body), not {controller!r}")
        first = 1 if join else 0
        limit = settings.timeout(timeout)
        self._cluster = Cluster(num_workers, num_servers, first, controller, limit)
        # Also called at the end of the interpreter, where threads and files are still usable.
        self._kill = weakref.finalize(
            self, Cluster.kill, self._cluster, "it was dropped without close"
        )
        try:
            self._cluster.begin()
        except BaseException:
            self._kill()
            raise

    def submit(self, function: Callable[..., Result], *args: Any, **kwargs: Any) -> "LocalRun":
        """Let every worker call the function, and return at once with the run.

        Function, arguments and results are pickled, by cloudpickle where it is installed.
        """
        with self._ended_by_ctrl_c():
            return self._cluster.submit(function, args, kwargs)

    def run(self, function: Callable[..., Result], *args: Any, **kwargs: Any) -> list[Result]:
        """Call the function in every worker, and return what it returned, by rank.

        Raises
        ------
        Exception
            What the function raised in the first worker in which it did; its ``__cause__`` is a
            `WorkerTraceback`, with the rank.
        PeerLostError
            A process of the cluster has died.
        """
        with self._ended_by_ctrl_c():
            results: list[Result] = self.submit(function, *args, **kwargs).result()
        return results

    @property
    def options(self) -> dict[str, Any]:
        """What ``kvstore.create`` needs to join this cluster as a worker from this process."""
        with self._ended_by_ctrl_c():
            return self._cluster.options()

    def close(self) -> None:
        """End all processes of the cluster. A second call does nothing."""
        try:
            self._cluster.close()
        finally:
            self._kill()

    def __enter__(self) -> "LocalCluster":
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        if kind is not None:
            self._cluster.kill(f"{kind.__name__} has left its block")
        self.close()

    @contextlib.contextmanager
    def _ended_by_ctrl_c(self) -> Iterator[None]:
        """A request that was sent by half is not made good again."""
        try:
            yield
        except KeyboardInterrupt:
            self._cluster.kill(INTERRUPTED)
            raise

    def __repr__(self) -> str:
        return f"<kvstore.LocalCluster: {self._cluster.told()}>"


class _Session:
    """A scheduler with its servers, and what the scheduler has told."""

    def __init__(self) -> None:
        self.processes: list[Process] = []
        self.token = secrets.token_hex(32)
        self.told = b""
        self.over = False
        self.host, self.port = "", 0

    def take(self, data: bytes) -> None:
        """What the scheduler writes: its address, then a line when all nodes have joined."""
        self.told += data
        self.over = not data
        if not self.port and b"\n" in self.told:
            place = json.loads(self.told.partition(b"\n")[0])
            self.host, self.port = place["host"], place["port"]

    @property
    def complete(self) -> bool:
        """Whether all its nodes had joined at some time."""
        return self.told.count(b"\n") > 1

    def variables(self) -> dict[str, str]:
        return {"KVSTORE_TOKEN": self.token, **address_variables(self.host, self.port)}


class Cluster:
    """What a `LocalCluster` has; the daemon thread holds on to this, not to the cluster itself.

    `lock` is a condition. Methods with the suffix `_locked` are called with it held.
    """

    def __init__(
        self,
        num_workers: int,
        num_servers: int,
        first: int,
        controller: Callable[[int, Any], object] | None,
        timeout: float,
    ) -> None:
        self.num_workers = num_workers
        self.num_servers = num_servers
        self.first = first  # the first rank that is a process
        self.controller = controller
        self.timeout = timeout
        self.pid = os.getpid()
        self.lock = threading.Condition()
        self.why_ended: str | None = None  # no process is left then
        self.closed = False
        self.workers: list[Process] = []
        self.ready: set[Process] = set()
        self.session = _Session()
        self.run: LocalRun | None = None
        self.lines: collections.deque[tuple[int, str]] = collections.deque()
        self.waiting = 0  # threads in `wait`
        self.printing = threading.Lock()
        self.processes = Processes(self._take_line)

    # -------------------------------------------------------------------------- in users' threads

    def begin(self) -> None:
        """Start everything, and return when the workers can take a function."""
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
            self._request_locked(servers, SERVE, session.variables(), controller)

    def _wait_or_end(self, done: Callable[[], bool]) -> None:
        if not self.wait(done, time.monotonic() + self.timeout):
            self.kill(f"it had not started after {self.timeout:g} s")
            raise TimeoutError(f"the processes of the cluster did not start in {self.timeout:g} s")
        with self.lock:
            self._check_locked()

    def wait(self, done: Callable[[], bool], deadline: float | None) -> bool:
        """Whether `done` came true before the deadline, or the cluster's end, which ends it too.

        Meanwhile this thread writes what the processes print.
        """
        with self.lock:
            self.waiting += 1
        try:
            while True:
                with self.lock:
                    over = done() or self.why_ended is not None
                    late = deadline is not None and time.monotonic() >= deadline
                    if not over and not late and not self.lines:
                        self.lock.wait(TICK_S)
                self._print()
                if over or late:
                    return over
        finally:
            with self.lock:
                self.waiting -= 1

    def submit(self, function: Callable[..., Any], args: Any, kwargs: Any) -> LocalRun:
        if not callable(function):
            raise ArrayTypeError(f"a run is of a function, not of {function!r}")
        self._check_process()
        with self.lock:
            self._check_locked()
        name = getattr(function, "__qualname__", None) or repr(function)
        blob = self._dumps((function, args, kwargs))
        self._renew()
        with self.lock:
            self._check_locked()
            if self.run is not None and not self.run.done():
                raise InvalidArgumentError(f"the workers still run {self.run.name}")
            self.run = LocalRun(self, name)
            self._request_locked(self.workers, RUN, self.session.variables(), blob)
            return self.run

    def _renew(self) -> None:
        """A new session if the workers have ended the one that there was."""
        with self.lock:
            running = self.run is not None and not self.run.done()
            over = self.session.over and not running
        if over:
            self._begin_session(self._dumps(self.controller))

    def _dumps(self, value: object) -> bytes:
        try:
            made = dumps(value)
        except Exception as error:
            if sys.modules.get("cloudpickle") is not None:
                raise ArrayTypeError(f"what is run is sent as a pickle: {error}") from error
            raise _needs_cloudpickle(str(error)) from error
        # Plain pickle names such a function by a module that the workers do not have.
        function = value[0] if isinstance(value, tuple) else value
        module = getattr(function, "__module__", None)
        if module == "__main__" and sys.modules.get("cloudpickle") is None:
            raise _needs_cloudpickle("the function was defined in a notebook or script")
        return made

    def options(self) -> dict[str, Any]:
        self._check_process()
        with self.lock:
            self._check_locked()
        self._renew()
        found = {
            "role": "worker",
            "scheduler": f"{self.session.host}:{self.session.port}",
            "token": self.session.token,
            "num_workers": self.num_workers,
            "num_servers": self.num_servers,
            "timeout": self.timeout,
        }
        return {**found, "rank": 0} if self.first else found

    def close(self) -> None:
        """End what there is in order; the rest is for `kill`."""
        if os.getpid() != self.pid:
            return
        with self.lock:
            self.closed = True
            if self.run is not None and not self.run.done():
                self.kill("it was closed during a run")
            if self.why_ended is not None:
                return
            workers = list(self.workers)
            for worker in workers:
                self.processes.close_input(worker)
        self.wait(lambda: all(w.status is not None for w in workers), time.monotonic() + CLOSE_S)
        session = self.session
        if session.over or (session.complete and not self.first):
            others = session.processes
            self.wait(lambda: all(o.status is not None for o in others), time.monotonic() + CLOSE_S)

    def kill(self, why: str) -> None:
        """End all processes at once, and a run with it. The first reason stays."""
        if os.getpid() != self.pid:
            return
        with self.lock:
            self._kill_locked(why, ClosedError(f"the cluster has ended: {why}"))

    def told(self) -> str:
        """What `repr` says of it."""
        if os.getpid() != self.pid:
            return "of the process that this one is a fork of"
        size = f"{_several(self.num_workers, 'worker')}, {_several(self.num_servers, 'server')}"
        if self.closed:
            return f"{size}, closed"
        if self.why_ended is not None:
            return f"{size}, ended: {self.why_ended}; make a new one"
        running = self.run is not None and not self.run.done()
        return f"{size}, running {self.run.name}" if running and self.run else f"{size}, ready"

    # -------------------------------------------------------------------------------- both sides

    def _check_process(self) -> None:
        # A fork may have the lock as it was held by another thread.
        if os.getpid() != self.pid:
            raise ClosedError("this cluster belongs to the process that this one is a fork of")

    def _check_locked(self) -> None:
        if self.closed:
            raise ClosedError("this cluster is closed")
        if self.why_ended is not None:
            raise ClosedError(f"this cluster has ended: {self.why_ended}; make a new one")

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

    def _kill_locked(self, why: str, error: KVStoreError) -> None:
        if self.why_ended is None:
            self.processes.close()
            self.why_ended = why
        if self.run is not None:
            self.run.fail(error)
        self.lock.notify_all()

    def _print(self) -> None:
        with self.printing:
            touched = set()
            while self.lines:
                stream, text = self.lines.popleft()
                touched.add(stream)
                with contextlib.suppress(OSError, ValueError, AttributeError):  # closed, or none
                    (sys.stdout if stream == 1 else sys.stderr).write(text)
            for stream in touched:
                with contextlib.suppress(OSError, ValueError, AttributeError):
                    (sys.stdout if stream == 1 else sys.stderr).flush()

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
                if self.run is not None and self.run.overdue():
                    why = f"its run of {self.run.name} failed in one worker and went on in others"
                    self._kill_locked(why, ClosedError(why))
                nobody = self.waiting == 0
                self.lock.notify_all()
            if nobody:
                self._print()

    def _take_line(self, process: Process, stream: int, line: bytes) -> None:
        self.lines.append((stream, f"[{process.name}] {line.decode(errors='replace')}"))

    def _take_answer_locked(self, process: Process, answer: bytearray) -> None:
        if answer[:1] == READY:
            self.ready.add(process)
        elif self.run is not None:
            # What it printed comes before what it returned.
            self.processes.drain(process)
            self.processes.end_lines(process)
            rank = self.first + self.workers.index(process)
            self.run.take(process, rank, answer)

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


def _count(name: str, number: Any) -> int:
    try:
        count = operator.index(number)
    except TypeError:
        count = None
    if count is None or isinstance(number, bool):
        raise ArrayTypeError(f"{name} is an integer, not {number!r}")
    if not 0 < count <= MOST_PROCESSES:
        raise InvalidArgumentError(f"{name}={count}: it is a number from 1 to {MOST_PROCESSES}")
    return count


def _several(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"


def _needs_cloudpickle(why: str) -> NotBuiltError:
    return NotBuiltError(
        f"what is run cannot be sent to the workers by plain pickle ({why}): "
        "pip install cloudpickle (it is among mlkvstore[dist])"
    )
