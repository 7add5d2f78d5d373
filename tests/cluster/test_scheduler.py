"""The scheduler's door: where it listens, who is let in, and strangers who change nothing."""

import contextlib
import json
import os
import random
import socket
import struct

import pytest
from fakes import LONG, FakeCore, make_settings, until

import kvstore
from kvstore.cluster import control, protocol
from kvstore.cluster.scheduler import MAX_STRANGERS, Scheduler


def stranger(cluster):
    connection = socket.create_connection(cluster.scheduler.address, timeout=LONG)
    connection.settimeout(LONG)
    return connection


def said(capsys, text):
    """The lines of stderr that hold the text; what was read before is kept."""
    seen = capsys.__dict__.setdefault("seen_by_tests", [])
    seen.append(capsys.readouterr().err)
    return [line for line in "".join(seen).splitlines() if text in line]


def closed_by_scheduler(connection):
    """Read to the end; what came before it."""
    data = b""
    with contextlib.suppress(ConnectionError):
        while more := connection.recv(4096):
            data += more
    connection.close()
    return data


def works(cluster):
    """A cluster of one worker and one server still comes into being, runs and ends."""
    worker, server = cluster.start()
    serving = cluster.serve(server, lambda head, body: None)
    worker.barrier(LONG)
    worker.command(1, "x", LONG)
    worker.close(LONG)
    serving.result(LONG)
    assert cluster.ended.result(LONG) is None


# ---------------------------------------------------------------------------------- listening


def listen(host="127.0.0.1", port=0, **options):
    address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    numbers = {"num_workers": 1, "num_servers": 1}
    scheduler = Scheduler(make_settings("scheduler", address, **numbers, **options))
    control.run(scheduler.listen())
    return scheduler


def test_port_0_means_any_and_is_told(capsys):
    scheduler = listen()
    host, port = scheduler.address
    assert host == "127.0.0.1" and port > 0
    assert f"the scheduler listens on 127.0.0.1:{port}" in capsys.readouterr().err
    scheduler._close()


def test_a_launcher_hears_the_address_over_a_pipe(monkeypatch, capsys):
    read_fd, write_fd = os.pipe()
    monkeypatch.setenv("KVSTORE_ANNOUNCE_FD", str(write_fd))
    scheduler = listen(advertise="node7")
    with os.fdopen(read_fd) as file:
        told = json.loads(file.readline())
        assert told == {"host": "node7", "port": scheduler.address[1]}
        scheduler._close()
        assert file.read() == ""
    assert capsys.readouterr().err == ""


def test_a_launcher_hears_that_the_cluster_is_complete_and_that_it_ends(make_cluster, monkeypatch):
    read_fd, write_fd = os.pipe()
    monkeypatch.setenv("KVSTORE_ANNOUNCE_FD", str(write_fd))
    cluster = make_cluster(1, 1)
    with os.fdopen(read_fd) as file:
        file.readline()
        worker, server = cluster.start()
        assert json.loads(file.readline()) == {"complete": True}
        serving = cluster.serve(server)
        worker.close(LONG)
        assert file.read() == ""
    serving.result(LONG)


def test_a_port_in_use_is_refused_by_address_and_setting():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(kvstore.InvalidArgumentError, match=f"127.0.0.1:{port}") as info:
            listen(port=port)
    assert "in use" in str(info.value) and "KVSTORE_SCHEDULER" in str(info.value)


@pytest.mark.parametrize("setting", ["scheduler", "bind"])
def test_a_host_that_is_not_of_this_machine_is_refused(setting):
    host, options = "192.0.2.1", {"token": "x"}
    if setting == "bind":
        host, options = "127.0.0.1", {"token": "x", "bind": "192.0.2.1"}
    with pytest.raises(kvstore.InvalidArgumentError, match=r"192\.0\.2\.1") as info:
        listen(host, **options)
    assert f"KVSTORE_{setting.upper()}" in str(info.value)


def test_a_host_without_an_address_is_refused():
    with pytest.raises(kvstore.InvalidArgumentError, match=r"no-such-host\.invalid"):
        listen("no-such-host.invalid")


def test_without_a_token_only_loopback_is_listened_on():
    with pytest.raises(kvstore.InvalidArgumentError, match="KVSTORE_TOKEN") as info:
        listen(bind="0.0.0.0")
    assert "0.0.0.0" in str(info.value)
    listen(bind="0.0.0.0", token="secret")._close()


