"""`from_environment`: the cluster of processes that SLURM, MPI or torchrun has started as workers.

The engine watches over the workers, and each worker over what it has started itself: rank 0 over
the scheduler, one worker of each node over that node's share of the servers. These companions are
ended with it: they may end by themselves while it waits at its exit for the other workers to leave;
what is left then, or when it was killed, is ended by force (processes.py).

Everything is checked before anything is started, by all workers alike, so that all raise who can
know what is wrong. One that cannot, because what is wrong is on another node, is ended by its
engine, when that other worker has failed.
"""

import asyncio
import atexit
import contextlib
import importlib.util
import os
import socket
import sys
import threading
import time
from typing import Any

from ..errors import ArrayTypeError, InvalidArgumentError, TimeoutError
from . import control, engines, entry, member, settings
from .engines import Place
from .launch import MOST_PROCESSES
from .processes import Announced, Process, Processes, environment
from .settings import Settings, join_address

START_S = 60.0  # for the scheduler to listen
FAILED_S = 5.0  # for the scheduler to tell the others that this worker has failed
ORPHANS_S = 2.0  # the same where this worker was killed
RESOLVE_S = 5.0
PATIENCE_S = 5.0  # before it says what it waits for
TICK_S = 0.1

# The package, and a controller, are found where the script finds them.
BOOT = (
    "import runpy, sys; sys.path[:] = {path!r}; "
    "runpy.run_module('kvstore.server', run_name='__main__', alter_sys=True)"
)


def from_environment(
    num_servers: int | None = None,
    *,
    num_workers: int | None = None,
    controller: str | None = None,
) -> None:
    """Make this process a worker of the cluster of all processes that the engine has started.

    The engine is SLURM (``srun``), MPI (``mpirun`` of Open MPI, ``mpiexec`` of MPICH and its
    relatives) or torchrun. Afterwards ``kvstore.create("dist_sync")`` joins with the rank that the
    engine gave. The scheduler is started here by rank 0, the servers by the first worker of each
    node; they end with these workers. What was found is put into the environment as
    ``KVSTORE_ROLE``, ``KVSTORE_SCHEDULER`` and so on. In a process that has a role already, one of
    ``kvrun`` or of MXNet's launchers, nothing is changed, and by a second call neither.

    The cluster serves one store of each worker, from `create` to `close`.

    Parameters
    ----------
    num_servers
        How many servers there are in all; 0: none, for stores of kind nccl. By default as
        ``KVSTORE_NUM_SERVERS`` says, else one a node; where the engine does not tell the nodes (MPI
        on several hosts) it must be given.
    num_workers
        How many processes the engine must have started; by default as ``KVSTORE_NUM_WORKERS`` says,
        else any number is right.
    controller
        What each server calls with (head, body) for ``send_command_to_servers``, as
        ``MODULE:FUNCTION``.

    Raises
    ------
    InvalidArgumentError
        No engine was found; its variables contradict each other or what was asked for; or it does
        not tell where rank 0 is, or how several hosts share a secret, and neither do
        ``KVSTORE_SCHEDULER`` and ``KVSTORE_TOKEN``; or the scheduler cannot listen.
    NotBuiltError
        UCX is missing.

    Examples
    --------
    >>> def train():                                 # in each process that srun has started
    ...     kvstore.cluster.from_environment()
    ...     with kvstore.create("dist_sync") as kv:
    ...         kv.barrier()
    """
    if os.environ.get("KVSTORE_ROLE") or os.environ.get("DMLC_ROLE"):
        return
    place = engines.find(os.environ)
    found = _settings(place, num_servers, num_workers)
    number = found.num_servers
    if number is None:
        raise InvalidArgumentError(
            f"{place.engine.name} does not tell how many hosts there are: say how many servers by "
            "num_servers= or KVSTORE_NUM_SERVERS"
        )
    servers = place.servers(number)
    if len(servers) > MOST_PROCESSES:
        raise InvalidArgumentError(
            f"num_servers={number}: {len(servers)} of them on one machine, the most are "
            f"{MOST_PROCESSES}"
        )
    serve = [sys.executable, "-c", BOOT.format(path=sys.path)]
    for_server = serve if controller is None else [*serve, "--controller", _checked(controller)]
    if number:
        entry.check_ucx()
    token = _token(place, found)
    if place.rank == 0:
        _check_host(found)
    if place.rank == 0 or servers:
        common = {"KVSTORE_TOKEN": token, "KVSTORE_SCHEDULER": found.address}
        companions = _Companions(found.timeout)
        try:
            if place.rank == 0:
                own = environment("scheduler", None, place.size, number)
                companions.start_scheduler(serve, {**own, **common, **_binding(found, True)})
            for rank in servers:
                own = {**environment("server", rank, place.size, number), **common}
                own.update(_binding(found, False))
                companions.processes.start(f"server {rank}", for_server, own)
        except BaseException:
            companions.processes.close()
            raise
        companions.look_after()
    os.environ.update(
        KVSTORE_ROLE="worker",
        KVSTORE_SCHEDULER=found.address,
        KVSTORE_TOKEN=token,
        KVSTORE_RANK=str(place.rank),
        KVSTORE_NUM_WORKERS=str(place.size),
        KVSTORE_NUM_SERVERS=str(number),
    )


