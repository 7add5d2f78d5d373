"""`RayCluster`: what needs no Ray, then runs on a Ray cluster of four nodes on this machine.

Its head has no place for actors, so that every other node can be lost.
"""

import importlib.util
import itertools
import math
import os
import re
import signal
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import store_program
from helpers import same
from launching import paths, until

import kvstore
from kvstore.cluster import ray_cluster
from kvstore.cluster import run as runs

README = Path(__file__).parents[2] / "README.md"
# Ray's processes take their time to start and to end.
LONG = 120

# Ray's test cluster leaves that to the collector.
pytestmark = pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")
needs_ray = pytest.mark.skipif(
    importlib.util.find_spec("ray") is None,
    reason="Ray is not installed: pip install 'mlkvstore[ray]' runs these",
)

# ------------------------------------------------------------------------------------- without Ray


def test_without_ray_it_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(kvstore.NotBuiltError, match=r"pip install 'mlkvstore\[ray\]'"):
        kvstore.RayCluster(2, 1)


def test_kvstore_does_not_import_ray():
    code = "import sys, kvstore; kvstore.RayCluster; sys.exit('ray' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_wrong_arguments_are_refused_before_ray_is_asked(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    refused = [
        ({"num_workers": 0}, kvstore.InvalidArgumentError, "num_workers=0"),
        ({"num_servers": True}, kvstore.ArrayTypeError, "num_servers"),
        ({"timeout": -1}, kvstore.InvalidArgumentError, "timeout"),
        ({"controller": "module:f"}, kvstore.ArrayTypeError, "controller"),
    ]
    for option in ("resources_per_worker", "resources_per_server"):
        refused += [
            ({option: 2}, kvstore.ArrayTypeError, option),
            ({option: {1: 2}}, kvstore.ArrayTypeError, option),
            ({option: {"CPU": -1}}, kvstore.InvalidArgumentError, f"{option}: -1 of 'CPU'"),
            ({option: {"CPU": math.nan}}, kvstore.InvalidArgumentError, "nan of 'CPU'"),
            ({option: {"GPU": "1"}}, kvstore.InvalidArgumentError, "'1' of 'GPU'"),
            ({option: {}}, kvstore.InvalidArgumentError, f"{option}={{}}"),
            ({option: {"CPU": 0}}, kvstore.InvalidArgumentError, option),
        ]
    for options, kind, text in refused:
        with pytest.raises(kind, match=text):
            kvstore.RayCluster(**options)


@pytest.mark.parametrize(
    ("asked", "nodes", "fit"),
    [
        ([(2, {"CPU": 1})], [{"CPU": 2}], True),
        ([(3, {"CPU": 1})], [{"CPU": 2}], False),
        ([(3, {"CPU": 1})], [{"CPU": 1.5}, {"CPU": 1.5}], False),  # enough, but in no two parts
        ([(1, {"CPU": 1}), (2, {"CPU": 0.5})], [{"CPU": 1}, {"CPU": 1}], True),
        ([(1, {"CPU": 2}), (2, {"CPU": 1})], [{"CPU": 2}, {"CPU": 1}], False),
        ([(10, {"CPU": 0.1})], [{"CPU": 1}], True),
        ([(1, {"CPU": 1, "GPU": 1})], [{"CPU": 1}, {"GPU": 1}], False),
        ([(1, {"CPU": 1}), (0, {"GPU": 1})], [{"CPU": 1}], True),
        ([(1, {"CPU": 1})], [], False),
    ],
)
def test_what_can_be_placed(asked, nodes, fit):
    assert ray_cluster.fits(asked, nodes) == fit


def test_resources_are_told_in_words():
    assert ray_cluster.told({"CPU": 2, "GPU": 0.5}) == "2 CPU and 0.5 GPU"
    assert ray_cluster.told({"CPU": 4.0, "node:1": 1}, ["CPU", "GPU"]) == "4 CPU and 0 GPU"


# ---------------------------------------------------------------------------------------- with Ray


