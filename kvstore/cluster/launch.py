"""`kvrun`: a command as every worker of a cluster on this machine, with servers and a scheduler.

The launcher has one thread and one loop (processes.py). Three things end it: all workers have ended
well; a process has failed, whose exit status it takes; a signal. Then the rest is told to end, and
after a grace killed. A signal is an exception here, which is raised wherever the loop is, also in a
write to a reader that does not read; what it may interrupt leaves nothing that would not be found.
"""

import argparse
import contextlib
import json
import math
import os
import re
import secrets
import select
import shutil
import signal
import sys
import time
from collections.abc import Sequence
from types import FrameType

from .. import __version__
from ..errors import InvalidArgumentError, KVStoreError, NotBuiltError
from . import settings
from .entry import check_ucx
from .processes import Process, Processes, address_variables, environment

START_S = 60.0  # for the scheduler to listen
LEAVE_S = 10.0  # for servers and scheduler to end by themselves after the last worker
GRACE_S = 3.0  # between being told to end and being killed
TICK_S = 0.1
MOST_PROCESSES = 4096


class _Signal(BaseException):
    """The launcher was told to end."""

    def __init__(self, number: int) -> None:
        self.number = number


class _Failed(Exception):
    """The run has failed: with an exit status, and a sentence unless it speaks for itself."""

    def __init__(self, status: int, text: str = "") -> None:
        super().__init__(text)
        self.status = status


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit status."""
    options = _parse(arguments)
    try:
        if options.num_servers:
            check_ucx()
    except NotBuiltError as error:
        print(f"kvrun: {error}", file=sys.stderr)
        return 1
    # Ignored, as some starters leave it, it would take away how the processes have ended.
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    launch = _Launch(options)
    for_workers = signal.SIGTERM
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, launch.on_signal)
    try:
        launch.start()
        launch.watch()
        status = 0
    except _Signal as ended:
        for_workers = signal.Signals(ended.number)
        status = 128 + ended.number
    except BrokenPipeError:  # whoever read the output has gone, as in `kvrun … | head`
        status = 128 + signal.SIGPIPE
    except (_Failed, KVStoreError, OSError) as error:
        status = error.status if isinstance(error, _Failed) else 1
        launch.last_words = f"kvrun: {error}\n"
    launch.end(for_workers if status else None)
    return status


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="kvrun",
        usage="%(prog)s -n WORKERS [-s SERVERS] [options] COMMAND [ARGUMENT ...]",
        description="Run COMMAND as each worker of a kvstore cluster on this machine, with servers "
        "and a scheduler beside it. The first process that fails ends all; its exit status is that "
        "of kvrun (128 + n for signal n).",
    )
    parser.add_argument("-n", "--num-workers", type=_count, required=True, metavar="WORKERS")
    parser.add_argument("-s", "--num-servers", type=_count_or_none, default=1, metavar="SERVERS")
    parser.add_argument(
        "--controller",
        type=_controller,
        metavar="MODULE:FUNCTION",
        help="what each server calls with (head, body) for send_command_to_servers",
    )
    parser.add_argument(
        "--allow-import",
        type=_modules,
        action="append",
        metavar="MODULE",
        help="where servers may import optimizers of users from, with the modules below it",
    )
    parser.add_argument(
        "--timeout",
        type=_seconds,
        metavar="SECONDS",
        help="that joining and each call on a store may take (KVSTORE_TIMEOUT); not the whole run",
    )
    parser.add_argument("--version", action="version", version=f"kvstore {__version__}")
    parser.add_argument(
        "command", nargs=argparse.REMAINDER, metavar="COMMAND", help="and arguments"
    )
    options = parser.parse_args(arguments)
    if options.command[:1] == ["--"]:
        del options.command[0]
    if not options.command:
        parser.error("there is no COMMAND to run as a worker")
    if options.num_workers + options.num_servers > MOST_PROCESSES:
        parser.error(f"no more than {MOST_PROCESSES} processes are started on one machine")
    if shutil.which(options.command[0]) is None:
        parser.exit(127, f"kvrun: there is no program {options.command[0]!r} to run\n")
    return options


def _count(text: str) -> int:
    if not (text.isascii() and text.isdigit() and 0 < int(text[:9]) <= MOST_PROCESSES):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 1 to {MOST_PROCESSES}")
    return int(text)


def _count_or_none(text: str) -> int:
    return 0 if text == "0" else _count(text)


def _seconds(text: str) -> str:
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not 0 < number < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds above 0")
    return text


def _controller(text: str) -> str:
    if not re.fullmatch(r"[\w.]+:[\w.]+", text):
        raise argparse.ArgumentTypeError(f"{text!r} is not MODULE:FUNCTION")
    return text


def _modules(text: str) -> str:
    try:
        return settings.modules(text)
    except InvalidArgumentError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


class _Launch:
    """The processes of one `kvrun`."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.processes = Processes(self._forward)
        self.last_words = ""
        self.armed = False  # signals are raised; each that was disarms
        self.mute = False  # the output has failed
        self.deadline = math.inf  # of writing
        self.workers: list[Process] = []
        self.others: list[Process] = []  # scheduler and servers
        self.announced = b""
        self.token = secrets.token_hex(32)

    def on_signal(self, number: int, frame: FrameType | None) -> None:
        """The handler of signals."""
        if self.armed:
            self.armed = False
            raise _Signal(number)

    def start(self) -> None:
        """Start the scheduler, then, told where it listens, all others."""
        self.armed = True
        serve = [sys.executable, "-m", "kvstore.server"]
        read_fd, write_fd = os.pipe()
        address = {**address_variables("127.0.0.1", 0), "KVSTORE_ANNOUNCE_FD": str(write_fd)}
        scheduler = self._start("scheduler", None, serve, address, pass_fds=[write_fd])
        os.close(write_fd)
        self.others.append(scheduler)
        self.processes.read_from(scheduler, read_fd, self._take_announced)
        deadline = time.monotonic() + START_S
        while b"\n" not in self.announced:
            if time.monotonic() > deadline:
                raise _Failed(1, f"the scheduler does not listen after {START_S:.0f} s")
            self.step()
        place = json.loads(self.announced.partition(b"\n")[0])
        address = address_variables(place["host"], place["port"])
        if self.options.controller:
            serve += ["--controller", self.options.controller]
        for module in self.options.allow_import or ():
            serve += ["--allow-import", module]
        for rank in range(self.options.num_servers):
            self.others.append(self._start("server", rank, serve, address))
        # What a worker prints shall not wait until it ends.
        address["PYTHONUNBUFFERED"] = os.environ.get("PYTHONUNBUFFERED", "1")
        for rank in range(self.options.num_workers):
            self.workers.append(self._start("worker", rank, self.options.command, address))

    def watch(self) -> None:
        """Return when all workers have ended well, and then servers and scheduler."""
        while any(worker.status is None for worker in self.workers):
            self.step()
        # A cluster that was never complete does not end by itself.
        if self.announced.count(b"\n") > 1:
            deadline = time.monotonic() + LEAVE_S
            while any(other.status is None for other in self.others):
                if time.monotonic() > deadline:
                    names = ", ".join(other.name for other in self.others if other.status is None)
                    self.last_words = f"kvrun: killed as the workers have ended: {names}\n"
                    break
                self.step()

    def step(self) -> None:
        """Forward output; raise _Failed if a process has failed."""
        ended = self.processes.step(self.processes.wait(TICK_S))
        # Of those seen at once: what a worker's end has brought down is not the cause of it.
        for process in sorted(ended, key=lambda process: process not in self.workers):
            assert process.status is not None
            if process.status != 0:
                status = process.status if process.status > 0 else 128 - process.status
                raise _Failed(status, f"{process.name} {process.ending()}")
            if process is self.others[0] and b"\n" not in self.announced:
                raise _Failed(1, "the scheduler ended before it listened")

    def end(self, for_workers: int | None) -> None:
        """Leave no process behind; with a signal for the workers, after a grace.

        A second signal to the launcher ends the grace.
        """
        with contextlib.suppress(_Signal):
            self.armed = True
            if for_workers is not None:
                # Workers first, or they would tell of servers that are gone.
                for process in sorted(self.processes, key=lambda one: one not in self.workers):
                    own = process in self.workers
                    self.processes.signal(process, for_workers if own else signal.SIGTERM)
            self.deadline = time.monotonic() + GRACE_S
            self._write(2, self.last_words.encode(errors="replace"))
            while for_workers is not None and any(p.status is None for p in self.processes):
                if time.monotonic() > self.deadline:
                    break
                self.processes.step(self.processes.wait(TICK_S))
            self.armed = False
        self.processes.close()

    def _start(
        self,
        role: str,
        rank: int | None,
        command: Sequence[str],
        variables: dict[str, str],
        pass_fds: Sequence[int] = (),
    ) -> Process:
        name = role if rank is None else f"{role} {rank}"
        own = environment(role, rank, self.options.num_workers, self.options.num_servers)
        own["KVSTORE_TOKEN"] = self.token
        if role == "worker" and self.options.timeout is not None:
            own["KVSTORE_TIMEOUT"] = self.options.timeout
        own.update(variables)
        return self.processes.start(name, command, own, pass_fds=pass_fds)

    def _take_announced(self, data: bytes) -> None:
        self.announced += data

    def _forward(self, process: Process, stream: int, line: bytes) -> None:
        self._write(stream, f"[{process.name}] ".encode() + line)

    def _write(self, fd: int, data: bytes) -> None:
        """Write all, past Python's buffers, which would fail once more at exit.

        In pieces that a pipe takes without blocking, so that the deadline holds whoever reads.
        """
        try:
            while data and not self.mute:
                if select.select([], [fd], [], TICK_S)[1]:
                    with contextlib.suppress(BlockingIOError):  # a terminal may still do this
                        data = data[os.write(fd, data[: select.PIPE_BUF]) :]
                elif time.monotonic() > self.deadline:
                    self.mute = True
        except OSError:
            self.mute = True
            if self.deadline == math.inf:
                raise