def test_a_cluster_works_over_ipv6(make_cluster):
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        pytest.skip("this machine has no IPv6 loopback")
    cluster = make_cluster(1, 1, host="::1")
    worker, server = cluster.start()
    assert worker.core.options["inet6"] and server.core.options["inet6"]
    assert worker.core.options["interface"] == "lo"


def test_a_host_name_works(make_cluster):
    works(make_cluster(1, 1, host="localhost"))


# ---------------------------------------------------------------------------------- strangers

SOME = random.Random(1)
TROUBLES = {
    "random bytes": b"\xf0" + SOME.randbytes(5000),
    "HTTP": b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
    "TLS": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"a" * 500,
    "a huge length": b"\xff\xff\xff\xff",
    "a frame too long for a stranger": struct.pack(">I", 100_000),
    "JSON that is no frame": struct.pack(">I", 2) + b"[]",
    "another frame": protocol.encode({"type": "join"}),
    "a hello without a nonce": protocol.encode({"type": "hello", "protocol": 1}),
    "a hello of another version": protocol.encode(
        {"type": "hello", "protocol": 99, "package": "7", "nonce": "0" * 64}
    ),
}


@pytest.mark.parametrize("trouble", TROUBLES)
def test_a_stranger_is_closed_and_mentioned_once(trouble, make_cluster, capsys):
    cluster = make_cluster(1, 1, token="secret")
    for _ in range(5):
        connection = stranger(cluster)
        connection.sendall(TROUBLES[trouble])
        answer = closed_by_scheduler(connection)
        assert b"welcome" not in answer
    works(cluster)
    assert len(said(capsys, "closed the connection from 127.0.0.1:")) == 1


@pytest.mark.parametrize("sent", [b"", b"\0\0", struct.pack(">I", 50) + b"half a frame"])
def test_a_stranger_that_ends_early_is_mentioned_once(sent, make_cluster, capsys):
    cluster = make_cluster(1, 1)
    for _ in range(5):
        with stranger(cluster) as connection:
            connection.sendall(sent)
    until(lambda: said(capsys, "closed the connection from 127.0.0.1:"))
    works(cluster)
    assert len(said(capsys, "closed the connection from 127.0.0.1:")) == 1


def test_a_silent_stranger_is_closed_after_a_while(make_cluster, monkeypatch, capsys):
    monkeypatch.setattr(protocol, "HANDSHAKE_S", 0.2)
    cluster = make_cluster(1, 1)
    assert closed_by_scheduler(stranger(cluster)) == b""
    monkeypatch.undo()
    assert len(said(capsys, "not said who it is after 0 s")) == 1
    works(cluster)


def test_a_stranger_that_sends_a_byte_now_and_then_is_closed_too(make_cluster, monkeypatch):
    monkeypatch.setattr(protocol, "HANDSHAKE_S", 0.3)
    cluster = make_cluster(1, 1)
    connection = stranger(cluster)
    data = iter(protocol.encode({"type": "hello", "nonce": "0" * 64}))
    connection.settimeout(0.05)
    ended = False
    for byte in data:
        try:
            connection.sendall(bytes([byte]))
            ended = connection.recv(100) == b""
        except TimeoutError:
            continue
        except ConnectionError:
            ended = True
        if ended:
            break
    assert ended
    connection.close()
    monkeypatch.undo()
    works(cluster)


def test_a_thousand_connections_keep_nobody_out(make_cluster, capsys):
    cluster = make_cluster(1, 1)
    crowd = []
    with contextlib.suppress(OSError):  # this process may not open so many
        for _ in range(1000):
            crowd.append(stranger(cluster))
    assert len(crowd) > 300
    works(cluster)
    for connection in crowd:
        connection.close()
    assert len(said(capsys, f"more than {MAX_STRANGERS} connections")) == 1


def test_a_node_with_another_token_is_told_so(make_cluster, capsys):
    cluster = make_cluster(1, 1, token="secret")
    for token in ("wrong", ""):
        for role in ("worker", "server"):
            joining = cluster.join(role, token=token)
            with pytest.raises(kvstore.InvalidArgumentError, match="KVSTORE_TOKEN"):
                joining.result(LONG)
    works(cluster)
    assert len(said(capsys, "does not know the token")) == 1


def test_a_node_that_knows_the_token_but_not_the_frames_is_closed(make_cluster):
    cluster = make_cluster(1, 1, token="secret")

    async def join_badly(frame):
        reader, writer = await protocol_connect(cluster)
        protocol.write(writer, frame)
        assert await protocol.read(reader) is None
        writer.close()

    for frame in ({"type": "place"}, {"type": "join"}, {"type": "join", "role": "king"}):
        control.run(join_badly(frame))
    works(cluster)


