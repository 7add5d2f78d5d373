"""The local processes of one cluster: started behind a gate, watched, and gone in the end.

A process is made in three steps: a shell that waits for one line on its standard input, leader of a
session of its own; the watchdog is told of its process group; the line is written and the shell
becomes the command. So whoever starts the processes may be killed at any moment: the watchdog knows
them all, or the gate sees the end of the file. Being in sessions of their own, they get none of the
signals of the starter's terminal; whoever started them passes on what they shall have.

A process that has ended is not reaped before its whole group has been killed and the watchdog has
forgotten it: until then its number cannot come to mean somebody else.

`kvrun` drives this from its main thread, `LocalCluster` from a thread of its own and under a lock.
Nothing here blocks for longer than it is told to.
"""

import collections
import contextlib
import functools
import os
import selectors
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence

from ..errors import KVStoreError
from . import watchdog
from .settings import MAX_TIMEOUT_S

GATE = ("/bin/sh", "-c", 'read -r go && exec "$@"')
GATE_WITHOUT_INPUT = ("/bin/sh", "-c", 'read -r go && exec "$@" </dev/null')
CHUNK = 1 << 16
MOST_IN_PIPE = 1 << 20  # what Linux lets a user's pipe hold
LONGEST_LINE = 1 << 16  # one without an end is cut there
POLL_S = 0.05  # where a process cannot be watched by a file descriptor

# What is said of one cluster, which a process inside it may be starting another of.
OF_ONE_CLUSTER = (
    "KVSTORE_ROLE",
    "KVSTORE_SCHEDULER",
    "KVSTORE_NUM_WORKERS",
    "KVSTORE_NUM_SERVERS",
    "KVSTORE_RANK",
    "KVSTORE_TOKEN",
    "KVSTORE_BIND",
    "KVSTORE_ADVERTISE",
    "KVSTORE_ANNOUNCE_FD",
    "KVSTORE_PARENT_FD",
)


def environment(role: str, rank: int | None, num_workers: int, num_servers: int) -> dict[str, str]:
    """The variables of a node of a cluster on this machine, but for scheduler and token."""
    variables = {
        name: value
        for name, value in os.environ.items()
        if name not in OF_ONE_CLUSTER and not name.startswith("DMLC_")
    }
    variables["KVSTORE_ROLE"] = variables["DMLC_ROLE"] = role
    variables["KVSTORE_NUM_WORKERS"] = variables["DMLC_NUM_WORKER"] = str(num_workers)
    variables["KVSTORE_NUM_SERVERS"] = variables["DMLC_NUM_SERVER"] = str(num_servers)
    variables["KVSTORE_BIND"] = "127.0.0.1"
    if role == "server":
        # Workers may join when they like: whoever has started them sees whether they are alive.
        variables["KVSTORE_TIMEOUT"] = f"{MAX_TIMEOUT_S:g}"
    if rank is not None:
        variables["KVSTORE_RANK"] = str(rank)
    return variables


def address_variables(host: str, port: int) -> dict[str, str]:
    """The variables, ours and MXNet's, that say where the scheduler of this machine listens."""
    return {
        "KVSTORE_SCHEDULER": f"{host}:{port}",
        "DMLC_PS_ROOT_URI": host,
        "DMLC_PS_ROOT_PORT": str(port),
    }


class Process:
    """One process: `status` is None, then its exit status, or minus the signal that ended it."""

    def __init__(self, name: str, popen: "subprocess.Popen[bytes]") -> None:
        self.name = name
        self.popen = popen
        self.pid = popen.pid
        self.status: int | None = None
        self.watch_fd: int | None = None
        self.lines: list[_Lines] = []
        self.outgoing: collections.deque[memoryview] = collections.deque()

    def look(self) -> bool:
        """Whether it has ended. It stays unreaped."""
        if self.status is None:
            try:
                found = os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
            except ChildProcessError:  # reaped by somebody else in this process
                self.status = 0
            else:
                if found is not None:
                    exited = found.si_code == os.CLD_EXITED
                    self.status = found.si_status if exited else -found.si_status
        return self.status is not None

    def ending(self) -> str:
        """How it ended, as part of a sentence."""
        assert self.status is not None
        if self.status >= 0:
            return f"ended with exit status {self.status}"
        try:
            return f"was killed by {signal.Signals(-self.status).name}"
        except ValueError:
            return f"was killed by signal {-self.status}"


