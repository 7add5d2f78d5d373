"""A node's place in a cluster: joining under a deadline, barriers, commands, losses, leaving."""

import os
import socket
import threading
import time
import types

import pytest
from fakes import LONG, FakeCore, make_settings, until

import kvstore
from kvstore import _dist
from kvstore.cluster import control, entry, protocol
from kvstore.cluster.member import Member


def cut(member):
    """What the death of its process does to a member's connection."""
    control.loop().call_soon_threadsafe(member._writer.transport.abort)


def lost(future, *texts):
    with pytest.raises(kvstore.PeerLostError) as info:
        future.result(LONG) if hasattr(future, "result") else future()
    for text in texts:
        assert text in str(info.value)


@pytest.fixture
def four(make_cluster):
    """A cluster of two workers and two servers."""
    cluster = make_cluster(2, 2)
    cluster.nodes = cluster.start()
    return cluster


# ------------------------------------------------------------------------------------- joining


def test_every_node_gets_its_place_and_its_peers(four):
    workers, servers = four.nodes[:2], four.nodes[2:]
    assert [(n.role, n.rank) for n in four.nodes] == [
        ("worker", 0),
        ("worker", 1),
        ("server", 0),
        ("server", 1),
    ]
    for node in four.nodes:
        assert (node.num_workers, node.num_servers) == (2, 2)
        assert (node.core.role, node.core.rank) == (node.role, node.rank)
    for node in workers:
        assert [peer[:2] for peer in node.core.peers] == [(2, "server 0"), (3, "server 1")]
        assert [peer[2] for peer in node.core.peers] == [s.core.address() for s in servers]
    for node in servers:
        assert [peer[:2] for peer in node.core.peers] == [(0, "worker 0"), (1, "worker 1")]


def test_the_data_planes_share_a_session_of_128_bits(make_cluster):
    first, second = make_cluster(1, 1).start(), make_cluster(1, 1).start()
    sessions = [node.core.options["session"] for node in (*first, *second)]
    assert len(sessions[0]) == 16
    assert sessions[0] == sessions[1] != sessions[2] == sessions[3]


@pytest.mark.parametrize(("setting", "copies"), [("auto", True), ("off", False)])
def test_copies_within_the_host_are_the_clusters_decision(setting, copies, make_cluster):
    cluster = make_cluster(1, 1)
    worker = cluster.join("worker", same_host_copies=setting)
    server = cluster.join("server").result(LONG)
    assert server.core.options["same_host_copies"] is copies
    assert worker.result(LONG).core.options["same_host_copies"] is copies


def test_settings_of_the_data_plane_are_passed_on(make_cluster):
    cluster = make_cluster(1, 1)
    worker = cluster.join("worker", interface="eth9", port_range="9000-9100")
    server = cluster.join("server").result(LONG)
    assert worker.result(LONG).core.options["interface"] == "eth9"
    assert worker.result(LONG).core.options["port_range"] == "9000-9100"
    assert server.core.options["interface"] == "lo"
    assert server.core.options["port_range"] is None


def test_an_address_to_bind_chooses_the_interface():
    with socket.create_server(("127.0.0.1", 0)) as near:
        assert entry.interface("", near) == "lo"
        assert entry.interface("127.0.0.1", near) == "lo"
        with pytest.raises(kvstore.InvalidArgumentError, match="KVSTORE_BIND"):
            entry.interface("no-such-host.invalid", near)


def test_the_deadline_of_joining_names_who_is_missing(make_cluster):
    cluster = make_cluster(2, 2)
    waiting = [cluster.join("server", timeout=2), cluster.join("worker", timeout=2)]
    for joining in waiting:
        with pytest.raises(
            kvstore.TimeoutError, match="missing: 1 of 2 servers and 1 of 2"
        ) as info:
            joining.result(LONG)
        assert "KVSTORE_TIMEOUT" in str(info.value)


def test_the_deadline_names_a_node_whose_data_plane_does_not_open(make_cluster):
    gate = threading.Event()

    class Slow(FakeCore):
        def address(self):
            gate.wait(LONG)
            return super().address()

    cluster = make_cluster(1, 1)
    server = cluster.join("server", make_core=Slow)
    worker = cluster.join("worker", timeout=1)
    with pytest.raises(kvstore.TimeoutError, match=r"server 0 \(host .*\) to open the data plane"):
        worker.result(LONG)
    gate.set()
    lost(server, "worker 0", "is gone", "could not join")


