"""A node's place in a cluster: the connection to the scheduler, and what is asked over it.

Everything with a leading `_on` or `async` runs on the control loop, everything else in the threads
of the user, which wait in short steps so that Ctrl-C is heard. What breaks a cluster is remembered:
every wait ends with it at once, the data plane hears of it, and every later call but `close` raises
it.
"""

import asyncio
import atexit
import base64
import concurrent.futures
import contextlib
import itertools
import os
import socket
import sys
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterator
from typing import ClassVar, NamedTuple

from .. import _core
from .._declared import Declared
from ..errors import (
    ClosedError,
    DeviceError,
    InvalidArgumentError,
    KVStoreError,
    PeerLostError,
    TimeoutError,
)
from . import calls, control, entry, protocol
from .entry import Core, MakeCore
from .protocol import Frame
from .settings import Settings

HEARTBEAT_S = 1.0
GRACE_S = 5.0  # for the scheduler's answer to a node that gives up
EXIT_S = 5.0
SHORT_S = 0.001  # for what is there or is not
ROOM = 64  # a command's number at the scheduler may have more digits than here


class Command(NamedTuple):
    """A command that a worker has sent to the servers, or to workers."""

    number: int
    head: int
    body: str | bytes


class Member:
    """A worker or server that has joined its cluster; made by `Member.join`.

    Attributes
    ----------
    role, rank, num_workers, num_servers, asynchronous
        Its place, as the scheduler gave it.
    core
        The data plane, open and connected.
    barrier_before_exit
        Whether `close` of a worker waits for the other workers to close.
    store
        A weak reference to the store that uses it.
    declared
        What it knows of the optimizers of the cluster.
    loads
        The last files of training states that this worker has loaded: what tells them apart, and
        the store's `counted` before.
    taking
        What other workers have begun to tell of theirs, by rank.
    joined
        Whether any member of this process has joined its cluster.
    """

    joined: ClassVar[bool] = False
    _prevented: ClassVar[tuple[type[KVStoreError], str] | None] = None

    def __init__(self, settings: Settings, asynchronous: bool) -> None:
        self.settings = settings
        self.role = settings.role
        self.rank = -1
        self.num_workers = self.num_servers = 0
        self.asynchronous = asynchronous
        self.barrier_before_exit = True
        self.core: Core | None = None
        self._pid = os.getpid()
        self._socket: socket.socket | None = None
        self._writer: asyncio.StreamWriter | None = None
        self._tasks: list[asyncio.Task[None]] = []
        self._ids = itertools.count(1)
        self._calls: dict[int, asyncio.Future[Frame]] = {}
        self._steps: dict[str, asyncio.Future[Frame]] = {}
        self._peers: list[tuple[int, str, bytes]] = []
        self._waiting_for = ""
        self._commands: deque[Command] = deque()
        self._broken = self._prevented
        self._told = threading.Event()  # of what has broken it
        self._closed = False
        self._shut_down = False
        self.store: Callable[[], object] | None = None
        self.declared = Declared()
        self.departed: set[int] = set()  # of a server: the workers that have left
        self.loads: deque[tuple[str, int]] = deque(maxlen=16)
        self.taking: dict[int, dict[str | int, int]] = {}

    def __repr__(self) -> str:
        state = "closed" if self._closed else "broken" if self._broken else "open"
        return f"<{self.role} {self.rank} of the cluster at {self.settings.address}, {state}>"

    # ------------------------------------------------------------------------------------ joining

    @classmethod
    def join(
        cls, settings: Settings, *, asynchronous: bool = False, make_core: MakeCore | None = None
    ) -> "Member":
        """Join the cluster of the settings; returns when all nodes are connected.

        Parameters
        ----------
        settings
            Role worker or server; `timeout` is the deadline of it all.
        asynchronous
            What a worker's kind of store is; all workers must agree.
        make_core
            Makes the data plane; `kvstore._core.Node` if not given.

        Raises
        ------
        TimeoutError
            Who is missing, or that there is no scheduler at the address.
        InvalidArgumentError
            Token, version, rank or numbers disagree with the rest of the cluster.
        PeerLostError
            A node went away meanwhile.
        """
        make_core = make_core or _core.Node
        member = cls(settings, asynchronous)
        member._check()
        _members.add(member)
        deadline = time.monotonic() + settings.timeout
        try:
            place = control.run(member._enter(deadline))
            member._take_place(place, make_core)
            assert member.core is not None
            address = base64.b64encode(member.core.address()).decode()
            control.run(member._step("roster", deadline, {"type": "address", "address": address}))
            member.core.connect(member._peers)
            member.core.wait_ready(max(deadline - time.monotonic(), 0.001))
            control.run(member._step("start", deadline, {"type": "ready"}))
            cls.joined = True
        except BaseException as error:
            member.fail(f"it could not join: {type(error).__name__}: {error}")
            raise
        return member

    async def _enter(self, deadline: float) -> Frame:
        settings = self.settings
        reader, writer = await entry.connect(settings, deadline)
        self._writer, self._socket = writer, entry.socket_of(writer)
        self._tasks.append(asyncio.ensure_future(self._read(reader)))
        frame = {
            "type": "join",
            "role": self.role,
            "rank": settings.rank,
            "host": entry.this_host(settings.advertise),
            "pid": os.getpid(),
            "asynchronous": self.asynchronous,
            "num_workers": settings.num_workers,
            "num_servers": settings.num_servers,
            "same_host_copies": settings.same_host_copies,
        }
        place = await self._step("place", deadline, frame)
        self._tasks.append(asyncio.ensure_future(self._beat()))
        return place

    def _take_place(self, place: Frame, make_core: MakeCore) -> None:
        field, settings = protocol.field, self.settings
        self.rank = field(place, "rank", int)
        self.num_workers = field(place, "num_workers", int)
        self.num_servers = field(place, "num_servers", int)
        self.asynchronous = field(place, "asynchronous", bool)
        assert self._socket is not None
        self.core = make_core(
            self.role,
            self.rank,
            self.num_workers,
            self.num_servers,
            session=bytes.fromhex(field(place, "session", str)),
            asynchronous=self.asynchronous,
            transport="ucx",
            library=entry.ucx_library(),
            interface=settings.interface or entry.interface(settings.bind, self._socket),
            port_range=settings.port_range or None,
            same_host_copies=field(place, "same_host_copies", bool),
            inet6=field(place, "inet6", bool),
        )
        if self._broken is not None:
            self.core.lose(self._broken[1])

    async def _step(self, due: str, deadline: float, frame: Frame) -> Frame:
        """Send a frame and wait for the one that ends this step of joining."""
        self._check()
        future: asyncio.Future[Frame] = asyncio.get_running_loop().create_future()
        self._steps[due] = future
        self._write(frame)
        try:
            await asyncio.wait({future}, timeout=max(deadline - time.monotonic(), 0))
        finally:
            self._steps.pop(due, None)
        if not future.done():
            raise TimeoutError(
                f"a {self.role} waited {self.settings.timeout:g} s for its cluster at "
                f"{self.settings.address}; missing: {self._waiting_for or 'the scheduler'} "
                "(the limit is KVSTORE_TIMEOUT or the option timeout)"
            )
        return future.result()

    @classmethod
    def prevent(cls, why: str) -> None:
        """What this process has started for its cluster is gone: no member of it can join."""
        cls._prevented = PeerLostError, why
        for member in list(_members):
            control.loop().call_soon_threadsafe(member._on_broken, *cls._prevented)

    # ------------------------------------------------------------------------- from the scheduler

    async def _read(self, reader: asyncio.StreamReader) -> None:
        why = "the connection to it closed"
        try:
            while (frame := await protocol.read(reader)) is not None:
                self._on_frame(frame)
        except protocol.ProtocolError as error:
            why = str(error)
        except OSError as error:
            why = error.strerror or str(error)
        except (TypeError, ValueError) as error:  # of a frame whose parts are wrong
            why = f"it sent what makes no sense: {error}"
        gone = f"the scheduler at {self.settings.address} is gone: {why}"
        self._on_broken(PeerLostError, gone)
        self._fail_calls(PeerLostError, gone)  # in a cluster that was broken before
        if self._writer is not None:
            self._writer.close()

    async def _beat(self) -> None:
        while True:
            self._write({"type": "heartbeat"})
            await asyncio.sleep(HEARTBEAT_S)

    def _on_frame(self, frame: Frame) -> None:
        kind = frame["type"]
        if kind in ("reply", "refused"):
            call = self._calls.get(protocol.field(frame, "id", int))
            if call is not None and not call.done():
                if kind == "reply":
                    call.set_result(frame)
                else:
                    call.set_exception(protocol.error_from(frame))
        elif kind == "command":
            self._on_command(_command(frame))
        elif kind == "progress":
            self._waiting_for = protocol.field(frame, "waiting_for", str)
        elif kind == "roster":
            for number, name, address in protocol.field(frame, "peers", list):
                self._peers.append((number, name, base64.b64decode(address)))
            if protocol.field(frame, "last", bool):
                self._on_step(frame)
        elif kind in ("place", "start"):
            self._on_step(frame)
        elif kind == "shutdown":
            self._shut_down = True
            self._wake()
        elif kind == "left":
            rank, finished = (
                protocol.field(frame, "rank", int),
                protocol.field(frame, "finished", bool),
            )
            self.departed.add(rank)
            if self.core is not None:
                self.core.left(rank, finished)
        elif kind == "lost":
            self._on_broken(PeerLostError, protocol.field(frame, "why", str))
        elif kind == "error":
            error = protocol.error_from(frame)
            self._on_broken(type(error), str(error))

    def _on_command(self, command: Command) -> None:
        if self.role == "server":
            self._commands.append(command)
            self._wake()
            return
        from .. import _dist  # which imports this module

        # Not on this loop, which the command may have to wait for.
        threading.Thread(
            target=_dist.run_command,
            args=(self, command, None),
            name="kvstore-command",
            daemon=True,
        ).start()

    def _wake(self) -> None:
        """Let the thread that serves look at what there is."""
        if self.core is not None and self.role == "server":
            self.core.wake()

    def _on_step(self, frame: Frame) -> None:
        step = self._steps.pop(frame["type"], None)
        if step is not None and not step.done():
            step.set_result(frame)

    def _on_broken(self, kind: type[KVStoreError], why: str) -> None:
        """The cluster is at its end for this node: everything that waits hears why."""
        if self._broken is not None:
            return
        self._broken = kind, why
        self._told.set()
        self._fail_calls(kind, why)
        if self.core is not None and not self._closed:
            self.core.lose(why)
        self._wake()  # which lets that thread close

    def _fail_calls(self, kind: type[KVStoreError], why: str) -> None:
        for future in [*self._calls.values(), *self._steps.values()]:
            if not future.done():
                future.set_exception(kind(why))

    # -------------------------------------------------------------------------- to the scheduler

    def _check(self) -> None:
        if os.getpid() != self._pid:
            raise ClosedError(
                f"this store belongs to process {self._pid}, of which this one is a fork: "
                "start processes with the spawn method and make the store in each"
            )
        if self._closed:
            raise ClosedError("this store is closed")
        if self._broken is not None:
            kind, why = self._broken
            raise kind(why)

    def _write(self, frame: Frame) -> None:
        if self._writer is not None:
            protocol.write(self._writer, frame)

    async def _call(self, frame: Frame, timeout: float, what: str, whole: bool = True) -> Frame:
        """Ask and wait for the answer; after the deadline TimeoutError says who is missing.

        `whole`: a cluster that has lost a node is not asked.
        """
        gone = self._writer is None or self._writer.transport.is_closing()
        if self._broken is not None and (whole or gone):
            kind, why = self._broken
            raise kind(why)
        ident = next(self._ids)
        future: asyncio.Future[Frame] = asyncio.get_running_loop().create_future()
        self._calls[ident] = future
        try:
            self._write({**frame, "id": ident})
            await asyncio.wait({future}, timeout=timeout)
            if not future.done():
                self._write({"type": "give_up", "id": ident})
                await asyncio.wait({future}, timeout=GRACE_S)
        except asyncio.CancelledError:
            self._write({"type": "give_up", "id": ident})
            raise
        finally:
            del self._calls[ident]
        missing = future.result().get("missing") if future.done() else "an answer of the scheduler"
        if missing is not None:
            raise TimeoutError(
                f"{what} of {self.role} {self.rank} waited {timeout:g} s; missing: {missing}"
            )
        return future.result()

    def barrier(self, timeout: float, text: str = "", what: str = "the barrier") -> list[str]:
        """Wait until all workers have come here, and give the text of each, by rank.

        TimeoutError names those who have not come."""
        self._check()
        frame = {"type": "barrier", "text": text}
        return protocol.field(control.run(self._call(frame, timeout, what)), "texts", list)

    def command(
        self, head: int, body: str | bytes, timeout: float, workers: list[int] | None = None
    ) -> list[str]:
        """Have every server run its controller, or a command of the package's own, and return what
        they answer, by rank; KVStoreError says which failed and how.

        With `workers` those run it, and those that have left the cluster do not answer."""
        self._check()
        frame: Frame = {"type": "command", "head": head, "id": 0}
        if workers is not None:
            frame["workers"] = workers
        if isinstance(body, str):
            frame["text"] = body
        else:
            frame["base64"] = base64.b64encode(body).decode()
        try:
            size = len(protocol.encode(frame))
        except protocol.ProtocolError:
            size = protocol.MAX_FRAME
        if size > protocol.MAX_FRAME - ROOM:
            raise InvalidArgumentError(
                f"the body of command {head} is too long to send: {len(body)} "
                f"{'characters' if isinstance(body, str) else 'bytes'}; as it travels the limit "
                f"is {protocol.MAX_FRAME} bytes"
            )
        reply = control.run(self._call(frame, timeout, f"command {head}"))
        return protocol.field(reply, "answers", list)

    def dead_nodes(self, role: str, silent: float) -> int:
        """How many nodes of a role are lost or were silent for so many seconds.

        It also works in a cluster that has lost a node, as long as the scheduler is there.
        """
        with contextlib.suppress(PeerLostError):
            self._check()
        frame = {"type": "dead", "role": role, "timeout_ms": int(min(silent, 1e9) * 1000)}

        def ask() -> Frame:
            limit = self.settings.timeout
            return control.run(self._call(frame, limit, "the count of the dead", whole=False))

        try:
            reply = ask()
        except PeerLostError:  # a loss while it was under way; or the scheduler is gone
            reply = ask()
        return protocol.field(reply, "count", int)

    # -------------------------------------------------------------------------------- of a server

    def commands(self) -> Iterator[Command]:
        """The commands that come, until the cluster ends; PeerLostError if it breaks.

        `done` must be called for each. Meanwhile this thread updates values by optimizers in
        Python.
        """
        assert self.core is not None
        while True:
            self._check()
            if self._commands:
                yield self._commands.popleft()
            elif self._shut_down:
                return
            else:
                update = self.core.next_update(control.STEP_S)
                if update is not None:
                    self.declared.served.run(self.core, update)

    def done(self, command: Command, failure: str | None = None, answer: str = "") -> None:
        """Tell the worker that a command was run, with an answer, or how it failed."""
        if len(answer) > calls.MAX_ANSWER:
            failure, answer = f"its answer of {len(answer)} characters is too long to send", ""
        frame = {"type": "done", "id": command.number, "failure": failure, "answer": answer}
        control.loop().call_soon_threadsafe(self._write, frame)

    # --------------------------------------------------------------------------------- the end

    def close(self, timeout: float | None = None, together: bool | None = None) -> None:
        """Leave the cluster. Idempotent; of a broken cluster it raises nothing.

        Parameters
        ----------
        timeout
            Seconds to wait for the others; after them the node has left all the same and
            TimeoutError says who had not.
        together
            Whether a worker waits for the other workers to leave; `barrier_before_exit` if None.
        """
        if self._closed or os.getpid() != self._pid:
            return
        self._closed = True
        together = self.barrier_before_exit if together is None else together
        frame = {"type": "leave", "together": together and self.role == "worker"}
        limit = self.settings.timeout if timeout is None else timeout
        try:
            frame["finished"] = self._is_finished()
            if self._broken is None:
                with contextlib.suppress(PeerLostError):
                    control.run(self._call(frame, limit, "leaving"))
            else:
                self._soon({**frame, "id": 0})
                if self.role == "server" and self.core is not None:
                    # A worker that sees a session end before the scheduler has told it who is
                    # lost would take this server for the one.
                    self.core.wait_alone(EXIT_S)
        finally:
            self._end()

    def _is_finished(self) -> bool:
        """Whether every call of this worker has been answered: nothing of it is on its way."""
        try:
            if self.core is not None:
                self.core.drain(SHORT_S)
        except (TimeoutError, PeerLostError, DeviceError):
            return False
        return True

    def await_loss(self, seconds: float) -> None:
        """Wait until the scheduler has told of a loss that the data plane knows of already."""
        self._told.wait(seconds)

    def fail(self, why: str) -> None:
        """Leave at once, so that the others take this node as lost and hear why.

        In a cluster that is broken already it leaves as by `close`: it is not lost as well.
        """
        if self._broken is not None:
            self.close()
        if not self._closed and os.getpid() == self._pid:
            self._closed = True
            self._soon({"type": "failed", "why": why[:1000]})
            self._end()

    def _soon(self, frame: Frame) -> None:
        control.loop().call_soon_threadsafe(self._write, frame)

    def _end(self) -> None:
        """Close the data plane, then the connection."""
        try:
            if self.core is not None:
                self.core.close()
        finally:
            _members.discard(self)
            with contextlib.suppress(concurrent.futures.TimeoutError, RuntimeError):
                control.start(self._disconnect()).result(timeout=GRACE_S)

    async def _disconnect(self) -> None:
        for task in self._tasks:
            task.cancel()
        if self._writer is not None:
            self._writer.close()
            with contextlib.suppress(OSError, asyncio.TimeoutError):
                await asyncio.wait_for(self._writer.wait_closed(), 1.0)

    def _at_exit(self) -> None:
        """What a process does that ends without `close`: it waits for nobody."""
        # An exception that nobody caught; at a prompt it ended nothing.
        ended_by = None if hasattr(sys, "ps1") else getattr(sys, "last_type", None)
        if self.role == "worker" and ended_by is None:
            self._leave_alone()
        elif ended_by is not None:
            self.fail(f"it ended by {ended_by.__name__}: {getattr(sys, 'last_value', '')}")
        else:
            self.fail("it ended before the cluster did")

    def _leave_alone(self) -> None:
        with contextlib.suppress(KVStoreError):
            _core.wait_all(self.settings.timeout)  # what was pushed last is on its way
            if self.core is not None and not self.num_servers:
                self.core.drain(self.settings.timeout)  # here, and not on servers
        with contextlib.suppress(KVStoreError):
            self.close(min(self.settings.timeout, EXIT_S), together=False)


def _command(frame: Frame) -> Command:
    text = protocol.field_or_none(frame, "text", str)
    body = base64.b64decode(protocol.field(frame, "base64", str)) if text is None else text
    return Command(protocol.field(frame, "id", int), protocol.field(frame, "head", int), body)


_members: "weakref.WeakSet[Member]" = weakref.WeakSet()


def of_this_process() -> Member | None:
    """The member that this process has open as a worker, if any."""
    for member in list(_members):
        if member.role == "worker" and member._pid == os.getpid() and not member._closed:
            return member
    return None


def leave_abandoned() -> None:
    """Leave the cluster whose store was dropped without `close`, as at the end of the process."""
    member = of_this_process()
    if member is not None and member.store is not None and member.store() is None:
        member._leave_alone()


def leave_all() -> None:
    """Leave every cluster that this process is in, as at its end."""
    for member in list(_members):
        member._at_exit()


def _close_sockets_in_child() -> None:
    # An open copy of the socket would keep the others from hearing that the parent has died.
    for member in list(_members):
        if member._socket is not None:
            member._socket.close()


atexit.register(leave_all)
os.register_at_fork(after_in_child=_close_sockets_in_child)
