"""Clusters of processes that engines have started, over the real data plane: their values, their
ends, and that they leave nothing behind. The engines are the variables that they set; the real
programs are tried where they are installed."""

import importlib.util
import os
import re
import shutil
import socket
import subprocess
import sys
import uuid
from pathlib import Path

import numpy as np
import pytest
import store_program
from helpers import same
from launching import KVRUN, LONG, Marked, read_until
from placing import NAMES, by_hand, free_address, mpich, open_mpi, slurm, torchrun, variables

pytestmark = pytest.mark.ucx

HERE = Path(__file__).parent

BEGIN = """
import os, signal, sys
import numpy as np
import kvstore
"""


def values(arguments):
    """A worker's whole part, with the arguments of `from_environment`."""
    return f"""{BEGIN}
import store_program
kvstore.cluster.from_environment({arguments})
found = store_program.with_cluster()
np.savez(sys.argv[1] + "/" + os.environ["KVSTORE_RANK"], **found)
"""


class Started(Marked):
    """The processes that an engine would have started."""

    def __init__(self):
        super().__init__(HERE, stand_in=False, KVSTORE_TIMEOUT=str(LONG))
        for name in NAMES:
            self.env.pop(name, None)
        self.plain = dict(self.env)

    def place(self, engine, size, nodes, code, *arguments, **more):
        """One process for each rank."""
        job = uuid.uuid4().hex
        processes = []
        for rank in range(size):
            given = variables(engine, rank, size, nodes, job, **more)
            self.env = {**self.plain, **given}
            command = (*self.before(rank), sys.executable, "-c", code, *arguments)
            processes.append(self.start(*command, stdin=subprocess.PIPE))
        return processes

    def before(self, rank):
        """What a process's command line begins with."""
        return ()

    def outcomes(self, processes):
        """(status, output, errors) of each, after which there is no process any more."""
        said = [process.communicate(timeout=2 * LONG) for process in processes]
        assert self.alive() == {}
        return [(one.returncode, *out) for one, out in zip(processes, said, strict=True)]


@pytest.fixture
def started():
    made = Started()
    yield made
    made.close()


def assert_same_as_alone(folder, num_workers):
    expected = store_program.alone(num_workers)
    for rank in range(num_workers):
        found = np.load(folder / f"{rank}.npz")
        assert list(found) == list(expected)
        for name, value in expected.items():
            assert same(found[name], value), name


# -------------------------------------------------------------------------------------- the values


@pytest.mark.parametrize(
    ("engine", "size", "nodes"),
    [
        (slurm, 2, 1),
        (slurm, 4, 2),
        (torchrun, 2, 1),
        (open_mpi, 2, 1),
        (mpich, 3, 1),
        (by_hand, 2, 2),
    ],
)
def test_each_engine_gives_the_values_of_a_local_store(started, tmp_path, engine, size, nodes):
    """Several nodes are this machine, which the address says; every one has a server."""
    more = {"KVSTORE_SCHEDULER": free_address() if nodes > 1 else None}
    if engine is by_hand:
        more["KVSTORE_NUM_SERVERS"] = nodes
    code = values("controller='store_program:controller'")
    processes = started.place(engine, size, nodes, code, tmp_path, **more)
    each = size // nodes
    for rank, (status, out, err) in enumerate(started.outcomes(processes)):
        assert (status, err) == (0, "")
        number, local = divmod(rank, each)
        told = [f"[server {number}] got {head} {body}" for head, body in store_program.COMMANDS]
        assert out.splitlines() == (told if local == 0 else [])
    assert_same_as_alone(tmp_path, size)


def test_as_many_servers_as_asked_for_and_all_beside_their_node(started, tmp_path):
    code = values("3, num_workers=2, controller='store_program:controller'")
    processes = started.place(slurm, 2, 2, code, tmp_path, KVSTORE_SCHEDULER=free_address())
    first, second = (out for _, out, _ in started.outcomes(processes))
    assert [f"[server {n}] got 0 first" in first for n in range(3)] == [True, True, False]
    assert [f"[server {n}] got 0 first" in second for n in range(3)] == [False, False, True]
    assert_same_as_alone(tmp_path, 2)