@pytest.fixture(scope="module")
def nodes():
    """Ray's cluster for tests: a head, and three nodes of two processors, all on loopback."""
    import ray
    from ray.cluster_utils import Cluster

    addresses = (f"127.0.0.{number}" for number in itertools.count(2))

    def options(num_cpus, **resources):
        return {
            "num_cpus": num_cpus,
            "resources": resources,
            "node_ip_address": next(addresses),
            "object_store_memory": 80 << 20,
        }

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv("PYTHONPATH", paths(*filter(None, sys.path)))  # what actors import
        made = Cluster(initialize_head=True, head_node_args=options(0))
        made.add = lambda *given, **resources: made.add_node(**options(*given, **resources))
        for _ in range(2):
            made.add(3)
        made.add(3, rare=1)
        ray.init(address=made.address, _node_ip_address="127.0.0.2", log_to_driver=False)
        yield made
        ray.shutdown()
        made.shutdown()


@pytest.fixture
def make(nodes, monkeypatch):
    """Makes clusters, and sees that they have left nothing."""
    monkeypatch.setattr(runs, "FAILED_S", LONG)
    made, before = [], places()

    def make(*arguments, timeout=LONG, **options):
        made.append(kvstore.RayCluster(*arguments, timeout=timeout, **options))
        return made[-1]

    yield make
    for cluster in made:
        cluster.close()
        wait_until_gone(pids(cluster))
        assert not cluster._cluster.thread.is_alive()
    assert places() == before


def places():
    """The placement groups that there are."""
    from ray.util import placement_group_table

    return [n for n, group in placement_group_table().items() if group["state"] != "REMOVED"]


@pytest.fixture(scope="module")
def shared(nodes):
    """A cluster for tests that leave it usable."""
    with kvstore.RayCluster(2, 2, controller=store_program.controller, timeout=LONG) as made:
        yield made


def pids(cluster):
    return [actor.pid for actor in cluster._cluster.actors]


def wait_until_gone(numbers):
    until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in numbers))


def rank():
    return int(os.environ["KVSTORE_RANK"])


def push_for_ever(go):
    """Work in rounds until it fails; `go` exists once they are under way."""
    kv = kvstore.create("dist_sync")
    kv.init("w", np.zeros(3, "float32"))
    while True:
        kv.push("w", np.ones(3, "float32"))
        kv.pull("w")
        Path(go).touch()


@needs_ray
@pytest.mark.ucx
def test_it_gives_the_values_of_a_local_store_in_one_session_after_the_other(shared):
    expected = store_program.alone(2)
    assert repr(shared) == "<kvstore.RayCluster: 2 workers, 2 servers, ready>"
    sessions = set()
    for _ in range(3):
        sessions.add(shared.options["scheduler"])
        for found in shared.run(store_program.with_cluster):
            assert list(found) == list(expected)
            for name, value in expected.items():
                assert same(found[name], value), name
    assert len(sessions) == 3


def create_dist():
    kvstore.create("dist_sync")


@needs_ray
def test_workers_may_be_alone(make):
    with make(2, 0) as made:
        assert repr(made) == "<kvstore.RayCluster: 2 workers, 0 servers, ready>"
        assert made.run(rank) == [0, 1]
        with pytest.raises(kvstore.PeerLostError, match="needs servers, and this cluster has none"):
            made.run(create_dist)


@needs_ray
@pytest.mark.ucx
def test_results_come_by_rank_from_the_main_threads(shared):
    factor = 10

    def describe(offset, *, times):
        main = threading.current_thread() is threading.main_thread()
        return rank() * factor * times + offset, main

    assert shared.run(describe, 5, times=2) == [(5, True), (25, True)]
    large = np.arange(1 << 21, dtype="float64")
    for number, result in enumerate(shared.run(lambda a: a + rank(), large)):
        assert (result == large + number).all()


@needs_ray
@pytest.mark.ucx
def test_a_store_that_a_run_has_kept_is_there_in_the_next(shared):
    def keep():
        sys.kept = kvstore.create("dist_sync")
        sys.kept.init("kept", np.zeros(1, "float32"))

    def use():
        with sys.__dict__.pop("kept") as kv:
            kv.push("kept", np.ones(1, "float32"))
            return kv.pull("kept").asnumpy().tolist()

    shared.run(keep)
    assert shared.run(use) == [[2]] * 2


