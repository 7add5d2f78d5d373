"""Commands of the package's own that workers run for each other."""

import threading

import pytest
from fakes import LONG

import kvstore
from kvstore import _declared, _dist_states
from kvstore.cluster import calls

HEAD = _dist_states.ASK


@pytest.fixture
def four(make_cluster):
    """Two workers and two servers, which serve."""
    cluster = make_cluster(2, 2)
    cluster.nodes = cluster.start()
    for server in cluster.nodes[2:]:
        cluster.serve(server)
    return cluster


@pytest.fixture
def runs(monkeypatch):
    """Replace what the command does."""
    return lambda function: monkeypatch.setitem(_dist_states.COMMANDS, HEAD, function)


def test_those_that_are_asked_answer_by_rank(four, runs):
    runs(lambda member, body: f"{member.rank} {body}")
    first, second = four.nodes[:2]
    assert first.command(HEAD, "größer", LONG, workers=[1]) == ["1 größer"]
    assert second.command(HEAD, "", LONG, workers=[1, 0]) == ["0 ", "1 "]
    assert second.command(HEAD, "", LONG, workers=[]) == []


def test_it_may_ask_the_servers_meanwhile(four, runs, monkeypatch):
    agree = _declared.AGREE
    monkeypatch.setitem(_declared.COMMANDS, agree, lambda member, body: f"{body} {member.rank}")
    runs(lambda member, body: ",".join(member.command(agree, body, LONG)))
    answers = four.nodes[0].command(HEAD, "server", LONG, workers=[0, 1])
    assert answers == ["server 0,server 1"] * 2


def test_a_failure_names_the_worker(four, runs):
    def fail(member, body):
        if member.rank == 1:
            raise ValueError("no")
        return ""

    runs(fail)
    with pytest.raises(kvstore.KVStoreError, match=r"^worker 1: ValueError: no$"):
        four.nodes[0].command(HEAD, "", LONG, workers=[0, 1])
    assert four.nodes[1].command(HEAD, "", LONG, workers=[0]) == [""]


def test_servers_have_no_such_command(four):
    with pytest.raises(kvstore.KVStoreError, match=f"there is no command {HEAD} in this version"):
        four.nodes[0].command(HEAD, "", LONG)
    with pytest.raises(kvstore.KVStoreError, match=r"worker 1: .*there is no command -1 "):
        four.nodes[0].command(-1, "", LONG, workers=[1])


def test_one_that_has_left_does_not_answer(four, runs):
    runs(lambda member, body: str(member.rank))
    four.nodes[1].close(LONG, together=False)
    assert four.nodes[0].command(HEAD, "", LONG, workers=[0, 1]) == ["0"]


def test_one_that_leaves_meanwhile_does_not_either(four, runs):
    asked, gate = threading.Event(), threading.Event()

    def wait(member, body):
        asked.set()
        gate.wait(LONG)
        return "late"

    runs(wait)
    waiting = four.pool.submit(four.nodes[0].command, HEAD, "", LONG, workers=[1])
    assert asked.wait(LONG)
    four.nodes[1].close(LONG, together=False)
    assert waiting.result(LONG) == []
    gate.set()


def test_the_deadline_names_who_has_not_answered(four, runs):
    gate = threading.Event()
    runs(lambda member, body: str(gate.wait(LONG)))
    with pytest.raises(kvstore.TimeoutError, match=r"command -3 of worker 0 .*worker 1"):
        four.nodes[0].command(HEAD, "", 0.2, workers=[1])
    gate.set()
    assert four.nodes[0].command(HEAD, "", LONG, workers=[1]) == ["True"]


def test_a_loss_ends_the_wait(four, runs):
    asked, gate = threading.Event(), threading.Event()

    def wait(member, body):
        asked.set()
        return str(gate.wait(LONG))

    runs(wait)
    waiting = four.pool.submit(four.nodes[0].command, HEAD, "", LONG, workers=[1])
    assert asked.wait(LONG)
    four.nodes[1].fail("it broke")
    with pytest.raises(kvstore.PeerLostError, match="worker 1"):
        waiting.result(LONG)
    gate.set()


@pytest.mark.parametrize("character", ["x", "\0"])
def test_an_answer_that_is_too_long_is_a_failure(character, four, runs):
    runs(lambda member, body: character * int(body))
    longest = calls.MAX_ANSWER
    answer = four.nodes[0].command(HEAD, str(longest), LONG, workers=[1])
    assert answer == [character * longest]
    with pytest.raises(kvstore.KVStoreError, match=f"{longest + 1} characters is too long"):
        four.nodes[0].command(HEAD, str(longest + 1), LONG, workers=[1])