def test_under_kvrun_nothing_more_is_started(started, tmp_path):
    code = values("controller='no_such_module:f'")
    controller = ("--controller", "store_program:controller")
    done = started.run(*KVRUN, "-n", "2", *controller, sys.executable, "-c", code, str(tmp_path))
    assert (done.returncode, done.stderr) == (0, "")
    assert_same_as_alone(tmp_path, 2)


def test_a_second_call_changes_nothing(started):
    code = f"""{BEGIN}
kvstore.cluster.from_environment()
before = dict(os.environ)
kvstore.cluster.from_environment(num_servers=7)
assert dict(os.environ) == before
with kvstore.create("dist_sync") as kv:
    print(kv.rank, kv.num_workers)
"""
    (outcome,) = started.outcomes(started.place(torchrun, 1, 1, code))
    assert outcome == (0, "0 1\n", "")


@pytest.fixture
def two_hosts(started):
    """Two network namespaces with one cable, for two processes; it gives the first's address."""
    names = [f"kvstore-{uuid.uuid4().hex[:8]}" for _ in range(2)]

    def ip(*words):
        done = subprocess.run(["ip", *words], capture_output=True, text=True, timeout=LONG)
        return done.returncode == 0

    if os.geteuid() != 0 or shutil.which("ip") is None:
        pytest.skip("two hosts are network namespaces: they need root and iproute2")
    try:
        if not all(ip("netns", "add", name) for name in names):
            pytest.skip("this machine lets nobody make network namespaces")
        far = ("peer", "name", "eth0", "netns", names[1])
        assert ip("link", "add", "eth0", "netns", names[0], "type", "veth", *far)
        for number, name in enumerate(names):
            assert ip("-n", name, "addr", "add", f"10.211.7.{number + 1}/24", "dev", "eth0")
            assert ip("-n", name, "link", "set", "eth0", "up")
            assert ip("-n", name, "link", "set", "lo", "up")
        started.before = lambda rank: ("ip", "netns", "exec", names[rank])
        yield "10.211.7.1"
    finally:
        started.close()
        for name in names:
            ip("netns", "delete", name)


@pytest.mark.parametrize("engine", [torchrun, slurm, open_mpi])
def test_on_two_hosts_it_gives_the_values_of_a_local_store(started, two_hosts, tmp_path, engine):
    more = {"KVSTORE_TOKEN": "secret", "KVSTORE_NUM_SERVERS": 3}
    if engine is torchrun:
        more["MASTER_ADDR"] = two_hosts
    elif engine is slurm:
        more["SLURM_STEP_NODELIST"] = f"{two_hosts},10.211.7.2"
    else:
        more["KVSTORE_SCHEDULER"] = f"{two_hosts}:9091"
    code = values("controller='store_program:controller'")
    outcomes = started.outcomes(started.place(engine, 2, 2, code, tmp_path, **more))
    assert [(status, err) for status, _, err in outcomes] == [(0, "")] * 2
    assert_same_as_alone(tmp_path, 2)


# ----------------------------------------------------------------------------------------- the ends


TRAIN = f"""{BEGIN}
kvstore.cluster.from_environment()
kv = kvstore.create("dist_sync")
kv.init("w", np.zeros(3, "float32"))
print("up", flush=True)
"""


def test_a_script_that_makes_no_store_ends_at_once(started):
    code = f"{BEGIN}\nkvstore.cluster.from_environment()\nprint('end')"
    processes = started.place(slurm, 2, 1, code)
    assert started.outcomes(processes) == [(0, "end\n", "")] * 2