def test_a_data_plane_that_does_not_connect_is_told_to_all(make_cluster):
    class Deaf(FakeCore):
        def wait_ready(self, timeout):
            assert 0 < timeout <= LONG
            raise kvstore.TimeoutError("server 0 does not answer")

    cluster = make_cluster(1, 1)
    worker = cluster.join("worker", make_core=Deaf)
    server = cluster.join("server")
    with pytest.raises(kvstore.TimeoutError, match="server 0 does not answer"):
        worker.result(LONG)
    lost(server, "worker 0 (", "server 0 does not answer")


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        return taken.getsockname()[1]


def test_without_a_scheduler_the_deadline_names_address_and_setting():
    address = f"127.0.0.1:{free_port()}"
    begin = time.monotonic()
    with pytest.raises(kvstore.TimeoutError, match=address) as info:
        Member.join(make_settings("server", address, timeout=0.5), make_core=FakeCore)
    assert 0.5 <= time.monotonic() - begin < LONG
    for text in ("Connection refused", "KVSTORE_SCHEDULER", "KVSTORE_TIMEOUT", "0.5 s"):
        assert text in str(info.value)


def test_a_host_that_does_not_resolve_is_named():
    node = make_settings("worker", "no-such-host.invalid:9000", timeout=0.5)
    with pytest.raises(kvstore.TimeoutError, match=r"no-such-host\.invalid:9000") as info:
        Member.join(node, make_core=FakeCore)
    assert "KVSTORE_SCHEDULER" in str(info.value)


def test_a_scheduler_may_come_later_than_its_nodes(make_cluster):
    port = free_port()
    node = make_settings("worker", f"127.0.0.1:{port}", timeout=LONG)
    joined = []
    early = threading.Thread(target=lambda: joined.append(Member.join(node, make_core=FakeCore)))
    tries = []
    original = entry._greet

    async def counted(settings):
        tries.append(settings)
        return await original(settings)

    entry._greet = counted
    try:
        early.start()
        until(lambda: len(tries) > 1)
        cluster = make_cluster(1, 1, port=port)
        cluster.join("server").result(LONG)
    finally:
        entry._greet = original
        early.join(LONG)
    cluster.members += joined
    assert joined[0].rank == 0


def test_another_service_at_the_address_is_found_out():
    with socket.create_server(("127.0.0.1", 0)) as server:

        def answer():
            connection, _ = server.accept()
            with connection:
                connection.recv(1000)
                connection.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")

        serving = threading.Thread(target=answer)
        serving.start()
        address = f"127.0.0.1:{server.getsockname()[1]}"
        with pytest.raises(
            kvstore.InvalidArgumentError, match="is no scheduler of kvstore"
        ) as info:
            Member.join(make_settings("worker", address), make_core=FakeCore)
        serving.join(LONG)
    assert address in str(info.value) and "KVSTORE_SCHEDULER" in str(info.value)


@pytest.mark.parametrize(("built", "library"), [(False, "/somewhere"), (True, None)])
def test_a_missing_ucx_is_told_before_anything_starts(built, library, monkeypatch):
    core = types.SimpleNamespace(build_info=lambda: {"ucx": built})
    monkeypatch.setattr(entry, "_core", core)
    monkeypatch.setattr(entry, "ucx_library", lambda: library)
    monkeypatch.setattr("ctypes.util.find_library", lambda name: None)
    for start in (
        lambda: kvstore.create("dist_sync", scheduler="127.0.0.1:1"),
        lambda: kvstore.LocalCluster(1, 1),
    ):
        with pytest.raises(kvstore.NotBuiltError, match=r"UCX.*pip install"):
            start()


# ------------------------------------------------------------------------------------ barriers


def test_a_barrier_waits_for_all_workers(make_cluster):
    cluster = make_cluster(3, 1)
    workers = cluster.start()[:3]
    before, after = [0] * 3, []
    lock = threading.Lock()

    def run(worker):
        for step in range(50):
            before[worker.rank] = step
            worker.barrier(LONG)
            with lock:
                after.append(min(before) >= step)
            worker.barrier(LONG)

    for future in [cluster.pool.submit(run, worker) for worker in workers]:
        future.result(LONG)
    assert len(after) == 150 and all(after)


def test_several_threads_of_a_worker_may_wait_in_barriers(four):
    futures = [four.pool.submit(four.nodes[rank].barrier, LONG) for rank in (0, 0, 0, 1, 1, 1)]
    for future in futures:
        future.result(LONG)


