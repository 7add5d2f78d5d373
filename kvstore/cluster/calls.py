"""What the nodes of a running cluster ask of the scheduler: barriers, commands, leaving, the count
of the dead.

Each request has an id of its node's and gets one answer: `reply`, or `refused` with an error. A
node whose deadline has passed sends `give_up`; the answer to that names who is `missing`, or is the
ordinary one if the two crossed on their way. No sockets here: `send` puts a frame on its way.
"""

import itertools
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from ..errors import KVStoreError, PeerLostError
from . import protocol
from .protocol import Frame, ProtocolError
from .roster import Node, Roster, Stage, listed

MAX_SILENCE_MS = 10**15
MAX_REASON = 2000  # characters of a failure that travel
MAX_TEXT = 4096  # of what a worker says in a barrier
MAX_ANSWER = protocol.MAX_FRAME // 8  # of an answer; as it travels it may be six times as long


@dataclass
class Command:
    """A command on its way to the servers, or to workers."""

    origin: Node
    ident: int
    head: int
    waiting: list[Node]
    failures: list[str] = field(default_factory=list)
    answers: dict[int, str] = field(default_factory=dict)  # by the node's rank


class Calls:
    """The requests under way."""

    def __init__(
        self,
        roster: Roster,
        send: Callable[[Node, Frame], None],
        all_left: Callable[[], None],
    ) -> None:
        self.roster = roster
        self._send = send
        self._all_left = all_left  # called before the last worker hears that it may go
        # The barriers that a worker waits in: more than one where several of its threads do.
        self._barriers: dict[Node, deque[tuple[int, str]]] = {}  # with what it says there
        self._commands: dict[int, Command] = {}
        self._numbers = itertools.count(1)
        self._leaves: dict[Node, int] = {}

    def take(self, node: Node, frame: Frame) -> bool:
        """Handle a frame; False if it is none of these."""
        take = {
            "barrier": self._barrier,
            "command": self._command,
            "done": self._done,
            "leave": self._leave,
            "give_up": self._give_up,
            "dead": self._dead,
        }.get(frame["type"])
        if take is None:
            return False
        take(node, protocol.field(frame, "id", int), frame)
        return True

    def fail_all(self, error: KVStoreError) -> None:
        """Answer every request with an error; those who leave may go."""
        for node, waits in self._barriers.items():
            for ident, _ in waits:
                self._refuse(node, ident, error)
        self._barriers.clear()
        for command in self._commands.values():
            self._refuse(command.origin, command.ident, error)
        self._commands.clear()
        for node in list(self._leaves):
            self._let_go(node)

    def _reply(self, node: Node, ident: int, **fields: object) -> None:
        self._send(node, {"type": "reply", "id": ident, **fields})

    def _refuse(self, node: Node, ident: int, error: Exception) -> None:
        self._send(node, {"type": "refused", "id": ident, **protocol.error_fields(error)})

    def _may_call(self, node: Node, ident: int, role: str) -> bool:
        """Whether the cluster is whole and the node one that may ask."""
        if self.roster.why_lost is not None:
            self._refuse(node, ident, PeerLostError(self.roster.why_lost))
            return False
        if self.roster.stage not in (Stage.RUNNING, Stage.ENDING) or node.role != role:
            raise ProtocolError("order", "it asked for what it may not ask for now")
        return True

    # ---------------------------------------------------------------------------------- barriers

    def _barrier(self, node: Node, ident: int, frame: Frame) -> None:
        if not self._may_call(node, ident, "worker"):
            return
        absent = self.roster.absent("worker")
        if absent:
            self._refuse(node, ident, _no_barrier(absent[0]))
            return
        text = protocol.field(frame, "text", str)
        if len(text) > MAX_TEXT:
            raise ProtocolError("fields", "it says too much in a barrier")
        self._barriers.setdefault(node, deque()).append((ident, text))
        workers = self.roster.of("worker")
        if all(self._barriers.get(worker) for worker in workers):
            waits = [self._barriers[worker].popleft() for worker in workers]
            texts = [text for _, text in waits]
            for worker, (own, _) in zip(workers, waits, strict=True):
                self._reply(worker, own, texts=texts)

    def _break_barriers(self, absent: Node) -> None:
        for node, waits in self._barriers.items():
            while waits:
                self._refuse(node, waits.popleft()[0], _no_barrier(absent))

    # ---------------------------------------------------------------------------------- commands

    def _command(self, node: Node, ident: int, frame: Frame) -> None:
        if not self._may_call(node, ident, "worker"):
            return
        head = protocol.field(frame, "head", int)
        body: Frame = {
            name: protocol.field(frame, name, str) for name in ("text", "base64") if name in frame
        }
        ranks = protocol.field_or_none(frame, "workers", list)
        nodes = self.roster.of("server")
        if ranks is not None:
            workers = self.roster.of("worker")
            nodes = [worker for worker in workers if worker.rank in ranks and not worker.left]
        number = next(self._numbers)
        self._commands[number] = Command(node, ident, head, list(nodes))
        for other in nodes:
            self._send(other, {"type": "command", "id": number, "head": head, **body})
        self._end_if_done(number)

    def _done(self, node: Node, number: int, frame: Frame) -> None:
        command = self._commands.get(number)
        if command is None or node not in command.waiting:
            return
        reason = protocol.field_or_none(frame, "failure", str)
        command.waiting.remove(node)
        command.answers[node.rank or 0] = protocol.field(frame, "answer", str)[:MAX_ANSWER]
        if reason is not None:
            what = f"the controller of {node.name} failed on command {command.head}"
            what = node.name if command.head < 0 else what
            command.failures.append(f"{what}: {reason[:MAX_REASON]}")
        self._end_if_done(number)

    def _end_if_done(self, number: int) -> None:
        command = self._commands[number]
        if command.waiting:
            return
        del self._commands[number]
        if command.failures:
            error = KVStoreError("; ".join(sorted(command.failures)[:8]))
            self._refuse(command.origin, command.ident, error)
        else:
            answers = [text for _, text in sorted(command.answers.items())]
            self._reply(command.origin, command.ident, answers=answers)

    # ----------------------------------------------------------------------------------- leaving

    def _leave(self, node: Node, ident: int, frame: Frame) -> None:
        together = protocol.field(frame, "together", bool)
        finished = protocol.field(frame, "finished", bool)
        whole = self.roster.why_lost is None and self.roster.stage == Stage.RUNNING
        if self.roster.why_lost is None and self.roster.stage < Stage.RUNNING:
            raise ProtocolError("order", "it left before the cluster was running")
        self._leaves[node] = ident
        if node.role == "worker" and together and whole:
            node.leaving = True
        else:
            self._let_go(node)
        if node.role == "worker":
            self._break_barriers(node)
            if whole:  # it will push no more, also while it waits for the others
                workers = [worker for worker in self.roster.of("worker") if worker is not node]
                for other in self.roster.of("server") or workers:
                    news = {"type": "left", "rank": node.rank, "finished": finished}
                    self._send(other, news)
        workers = self.roster.of("worker")
        if all(worker.left or worker.leaving for worker in workers):
            for worker in workers:
                if worker.leaving:
                    self._let_go(worker)

    def _let_go(self, node: Node) -> None:
        """A node has left, and hears that it may close its connection."""
        node.leaving, node.left = False, True
        for number, command in list(self._commands.items()):
            if node in command.waiting:  # it may have heard of it or not
                command.waiting.remove(node)
                self._end_if_done(number)
        if all(worker.left for worker in self.roster.of("worker")):
            self._all_left()
        self._reply(node, self._leaves.pop(node))
        if self.roster.why_lost is not None or self.roster.stage != Stage.RUNNING:
            return
        if all(worker.left for worker in self.roster.of("worker")):
            self.roster.stage = Stage.ENDING
            for server in self.roster.of("server"):
                self._send(server, {"type": "shutdown"})

    # --------------------------------------------------------------------------- the other calls

    def _give_up(self, node: Node, ident: int, frame: Frame) -> None:
        here = [wait for wait in self._barriers.get(node, ()) if wait[0] == ident]
        if here:
            self._barriers[node].remove(here[0])
            absent = [w for w in self.roster.of("worker") if w is not node]
            absent = [w for w in absent if not self._barriers.get(w)]
            self._reply(node, ident, missing=listed([str(w) for w in absent]) if absent else "")
        elif self._leaves.get(node) == ident:
            absent = [w for w in self.roster.of("worker") if not (w.left or w.leaving)]
            self._leaves[node] = -1  # its place in `_let_go`'s reply, which nobody waits for
            self._let_go(node)
            self._reply(node, ident, missing=listed([str(w) for w in absent]) if absent else "")
        for command in self._commands.values():
            if command.origin is node and command.ident == ident:
                missing = listed([str(server) for server in command.waiting])
                self._reply(node, ident, missing=missing)
                command.ident = -1

    def _dead(self, node: Node, ident: int, frame: Frame) -> None:
        role = protocol.field(frame, "role", str)
        timeout = min(protocol.field(frame, "timeout_ms", int), MAX_SILENCE_MS) / 1000
        self._reply(node, ident, count=self.roster.dead(role, timeout))


def _no_barrier(absent: Node) -> PeerLostError:
    return PeerLostError(f"{absent} has left the cluster, and a barrier takes all workers")
