"""Which engine has started this process: its place among the others, and where they find rank 0.

SLURM, MPI and torchrun tell a process its place by variables of the environment; a table says by
which. They may stand inside each other, mpirun in a SLURM job or torchrun in both, and the
innermost one has started this process: the table begins with it. A variable counts only together
with the one that its engine alone sets, for names like RANK are also set by hand, and outlive what
they meant.

The address is the first of: what the user has set; loopback where the engine says that there is one
host; the host of rank 0 where the engine names it. The port is then a number made from the name of
the job, which all processes know, below those that the system gives to connections.
"""

import ipaddress
import os
import re
import zlib
from collections.abc import Mapping
from dataclasses import dataclass

from ..errors import InvalidArgumentError
from .settings import MAX_NODES

PORTS = range(20_000, 30_000)

Environment = Mapping[str, str]


@dataclass(frozen=True)
class Engine:
    """What an engine calls a process's place; a name that is empty it does not tell.

    `marker` is the variable that it alone sets, `job` are those that name the run, `token` says how
    a variable reaches all processes.
    """

    name: str
    marker: str
    rank: str
    size: str
    local_rank: str = ""
    local_size: str = ""
    node: str = ""
    nodes: str = ""
    job: tuple[str, ...] = ()
    token: str = "set it on every host"


TORCHRUN = Engine(
    "torchrun",
    "TORCHELASTIC_RUN_ID",
    rank="RANK",
    size="WORLD_SIZE",
    local_rank="LOCAL_RANK",
    local_size="LOCAL_WORLD_SIZE",
    node="GROUP_RANK",
    nodes="GROUP_WORLD_SIZE",
    # Started again after a failure, it is another run: the old one may still be ending.
    job=("TORCHELASTIC_RUN_ID", "MASTER_PORT", "TORCHELASTIC_RESTART_COUNT"),
    token="export it on every host before torchrun",
)
OPEN_MPI = Engine(
    "Open MPI",
    "OMPI_COMM_WORLD_RANK",
    rank="OMPI_COMM_WORLD_RANK",
    size="OMPI_COMM_WORLD_SIZE",
    local_rank="OMPI_COMM_WORLD_LOCAL_RANK",
    local_size="OMPI_COMM_WORLD_LOCAL_SIZE",
    job=("PMIX_NAMESPACE",),
    token="export it and give mpirun -x with its name",
)
HYDRA = Engine(
    "MPICH",
    "MPI_LOCALRANKID",
    rank="PMI_RANK",
    size="PMI_SIZE",
    local_rank="MPI_LOCALRANKID",
    local_size="MPI_LOCALNRANKS",
    token="export it before mpiexec, which passes it on",
)
SLURM = Engine(
    "SLURM",
    "SLURM_STEP_ID",
    rank="SLURM_PROCID",
    size="SLURM_STEP_NUM_TASKS",
    local_rank="SLURM_LOCALID",
    node="SLURM_NODEID",
    nodes="SLURM_STEP_NUM_NODES",
    job=("SLURM_JOB_ID", "SLURM_STEP_ID", "SLURM_RESTART_COUNT"),
    token="export it before srun or sbatch, which pass it on",
)
PMI = Engine("PMI", "PMI_RANK", rank="PMI_RANK", size="PMI_SIZE")
# For any other engine: what it calls them is given to a process under these names.
BY_HAND = Engine("KVSTORE_RANK", "KVSTORE_RANK", rank="KVSTORE_RANK", size="KVSTORE_NUM_WORKERS")
# srun gives its tasks variables of PMI too, and knows more.
TABLE = (TORCHRUN, OPEN_MPI, HYDRA, SLURM, PMI, BY_HAND)