def test_the_deadline_of_a_barrier_names_who_did_not_come(make_cluster):
    cluster = make_cluster(4, 1)
    workers = cluster.start()[:4]
    together = [cluster.pool.submit(workers[rank].barrier, 0.5) for rank in (0, 2)]
    for future in together:
        with pytest.raises(kvstore.TimeoutError, match=r"waited 0\.5 s") as info:
            future.result(LONG)
        assert "worker 1 (" in str(info.value) and "worker 3 (" in str(info.value)


def test_after_a_deadline_the_next_barrier_is_whole(four):
    with pytest.raises(kvstore.TimeoutError):
        four.nodes[0].barrier(0.1)
    late = four.pool.submit(four.nodes[1].barrier, LONG)
    second = four.scheduler.roster.of("worker")[1]
    until(lambda: four.scheduler.calls._barriers.get(second))
    assert not late.done()
    four.nodes[0].barrier(LONG)
    late.result(LONG)


# ------------------------------------------------------------------------------------ commands


@pytest.mark.parametrize(
    "body", ["", "text", "ü\0\ud800", b"", b"\0\xff" * 100, "x" * 1_000_000, b"y" * 700_000]
)
def test_a_command_reaches_every_server_as_it_was_sent(body, four):
    seen = [[], []]
    serving = [
        four.serve(server, lambda head, got, s=seen[server.rank]: s.append((head, got)))
        for server in four.nodes[2:]
    ]
    for head in (0, 7, 2**63 - 1):
        _dist.command(four.nodes[1], head, body, LONG)
        assert [s[-1] for s in seen] == [(head, body)] * 2
        assert type(seen[0][-1][1]) is type(body)
    assert not any(future.done() for future in serving)


def test_commands_of_several_workers_come_to_all_servers_in_one_order(four):
    seen = [[], []]
    for server in four.nodes[2:]:
        four.serve(server, lambda head, body, s=seen[server.rank]: s.append((head, body)))

    def send(worker):
        for number in range(50):
            worker.command(worker.rank, str(number), LONG)

    for future in [four.pool.submit(send, worker) for worker in four.nodes[:2]]:
        future.result(LONG)
    assert seen[0] == seen[1] and len(seen[0]) == 100


def test_the_controller_runs_in_the_thread_that_serves(four):
    threads = [set(), set()]
    for server in four.nodes[2:]:
        own = threads[server.rank]
        four.serve(server, lambda head, body, own=own: own.add(threading.get_ident()))
    four.nodes[0].command(1, "", LONG)
    four.nodes[1].command(1, "", LONG)
    assert [len(own) for own in threads] == [1, 1]


def test_a_controller_that_fails_raises_at_the_worker_and_the_server_goes_on(four):
    def controller(head, body):
        if head == 3:
            raise ValueError(f"no {body}")

    for server in four.nodes[2:]:
        four.serve(server, controller if server.rank == 1 else lambda head, body: None)
    with pytest.raises(kvstore.KVStoreError) as info:
        four.nodes[0].command(3, "thing", LONG)
    assert str(info.value) == "the controller of server 1 failed on command 3: ValueError: no thing"
    four.nodes[0].command(4, "thing", LONG)


def test_a_server_without_a_controller_says_so(four):
    for server in four.nodes[2:]:
        four.serve(server)
    with pytest.raises(kvstore.KVStoreError, match="started without a controller"):
        four.nodes[0].command(1, "", LONG)
    with pytest.raises(kvstore.KVStoreError, match="no command -5"):
        four.nodes[0].command(-5, "", LONG)


def test_the_deadline_of_a_command_names_the_servers_that_have_not_run_it(four):
    gate = threading.Event()
    four.serve(four.nodes[2], lambda head, body: None)
    four.serve(four.nodes[3], lambda head, body: gate.wait(LONG))
    with pytest.raises(kvstore.TimeoutError, match="command 1 of worker 0") as info:
        four.nodes[0].command(1, "", 0.5)
    gate.set()
    assert "server 1 (" in str(info.value) and "server 0" not in str(info.value)
    four.nodes[0].command(1, "", LONG)


@pytest.mark.parametrize("body", ["x" * (1 << 20), b"x" * (1 << 20), "\0" * (1 << 18)])
def test_a_body_that_is_too_long_is_refused(body, four):
    with pytest.raises(kvstore.InvalidArgumentError, match="1048576 bytes") as info:
        four.nodes[0].command(1, body, LONG)
    assert str(len(body)) in str(info.value)


@pytest.mark.parametrize("head", [2**63, -(2**63) - 1])
def test_a_head_has_64_bits(head, four):
    with pytest.raises(kvstore.InvalidArgumentError, match=str(head)):
        _dist.command(four.nodes[0], head, "", LONG)