LEAVES_FIRST = f"""{BEGIN}
kvstore.cluster.from_environment()
kv = kvstore.create("dist_sync", timeout={LONG})
kv.set_barrier_before_exit(False)
kv.init("w", np.ones(3, "float32"))
if kv.rank == 0:
    kv.close()
print("up", flush=True)
if kv.rank == 1:
    sys.stdin.readline()
    print(kv.pull("w").asnumpy(), flush=True)
    kv.close()
"""


def test_the_scheduler_stays_until_the_last_worker_has_left(started):
    processes = started.place(mpich, 2, 1, LEAVES_FIRST)
    for process in processes:
        read_until(process, "up")
    print("go on", file=processes[1].stdin, flush=True)
    outcomes = started.outcomes(processes)
    assert outcomes == [(0, "", ""), (0, "[1. 1. 1.]\n", "")]


def test_it_does_not_stay_for_longer_than_the_timeout(started):
    processes = started.place(slurm, 2, 1, LEAVES_FIRST, KVSTORE_TIMEOUT=1)
    for process in processes:
        read_until(process, "up")
    out, err = processes[0].communicate(timeout=LONG)
    assert (processes[0].returncode, out) == (0, "")
    assert "killed, as other workers have not left 1 s after this one: scheduler, server 0" in err
    (status, _, err) = started.outcomes(processes[1:])[0]
    assert status == 1
    assert "PeerLostError" in err


@pytest.mark.parametrize("victim", [0, 1])
def test_who_is_killed_is_named_to_the_others(started, victim):
    code = f"""{TRAIN}
if kv.rank == {victim}:
    signal.pause()
try:
    kv.push("w", np.ones(3, "float32"))
    kv.pull("w").asnumpy()
except kvstore.PeerLostError as error:
    print(error)
"""
    processes = started.place(open_mpi, 2, 1, code)
    for process in processes:
        read_until(process, "up")
    processes[victim].kill()
    other = processes[1 - victim]
    out, err = other.communicate(timeout=2 * LONG)
    assert f"worker {victim} (host" in out, err
    started.wait_until_gone()


def test_an_exception_ends_the_others_too_and_says_why(started):
    code = f"""{TRAIN}
if kv.rank == 0:
    raise ValueError("of the user's")
kv.push("w", np.ones(3, "float32"))
kv.pull("w").asnumpy()
"""
    (status, _, own), (other, _, err) = started.outcomes(started.place(slurm, 2, 1, code))
    assert (status, other) == (1, 1), own + err
    assert re.search(r"PeerLostError: .*worker 0 \(host", err)
    assert "ended by ValueError: of the user's" in err


def test_killing_all_leaves_no_process(started):
    processes = started.place(torchrun, 2, 1, f"{TRAIN}\nsignal.pause()")
    for process in processes:
        read_until(process, "up")
    for process in processes:
        process.kill()
    started.wait_until_gone()


def test_killing_rank_0_before_all_have_joined_leaves_no_process(started):
    code = f"{BEGIN}\nkvstore.cluster.from_environment()\nprint('up', flush=True)\nsignal.pause()"
    (process,) = started.place(slurm, 2, 1, code)[:1]
    read_until(process, "up")
    for one in started.started:
        one.kill()
    started.wait_until_gone()


def test_a_server_that_cannot_start_fails_its_workers_join(started):
    code = f"""{BEGIN}
kvstore.cluster.from_environment(controller="store_program:no_such_function")
kvstore.create("dist_sync", timeout=1e6)
"""
    processes = started.place(slurm, 2, 1, code)
    assert processes[0].wait(LONG) == 1
    err = processes[0].stderr.read()
    # Wherever the worker was when it was told.
    assert "PeerLostError: " in err, err
    assert "the server 0, which this worker had started, ended with exit" in err, err
    assert "no_such_function" in err, err
    processes[1].kill()
    started.outcomes(processes)


def test_a_port_that_is_taken_is_named(started):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        code = f"{BEGIN}\nkvstore.cluster.from_environment()"
        first, _ = started.outcomes(
            started.place(slurm, 2, 1, code, KVSTORE_SCHEDULER=f"127.0.0.1:{port}")
        )
    assert first[0] == 1
    assert "InvalidArgumentError: the scheduler, which rank 0 starts, ended with exit" in first[2]
    assert f"127.0.0.1:{port}" in first[2] and "KVSTORE_SCHEDULER=host:port" in first[2]


