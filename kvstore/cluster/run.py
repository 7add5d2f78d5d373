"""A run of a function in the workers of a cluster that this process has made, and their answers."""

import contextlib
import io
import pickle
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Protocol

from ..errors import KVStoreError, TimeoutError
from .worker_main import ERROR, HEADER

if TYPE_CHECKING:
    from .maker import Maker

FAILED_S = 5.0  # for the other workers to end a run in which one has failed
INTERRUPTED = "a run was interrupted"


class Worker(Protocol):
    """A process that runs functions."""

    pid: int


class WorkerTraceback(Exception):
    """Where in which worker an exception was raised; the cause of that exception here."""

    def __init__(self, rank: int, pid: int, text: str) -> None:
        super().__init__(f"in worker {rank} (pid {pid}):\n\n{text.rstrip()}")
        self.rank = rank
        self.pid = pid
        self.traceback = text


class Run:
    """A function that the workers of a cluster are calling; made by ``submit``."""

    def __init__(self, cluster: "Maker", name: str) -> None:
        self._cluster = cluster
        self.name = name
        self._answers: dict[Worker, bytes | bytearray] = {}
        self._fault: BaseException | None = None
        self._failed_at: float | None = None
        self._over = not cluster.run_in
        self._results: list[Any] | None = None

    def done(self) -> bool:
        """Whether it has ended, well or not."""
        return self._over

    def result(self, timeout: float | None = None) -> list[Any]:
        """Wait for the end of the run; what the function returned, by rank.

        Raises what the cluster's ``run`` raises, and `kvstore.TimeoutError` after `timeout`
        seconds; the run then goes on.
        """
        end = None if timeout is None else time.monotonic() + timeout
        try:
            done = self._cluster.wait(lambda: self._over, end)
        except BaseException:
            self._cluster.kill(INTERRUPTED)
            raise
        if not done:
            raise TimeoutError(f"the run of {self.name} has not ended after {timeout:g} s")
        if self._fault is not None:
            raise self._fault
        if self._results is None:
            answers = [self._answers.pop(worker) for worker in self._cluster.run_in]
            views = [memoryview(answer)[HEADER.size :] for answer in answers]
            self._results = [pickle.loads(view) for view in views]
        return self._results

    def __repr__(self) -> str:
        state = "failed" if self._fault else "ended" if self._over else "under way"
        return f"<run of {self.name}, {state}>"

    # What follows is called under the cluster's lock.

    def take(self, worker: Worker, rank: int, answer: bytes | bytearray) -> None:
        """A worker's answer is there."""
        self._answers[worker] = answer
        if answer[:1] == ERROR and self._fault is None:
            self._fault = _error_from(rank, worker.pid, answer)
            self._failed_at = time.monotonic()
        self._over = len(self._answers) == len(self._cluster.run_in)

    def overdue(self) -> bool:
        """Whether it has failed in one worker and still runs in another."""
        return (
            not self._over
            and self._failed_at is not None
            and time.monotonic() > self._failed_at + FAILED_S
        )

    def fail(self, error: BaseException) -> None:
        """It has ended without all answers; the first thing that went wrong is the reason."""
        if not self._over:
            self._fault = self._fault or error
            self._over = True


def _error_from(rank: int, pid: int, answer: bytes | bytearray) -> BaseException:
    file = io.BytesIO(memoryview(answer)[HEADER.size :])
    cause = WorkerTraceback(rank, pid, pickle.load(file))
    error: object = None
    with contextlib.suppress(Exception):  # it may need what is not here
        error = pickle.load(file)
    if not isinstance(error, Exception):
        last = cause.traceback.rstrip().rpartition("\n")[2]
        error = KVStoreError(f"worker {rank} failed: {last}")
    error.__cause__ = cause
    return error


class Answer:
    """Puts the answers of a process together again."""

    def __init__(self, on_answer: Callable[[bytearray], None]) -> None:
        self._on_answer = on_answer
        self._data = bytearray()

    def take(self, data: bytes) -> None:
        self._data += data
        while len(self._data) >= HEADER.size:
            size = HEADER.size + HEADER.unpack_from(self._data)[1]
            if len(self._data) < size:
                return
            whole, self._data = self._data, self._data[size:]
            del whole[size:]
            self._on_answer(whole)