def _settings(place: Place, num_servers: int | None, num_workers: int | None) -> Settings:
    options: dict[str, Any] = {"role": "worker", "num_workers": num_workers}
    options["num_servers"] = num_servers
    if num_servers is None and not os.environ.get("KVSTORE_NUM_SERVERS"):
        options["num_servers"] = place.nodes
    if not (os.environ.get("KVSTORE_SCHEDULER") or os.environ.get("DMLC_PS_ROOT_URI")):
        options["scheduler"] = join_address(*engines.address(place, os.environ))
    found = settings.read(options)
    if found.num_workers not in (None, place.size):
        raise InvalidArgumentError(
            f"{found.num_workers} workers were asked for (num_workers= or KVSTORE_NUM_WORKERS), "
            f"but {place.engine.name} has started {place.size} ({place.engine.size})"
        )
    return found


def _token(place: Place, found: Settings) -> str:
    if found.token:
        return found.token
    if engines.is_loopback(found.host):
        return place.job  # no secret, but it keeps two jobs apart that come by the same port
    raise InvalidArgumentError(
        f"the scheduler at {found.address} can be reached from other machines, so the cluster "
        "needs a secret: set KVSTORE_TOKEN in all processes to what `python -c 'import secrets; "
        f"print(secrets.token_hex())'` has printed once ({place.engine.token})"
    )


def _binding(found: Settings, scheduler: bool) -> dict[str, str]:
    """What a companion listens on: like this worker, but the scheduler on all addresses.

    For on its own host the name that others find it by may mean another address, or none yet.
    """
    bind = found.bind
    if scheduler and not bind and not engines.is_loopback(found.host):
        bind = "::" if socket.has_dualstack_ipv6() else "0.0.0.0"
    return {"KVSTORE_BIND": bind, "KVSTORE_ADVERTISE": found.advertise}


def _check_host(found: Settings) -> None:
    """Rank 0 must be where the others look for the scheduler, as far as names can tell."""
    if found.bind or engines.is_loopback(found.host):
        return
    looking = control.in_thread(socket.getaddrinfo, found.host, 0, 0, socket.SOCK_STREAM)
    try:
        addresses = {one[4][0] for one in control.run(asyncio.wait_for(looking, RESOLVE_S))}
    except (OSError, UnicodeError, asyncio.TimeoutError):
        return  # a name that comes to mean something later, as the others will find
    own = {str(address) for address in addresses if _is_own(str(address))}
    if own and not all(engines.is_loopback(address) for address in own):
        return
    meaning = ", ".join(sorted(map(str, addresses)))
    trouble = "which other machines cannot reach" if own else "which is not this host's"
    raise InvalidArgumentError(
        f"rank 0 runs on {socket.gethostname()} and so does the scheduler, but there "
        f"{found.host!r} means {meaning}, {trouble}: set KVSTORE_SCHEDULER to host:port with an "
        "address of that host that all others reach"
    )


def _is_own(address: str) -> bool:
    """Whether an address is one of this machine's."""
    try:
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        with socket.socket(family, socket.SOCK_DGRAM) as trying:
            trying.bind((address, 0))
    except OSError:
        return False
    return True