@dataclass(frozen=True)
class Place:
    """Where a process stands among those that an engine has started.

    `node` and `nodes` are None where it does not tell, `job` is empty where nothing names the run.
    """

    engine: Engine
    rank: int
    size: int
    local_rank: int | None
    node: int | None
    nodes: int | None
    job: str

    def servers(self, number: int) -> list[int]:
        """The ranks of those of so many servers that this process starts.

        They are spread evenly over the nodes, and over the workers where the nodes are not told.
        """
        if self.node is None or self.nodes is None:
            part, parts = self.rank, self.size
        elif self.local_rank == 0:
            part, parts = self.node, self.nodes
        else:
            return []
        return [server for server in range(number) if server * parts // number == part]


def find(environment: Environment) -> Place:
    """The place of this process; InvalidArgumentError if it has none or a contradictory one."""
    found = [engine for engine in TABLE if environment.get(engine.marker)]
    if not found:
        raise InvalidArgumentError(_nothing(environment))
    place = _place(found[0], environment)
    if found[0] is OPEN_MPI and HYDRA in found:
        other = _place(HYDRA, environment)
        if (other.rank, other.size) != (place.rank, place.size):
            raise InvalidArgumentError(
                f"Open MPI says that this is process {place.rank} of {place.size}, MPICH that it "
                f"is {other.rank} of {other.size}: unset the variables of the one that has not "
                "started it (OMPI_COMM_WORLD_…, or PMI_… and MPI_LOCAL…)"
            )
    own = environment.get(BY_HAND.rank)
    if own and own != str(place.rank):
        raise InvalidArgumentError(
            f"KVSTORE_RANK={own[:100]!r}, but {place.engine.name} has started this process as rank "
            f"{place.rank} ({place.engine.rank}): unset KVSTORE_RANK"
        )
    return place


def _place(engine: Engine, environment: Environment) -> Place:
    def number(variable: str, low: int, high: int, limit: str) -> int:
        text = environment.get(variable, "")
        if not text:
            raise InvalidArgumentError(
                f"{engine.name} has set {engine.marker} but not {variable}, without which this "
                "process does not know its place"
            )
        if not (text.isascii() and text.isdigit() and low <= int(text[:9]) <= high):
            raise InvalidArgumentError(
                f"{variable}={text[:100]!r}: {engine.name} sets it to an integer from {low} to "
                f"{high}{limit}"
            )
        return int(text)

    def pair(one: str, count: str, most: int, limit: str) -> tuple[int | None, int | None]:
        """A number and how many there are, as far as the engine tells."""
        total = number(count, 1, most, limit) if count else None
        above = most if total is None else total
        return number(one, 0, above - 1, _limit(count)) if one else None, total

    size = number(engine.size, 1, MAX_NODES, "")
    rank = number(engine.rank, 0, size - 1, _limit(engine.size))
    local_rank, local_size = pair(engine.local_rank, engine.local_size, size, _limit(engine.size))
    node, nodes = pair(engine.node, engine.nodes, size, _limit(engine.size))
    if nodes is None and local_size == size:
        node, nodes = 0, 1
    if nodes == 1 and local_size is not None and local_size != size:
        raise InvalidArgumentError(
            f"{engine.nodes}=1 and {engine.local_size}={local_size} contradict "
            f"{engine.size}={size}: these variables of {engine.name} have been changed"
        )
    job = " ".join(environment.get(name, "") for name in engine.job).strip()
    if not job and nodes == 1:
        job = _ancestor(engine.marker)
    return Place(engine, rank, size, local_rank, node, nodes, f"{engine.name} {job}" if job else "")


def _limit(count: str) -> str:
    return f" ({count} is one more)" if count else ""


def _nothing(environment: Environment) -> str:
    if environment.get("SLURM_JOB_ID"):
        return (
            f"this process runs in SLURM job {environment['SLURM_JOB_ID'][:20]}, but srun has not "
            "started it: in the batch script write srun before the command"
        )
    if environment.get("PMIX_RANK"):
        return (
            "whoever has started this process has set PMIX_RANK, but nothing that says how many "
            "there are: set KVSTORE_RANK, KVSTORE_NUM_WORKERS and KVSTORE_SCHEDULER in it"
        )
    markers = ", ".join(engine.marker for engine in TABLE)
    return (
        f"neither SLURM nor MPI nor torchrun has started this process: none of {markers} is set. "
        "Start it by srun, mpirun or torchrun, or on one machine by kvrun; with another engine set "
        "KVSTORE_RANK, KVSTORE_NUM_WORKERS and KVSTORE_SCHEDULER in each process"
    )


def _ancestor(variable: str) -> str:
    """The process, among those that this one descends from, that has given the variable to it.

    For an engine that names its runs nowhere: on one host this does.
    """
    pid = os.getpid()
    try:
        while pid > 1:
            with open(f"/proc/{pid}/environ", "rb") as file:
                if f"\0{variable}=".encode() not in b"\0" + file.read():
                    break
            with open(f"/proc/{pid}/stat") as file:
                pid = int(file.read().rpartition(")")[2].split()[1])
    except OSError:  # it is another user's, so it is the one; or there is no /proc
        pass
    return str(pid)


def address(place: Place, environment: Environment) -> tuple[str, int]:
    """Host and port of the scheduler, where the user has set none."""
    if place.nodes == 1:
        return "127.0.0.1", _port(place)
    elif place.engine is SLURM:
        for variable in ("SLURM_STEP_NODELIST", "SLURM_JOB_NODELIST"):
            if environment.get(variable):
                return first_host(environment[variable]), _port(place)
    elif place.engine is TORCHRUN and environment.get("MASTER_ADDR"):
        return environment["MASTER_ADDR"], _port(place)
    raise InvalidArgumentError(
        f"{place.engine.name} does not tell on which host rank 0 runs: set KVSTORE_SCHEDULER to "
        f"host:port, that host and a free port of it, for all {place.size} processes"
    )


def _port(place: Place) -> int:
    return PORTS[zlib.crc32(place.job.encode()) % len(PORTS)]


def first_host(nodes: str) -> str:
    """The first host of a list as SLURM writes it: `a1`, for `a[1-3,7],b2`."""
    first = re.split(r",(?![^\[]*\])", nodes, maxsplit=1)[0]
    return re.sub(r"\[([^\],-]*)[^\]]*\]", r"\1", first)


def is_loopback(host: str) -> bool:
    """Whether a host is this machine by its very name."""
    try:
        return host == "localhost" or ipaddress.ip_address(host.partition("%")[0]).is_loopback
    except ValueError:
        return False
