"""`RayCluster`: a cluster whose processes are actors (ray_node.py) that Ray starts and watches.

A placement group holds their places, spread over the nodes of Ray's cluster; the scheduler takes no
place of its own and sits beside server 0. Each request is a call of an actor, and what comes of it
comes in a thread of Ray's own, where nothing may wait: there it is only put into a queue. One
daemon thread takes it from there, and it is this thread that ends everything: whoever wants the end
says so and waits for the thread, so that the garbage collector may want it anywhere.

A lost node is heard of twice. The scheduler, which sees a connection close, tells the other nodes
at once and ends, which is the end of a call; Ray tells that an actor is gone.
"""

import contextlib
import importlib
import math
import os
import queue
import secrets
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

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
from .maker import (
    CLOSE_S,
    TICK_S,
    AllowImport,
    Controller,
    MadeCluster,
    Maker,
    Session,
    several,
)
from .ray_node import SchedulerNode, ServerNode, WorkerNode
from .roster import listed

__all__ = ["RayCluster"]

END_S = 10.0  # for Ray to take note that everything shall end
REPORT_S = 5.0
MOST_CALLS = 8  # at the scheduler at once
OWN_OPTIONS = {"CPU": "num_cpus", "GPU": "num_gpus", "memory": "memory"}

Resources = Mapping[str, float]
Take = Callable[["Actor", Any], object]