def _checked(controller: str) -> str:
    """A controller as its servers will find it, as far as that can be seen without an import."""
    if not isinstance(controller, str):
        raise ArrayTypeError(
            f"controller={controller!r}: it is MODULE:FUNCTION as a str, for servers are processes "
            "of their own"
        )
    module, _, name = controller.partition(":")
    try:
        there = bool(module and name) and importlib.util.find_spec(module) is not None
    except (ImportError, ValueError):
        there = False
    if not there:
        raise InvalidArgumentError(
            f"controller={controller!r}: it is MODULE:FUNCTION, of a module that can be imported"
        )
    return controller


class _Companions:
    """The scheduler and the servers that this process has started, and a thread for them."""

    def __init__(self, timeout: float) -> None:
        self.processes = Processes(self._forward, ORPHANS_S)
        self.timeout = timeout
        self._pid = os.getpid()
        self._over = threading.Event()
        self._words: dict[Process, str] = {}  # what each has said last
        self._thread = threading.Thread(target=self._look, name="kvstore-companions", daemon=True)

    def start_scheduler(self, command: list[str], variables: dict[str, str]) -> None:
        """Start the scheduler and return when it listens."""
        read_fd, write_fd = os.pipe()
        try:
            variables["KVSTORE_ANNOUNCE_FD"] = str(write_fd)
            scheduler = self.processes.start("scheduler", command, variables, pass_fds=[write_fd])
        except BaseException:
            os.close(read_fd)
            raise
        finally:
            os.close(write_fd)
        announced = Announced()
        self.processes.read_from(scheduler, read_fd, announced.take)
        deadline = time.monotonic() + START_S
        while not announced.port:
            if time.monotonic() > deadline:
                raise TimeoutError(f"the scheduler does not listen after {START_S:.0f} s")
            if self.processes.step(self.processes.wait(TICK_S)) and not announced.port:
                raise InvalidArgumentError(
                    f"the scheduler, which rank 0 starts, {scheduler.ending()}: "
                    f"{self._words.get(scheduler, 'it said nothing')}; another place for it is set "
                    "by KVSTORE_SCHEDULER=host:port"
                )

    def look_after(self) -> None:
        """Leave them to the thread until this process ends."""
        self._thread.start()
        atexit.register(self._at_exit)

    def _forward(self, process: Process, stream: int, line: bytes) -> None:
        text = line.decode(errors="replace").rstrip()
        self._words[process] = text.removeprefix("kvstore.server: ") or self._words.get(process, "")
        data = f"[{process.name}] ".encode() + line
        with contextlib.suppress(OSError):
            while data:
                data = data[os.write(stream, data) :]

    def _look(self) -> None:
        while not self._over.is_set() and list(self.processes):
            for process in self.processes.step(self.processes.wait(TICK_S)):
                if process.status != 0:
                    self._take_failure(process)
                self.processes.forget(process)

    def _take_failure(self, process: Process) -> None:
        _say(f"{process.name} {process.ending()}")
        if not member.Member.joined:
            # Nobody else tells: a cluster that is not complete forgets who has gone.
            member.Member.prevent(
                f"the {process.name}, which this worker had started, {process.ending()}: "
                f"{self._words.get(process, 'it said nothing')}"
            )

    def _at_exit(self) -> None:
        if os.getpid() != self._pid:
            return
        try:
            member.leave_all()
            self._wait()
        finally:
            self._over.set()
            self._thread.join(PATIENCE_S)  # it may hang in a write to a reader that does not read
            self.processes.close()

    def _wait(self) -> None:
        """Wait for them to end by themselves, which they do when all workers have left."""
        if not member.Member.joined:
            return
        failed = getattr(sys, "last_type", None) is not None and not hasattr(sys, "ps1")
        begin = time.monotonic()
        told = failed
        while self._thread.is_alive():
            self._thread.join(control.STEP_S)
            passed = time.monotonic() - begin
            if passed > (FAILED_S if failed else self.timeout):
                break
            if passed > PATIENCE_S and not told:
                told = True
                _say(f"waiting for other workers to leave, for at most {self.timeout:g} s")
        left = ", ".join(process.name for process in self.processes if process.status is None)
        if left and not failed:
            _say(
                f"killed, as other workers have not left {self.timeout:g} s after this one: {left}"
            )


def _say(text: str) -> None:
    with contextlib.suppress(OSError, ValueError):  # a closed stderr
        print(f"kvstore: {text}", file=sys.stderr, flush=True)