# -------------------------------------------------------------------------------------- losses


def test_the_loss_of_a_worker_ends_every_wait_of_the_others(four):
    waiting = [
        four.pool.submit(four.nodes[0].barrier, LONG),
        four.pool.submit(four.nodes[0].command, 1, "", LONG),
        *[four.serve(server, lambda head, body: None) for server in four.nodes[3:]],
    ]
    until(lambda: four.scheduler.calls._barriers)
    cut(four.nodes[1])
    for future in waiting:
        lost(future, "worker 1 (host ", f"pid {os.getpid()}", "is gone", "connection")
    until(lambda: four.nodes[2]._broken)
    for index in (0, 2, 3):
        assert "worker 1" in four.nodes[index].core.lost
    lost(lambda: four.nodes[0].barrier(LONG), "worker 1")
    lost(lambda: four.nodes[0].command(1, "", LONG), "worker 1")
    for node in four.nodes:
        node.close(LONG)
        assert node.core.closed
    lost(four.ended, "worker 1")


def test_the_loss_of_a_server_is_told_to_the_workers(four):
    cut(four.nodes[3])
    until(lambda: all(worker.core.lost for worker in four.nodes[:2]))
    lost(lambda: four.nodes[1].barrier(LONG), "server 1 (")


def test_the_end_of_the_scheduler_is_told_to_all(four):
    waiting = four.pool.submit(four.nodes[0].barrier, LONG)
    serving = four.serve(four.nodes[2])
    until(lambda: four.scheduler.calls._barriers)
    four.ended.cancel()
    for future in (waiting, serving):
        lost(future, f"the scheduler at {four.address} is gone")
    until(lambda: all(node.core.lost for node in four.nodes))
    lost(lambda: four.nodes[1].dead_nodes("worker", 60), "the scheduler")


def test_a_lost_node_counts_as_dead_and_one_that_left_does_not(make_cluster):
    cluster = make_cluster(3, 2)
    nodes = cluster.start()
    ask = nodes[0]
    assert _dist.dead_nodes(ask, "worker", 60) == 0
    nodes[1].close(LONG, together=False)
    assert _dist.dead_nodes(ask, "worker", 60) == 0
    cut(nodes[3])
    until(lambda: ask.core.lost)
    assert _dist.dead_nodes(ask, "server", 60) == 1
    assert _dist.dead_nodes(ask, "worker", 60) == 0
    assert _dist.dead_nodes(ask, "scheduler", 60) == 0
    assert [_dist.dead_nodes(ask, mask, 60) for mask in (1, 2, 4, 6)] == [0, 1, 0, 1]


def test_a_node_that_ends_because_of_a_loss_is_not_lost_too(four):
    cut(four.nodes[1])
    until(lambda: four.nodes[0].core.lost and four.nodes[2].core.lost)
    four.nodes[2].fail("PeerLostError")
    until(lambda: four.scheduler.roster.of("server")[0].left)
    assert _dist.dead_nodes(four.nodes[0], "server", 60) == 0
    assert _dist.dead_nodes(four.nodes[0], "worker", 60) == 1


def test_a_node_that_was_silent_for_long_counts_as_dead(four, monkeypatch):
    asked = four.nodes[0]
    four.scheduler.roster.of("server")[1].heard -= 1000
    assert _dist.dead_nodes(asked, "server", 500) in (0, 1)  # it may just have been heard
    monkeypatch.setattr("kvstore.cluster.member.HEARTBEAT_S", LONG)
    until(lambda: _dist.dead_nodes(asked, "server", 0.001) == 2)


@pytest.mark.parametrize("timeout", [-1, float("nan")])
def test_a_silence_is_a_number_of_seconds(timeout, four):
    with pytest.raises(kvstore.InvalidArgumentError, match=f"seconds, not {timeout}"):
        _dist.dead_nodes(four.nodes[0], "worker", timeout)
    assert _dist.dead_nodes(four.nodes[0], "worker", float("inf")) == 0


@pytest.mark.parametrize("role", ["king", 0, 8, "Worker"])
def test_an_unknown_role_has_no_dead(role, four):
    with pytest.raises(kvstore.InvalidArgumentError, match="role must be"):
        _dist.dead_nodes(four.nodes[0], role, 60)


def test_a_frame_that_makes_no_sense_costs_a_node_its_place(four):
    control.loop().call_soon_threadsafe(four.nodes[1]._write, {"type": "dance"})
    lost(four.pool.submit(four.nodes[0].barrier, LONG), "worker 1", "'dance'")