@needs_ray
@pytest.mark.ucx
def test_an_exception_is_raised_here_with_its_rank(shared):
    def fail_in_one():
        if rank() == 1:
            raise ZeroDivisionError("divided by nothing")

    with pytest.raises(ZeroDivisionError, match="divided by nothing") as caught:
        shared.run(fail_in_one)
    assert str(caught.value.__cause__).startswith("in worker 1 (pid ")
    with pytest.raises(kvstore.KVStoreError, match=r"worker [01] failed: SystemExit: 3"):
        shared.run(lambda: sys.exit(3))
    with pytest.raises(kvstore.ArrayTypeError, match="pickle"):
        shared.run(rank, threading.Lock())
    assert shared.run(rank) == [0, 1]


@needs_ray
@pytest.mark.ucx
def test_signals_do_not_end_what_serves(shared):
    for pid in pids(shared):
        os.kill(pid, signal.SIGINT)
    assert len(shared.run(store_program.with_cluster)) == 2


@needs_ray
@pytest.mark.ucx
def test_the_nodes_are_spread_and_the_token_is_in_no_file(shared, nodes):
    import ray
    from ray.util import placement_group_table

    table = placement_group_table(shared._cluster.group)
    assert len(set(table["bundles_to_node_id"].values())) == 3
    print_in_workers = "printed by a worker of a test"
    shared.run(print, print_in_workers)
    folder = Path(ray._private.worker._global_node.get_session_dir_path())
    files = [path for path in folder.rglob("*") if path.is_file()]
    # What is printed is in Ray's files, in its own time.
    until(lambda: any(print_in_workers.encode() in path.read_bytes() for path in files))
    token = shared.options["token"].encode()
    assert not [path for path in folder.rglob("*") if path.is_file() and token in path.read_bytes()]


@needs_ray
@pytest.mark.ucx
def test_this_process_joins_as_rank_0(make):
    cluster = make(2, 1, join=True, controller=store_program.controller)
    assert cluster.run(rank) == [1]
    run = cluster.submit(store_program.with_cluster)
    mine = store_program.with_cluster(**cluster.options)
    for found in (mine, *run.result()):
        for name, value in store_program.alone(2).items():
            assert same(found[name], value), name


@needs_ray
@pytest.mark.ucx
def test_too_few_resources_are_told_before_anything_is_asked_for(make):
    with pytest.raises(
        kvstore.InvalidArgumentError,
        match="3 servers of 1 CPU each and 50 workers of 1 CPU and 1 GPU each: its nodes have",
    ):
        make(50, 3, resources_per_worker={"CPU": 1, "GPU": 1})


@needs_ray
@pytest.mark.ucx
def test_resources_that_others_hold_are_waited_for_until_the_deadline(make):
    make(1, 1, resources_per_worker={"rare": 1})
    with pytest.raises(
        kvstore.TimeoutError, match=r"no room for .* of 1 rare each in 0\.5 s: .* and 0 rare$"
    ):
        make(1, 1, timeout=0.5, resources_per_worker={"rare": 1})


@needs_ray
@pytest.mark.ucx
def test_an_error_in_the_block_ends_the_cluster_at_once(make):
    with pytest.raises(KeyError), make(1, 1) as cluster:
        run = cluster.submit(signal.pause)
        raise KeyError
    with pytest.raises(kvstore.ClosedError, match="KeyError has left its block"):
        run.result()
    with pytest.raises(kvstore.ClosedError, match="closed"):
        cluster.run(rank)


@needs_ray
@pytest.mark.ucx
def test_ctrl_c_ends_the_run_and_the_cluster_but_not_this_process(make):
    cluster = make(2, 1)

    def interrupt_the_maker(pid):
        if rank() == 0:
            os.kill(pid, signal.SIGINT)
        signal.pause()

    with pytest.raises(KeyboardInterrupt):
        cluster.run(interrupt_the_maker, os.getpid())
    assert "ended: a run was interrupted; make a new one" in repr(cluster)
    with pytest.raises(kvstore.ClosedError, match="make a new one"):
        cluster.run(rank)


@needs_ray
@pytest.mark.ucx
def test_a_run_that_fails_in_one_worker_does_not_wait_for_ever_for_the_others(make, monkeypatch):
    cluster = make(2, 1)
    monkeypatch.setattr(runs, "FAILED_S", 0.1)

    def fail_or_wait():
        if rank() == 1:
            raise ValueError("one has failed")
        signal.pause()

    with pytest.raises(ValueError, match="one has failed"):
        cluster.run(fail_or_wait)
    assert "failed in one worker" in repr(cluster)


