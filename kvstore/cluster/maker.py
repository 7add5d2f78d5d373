"""What `LocalCluster` and `RayCluster` share: how a cluster looks to the process that has made it.

`MadeCluster` is what users hold, `Maker` what is behind it: it outlives the other by as long as it
takes to end everything. How processes are started, asked and ended is its subclasses'.

A scheduler and its servers serve one session: from the joining of all workers until all have
closed their stores. A run that makes stores after a run that has closed its own gets a new session.
"""

import abc
import collections
import contextlib
import operator
import os
import secrets
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

from ..errors import (
    ArrayTypeError,
    ClosedError,
    InvalidArgumentError,
    KVStoreError,
    NotBuiltError,
    TimeoutError,
)
from . import settings
from .processes import address_variables
from .run import INTERRUPTED, Run, Worker
from .worker_main import dumps

CLOSE_S = 5.0  # for workers, then for servers, to end by themselves
TICK_S = 0.1
MOST_PROCESSES = 4096

Controller = Callable[[int, Any], object]
AllowImport = str | Sequence[str] | None
Result = TypeVar("Result")


class MadeCluster:
    """A cluster that this process has made; `LocalCluster` and `RayCluster` say of what."""

    _cluster: "Maker"

    def _begin(self, cluster: "Maker") -> None:
        self._cluster = cluster
        # Also called at the end of the interpreter, where threads and files are still usable.
        self._kill = weakref.finalize(self, cluster.kill_dropped)
        try:
            cluster.begin()
        except BaseException:
            cluster.kill("it did not start")
            self._kill.detach()
            raise

    def submit(self, function: Callable[..., Result], *args: Any, **kwargs: Any) -> Run:
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
            self._cluster.kill("it was closed")
            self._kill.detach()

    def __enter__(self: "Made") -> "Made":
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
        return f"<kvstore.{type(self).__name__}: {self._cluster.told()}>"


Made = TypeVar("Made", bound=MadeCluster)


class Session:
    """What is known of a scheduler that serves with its servers."""

    def __init__(self) -> None:
        self.token = secrets.token_hex(32)
        self.host, self.port = "", 0

    def variables(self) -> dict[str, str]:
        """What its workers' environment says of it."""
        return {"KVSTORE_TOKEN": self.token, **address_variables(self.host, self.port)}


class Maker(abc.ABC):
    """What a `MadeCluster` has; its threads hold on to this, not to the cluster itself.

    `lock` is a condition. Methods with the suffix `_locked` are called with it held.
    """

    session: Session

    def __init__(
        self,
        num_workers: Any,
        num_servers: Any,
        controller: Controller | None,
        allow_import: AllowImport,
        timeout: float | None,
        join: bool,
    ) -> None:
        self.num_workers = _count("num_workers", num_workers)
        self.num_servers = _count("num_servers", num_servers, 0)
        if controller is not None and not callable(controller):
            raise ArrayTypeError(f"controller is a function of (head, body), not {controller!r}")
        self.controller = controller
        self.allow_import = settings.modules(allow_import)
        self.timeout = settings.timeout(timeout)
        self.first = 1 if join else 0  # the first rank that is not this process
        self.pid = os.getpid()
        self.lock = threading.Condition()
        self.why_ended: str | None = None  # no process is left then, or they are being ended
        self.ended_by: KVStoreError | None = None
        self.closed = False
        self.current: Run | None = None
        self.lines: collections.deque[tuple[int, str]] = collections.deque()
        self.waiting = 0  # threads in `wait`
        self.printing = threading.Lock()

    @property
    @abc.abstractmethod
    def run_in(self) -> list[Any]:
        """The workers that a run is of, by rank; each a `run.Worker`."""

    @abc.abstractmethod
    def begin(self) -> None:
        """Start everything, and return when the workers can take a function."""

    @abc.abstractmethod
    def _begin_session(self, controller: bytes) -> None:
        """Let a scheduler listen, and servers join it."""

    @abc.abstractmethod
    def _session_over(self) -> bool:
        """Whether all workers have left the session that there is."""

    @abc.abstractmethod
    def _send_run_locked(self, blob: bytes) -> None:
        """Hand a function to the workers."""

    @abc.abstractmethod
    def _close_in_order(self) -> None:
        """Give everybody the time to end well; the rest is for `kill`."""

    @abc.abstractmethod
    def _end_locked(self) -> None:
        """End all processes at once."""

    # -------------------------------------------------------------------------- in users' threads

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

    def submit(self, function: Callable[..., Any], args: Any, kwargs: Any) -> Run:
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
            if self.current is not None and not self.current.done():
                raise InvalidArgumentError(f"the workers still run {self.current.name}")
            self.current = Run(self, name)
            self._send_run_locked(blob)
            return self.current

    def _renew(self) -> None:
        """A new session if the workers have ended the one that there was."""
        with self.lock:
            running = self.current is not None and not self.current.done()
        if not running and self._session_over():
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
            "scheduler": settings.join_address(self.session.host, self.session.port),
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
            running = self.current is not None and not self.current.done()
        if running:
            self.kill("it was closed during a run")
        if self.why_ended is None:
            self._close_in_order()

    def kill(self, why: str) -> None:
        """End all processes at once, and a run with it. The first reason stays."""
        if os.getpid() != self.pid:
            return
        with self.lock:
            self._kill_locked(why, ClosedError(f"the cluster has ended: {why}"))

    def kill_dropped(self) -> None:
        """`kill` where the garbage collector, or the end of the interpreter, has come to it."""
        self.kill("it was dropped without close")

    def told(self) -> str:
        """What `repr` says of it."""
        if os.getpid() != self.pid:
            return "of the process that this one is a fork of"
        size = f"{several(self.num_workers, 'worker')}, {several(self.num_servers, 'server')}"
        if self.closed:
            return f"{size}, closed"
        if self.why_ended is not None:
            return f"{size}, ended: {self.why_ended}; make a new one"
        run = self.current
        return f"{size}, ready" if run is None or run.done() else f"{size}, running {run.name}"

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

    def _kill_locked(self, why: str, error: KVStoreError) -> None:
        if self.why_ended is None:
            self._end_locked()
            self.why_ended, self.ended_by = why, error
        if self.current is not None:
            self.current.fail(error)
        self.lock.notify_all()

    def _check_run_locked(self) -> None:
        """End what a run that is overdue is in."""
        if self.current is not None and self.current.overdue():
            why = f"its run of {self.current.name} failed in one worker and went on in others"
            self._kill_locked(why, ClosedError(why))

    def _take_answer_of_run_locked(self, worker: Worker, answer: bytes | bytearray) -> None:
        if self.current is not None:
            rank = self.first + self.run_in.index(worker)
            self.current.take(worker, rank, answer)

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


def _count(name: str, number: Any, low: int = 1) -> int:
    try:
        count = operator.index(number)
    except TypeError:
        count = None
    if count is None or isinstance(number, bool):
        raise ArrayTypeError(f"{name} is an integer, not {number!r}")
    if not low <= count <= MOST_PROCESSES:
        raise InvalidArgumentError(f"{name}={count}: it is a number from {low} to {MOST_PROCESSES}")
    return count


def several(number: int, what: str) -> str:
    """`1 worker`, `2 workers`."""
    return f"{number} {what}{'' if number == 1 else 's'}"


def _needs_cloudpickle(why: str) -> NotBuiltError:
    return NotBuiltError(
        f"what is run cannot be sent to the workers by plain pickle ({why}): "
        "pip install cloudpickle (it is among mlkvstore[dist])"
    )
