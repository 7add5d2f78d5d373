"""Who may join a cluster, the ranks, and what is said of who is missing."""

import pytest

from kvstore.cluster.protocol import ProtocolError
from kvstore.cluster.roster import Node, Refusal, Roster, Stage, listed, node_of

HOST = {"boot_id": "b1", "namespaces": "p1 u1", "euid": 0, "hostname": "h1"}


def node(role, wanted=None, pid=1, copies=True, inet6=False, **changes):
    numbers = {"num_workers": changes.pop("num_workers", None)}
    numbers["num_servers"] = changes.pop("num_servers", None)
    asynchronous = changes.pop("asynchronous", False) if role == "worker" else None
    return Node(
        role=role,
        wanted=wanted,
        host={**HOST, **changes},
        pid=pid,
        asynchronous=asynchronous,
        copies=copies,
        inet6=inet6,
        **numbers,
    )


def filled(*nodes, workers=None, servers=None):
    roles = [one.role for one in nodes]
    roster = Roster(workers or roles.count("worker"), servers or roles.count("server"))
    for one in nodes:
        roster.admit(one)
    return roster


def refused(roster, one, *texts):
    before = list(roster.nodes)
    with pytest.raises(Refusal) as info:
        roster.admit(one)
    assert roster.nodes == before
    for text in texts:
        assert text in str(info.value)
    return info.value


def test_ranks_are_given_in_order_of_arrival():
    nodes = [node("server"), node("worker"), node("worker"), node("server")]
    roster = filled(*nodes)
    assert roster.complete
    roster.place()
    assert [one.rank for one in nodes] == [0, 0, 1, 1]
    assert roster.stage == Stage.PLACING


def test_wanted_ranks_come_first():
    nodes = [node("worker"), node("worker", 0), node("worker"), node("worker", 2)]
    roster = filled(*nodes)
    roster.place()
    assert [one.rank for one in nodes] == [1, 0, 3, 2]
    assert [one.rank for one in roster.of("worker")] == [0, 1, 2, 3]


def test_one_rank_for_two_is_refused_and_both_are_named():
    first = node("worker", 1, pid=11, hostname="a")
    roster = filled(first, workers=2, servers=1)
    second = node("worker", 1, pid=22, hostname="b")
    refusal = refused(
        roster, second, "rank 1 was asked for by two workers", "host a, pid 11", "host b, pid 22"
    )
    assert refusal.others == (first,)


def test_a_server_may_have_the_rank_of_a_worker():
    filled(node("worker", 0), node("server", 0)).place()


def test_kinds_that_disagree_are_refused_and_both_are_named():
    first = node("worker", pid=11)
    roster = filled(first, workers=2, servers=1)
    refusal = refused(
        roster,
        node("worker", pid=22, asynchronous=True),
        "dist_sync at host h1, pid 11",
        "dist_async at host h1, pid 22",
    )
    assert refusal.others == (first,)


def test_a_full_role_takes_nobody_more():
    roster = filled(node("server", pid=11), workers=1, servers=1)
    refusal = refused(
        roster, node("server", pid=22), "has its 1 server already", "pid 11", "pid 22"
    )
    assert refusal.others == ()


@pytest.mark.parametrize(("name", "word"), [("num_workers", "worker"), ("num_servers", "server")])
def test_numbers_that_disagree_are_both_told(name, word):
    refused(Roster(2, 2), node("worker", **{name: 3}), f"there are 3 {word}s", "was told 2")
    Roster(2, 2).admit(node("worker", **{name: 2}))


@pytest.mark.parametrize("rank", [2, 10**12, -1])
def test_a_rank_must_be_below_the_number(rank):
    refused(Roster(2, 1), node("worker", rank), f"wants rank {rank}", "from 0 to 1")


def test_a_running_cluster_takes_nobody_in():
    roster = filled(node("worker"), node("server"))
    roster.place()
    roster.stage = Stage.RUNNING
    refused(roster, node("worker", pid=7), "is complete", "pid 7", "cannot come back")
    roster.stage = Stage.ENDING
    refused(roster, node("worker", pid=7), "is ending")
    roster.why_lost = "worker 0 is gone"
    refused(roster, node("worker", pid=7), "worker 0 is gone", "start it anew")


