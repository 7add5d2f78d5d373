"""Who belongs to a cluster: what the scheduler knows of its nodes. No sockets, nothing waits.

A cluster goes through the stages below in order. While it is joining, a node that goes away is
simply forgotten; later it is lost, and so is the cluster.
"""

import enum
import time
from dataclasses import dataclass, field
from typing import Any

from ..errors import InvalidArgumentError, KVStoreError
from . import protocol
from .protocol import Frame

FIELD_LIMIT = 256  # characters of what a node says of itself


class Stage(enum.IntEnum):
    """How far a cluster is."""

    JOINING = 0  # nodes are missing
    PLACING = 1  # ranks are given, addresses are missing
    CONNECTING = 2  # nodes connect to each other
    RUNNING = 3
    ENDING = 4  # all workers have left


@dataclass(eq=False)
class Node:
    """A node, as it joined."""

    role: str
    wanted: int | None
    host: dict[str, Any]
    pid: int
    asynchronous: bool | None
    num_workers: int | None
    num_servers: int | None
    copies: bool
    inet6: bool
    connection: Any = None
    rank: int | None = None
    address: str | None = None
    ready: bool = False
    leaving: bool = False  # a worker that waits for the others to leave too
    left: bool = False
    lost: bool = False
    heard: float = field(default_factory=time.monotonic)

    @property
    def hostname(self) -> str:
        return str(self.host["hostname"])

    @property
    def where(self) -> str:
        return f"host {self.hostname}, pid {self.pid}"

    @property
    def name(self) -> str:
        """`worker 1`, or `a worker` before it has a rank."""
        return f"a {self.role}" if self.rank is None else f"{self.role} {self.rank}"

    def __str__(self) -> str:
        return f"{self.name} ({self.where})"


def node_of(frame: Frame, inet6: bool) -> Node:
    """The node that a join frame tells of; ProtocolError if the frame is not right."""
    role = protocol.field(frame, "role", str)
    if role not in ("worker", "server"):
        raise protocol.ProtocolError("fields", f"it wants to be a {role[:40]!r}")
    host = protocol.field(frame, "host", dict)
    told: dict[str, Any] = {
        name: protocol.field(host | {"type": "join"}, name, str)[:FIELD_LIMIT]
        for name in ("boot_id", "namespaces", "hostname")
    }
    told["euid"] = protocol.field(host | {"type": "join"}, "euid", int)
    return Node(
        role=role,
        wanted=protocol.field_or_none(frame, "rank", int),
        host=told,
        pid=protocol.field(frame, "pid", int),
        asynchronous=protocol.field(frame, "asynchronous", bool) if role == "worker" else None,
        num_workers=protocol.field_or_none(frame, "num_workers", int),
        num_servers=protocol.field_or_none(frame, "num_servers", int),
        copies=protocol.field(frame, "same_host_copies", bool),
        inet6=inet6,
    )


class Refusal(Exception):
    """A node cannot join; `others` are those that joined before and must go with it."""

    def __init__(self, message: str, others: tuple[Node, ...] = ()) -> None:
        super().__init__(message)
        self.others = others

    def error(self) -> KVStoreError:
        return InvalidArgumentError(str(self))