def test_two_jobs_that_come_by_one_port_stay_apart(started):
    address = free_address()
    code = f"{TRAIN}\nsignal.pause()"
    (one,) = started.place(slurm, 1, 1, code, KVSTORE_SCHEDULER=address)
    read_until(one, "up")
    stray = variables(slurm, 1, 2, job="another", KVSTORE_SCHEDULER=address)
    started.env = {**started.plain, **stray}
    process = started.start(sys.executable, "-c", code)
    assert process.wait(LONG) == 1
    assert "token" in process.stderr.read()


# -------------------------------------------------------------------------------- the real programs


def said_by(program):
    """What a program says of its version, if it is installed."""
    path = shutil.which(program)
    if path is None:
        return ""
    done = subprocess.run([path, "--version"], capture_output=True, text=True, timeout=LONG)
    return done.stdout + done.stderr


def mpirun_of(name, *programs):
    """The command of that MPI's launcher; skips where there is none."""
    for program in programs:
        if name in said_by(program):
            return program
    pytest.skip(f"no mpirun of {name} is installed ({', '.join(programs)})")


@pytest.mark.parametrize("size", [2, 4])
def test_a_real_mpirun_of_open_mpi(started, tmp_path, size):
    program = mpirun_of("Open MPI", "mpirun.openmpi", "mpirun")
    started.env["OMPI_MCA_rmaps_base_oversubscribe"] = "1"
    started.env["PRTE_MCA_rmaps_default_mapping_policy"] = ":oversubscribe"
    root = ["--allow-run-as-root"] if os.geteuid() == 0 else []
    code = values("2, controller='store_program:controller'")
    command = [program, *root, "-n", str(size), sys.executable, "-c", code, str(tmp_path)]
    done = started.run(*command)
    assert done.returncode == 0, done.stderr
    assert_same_as_alone(tmp_path, size)


@pytest.mark.parametrize("size", [2, 4])
def test_a_real_mpiexec_of_mpich(started, tmp_path, size):
    program = mpirun_of("HYDRA", "mpiexec.hydra", "mpiexec", "mpirun")
    code = values("2, controller='store_program:controller'")
    done = started.run(program, "-n", str(size), sys.executable, "-c", code, str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert_same_as_alone(tmp_path, size)


@pytest.fixture
def run_by_torch(started, tmp_path):
    if importlib.util.find_spec("torch") is None:
        pytest.skip("torch is not installed, and so torchrun is not")

    def run(code, *options):
        script = tmp_path / "script.py"
        script.write_text(code)
        torchrun = (sys.executable, "-m", "torch.distributed.run", "--standalone")
        process = started.start(*torchrun, *options, script, tmp_path)
        out, err = process.communicate(timeout=3 * LONG)
        assert started.alive() == {}
        assert process.returncode == 0, err
        return out

    return run


@pytest.mark.parametrize("size", [2, 4])
def test_a_real_torchrun(run_by_torch, tmp_path, size):
    run_by_torch(values("2, controller='store_program:controller'"), f"--nproc-per-node={size}")
    assert_same_as_alone(tmp_path, size)


def test_a_real_torchrun_that_starts_all_again_after_a_failure(run_by_torch, tmp_path):
    code = f"""{TRAIN}
if os.environ["TORCHELASTIC_RESTART_COUNT"] == "0" and kv.rank == 1:
    os.kill(os.getpid(), signal.SIGKILL)
kv.push("w", np.ones(3, "float32"))
sys.stdout.write(f"sum {{kv.pull('w').asnumpy()}}\\n")  # as a whole, beside the other worker's
kv.close()
"""
    out = run_by_torch(code, "--nproc-per-node=2", "--max-restarts=1")
    assert out.count("sum [2. 2. 2.]") == 2