def test_who_is_missing_is_counted_before_there_are_ranks():
    roster = Roster(4, 2)
    assert roster.waiting_for() == "2 of 2 servers and 4 of 4 workers"
    for one in (node("server"), node("worker"), node("worker"), node("worker")):
        roster.admit(one)
    assert roster.waiting_for() == "1 of 2 servers and 1 of 4 workers"
    roster.admit(node("server"))
    assert roster.waiting_for() == "1 of 4 workers"
    assert Roster(1, 1).waiting_for() == "1 of 1 server and 1 of 1 worker"


def test_who_is_missing_is_named_once_there_are():
    first, second = node("worker", pid=5), node("server", pid=6)
    roster = filled(first, second)
    roster.place()
    first.address = "x"
    assert roster.waiting_for() == "server 0 (host h1, pid 6) to open the data plane"
    second.address, roster.stage = "y", Stage.CONNECTING
    assert "worker 0 (host h1, pid 5) and server 0" in roster.waiting_for()


def test_long_lists_end_in_a_number():
    assert listed(["a"]) == "a"
    assert listed(["a", "b", "c"]) == "a, b and c"
    assert listed([str(i) for i in range(5)], 3) == "0, 1, 2 and 2 more"


def test_workers_talk_to_servers_and_servers_to_all_others():
    roster = filled(*[node("worker") for _ in range(3)], node("server"), node("server"))
    roster.place()
    for number, one in enumerate(roster.nodes):
        one.address = str(number)
    worker, server = roster.of("worker")[1], roster.of("server")[1]
    assert roster.peers_of(worker) == [(3, "server 0", "3"), (4, "server 1", "4")]
    workers = [(i, f"worker {i}", str(i)) for i in range(3)]
    assert roster.peers_of(server) == [*workers, (3, "server 0", "3")]


@pytest.mark.parametrize(
    ("changes", "allowed"),
    [
        ({}, True),
        ({"boot_id": "b2"}, False),
        ({"namespaces": "p2 u1"}, False),
        ({"euid": 1}, False),
        ({"copies": False}, False),
        ({"boot_id": ""}, False),
    ],
)
def test_copies_need_one_host_user_and_namespace(changes, allowed):
    roster = filled(node("worker"), node("server", **changes))
    assert roster.same_host_copies is allowed


def test_ipv6_is_used_where_every_node_has_it():
    assert filled(node("worker", inet6=True), node("server", inet6=True)).inet6
    assert not filled(node("worker", inet6=True), node("server")).inet6


def test_the_dead_are_the_lost_and_the_silent():
    nodes = [node("worker") for _ in range(4)]
    roster = filled(*nodes, node("server"))
    roster.place()
    assert roster.dead("worker", 60) == 0
    nodes[0].lost = True
    nodes[1].heard -= 100
    nodes[2].heard -= 100
    nodes[2].left = True
    assert roster.dead("worker", 60) == 2
    assert roster.dead("worker", 1000) == 1
    assert roster.dead("server", 60) == 0


GOOD = {
    "type": "join",
    "role": "worker",
    "rank": None,
    "host": HOST,
    "pid": 1,
    "asynchronous": True,
    "num_workers": None,
    "num_servers": 2,
    "same_host_copies": True,
}


def test_a_join_frame_becomes_a_node():
    found = node_of(GOOD, True)
    assert (found.role, found.wanted, found.asynchronous) == ("worker", None, True)
    assert (found.num_workers, found.num_servers, found.inet6) == (None, 2, True)
    assert str(found) == "a worker (host h1, pid 1)"
    assert node_of({**GOOD, "role": "server"}, False).asynchronous is None


@pytest.mark.parametrize(
    "change",
    [
        {"role": "scheduler"},
        {"role": None},
        {"rank": "1"},
        {"rank": True},
        {"host": None},
        {"host": {}},
        {"host": {**HOST, "euid": "0"}},
        {"pid": None},
        {"asynchronous": None},
        {"num_workers": 1.5},
        {"same_host_copies": 1},
    ],
)
def test_a_bad_join_frame_is_refused(change):
    with pytest.raises(ProtocolError):
        node_of({**GOOD, **change}, False)


def test_what_a_node_says_of_itself_is_kept_short():
    found = node_of({**GOOD, "host": {**HOST, "hostname": "h" * 10_000}}, False)
    assert len(str(found)) < 400
