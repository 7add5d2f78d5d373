"""Clusters of workers alone, as stores of kind `nccl` have them: what the control plane does there
for groups of GPUs, without any GPU."""

import json
import subprocess
import sys

import pytest
from fakes import LONG, FakeCore, until

import kvstore
from kvstore import _dist, _nccl
from kvstore.cluster import settings


@pytest.fixture
def three(make_cluster):
    cluster = make_cluster(3, 0)
    cluster.nodes = cluster.start()
    return cluster


def each(cluster, function):
    """What the function gives for each member, all at once; exceptions as they are."""
    futures = [cluster.pool.submit(function, member) for member in cluster.nodes]
    return [future.exception(LONG) or future.result() for future in futures]


def test_a_cluster_without_servers_begins_and_ends(three):
    assert [(one.rank, one.num_workers, one.num_servers) for one in three.nodes] == [
        (rank, 3, 0) for rank in range(3)
    ]
    assert all(member.core.peers == [] for member in three.nodes)
    each(three, lambda member: member.close(LONG))
    assert three.ended.result(LONG) is None


def test_workers_tell_each_other_a_text_in_a_barrier(three):
    texts = each(three, lambda member: member.barrier(LONG, f"of {member.rank}"))
    assert texts == [["of 0", "of 1", "of 2"]] * 3
    assert each(three, lambda member: member.barrier(LONG)) == [["", "", ""]] * 3


def test_a_text_may_not_be_long(three):
    waiting = three.pool.submit(three.nodes[0].barrier, LONG)
    with pytest.raises(kvstore.PeerLostError):
        three.nodes[1].barrier(LONG, "x" * 5000)
    with pytest.raises(kvstore.PeerLostError, match=r"worker 1 \(.* says too much in a barrier"):
        waiting.result(LONG)


def test_all_who_gather_are_at_the_same_call(three):
    told = each(three, lambda one: _nccl.gather(one, "an init", str(one.rank), LONG))
    assert told == [["0", "1", "2"]] * 3
    told = each(three, lambda one: _nccl.gather(one, f"call {one.rank // 2}", "", LONG))
    assert all(isinstance(error, kvstore.InvalidArgumentError) for error in told)
    assert "worker 0 is at call 0, worker 2 at call 1" in str(told[0])
    assert "worker 2 is at call 1, worker 0 at call 0" in str(told[2])


def test_who_is_at_a_barrier_and_who_is_not_hear_of_each_other(three):
    def call(member):
        if member.rank == 1:
            _dist.barrier(member, LONG)
        else:
            _nccl.gather(member, "an init", "", LONG)

    told = each(three, call)
    assert all(isinstance(error, kvstore.InvalidArgumentError) for error in told)
    assert "worker 1 is at a barrier, worker 0 at an init" in str(told[1])
    assert "worker 0 is at an init, worker 1 at a barrier" in str(told[0])


def test_the_deadline_names_who_has_not_come(three):
    with pytest.raises(kvstore.TimeoutError, match=r"an init of worker 0 waited.*worker 1.*2"):
        _nccl.gather(three.nodes[0], "an init", "", 0.2)
    assert each(three, lambda one: _nccl.gather(one, "x", "", LONG)) == [["", "", ""]] * 3


def test_workers_hear_at_once_that_another_one_leaves(three):
    leaving = three.pool.submit(three.nodes[2].close, LONG)
    until(lambda: all(member.core.gone == [(2, True)] for member in three.nodes[:2]))
    assert three.nodes[2].core.gone == []
    each(three, lambda member: member.close(LONG))
    leaving.result(LONG)


def test_a_cluster_with_servers_is_none_for_nccl(make_cluster):
    class Taken(FakeCore):
        def __init__(self, *place, **options):
            _nccl.Ranks.take_place(self, *place, **options)

    cluster = make_cluster(1, 1)
    server = cluster.join("server")
    with pytest.raises(kvstore.InvalidArgumentError, match=r"needs no servers.* has 1"):
        cluster.join("worker", make_core=Taken).result(LONG)
    with pytest.raises(kvstore.PeerLostError, match="needs no servers"):
        server.result(LONG)


DIST = """
import kvstore
try:
    kvstore.create("dist_sync")
except kvstore.InvalidArgumentError as error:
    print(error)
"""


@pytest.mark.ucx
def test_a_dist_store_says_that_it_needs_servers():
    done = subprocess.run(
        [sys.executable, "-m", "kvstore.launch", "-n", "1", "-s", "0", sys.executable, "-c", DIST],
        capture_output=True,
        text=True,
        timeout=LONG,
    )
    assert "a dist store needs servers, and this cluster has none" in done.stdout, done.stderr


def test_a_local_cluster_may_have_no_servers():
    with kvstore.LocalCluster(2, 0) as cluster:
        assert cluster.options["num_servers"] == 0
        assert cluster.run(json.dumps, [1]) == ["[1]", "[1]"]
    with pytest.raises(kvstore.InvalidArgumentError, match=r"num_servers=-1: .* from 0 to"):
        kvstore.LocalCluster(1, -1)


def test_what_tells_of_a_cluster(monkeypatch):
    assert not settings.has_cluster({})
    assert not settings.has_cluster({"timeout": 5, "num_threads": 2, "rank": None})
    assert settings.has_cluster({"rank": 0})
    monkeypatch.setenv("KVSTORE_RANK", "0")
    assert not settings.has_cluster({})
    monkeypatch.setenv("DMLC_PS_ROOT_URI", "10.0.0.1")
    assert settings.has_cluster({})
