"""The scheduler: lets nodes in, gives ranks, tells everyone who is there and who is gone.

One asyncio server; `Roster` says who may join and who is missing, `Calls` what workers ask for once
the cluster runs. Strangers are closed and mentioned once a kind: nothing that comes before the
greeting is over can reach the cluster's state. The first loss of a node of a complete cluster ends
it: everyone is told, nobody is let in, and the scheduler ends when the last connection has closed.
"""

import asyncio
import base64
import contextlib
import ipaddress
import json
import os
import secrets
import socket
import sys
import time
from typing import Any, TextIO

from ..errors import InvalidArgumentError, PeerLostError
from . import control, protocol
from .calls import MAX_REASON, Calls
from .protocol import Frame, ProtocolError
from .roster import Node, Refusal, Roster, Stage, listed, node_of
from .settings import BY_OPTION, Settings, join_address

MAX_STRANGERS = 256  # greetings under way; beyond it the oldest one is closed
TICK_S = 1.0
FIRST_REPORTS_S = (5, 15, 30)
REPORT_EVERY_S = 30
CLOSING_S = 5.0  # for connections of nodes that have left
ROSTER_CHUNK = 64  # peers in a frame
MAX_ADDRESS = 8192


class Scheduler:
    """The scheduler of one cluster.

    Parameters
    ----------
    settings
        Where to listen, how many nodes there will be, and their token.
    """

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        assert settings.num_workers is not None and settings.num_servers is not None
        self.roster = Roster(settings.num_workers, settings.num_servers)
        self.calls = Calls(self.roster, self._send, lambda: self._tell_launcher(None))
        self.session = secrets.token_bytes(16)
        self.address: tuple[str, int] | None = None
        self._servers: list[asyncio.Server] = []
        self._strangers: dict[asyncio.Task[Any], asyncio.StreamWriter] = {}
        self._tasks: set[asyncio.Task[Any]] = set()
        self._logged: set[str] = set()
        self._ending = False
        self._told = ""  # whom the nodes know to be missing
        self._launcher: TextIO | None = None
        self._changed = asyncio.Event()  # somebody has left or gone

    # ----------------------------------------------------------------------------- from outside

    async def listen(self) -> None:
        """Open the sockets and tell the launcher where; InvalidArgumentError where they cannot be.

        `address` is then what nodes connect to.
        """
        sockets = await _listening(self.settings)
        try:
            self._check_token(sockets)
            for one in sockets:
                server = await asyncio.start_server(self._serve, sock=one, backlog=1024)
                self._servers.append(server)
        except BaseException:
            self._close()
            for one in sockets:
                one.close()
            raise
        port = sockets[0].getsockname()[1]
        self.address = (self.settings.advertise or self.settings.host, port)
        asyncio.get_running_loop().set_exception_handler(self._loop_trouble)
        self._announce()

    async def run(self) -> None:
        """Serve until the cluster has ended; PeerLostError if it ended by the loss of a node."""
        if self.address is None:
            await self.listen()
        ticking = asyncio.ensure_future(self._tick())
        try:
            while not self._over():
                self._changed.clear()
                await self._changed.wait()
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(self._all_closed(), CLOSING_S)
        finally:
            ticking.cancel()
            self._close()
            for task in self._tasks:
                task.cancel()
            await asyncio.gather(ticking, *self._tasks, return_exceptions=True)
        if self.roster.why_lost is not None:
            raise PeerLostError(self.roster.why_lost)

    def _over(self) -> bool:
        if self.roster.why_lost is not None:
            return all(node.connection is None for node in self.roster.nodes)
        return self.roster.stage == Stage.ENDING and all(node.left for node in self.roster.nodes)

    async def _all_closed(self) -> None:
        while any(node.connection is not None for node in self.roster.nodes):
            self._changed.clear()
            await self._changed.wait()

    def _close(self) -> None:
        self._ending = True
        self._tell_launcher(None)
        for server in self._servers:
            server.close()
        for writer in [*self._strangers.values(), *(n.connection for n in self.roster.nodes)]:
            if writer is not None:
                writer.transport.abort()

    def _check_token(self, sockets: list[socket.socket]) -> None:
        if self.settings.token:
            return
        for one in sockets:
            host = one.getsockname()[0]
            if not ipaddress.ip_address(host.partition("%")[0]).is_loopback:
                raise InvalidArgumentError(
                    f"a scheduler that listens on {host}, which other machines can reach, needs a "
                    f"token: set {BY_OPTION['token'].told()} to the same secret on every node"
                )

    def _announce(self) -> None:
        assert self.address is not None
        host, port = self.address
        descriptor = os.environ.get("KVSTORE_ANNOUNCE_FD", "")
        if not descriptor.isdigit():
            self._say(f"the scheduler listens on {join_address(host, port)}")
            return
        with contextlib.suppress(OSError):
            self._launcher = os.fdopen(int(descriptor), "w", buffering=1)
        self._tell_launcher({"host": host, "port": port})

    def _tell_launcher(self, news: dict[str, Any] | None) -> None:
        """A line for the launcher; without news nothing more will come.

        It hears the end before the last worker does, which may then ask it for a new cluster.
        """
        with contextlib.suppress(OSError):
            if self._launcher is not None and news is None:
                self._launcher.close()
                self._launcher = None
            elif self._launcher is not None:
                self._launcher.write(json.dumps(news) + "\n")

    # ------------------------------------------------------------------------------ what it says

    def _say(self, text: str) -> None:
        with contextlib.suppress(OSError, ValueError):  # a closed stderr ends no cluster
            print(f"kvstore: {text}", file=sys.stderr, flush=True)

    def _say_once(self, kind: str, text: str) -> None:
        if kind not in self._logged:
            self._logged.add(kind)
            self._say(f"{text} (said once for each kind of trouble)")

    def _loop_trouble(self, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        text = f"{context.get('message')}: {context.get('exception')}"
        self._say_once(f"loop {context.get('message')}", text)

    async def _tick(self) -> None:
        """Tell those who wait, and the terminal, who is missing."""
        begin, reports = time.monotonic(), list(FIRST_REPORTS_S)
        while True:
            await asyncio.sleep(TICK_S)
            if self.roster.stage >= Stage.RUNNING or self.roster.why_lost is not None:
                return
            self._tell_progress()
            if self._launcher is not None and not self.roster.of("worker"):
                # The launcher sees who is there; nobody waits before a worker does.
                begin = time.monotonic()
            passed = time.monotonic() - begin
            if passed >= reports[0]:
                at = reports.pop(0)
                reports = reports or [at + REPORT_EVERY_S]
                self._say(f"waiting for {self._told} ({at} s)")

    def _tell_progress(self) -> None:
        waiting = self.roster.waiting_for()
        if waiting != self._told:
            self._told = waiting
            self._tell_all({"type": "progress", "waiting_for": waiting})

    # ------------------------------------------------------------------------------- connections

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        peer = writer.get_extra_info("peername") or ("?", 0)
        node: Node | None = None
        why = "its connection closed"
        try:
            self._strangers[task] = writer
            if len(self._strangers) > MAX_STRANGERS:
                oldest = self._strangers.pop(next(iter(self._strangers)))
                self._say_once(
                    "many", f"more than {MAX_STRANGERS} connections have not said who they are"
                )
                oldest.transport.abort()
            try:
                protocol.set_liveness(writer.get_extra_info("socket"))
                node = await asyncio.wait_for(
                    self._greet(reader, writer, peer), protocol.HANDSHAKE_S
                )
            except asyncio.TimeoutError:
                raise ProtocolError(
                    "silent", f"it had not said who it is after {protocol.HANDSHAKE_S:.0f} s"
                ) from None
            finally:
                self._strangers.pop(task, None)
            if node is not None:
                why = await self._listen_to(node, reader)
        except ProtocolError as error:
            why = str(error)
            where = join_address(*map(str, peer[:2])) if node is None else str(node)
            self._say_once(error.kind, f"closed the connection from {where}: {error}")
        except asyncio.CancelledError:
            pass  # by the end of the scheduler; asyncio takes it for an error if it goes on
        except OSError as error:
            why = f"its connection failed: {error.strerror or error}"
        finally:
            self._tasks.discard(task)
            writer.close()
            if node is not None:
                self._gone(node, why)

    async def _greet(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, peer: Any
    ) -> Node | None:
        """From the first byte to a node that has joined; None: it was refused."""
        await protocol.accept(reader, writer, self.settings.token)
        frame = await protocol.read(reader)
        if frame is None:
            return None
        if frame["type"] != "join":
            raise ProtocolError("order", f"it sent {frame['type'][:40]!r} where 'join' is due")
        inet6 = ":" in peer[0] and not peer[0].startswith("::ffff:")
        node = node_of(frame, inet6)
        node.connection = writer
        try:
            self.roster.admit(node)
        except Refusal as refusal:
            self._say(f"refused a node: {refusal}")
            error = {"type": "error", **protocol.error_fields(refusal.error())}
            for one in (node, *refusal.others):
                self._send(one, error)
                one.connection.close()
                if one in self.roster.nodes:
                    self.roster.nodes.remove(one)
            return None
        if self.roster.complete:
            self._place()
        else:
            waiting = self.roster.waiting_for()
            self._send(node, {"type": "progress", "waiting_for": waiting})
        return node

    async def _listen_to(self, node: Node, reader: asyncio.StreamReader) -> str:
        """Take a node's frames to the last one; returns why there are no more."""
        while (frame := await protocol.read(reader)) is not None:
            node.heard = time.monotonic()
            kind = frame["type"]
            if kind == "heartbeat":
                continue
            if kind == "failed":
                return protocol.field(frame, "why", str)[:MAX_REASON]
            if kind == "address":
                self._take_address(node, frame)
            elif kind == "ready":
                self._take_ready(node)
            elif not self.calls.take(node, frame):
                raise ProtocolError("order", f"it sent a frame {kind[:40]!r}, which is unknown")
            if node.left:
                self._changed.set()
        return "its connection closed"

    def _send(self, node: Node, frame: Frame) -> None:
        if node.connection is not None:
            protocol.write(node.connection, frame)

    def _tell_all(self, frame: Frame) -> None:
        for node in self.roster.nodes:
            self._send(node, frame)

    # ------------------------------------------------------------------------------ the beginning

    def _place(self) -> None:
        self.roster.place()
        common = {
            "type": "place",
            "session": self.session.hex(),
            "num_workers": self.roster.sizes["worker"],
            "num_servers": self.roster.sizes["server"],
            "asynchronous": self.roster.asynchronous,
            "same_host_copies": self.roster.same_host_copies,
            "inet6": self.roster.inet6,
        }
        for node in self.roster.nodes:
            self._send(node, {**common, "rank": node.rank})
        self._tell_progress()

    def _take_address(self, node: Node, frame: Frame) -> None:
        address = protocol.field(frame, "address", str)
        if self.roster.stage != Stage.PLACING or len(address) > MAX_ADDRESS:
            raise ProtocolError("order", "it sent an address that is too long or not due")
        try:
            base64.b64decode(address, validate=True)
        except ValueError:
            raise ProtocolError("fields", "it sent an address that is not base64") from None
        node.address = address
        if any(other.address is None for other in self.roster.nodes):
            return
        self.roster.stage = Stage.CONNECTING
        for other in self.roster.nodes:
            peers = self.roster.peers_of(other)
            for at in range(0, max(len(peers), 1), ROSTER_CHUNK):
                last = at + ROSTER_CHUNK >= len(peers)
                chunk = peers[at : at + ROSTER_CHUNK]
                self._send(other, {"type": "roster", "peers": chunk, "last": last})
        self._tell_progress()

    def _take_ready(self, node: Node) -> None:
        if self.roster.stage != Stage.CONNECTING:
            raise ProtocolError("order", "it sent 'ready' when that was not due")
        node.ready = True
        if all(other.ready for other in self.roster.nodes):
            self.roster.stage = Stage.RUNNING
            self._tell_launcher({"complete": True})
            self._tell_all({"type": "start"})

    # ------------------------------------------------------------------------------------ the end

    def _gone(self, node: Node, why: str) -> None:
        """The connection of a node has ended."""
        node.connection = None
        self._changed.set()
        if self._ending or node.left or node not in self.roster.nodes:
            return
        if self.roster.stage == Stage.JOINING:
            self.roster.nodes.remove(node)
            return
        node.lost = True
        if self.roster.why_lost is not None:
            return
        self.roster.why_lost = f"{node} is gone: {why}"
        absent = listed([other.name for other in self.roster.nodes if not other.lost])
        self._say(f"{self.roster.why_lost}; telling {absent}")
        lost = {"type": "lost", "role": node.role, "rank": node.rank, "why": self.roster.why_lost}
        self._tell_all(lost)
        self.calls.fail_all(PeerLostError(self.roster.why_lost))


async def _listening(settings: Settings) -> list[socket.socket]:
    """A socket for each address of the host, all with one port."""
    host = settings.bind or settings.host
    setting = BY_OPTION["bind" if settings.bind else "scheduler"].told()
    try:
        found = await control.in_thread(
            socket.getaddrinfo, host, settings.port, 0, socket.SOCK_STREAM, 0, socket.AI_PASSIVE
        )
    except (OSError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise InvalidArgumentError(
            f"the scheduler cannot listen on {host!r}: {reason} (set by {setting})"
        ) from None
    sockets: list[socket.socket] = []
    port, trouble = settings.port, OSError("no address")
    for family, _, _, _, where in sorted(found, key=lambda one: one[0] != socket.AF_INET):
        one = socket.socket(family, socket.SOCK_STREAM)
        try:
            one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if family == socket.AF_INET6:
                # '::' takes IPv4 too, unless 0.0.0.0 has a socket of its own.
                alone = len(found) == 1 and where[0] == "::"
                one.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, not alone)
            one.bind((where[0], port, *where[2:]))
            one.listen(1024)
        except OSError as error:
            one.close()
            trouble = error
            continue
        port = one.getsockname()[1]
        sockets.append(one)
    if not sockets:
        raise InvalidArgumentError(
            f"the scheduler cannot listen on {join_address(host, settings.port)}: "
            f"{trouble.strerror or trouble} (set by {setting})"
        )
    return sockets