class RayCluster(MadeCluster):
    """A scheduler, servers and workers as actors of a Ray cluster.

    It has the methods of `LocalCluster`, and ends as that does. The places of its actors are a
    placement group, spread over Ray's nodes as evenly as their resources allow; the scheduler sits
    beside server 0. ``kvstore`` must be installed on the nodes, as what Ray's actors use must be.
    What they print goes where Ray puts it. When a node or an actor is lost, `run` raises
    `PeerLostError` and the cluster ends.

    ``ray.init()`` is called if nobody has: it finds a running cluster by ``RAY_ADDRESS`` or on this
    machine, or starts one here. Ray itself stays when the cluster is closed.

    Parameters
    ----------
    num_workers, num_servers
        How many there are. No servers: for stores of kind nccl, which need none.
    controller
        What each server calls with (head, body) for ``send_command_to_servers``.
    timeout
        Seconds that starting, joining and every call on a store may take, by default as
        ``KVSTORE_TIMEOUT`` says, or 300. It does not limit a run.
    join
        Make this process the worker of rank 0: only the other ranks become actors. It joins with
        ``kvstore.create('dist_sync', **cluster.options)`` after `submit`, for joining waits for all
        workers. This machine and the actors must reach each other.
    resources_per_worker, resources_per_server
        What Ray keeps for each: amounts by name, by default one ``"CPU"``.

    Raises
    ------
    NotBuiltError
        Ray is not installed.
    InvalidArgumentError
        Ray's nodes do not have the resources. A cluster that grows on demand is told to grow first:
        ``ray.autoscaler.sdk.request_resources``.
    TimeoutError
        They have them, but others held them all the time.

    Examples
    --------
    >>> def train():
    ...     with kvstore.create("dist_sync") as kv:
    ...         kv.init("w", np.zeros(3))
    ...         kv.push("w", np.ones(3))
    ...         return kv.pull("w").asnumpy()
    >>> with kvstore.RayCluster(2, 1) as cluster:    # doctest: +SKIP
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
        resources_per_worker: Resources | None = None,
        resources_per_server: Resources | None = None,
    ) -> None:
        for_worker = _resources("resources_per_worker", resources_per_worker)
        for_server = _resources("resources_per_server", resources_per_server)
        self._begin(
            RayMaker(
                num_workers,
                num_servers,
                controller,
                allow_import,
                timeout,
                join,
                for_worker,
                for_server,
            )
        )


class Actor:
    """An actor, and where it was found to be."""

    def __init__(self, name: str, handle: Any) -> None:
        self.name = name
        self.handle = handle
        self.host, self.pid = "", 0

    def __str__(self) -> str:
        return f"{self.name} (host {self.host}, pid {self.pid})" if self.pid else self.name


class _Session(Session):
    """A scheduler that listens, and who serves in it."""

    def __init__(self) -> None:
        super().__init__()
        self.serving: set[Actor] = set()


class RayMaker(Maker):
    """The actors behind a `RayCluster`."""

    session: _Session

    def __init__(
        self,
        num_workers: int,
        num_servers: int,
        controller: Controller | None,
        allow_import: AllowImport,
        timeout: float | None,
        join: bool,
        for_worker: Resources,
        for_server: Resources,
    ) -> None:
        super().__init__(num_workers, num_servers, controller, allow_import, timeout, join)
        self.for_worker = for_worker
        self.for_server = for_server
        self.ray = _ray()
        self.job: str | None = None  # the connection to Ray that all this is of
        self.group: Any = None
        self.scheduler: Actor
        self.servers: list[Actor] = []
        self.workers: list[Actor] = []
        self.actors: list[Actor] = []  # all of them
        self.session = _Session()
        self.events: queue.SimpleQueue[tuple[Actor, Take, Any] | None] = queue.SimpleQueue()
        self.thread = threading.Thread(target=self._loop, name="kvstore-ray-cluster", daemon=True)

    @property
    def run_in(self) -> list[Actor]:
        return self.workers

    # -------------------------------------------------------------------------- in users' threads

    def begin(self) -> None:
        blob = self._dumps(self.controller)
        if not self.ray.is_initialized():
            self.ray.init()
        self.job = self.ray.get_runtime_context().get_job_id()
        self.thread.start()
        try:
            self._take_places(time.monotonic() + self.timeout)
            self._start_actors()
            self._begin_session(blob)
        except ClosedError:
            if self.ended_by is None:
                raise
            raise self.ended_by from None

    def _take_places(self, deadline: float) -> None:
        self._check_resources()
        bundles = [resources for number, resources in self._wanted() for _ in range(number)]
        util = importlib.import_module("ray.util")
        name = f"kvstore-{secrets.token_hex(4)}"
        self.group = util.placement_group(bundles, strategy="SPREAD", name=name)
        report = time.monotonic() + REPORT_S
        while util.placement_group_table(self.group)["state"] != "CREATED":
            now = time.monotonic()
            if now > deadline:
                free = told(self.ray.available_resources(), self._names())
                raise TimeoutError(
                    f"Ray had no room for {self._asked()} in {self.timeout:g} s: others use its "
                    f"nodes, which {self._has()}; free: {free}"
                )
            if now > report:
                report = math.inf
                text = f"kvstore: waiting for Ray to have room for {self._asked()}\n"
                self.lines.append((2, text))
            self.wait(lambda: False, min(now + TICK_S, deadline))
            with self.lock:
                self._check_locked()

    def _check_resources(self) -> None:
        """InvalidArgumentError where no waiting would help."""
        if not fits(self._wanted(), self._nodes()):
            raise InvalidArgumentError(
                f"Ray has not enough for {self._asked()}: its nodes {self._has()} (what is asked "
                "for is set by resources_per_worker and resources_per_server)"
            )

    def _wanted(self) -> list[tuple[int, Resources]]:
        """Servers, then workers: how many, and what each needs."""
        processes = self.num_workers - self.first
        return [(self.num_servers, self.for_server), (processes, self.for_worker)]

    def _nodes(self) -> list[Resources]:
        return [node["Resources"] for node in self.ray.nodes() if node["Alive"]]

    def _names(self) -> list[str]:
        return list({**self.for_server, **self.for_worker})

    def _asked(self) -> str:
        return " and ".join(
            f"{several(number, role)} of {told(resources)} each"
            for role, (number, resources) in zip(("server", "worker"), self._wanted(), strict=True)
            if number
        )

    def _has(self) -> str:
        return f"have {listed([told(node, self._names()) for node in self._nodes()] or ['gone'])}"

    def _start_actors(self) -> None:
        remote = self.ray.remote
        kind = remote(max_concurrency=MOST_CALLS)(SchedulerNode)
        self.scheduler = self._start(kind, "scheduler", None, 0, {})
        kind = remote(ServerNode)
        for rank in range(self.num_servers):
            self.servers.append(self._start(kind, "server", rank, rank, self.for_server))
        kind = remote(WorkerNode)
        for rank in range(self.first, self.num_workers):
            place = self.num_servers + rank - self.first
            self.workers.append(self._start(kind, "worker", rank, place, self.for_worker))
        for actor in self.actors:
            self._call(actor, _take_about, "about")
        self._wait_or_end(lambda: all(actor.pid for actor in self.actors))

    def _start(
        self, kind: Any, role: str, rank: int | None, place: int, resources: Resources
    ) -> Actor:
        strategies = importlib.import_module("ray.util.scheduling_strategies")
        own = {OWN_OPTIONS[name]: resources[name] for name in resources if name in OWN_OPTIONS}
        made = kind.options(
            num_cpus=own.pop("num_cpus", 0),
            **own,
            resources={n: amount for n, amount in resources.items() if n not in OWN_OPTIONS},
            max_restarts=0,
            scheduling_strategy=strategies.PlacementGroupSchedulingStrategy(
                self.group, placement_group_bundle_index=place
            ),
        )
        handle = made.remote(role, rank, self.num_workers, self.num_servers)
        actor = Actor(role if rank is None else f"{role} {rank}", handle)
        self.actors.append(actor)
        return actor

    def _begin_session(self, controller: bytes) -> None:
        session = _Session()

        def take_address(_: Actor, place: tuple[str, int]) -> None:
            session.host, session.port = place

        def take_end(actor: Actor, _: None) -> None:
            session.serving.discard(actor)

        self._call(self.scheduler, take_address, "listen", session.token)
        self._wait_or_end(lambda: session.port != 0)
        with self.lock:
            self.session = session
            session.serving.update([self.scheduler, *self.servers])
        self._call(self.scheduler, take_end, "served")
        where = settings.join_address(session.host, session.port)
        for server in self.servers:
            self._call(
                server, take_end, "serve", where, session.token, controller, self.allow_import
            )

    def _session_over(self) -> bool:
        return self._state(self.timeout)[1]

    def _state(self, limit: float) -> tuple[bool, bool]:
        """What the scheduler says of the session; of one that is gone, that it goes on."""
        found: list[tuple[bool, bool]] = []
        self._call(self.scheduler, lambda _, state: found.append(state), "state")
        self.wait(lambda: bool(found), time.monotonic() + limit)
        return found[0] if found and found[0] else (False, False)

    def _send_run_locked(self, blob: bytes) -> None:
        if not self._connected():
            return
        variables = {"KVSTORE_TIMEOUT": f"{self.timeout:g}", **self.session.variables()}
        once = self.ray.put(blob)
        for worker in self.workers:
            self._call(worker, self._take_answer_of_run_locked, "run", variables, once)

    def _close_in_order(self) -> None:
        staying = set(self.workers)
        for worker in self.workers:
            self._call(worker, lambda one, _: staying.discard(one), "leave")
        self.wait(lambda: not staying, time.monotonic() + CLOSE_S)
        complete, over = self._state(CLOSE_S)
        if over or (complete and not self.first):
            self.wait(lambda: not self.session.serving, time.monotonic() + CLOSE_S)

    def kill(self, why: str) -> None:
        super().kill(why)
        self._wait_for_end()

    def kill_dropped(self) -> None:
        super().kill("it was dropped without close")
        # The collector may have come here in a thread of Ray's, which the end needs.
        if threading.current_thread() is threading.main_thread():
            self._wait_for_end()

    def _wait_for_end(self) -> None:
        if os.getpid() == self.pid and self.thread.ident is not None:
            self.thread.join(END_S)

    # -------------------------------------------------------------------------------- both sides

    def _call(self, actor: Actor, take: Take, method: str, *arguments: Any) -> None:
        """Call a method of an actor; `take` gets the result, in the daemon thread."""
        if not self._connected():
            return  # it is the end, as that thread will see
        future = getattr(actor.handle, method).remote(*arguments).future()
        future.add_done_callback(lambda done: self.events.put((actor, take, done)))

    def _connected(self) -> bool:
        """Whether this is still the connection to Ray in which the cluster was made.

        To be asked before Ray is: without one, Ray would make itself a new one.
        """
        ray = self.ray
        return bool(ray.is_initialized() and ray.get_runtime_context().get_job_id() == self.job)

    def _end_locked(self) -> None:
        self.events.put(None)  # the daemon thread is woken

    # ------------------------------------------------------------------------ in the daemon thread

    def _loop(self) -> None:
        try:
            while self.why_ended is None:
                self._step()
        except Exception as error:  # or everybody would wait for what nobody takes
            why = f"{type(error).__name__} in the thread that serves it: {error}"
            with self.lock:
                self._kill_locked(why, KVStoreError(why))
        finally:
            self._end()

    def _step(self) -> None:
        event = None
        with contextlib.suppress(queue.Empty):
            event = self.events.get(timeout=TICK_S)
        with self.lock:
            if self.why_ended is not None:
                return
            if event is not None:
                self._take_locked(*event)
            elif not self._connected():
                self._kill_locked("Ray was shut down", PeerLostError("Ray was shut down"))
            self._check_run_locked()
            self.lock.notify_all()

    def _take_locked(self, actor: Actor, take: Take, done: Any) -> None:
        trouble = done.exception()
        if trouble is None or self.closed:
            take(actor, None if trouble else done.result())
            return
        cause = trouble.cause if isinstance(trouble, self.ray.exceptions.RayTaskError) else None
        if isinstance(cause, PeerLostError):  # somebody else is lost
            error: KVStoreError = cause
        elif isinstance(cause, KVStoreError):
            error = type(cause)(f"{actor}: {cause}")
        elif cause is not None:
            error = KVStoreError(f"{actor} failed: {type(cause).__name__}: {cause}")
        else:
            error = PeerLostError(f"{actor} is gone: {str(trouble).strip().splitlines()[-1]}")
        self._kill_locked(str(error), error)

    def _end(self) -> None:
        """End all there is; what is gone already is not missed."""
        if not self._connected():
            return
        for actor in self.actors:
            with contextlib.suppress(Exception):
                self.ray.kill(actor.handle)
        if self.group is not None:
            with contextlib.suppress(Exception):
                importlib.import_module("ray.util").remove_placement_group(self.group)


def _take_about(actor: Actor, about: tuple[str, int]) -> None:
    actor.host, actor.pid = about


def _ray() -> Any:
    try:
        return importlib.import_module("ray")
    except ImportError as error:
        raise NotBuiltError(
            f"a RayCluster needs Ray: pip install 'mlkvstore[ray]' ({error})"
        ) from error


def _resources(option: str, given: Resources | None) -> dict[str, float]:
    """Resources that were asked for, checked."""
    found = {"CPU": 1} if given is None else given
    if not isinstance(found, Mapping) or not all(isinstance(name, str) for name in found):
        raise ArrayTypeError(f"{option} is a dict of amounts by name, not {given!r}")
    for name, amount in found.items():
        number = isinstance(amount, (int, float)) and not isinstance(amount, bool)
        if not number or not 0 <= amount < math.inf:
            raise InvalidArgumentError(f"{option}: {amount!r} of {name!r} is no amount")
    if not any(found.values()):
        raise InvalidArgumentError(f"{option}={given!r}: Ray keeps a place only for some resource")
    return {name: amount for name, amount in found.items() if amount}


def fits(asked: Sequence[tuple[int, Resources]], nodes: Sequence[Resources]) -> bool:
    """Whether so many of each could be placed if nobody else used the nodes.

    No exact packing: False is certain, True is not.
    """
    for name in {name for _, resources in asked for name in resources}:
        due = sum(number * resources.get(name, 0) for number, resources in asked)
        if due > sum(node.get(name, 0) for node in nodes) + 1e-6:
            return False
    for number, resources in asked:
        rooms = (
            min(int(node.get(name, 0) / amount + 1e-6) for name, amount in resources.items())
            for node in nodes
        )
        if number > sum(rooms):
            return False
    return True


def told(resources: Resources, names: Sequence[str] | None = None) -> str:
    """`2 CPU and 1 GPU`; with names, those only."""
    names = list(resources) if names is None else names
    return " and ".join(f"{resources.get(name, 0):g} {name}" for name in names)