async def protocol_connect(cluster):
    import asyncio

    reader, writer = await asyncio.open_connection(*cluster.scheduler.address)
    await protocol.introduce(reader, writer, cluster.options.get("token", ""))
    return reader, writer


# ------------------------------------------------------------------------------ who is let in


def test_one_rank_for_two_ends_both_and_the_cluster_goes_on(make_cluster):
    cluster = make_cluster(2, 1)
    first = cluster.join("worker", rank=1)
    until(lambda: cluster.scheduler.roster.of("worker"))
    second = cluster.join("worker", rank=1)
    for joining in (first, second):
        with pytest.raises(kvstore.InvalidArgumentError, match="rank 1 was asked for by two"):
            joining.result(LONG)
    assert cluster.scheduler.roster.nodes == []
    futures = [cluster.join("worker", rank=rank) for rank in (1, 0)]
    cluster.join("server").result(LONG)
    assert [future.result(LONG).rank for future in futures] == [1, 0]


def test_kinds_that_disagree_end_both(make_cluster):
    cluster = make_cluster(2, 1)
    first = cluster.join("worker", asynchronous=True)
    until(lambda: cluster.scheduler.roster.of("worker"))
    second = cluster.join("worker", asynchronous=False)
    for joining in (first, second):
        with pytest.raises(kvstore.InvalidArgumentError, match="disagree about the kind") as info:
            joining.result(LONG)
        assert "dist_sync" in str(info.value) and "dist_async" in str(info.value)


@pytest.mark.parametrize("asynchronous", [False, True])
def test_servers_learn_the_kind(asynchronous, make_cluster):
    cluster = make_cluster(1, 1)
    worker = cluster.join("worker", asynchronous=asynchronous)
    server = cluster.join("server").result(LONG)
    assert server.asynchronous is asynchronous
    assert server.core.options["asynchronous"] is asynchronous
    assert worker.result(LONG).asynchronous is asynchronous


def test_numbers_that_disagree_are_told(make_cluster):
    cluster = make_cluster(1, 1)
    with pytest.raises(kvstore.InvalidArgumentError, match="there are 3 workers, the scheduler"):
        cluster.join("server", num_workers=3).result(LONG)
    works(cluster)


def test_nobody_joins_a_running_cluster(make_cluster):
    cluster = make_cluster(1, 1)
    cluster.start()
    for role in ("worker", "server"):
        with pytest.raises(kvstore.InvalidArgumentError, match="cannot come back"):
            cluster.join(role).result(LONG)


def test_a_worker_that_has_left_cannot_come_back(make_cluster):
    cluster = make_cluster(2, 1)
    workers = cluster.start()[:2]
    workers[0].close(LONG, together=False)
    with pytest.raises(kvstore.InvalidArgumentError, match="cannot come back"):
        cluster.join("worker").result(LONG)
    with pytest.raises(kvstore.PeerLostError, match=r"worker 0 \(.*\) has left"):
        workers[1].barrier(LONG)


def test_a_node_that_goes_away_early_makes_room(make_cluster):
    cluster = make_cluster(1, 2)
    early = cluster.join("server", timeout=0.3)
    with pytest.raises(kvstore.TimeoutError):
        early.result(LONG)
    until(lambda: not cluster.scheduler.roster.nodes)
    cluster.start()


def test_a_data_plane_that_does_not_open_is_told_to_all(make_cluster):
    class Broken(FakeCore):
        def __init__(self, *args, **options):
            raise kvstore.NotBuiltError("no UCX here")

    cluster = make_cluster(1, 1)
    server = cluster.join("server", make_core=Broken)
    worker = cluster.join("worker")
    with pytest.raises(kvstore.NotBuiltError, match="no UCX here"):
        server.result(LONG)
    with pytest.raises(kvstore.PeerLostError, match=r"server 0 \(.*\) is gone.*no UCX here"):
        worker.result(LONG)
    with pytest.raises(kvstore.PeerLostError, match="no UCX here"):
        cluster.ended.result(LONG)


def test_the_terminal_hears_who_is_missing(make_cluster, monkeypatch, capsys):
    from kvstore.cluster import scheduler

    monkeypatch.setattr(scheduler, "FIRST_REPORTS_S", (1,))
    monkeypatch.setattr(scheduler, "REPORT_EVERY_S", 1)
    cluster = make_cluster(4, 2)
    cluster.join("worker")
    cluster.join("server", timeout=LONG)
    until(lambda: said(capsys, "waiting for 1 of 2 servers and 3 of 4 workers (2 s)"))
    assert said(capsys, "(1 s)")