class Processes:
    """The processes of one cluster and the pipes to them.

    Parameters
    ----------
    on_line
        Called with the process, 1 or 2 for its standard output or error, and one line of it with
        the line's end.
    orphans_s
        Seconds that they may go on when this process was killed.
    """

    def __init__(
        self, on_line: Callable[[Process, int, bytes], None], orphans_s: float = 0.0
    ) -> None:
        self._on_line = on_line
        self._selector = selectors.DefaultSelector()
        self._pipes: dict[Process, list[_Reader]] = {}
        self._watchdog = subprocess.Popen(
            [sys.executable, "-I", "-S", watchdog.__file__, str(os.getpid()), str(orphans_s)],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            cwd="/",
            start_new_session=True,
        )

    def __iter__(self) -> "collections.abc.Iterator[Process]":
        return iter(list(self._pipes))

    def start(
        self,
        name: str,
        command: Sequence[str],
        variables: Mapping[str, str],
        *,
        keep_input: bool = False,
        pass_fds: Sequence[int] = (),
    ) -> Process:
        """Start a process; with `keep_input` its standard input is what is given to `send`."""
        gate = GATE if keep_input else GATE_WITHOUT_INPUT
        popen = subprocess.Popen(
            [*gate, name, *command],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            bufsize=0,
            env=variables,
            start_new_session=True,
            pass_fds=pass_fds,
        )
        process = Process(name, popen)
        self._pipes[process] = []
        self._tell_watchdog(f"+{process.pid}\n")
        assert popen.stdin and popen.stdout and popen.stderr
        for stream, pipe in ((1, popen.stdout), (2, popen.stderr)):
            lines = _Lines(functools.partial(self._on_line, process, stream))
            process.lines.append(lines)
            self.read_from(process, pipe.fileno(), lines.take, close=False)
        with contextlib.suppress(AttributeError, OSError):  # not on every system
            process.watch_fd = os.pidfd_open(process.pid)
            self._selector.register(process.watch_fd, selectors.EVENT_READ, lambda: None)
        os.set_blocking(popen.stdin.fileno(), False)
        with contextlib.suppress(BrokenPipeError):  # it was killed at the gate
            popen.stdin.write(b"go\n")
        if not keep_input:
            popen.stdin.close()
        return process

    def read_from(
        self, process: Process, fd: int, take: Callable[[bytes], None], *, close: bool = True
    ) -> None:
        """Hand what comes from a pipe of the process to `take`, b"" at its end.

        With `close` the descriptor is taken over.
        """
        os.set_blocking(fd, False)
        reader = _Reader(self._selector, fd, take, close)
        self._pipes[process].append(reader)
        self._selector.register(fd, selectors.EVENT_READ, reader.ready)

    def send(self, process: Process, *parts: bytes) -> None:
        """Write to the standard input of a process, as it takes it."""
        process.outgoing.extend(memoryview(part) for part in parts)
        self._write(process)

    def close_input(self, process: Process) -> None:
        """End the standard input of a process."""
        process.outgoing.clear()
        stdin = process.popen.stdin
        assert stdin
        if not stdin.closed:
            with contextlib.suppress(KeyError):
                self._selector.unregister(stdin)
            stdin.close()

    def _write(self, process: Process) -> None:
        stdin = process.popen.stdin
        assert stdin
        try:
            while process.outgoing:
                part = process.outgoing[0]
                written = os.write(stdin.fileno(), part)
                process.outgoing[0] = part[written:]
                if written == len(part):
                    process.outgoing.popleft()
        except BlockingIOError:
            with contextlib.suppress(KeyError):  # it is registered already
                self._selector.register(stdin, selectors.EVENT_WRITE, lambda: self._write(process))
            return
        except (BrokenPipeError, ValueError):  # it is ending, which is seen elsewhere; or closed
            process.outgoing.clear()
        with contextlib.suppress(KeyError, ValueError):
            self._selector.unregister(stdin)

    def wait(self, timeout: float) -> list[Callable[[], None]]:
        """What there is to be called (by `step`), after at most `timeout` seconds."""
        if any(process.watch_fd is None and process.status is None for process in self):
            timeout = min(timeout, POLL_S)
        return [key.data for key, _ in self._selector.select(timeout)]

    def step(self, calls: Sequence[Callable[[], None]]) -> list[Process]:
        """Move what has come. Returns the processes that have ended since, their output moved."""
        for call in calls:
            call()
        ended = [process for process in self if process.status is None and process.look()]
        for process in ended:
            if process.watch_fd is not None:
                self._selector.unregister(process.watch_fd)
                os.close(process.watch_fd)
                process.watch_fd = None
            self.drain(process)
        return ended

    def drain(self, process: Process) -> None:
        """Read all that the process has written until now."""
        for reader in self._pipes.get(process, ()):
            # Not without a bound: a process that has left the group may write for ever.
            for _ in range(MOST_IN_PIPE // CHUNK):
                if not reader.ready():
                    break

    def end_lines(self, process: Process) -> None:
        """Take the line that it has begun as a whole one."""
        for lines in process.lines:
            lines.take(b"")

    def signal(self, process: Process, number: int) -> None:
        """Send a signal to the process's group."""
        # A group of which only the unreaped leader is left takes signals and ignores them.
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, number)

    def forget(self, process: Process) -> None:
        """Kill what is left of the process's group, and reap it."""
        self.signal(process, signal.SIGKILL)
        with contextlib.suppress(KVStoreError):
            self._tell_watchdog(f"-{process.pid}\n")
        process.popen.wait()
        if process.status is None:
            process.status = process.popen.returncode
        self.drain(process)
        self.close_input(process)
        for reader in self._pipes.pop(process, ()):
            reader.finish()
        for pipe in (process.popen.stdout, process.popen.stderr):
            assert pipe
            pipe.close()
        if process.watch_fd is not None:
            self._selector.unregister(process.watch_fd)
            os.close(process.watch_fd)
            process.watch_fd = None

    def close(self) -> None:
        """Kill and reap all there is, the watchdog too."""
        for process in self:
            self.signal(process, signal.SIGKILL)
        for process in self:
            self.forget(process)
        assert self._watchdog.stdin
        self._watchdog.stdin.close()
        self._watchdog.wait()

    def release(self) -> None:
        """Close what `wait` uses: for the thread that calls it, after `close`."""
        self._selector.close()

    def _tell_watchdog(self, line: str) -> None:
        assert self._watchdog.stdin
        try:
            os.write(self._watchdog.stdin.fileno(), line.encode())
        except BrokenPipeError:
            raise KVStoreError(
                f"the process that watches over the cluster's (pid {self._watchdog.pid}) is gone"
            ) from None