def test_a_node_that_ends_by_an_error_says_so(four):
    four.nodes[2].fail("MemoryError: no room")
    lost(four.pool.submit(four.nodes[0].barrier, LONG), "server 0 (", "MemoryError: no room")


# ------------------------------------------------------------------------------------- leaving


def test_a_cluster_ends_when_all_workers_have_left(four):
    serving = [four.serve(server) for server in four.nodes[2:]]
    first = four.pool.submit(_dist.close, four.nodes[0], LONG)
    until(lambda: four.scheduler.roster.of("worker")[0].leaving)
    assert not first.done() and not four.nodes[0].core.closed
    four.nodes[1].close(LONG)
    first.result(LONG)
    for future in serving:
        future.result(LONG)
    assert four.ended.result(LONG) is None
    assert all(node.core.closed for node in four.nodes)
    assert not any(node.core.lost for node in four.nodes)


def test_a_worker_need_not_wait_for_the_others(four):
    four.nodes[0].barrier_before_exit = False
    four.nodes[0].close(LONG)
    assert four.nodes[0].core.closed
    serving = [four.serve(server, lambda head, body: None) for server in four.nodes[2:]]
    four.nodes[1].command(1, "", LONG)
    four.nodes[1].close(LONG)
    for future in serving:
        future.result(LONG)
    assert four.ended.result(LONG) is None


def test_the_deadline_of_leaving_names_the_others_and_the_worker_has_left(four):
    with pytest.raises(kvstore.TimeoutError, match=r"missing: worker 1 \("):
        four.nodes[0].close(0.3)
    assert four.nodes[0].core.closed
    serving = [four.serve(server) for server in four.nodes[2:]]
    four.nodes[1].close(LONG)
    for future in serving:
        future.result(LONG)
    assert four.ended.result(LONG) is None


def test_a_loss_lets_those_who_leave_go(four):
    leaving = four.pool.submit(four.nodes[0].close, LONG)
    until(lambda: four.scheduler.roster.of("worker")[0].leaving)
    cut(four.nodes[1])
    leaving.result(LONG)


def test_a_barrier_ends_when_another_worker_leaves(four):
    waiting = four.pool.submit(four.nodes[1].barrier, LONG)
    until(lambda: four.scheduler.calls._barriers)
    leaving = four.pool.submit(four.nodes[0].close, LONG)
    lost(waiting, "worker 0 (", "has left")
    four.nodes[1].close(LONG)
    leaving.result(LONG)


def test_servers_hear_at_once_that_a_worker_leaves(four):
    servers = [node.core for node in four.nodes[2:]]
    leaving = four.pool.submit(four.nodes[1].close, LONG)
    until(lambda: all(core.gone == [(1, True)] for core in servers))
    assert not leaving.done()

    def busy(timeout):
        raise kvstore.TimeoutError("server 0 has not answered all calls")

    four.nodes[0].core.drain = busy
    four.nodes[0].close(LONG, together=False)
    leaving.result(LONG)
    until(lambda: all(core.gone == [(1, True), (0, False)] for core in servers))


def test_after_close_calls_say_closed_and_close_does_nothing(four):
    four.nodes[0].close(LONG, together=False)
    four.nodes[0].close(LONG)
    for call in (
        lambda: four.nodes[0].barrier(LONG),
        lambda: four.nodes[0].command(1, "", LONG),
        lambda: four.nodes[0].dead_nodes("worker", 1),
    ):
        with pytest.raises(kvstore.ClosedError):
            call()


def test_a_member_tells_its_state(four):
    assert repr(four.nodes[3]) == f"<server 1 of the cluster at {four.address}, open>"
    cut(four.nodes[3])
    until(lambda: "broken" in repr(four.nodes[2]))
    four.nodes[2].close()
    assert "closed" in repr(four.nodes[2])


@pytest.mark.parametrize(
    "wrong",
    [
        {"type": "reply", "id": "one"},
        {"type": "roster", "peers": [1], "last": True},
        {"type": "roster", "peers": [[0, "server 0", "abcde"]], "last": True},
        {"type": "command", "id": 1, "head": 1},
        {"type": "lost"},
    ],
)
def test_what_a_scheduler_sends_is_checked(wrong, make_cluster):
    cluster = make_cluster(1, 1)
    worker, _ = cluster.start()
    node = cluster.scheduler.roster.of("worker")[0]
    control.loop().call_soon_threadsafe(protocol.write, node.connection, wrong)
    until(lambda: worker.core.lost)
    lost(lambda: worker.barrier(LONG), f"the scheduler at {cluster.address} is gone: it")