def _plural(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def listed(names: list[str], limit: int = 8) -> str:
    """`worker 1, worker 2 and server 0`, with the end of a long list counted only."""
    if len(names) > limit:
        names = [*names[:limit], f"{len(names) - limit} more"]
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


class Roster:
    """The nodes of a cluster, how far it is, and who is missing."""

    def __init__(self, num_workers: int, num_servers: int) -> None:
        self.sizes = {"worker": num_workers, "server": num_servers}
        self.nodes: list[Node] = []
        self.stage = Stage.JOINING
        self.started = 0.0
        self.why_lost: str | None = None  # the first loss; the cluster does not come back from it

    def of(self, role: str) -> list[Node]:
        """The nodes of a role, by rank once there are ranks."""
        return [node for node in self.nodes if node.role == role]

    # ------------------------------------------------------------------------------- joining

    def admit(self, node: Node) -> None:
        """Take a node in, or raise Refusal."""
        self._check_open(node)
        self._check_numbers(node)
        same = self.of(node.role)
        for other in same:
            if node.wanted is not None and node.wanted == other.wanted:
                raise Refusal(
                    f"rank {node.wanted} was asked for by two {node.role}s "
                    f"({other.where}, and {node.where})",
                    (other,),
                )
            if node.asynchronous != other.asynchronous:
                raise Refusal(
                    f"workers disagree about the kind of store: {_kind(other)} at {other.where}, "
                    f"{_kind(node)} at {node.where}",
                    (other,),
                )
        size = self.sizes[node.role]
        if len(same) >= size:
            there = listed([f"({other.where})" for other in same], 4)
            raise Refusal(
                f"the cluster has its {_plural(size, node.role)} already: {there}; "
                f"there is no place for another ({node.where})"
            )
        self.nodes.append(node)

    def _check_open(self, node: Node) -> None:
        if self.why_lost is not None:
            raise Refusal(
                f"the cluster has lost a node and takes nobody in any more ({self.why_lost}); "
                "start it anew"
            )
        if self.stage != Stage.JOINING:
            since = f"since {time.monotonic() - self.started:.0f} s"
            state = "is ending" if self.stage == Stage.ENDING else f"is complete {since}"
            raise Refusal(
                f"the cluster {state}, a {node.role} ({node.where}) can join it no more: "
                "a node that has left or died cannot come back; start the cluster anew"
            )

    def _check_numbers(self, node: Node) -> None:
        told = {"worker": node.num_workers, "server": node.num_servers}
        for role, number in told.items():
            if number is not None and number != self.sizes[role]:
                raise Refusal(
                    f"a {node.role} ({node.where}) was told that there are "
                    f"{_plural(number, role)}, the scheduler was told {self.sizes[role]}"
                )
        size = self.sizes[node.role]
        if node.wanted is not None and not 0 <= node.wanted < size:
            raise Refusal(
                f"a {node.role} ({node.where}) wants rank {node.wanted}, but there are "
                f"{_plural(size, node.role)}: ranks go from 0 to {size - 1}"
            )

    @property
    def complete(self) -> bool:
        return len(self.nodes) == sum(self.sizes.values())

    def place(self) -> None:
        """Give ranks: first those asked for, then the free ones in order of arrival."""
        for role in self.sizes:
            nodes = self.of(role)
            taken = {node.wanted for node in nodes}
            free = iter(rank for rank in range(len(nodes)) if rank not in taken)
            for node in nodes:
                node.rank = next(free) if node.wanted is None else node.wanted
        self.nodes.sort(key=lambda node: (node.role != "worker", node.rank))
        self.started = time.monotonic()
        self.stage = Stage.PLACING

    @property
    def asynchronous(self) -> bool:
        return any(node.asynchronous for node in self.nodes)

    @property
    def same_host_copies(self) -> bool:
        """Whether all nodes are on one host and may read each other's memory.

        Between hosts it would not help, and what UCX needs for it makes tcp slow.
        """
        places = {
            (node.host["boot_id"], node.host["namespaces"], node.host["euid"])
            for node in self.nodes
        }
        known = all(node.host["boot_id"] for node in self.nodes)
        return known and len(places) == 1 and all(node.copies for node in self.nodes)

    @property
    def inet6(self) -> bool:
        """Whether values travel by IPv6: where no node has come by IPv4."""
        return all(node.inet6 for node in self.nodes)

    def peers_of(self, node: Node) -> list[tuple[int, str, str]]:
        """(number, name, address) of those that a node talks to: servers to all others."""
        return [
            (number, other.name, other.address or "")
            for number, other in enumerate([*self.of("worker"), *self.of("server")])
            if other is not node and "server" in (node.role, other.role)
        ]

    # ----------------------------------------------------------------------------- who is missing

    def waiting_for(self) -> str:
        """What a cluster that is not running yet waits for, as part of a sentence."""
        if self.stage == Stage.JOINING:
            parts = []
            for role in ("server", "worker"):
                size = self.sizes[role]
                missing = size - len(self.of(role))
                if missing:
                    parts.append(f"{missing} of {_plural(size, role)}")
            return " and ".join(parts)
        if self.stage == Stage.PLACING:
            names = [str(node) for node in self.nodes if node.address is None]
            return f"{listed(names)} to open the data plane" if names else ""
        names = [str(node) for node in self.nodes if not node.ready]
        return f"{listed(names)} to be connected" if names else ""

    def absent(self, role: str) -> list[Node]:
        """Nodes of a role that have left or are about to."""
        return [node for node in self.of(role) if node.left or node.leaving]

    def dead(self, role: str, timeout: float) -> int:
        """How many nodes of a role are lost, or were not heard of for so many seconds."""
        now = time.monotonic()
        return sum(
            node.lost or (not node.left and now - node.heard > timeout) for node in self.of(role)
        )


def _kind(node: Node) -> str:
    return "dist_async" if node.asynchronous else "dist_sync"