class _Reader:
    """The read end of a pipe that does not block."""

    def __init__(
        self,
        selector: selectors.BaseSelector,
        fd: int,
        take: Callable[[bytes], None],
        close: bool,
    ) -> None:
        self._selector = selector
        self._fd = fd
        self._take = take
        self._close = close
        self._open = True

    def ready(self) -> bool:
        """Read once. Whether there may be more."""
        if not self._open:
            return False
        try:
            data = os.read(self._fd, CHUNK)
        except BlockingIOError:
            return False
        if data:
            self._take(data)
        else:
            self.finish()
        return bool(data)

    def finish(self) -> None:
        """Read no more."""
        if self._open:
            self._open = False
            self._selector.unregister(self._fd)
            if self._close:
                os.close(self._fd)
            self._take(b"")


class _Lines:
    """Cuts what comes into lines; a carriage return ends one too, for progress bars."""

    def __init__(self, on_line: Callable[[bytes], None]) -> None:
        self._on_line = on_line
        self._rest = b""

    def take(self, data: bytes) -> None:
        lines = (self._rest + data).splitlines(keepends=True)
        self._rest = b""
        whole = not lines or lines[-1].endswith((b"\n", b"\r"))
        if not whole and data and len(lines[-1]) < LONGEST_LINE:
            self._rest = lines.pop()
        for line in lines:
            self._on_line(line if line.endswith((b"\n", b"\r")) else line + b"\n")