@needs_ray
@pytest.mark.ucx
@pytest.mark.parametrize("which", ["worker 1", "server 0", "scheduler"])
def test_an_actor_that_dies_under_work_ends_the_run(make, which, tmp_path):
    cluster = make(2, 1)
    (victim,) = (actor.pid for actor in cluster._cluster.actors if actor.name == which)
    run = cluster.submit(push_for_ever, str(tmp_path / "go"))
    until((tmp_path / "go").exists)
    os.kill(victim, signal.SIGKILL)
    with pytest.raises(kvstore.PeerLostError, match=which):
        run.result(LONG)


@needs_ray
@pytest.mark.ucx
@pytest.mark.parametrize("which", ["worker 0", "server 0", "scheduler"])
def test_an_actor_that_dies_when_nothing_runs_is_missed_by_the_next_run(make, which):
    cluster = make(1, 1)
    (victim,) = (actor.pid for actor in cluster._cluster.actors if actor.name == which)
    os.kill(victim, signal.SIGKILL)
    with pytest.raises((kvstore.PeerLostError, kvstore.ClosedError), match=which):
        cluster.run(store_program.with_cluster)


@needs_ray
@pytest.mark.ucx
@pytest.mark.parametrize(
    ("on_it", "who"),
    [("resources_per_server", "server 0|scheduler"), ("resources_per_worker", "worker 0")],
)
def test_a_node_that_is_lost_ends_the_run_and_the_cluster(make, nodes, tmp_path, on_it, who):
    lost = nodes.add(1, unsafe=1)
    cluster = make(1, 1, **{on_it: {"unsafe": 1}})
    run = cluster.submit(push_for_ever, str(tmp_path / "go"))
    until((tmp_path / "go").exists)
    nodes.remove_node(lost, allow_graceful=False)
    with pytest.raises(kvstore.PeerLostError, match=who):
        run.result(LONG)
    with pytest.raises(kvstore.ClosedError, match=f"({who}).*; make a new one"):
        cluster.run(rank)


SCRIPT = """
import signal, sys
import numpy as np, kvstore, ray
ray.init(address="{address}", _node_ip_address="127.0.0.2", log_to_driver=False)
cluster = kvstore.RayCluster(1, 1)
pids = [actor.pid for actor in cluster._cluster.actors]
print("pids", *pids, flush=True)
{then}
"""


COLLECTED = """
import gc
made = cluster._cluster
cluster.itself = cluster
del cluster
gc.collect()
assert made.why_ended and not made.thread.is_alive()
"""


@needs_ray
@pytest.mark.ucx
@pytest.mark.parametrize(
    ("then", "status"),
    [
        ("cluster.run(int)", 0),
        (COLLECTED, 0),
        ("cluster.run(1 .__truediv__, 0)", 1),
        ("ray.shutdown()\ntry: cluster.run(int)\nexcept kvstore.ClosedError: sys.exit(5)", 5),
        ("cluster.submit(signal.pause)\nimport os; os.kill(os.getpid(), 9)", -9),
    ],
    ids=["forgotten", "collected", "raised", "shut down", "killed"],
)
def test_a_script_leaves_nothing_however_it_ends(nodes, make, then, status):
    code = SCRIPT.format(address=nodes.address, then=then)
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=LONG
    )
    assert done.returncode == status, done.stderr
    # Ray may have something to say of nodes that were lost before.
    (numbers,) = re.findall(r"^pids (.*)", done.stdout, re.MULTILINE)
    assert len(numbers.split()) == 3
    wait_until_gone(numbers.split())


@needs_ray
@pytest.mark.ucx
def test_the_program_of_the_readme_runs(nodes, make):
    section = README.read_text(encoding="utf-8").partition("\n## On Ray\n")[2]
    (program,) = re.findall(r"^```py\n(.*?)^```$", section.partition("\n## ")[0], re.M | re.S)
    program = f"import ray\nray.init({nodes.address!r}, _node_ip_address='127.0.0.2')\n{program}"
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, capture_output=True, text=True, timeout=LONG)
    assert done.returncode == 0, done.stderr
    assert re.findall(r"array\((.*?), dtype=float32\)", done.stdout) == ["[30., 30., 30.]"] * 2
