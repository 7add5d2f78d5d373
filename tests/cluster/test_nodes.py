"""Nodes that are processes: killed, interrupted, forked, ended with and without `close`."""

import os
import signal
import socket
import threading
import time

import pytest
from fakes import LONG, Child, FakeCore, make_settings, until

import kvstore
from kvstore import _core, server
from kvstore.cluster.member import Member

# Within what time everyone must hear of a death or of Ctrl-C.
SOON = 2 if _core.build_info()["flavour"] in ("release", "debug") else 30


@pytest.fixture
def children():
    made = []
    yield made
    for one in made:
        one.stop()


def started(cluster, children, *nodes):
    """Children that are nodes of a cluster, joined."""
    new = [Child.node(role, cluster.address, action) for role, action in nodes]
    children += new
    for one in new:
        if one.args[-3] == "worker":
            one.says("joining")
    for one in new:
        one.says("joined")
    return new


def interrupted(one):
    begin = time.time()
    one.send_signal(signal.SIGINT)
    while (line := one.stdout.readline()) in ("joining\n", "joined\n"):
        pass
    at, name, *_ = line.split()
    assert name == "KeyboardInterrupt"
    assert float(at) - begin < SOON
    return one.ends(1)


# --------------------------------------------------------------------------------------- deaths


WAITS = """
print(member.rank, flush=True)
while True:
    if member.rank == 0:
        member.barrier(60)
    member._check()
    time.sleep(0.01)
"""


@pytest.mark.parametrize("victim", ["worker 1", "server 0", "scheduler"])
def test_a_killed_process_is_named_by_all_others_within_two_seconds(victim, children):
    scheduler, address = Child.scheduler(2, 1)
    nodes = [Child.node("worker", address, WAITS) for _ in range(2)]
    nodes.append(Child.node("server", address))
    children += [scheduler, *nodes]
    all_nodes = {"scheduler": scheduler, "server 0": nodes[2]}
    for one in nodes[:2]:
        one.says("joining")
        one.says("joined")
        all_nodes[f"worker {one.stdout.readline().strip()}"] = one
    nodes[2].says("joined")
    dying = all_nodes[victim]
    begin = time.time()
    dying.kill()
    named = f"the scheduler at {address}"
    if victim != "scheduler":
        named = f"{victim} (host {socket.gethostname()}, pid {dying.pid}) is gone"
    for one in nodes:
        if one is not dying:
            at, name, text = one.stdout.readline().split(maxsplit=2)
            assert name == "PeerLostError" and named in text
            assert float(at) - begin < SOON
            one.ends(1)
    if victim != "scheduler":
        _, err = scheduler.ends(1)
        first, last = err.splitlines()
        assert first.startswith(f"kvstore: {named}")
        assert last.startswith(f"kvstore.server: {named}")


def test_a_stopped_process_is_not_dead(make_cluster, children):
    cluster = make_cluster(1, 1)
    stopped = Child.node("worker", cluster.address, "time.sleep(60)")
    children.append(stopped)
    server = cluster.join("server").result(LONG)
    stopped.send_signal(signal.SIGSTOP)
    until(lambda: server.dead_nodes("worker", 1.5) == 1)
    assert server.core.lost is None
    stopped.send_signal(signal.SIGCONT)
    until(lambda: server.dead_nodes("worker", 1.5) == 0)


# ----------------------------------------------------------------------------------------- ends


def test_an_orderly_end_has_exit_status_0_everywhere(children):
    scheduler, address = Child.scheduler(2, 1)
    work = "member.barrier(60); member.command(1, '0', 60); member.close(60)"
    children += [scheduler]
    children += [Child.node("worker", address, work) for _ in range(2)]
    children.append(Child.node("server", address))
    for one in children[1:]:
        out, err = one.ends(0)
        assert out.endswith("done\n") and err == ""
    out, err = scheduler.ends(0)
    assert (out, err) == ("", "")


def test_a_worker_that_ends_without_close_has_left(make_cluster, children):
    cluster = make_cluster(2, 1)
    first = Child.node("worker", cluster.address, "sys.exit(0)")
    server = Child.node("server", cluster.address)
    children += [first, server]
    second = cluster.join("worker").result(LONG)
    first.ends(0)
    second.command(1, "0", LONG)
    with pytest.raises(kvstore.PeerLostError, match="has left"):
        second.barrier(LONG)
    second.close(LONG)
    server.ends(0)
    assert cluster.ended.result(LONG) is None


def test_a_worker_that_ends_by_an_exception_is_lost_and_the_exception_is_told(
    make_cluster, children
):
    cluster = make_cluster(2, 1)
    children.append(Child.node("worker", cluster.address, "raise"))
    children.append(Child.node("server", cluster.address))
    second = cluster.join("worker").result(LONG)
    with pytest.raises(
        kvstore.PeerLostError, match="it ended by RuntimeError: No active exception"
    ):
        second.barrier(LONG)
    _, err = children[0].ends(1)
    assert "RuntimeError" in err


def test_a_child_of_a_launcher_ends_with_it(children):
    read_fd, write_fd = os.pipe()
    children.append(
        Child(
            "-m",
            "kvstore.server",
            pass_fds=[read_fd],
            KVSTORE_ROLE="scheduler",
            KVSTORE_SCHEDULER="127.0.0.1:0",
            KVSTORE_NUM_WORKERS="1",
            KVSTORE_NUM_SERVERS="1",
            KVSTORE_PARENT_FD=str(read_fd),
        )
    )
    os.close(read_fd)
    assert "listens on" in children[0].stderr.readline()
    assert children[0].poll() is None
    os.close(write_fd)
    children[0].ends(1)


# --------------------------------------------------------------------------------------- Ctrl-C


def test_ctrl_c_ends_looking_for_a_scheduler(children):
    children.append(Child.node("worker", "127.0.0.1:1"))
    children[0].says("joining")
    interrupted(children[0])


def test_ctrl_c_ends_the_wait_for_the_cluster_and_makes_room(make_cluster, children):
    cluster = make_cluster(1, 1)
    children.append(Child.node("worker", cluster.address))
    until(lambda: cluster.scheduler.roster.nodes)
    interrupted(children[0])
    until(lambda: not cluster.scheduler.roster.nodes)
    cluster.start()


@pytest.mark.parametrize(
    ("wait", "begun"),
    [
        ("member.barrier(60)", lambda s: s.calls._barriers),
        ("member.command(1, '60', 60)", lambda s: s.calls._commands),
        ("member.close(60)", lambda s: s.calls._leaves),
    ],
)
def test_ctrl_c_ends_a_workers_wait(wait, begun, make_cluster, children):
    cluster = make_cluster(2, 1)
    children.append(Child.node("worker", cluster.address, wait))
    joining = cluster.join("worker"), cluster.join("server")
    for future in joining:
        future.result(LONG)
    until(lambda: begun(cluster.scheduler))
    interrupted(children[0])


def test_ctrl_c_ends_a_server_and_the_others_hear_of_it(make_cluster, children):
    cluster = make_cluster(1, 1)
    children.append(Child.node("server", cluster.address))
    worker = cluster.join("worker").result(LONG)
    interrupted(children[0])
    with pytest.raises(kvstore.PeerLostError, match=r"server 0 \(.*KeyboardInterrupt"):
        worker.barrier(LONG)


def test_ctrl_c_ends_a_scheduler(children):
    scheduler, _ = Child.scheduler(1, 1)
    children.append(scheduler)
    begin = time.time()
    scheduler.send_signal(signal.SIGINT)
    out, err = scheduler.ends(130)
    assert time.time() - begin < SOON + 1  # and the end of an interpreter
    assert out + err == ""


# ----------------------------------------------------------------------------------------- fork

FORKED = """
child = os.fork()
if child == 0:
    for call in (lambda: member.barrier(60), lambda: member.command(1, "0", 60)):
        try:
            call()
        except Exception as error:
            print(type(error).__name__, error, flush=True)
    member.close(60)
    {then}
"""


def test_a_forked_child_has_no_place_in_the_cluster(make_cluster, children):
    cluster = make_cluster(1, 1)
    action = (
        FORKED.format(then="sys.exit(0)")
        + "os.waitpid(child, 0); member.barrier(60); member.close()"
    )
    first, server = started(cluster, children, ("worker", action), ("server", ""))
    for _ in range(2):
        line = first.stdout.readline()
        assert line.startswith("ClosedError") and f"process {first.pid}" in line
        assert "spawn" in line
    out, err = first.ends(0)
    assert out.endswith("done\n") and "Traceback" not in err
    server.ends(0)
    assert cluster.ended.result(LONG) is None


def test_a_forked_child_does_not_hide_the_death_of_its_parent(make_cluster, children):
    cluster = make_cluster(1, 1)
    action = FORKED.format(then="print(os.getpid(), flush=True); time.sleep(60)") + "time.sleep(60)"
    first, server = started(cluster, children, ("worker", action), ("server", ""))
    lines = [first.stdout.readline() for _ in range(3)]
    child = int(lines[2])
    try:
        begin = time.time()
        first.kill()
        at, name, _ = server.stdout.readline().split(maxsplit=2)
        assert name == "PeerLostError" and float(at) - begin < SOON
        os.kill(child, 0)  # it still lives
    finally:
        os.kill(child, signal.SIGKILL)


def test_a_forked_child_may_join_another_cluster(make_cluster, children):
    first, second = make_cluster(1, 1), make_cluster(1, 1)
    action = FORKED.format(
        then=f"""
    Member.join(make_settings("worker", {second.address!r}), make_core=FakeCore).close()
    print("joined", flush=True)
    os._exit(0)"""
    )
    action += "os.waitpid(child, 0); member.close()"
    worker, _ = started(first, children, ("worker", action), ("server", ""))
    server = second.join("server").result(LONG)
    second.serve(server).result(LONG)
    out, _ = worker.ends(0)
    assert "joined" in out
    assert second.ended.result(LONG) is None


# ------------------------------------------------------------------------------------ serve


def test_the_controller_of_the_command_line_is_found():
    assert server._controller("os.path:join") is os.path.join
    assert server._controller("threading:Thread.start") is threading.Thread.start


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("os.path", "MODULE:FUNC"),
        (":join", "MODULE:FUNC"),
        ("os.path:", "MODULE:FUNC"),
        ("no_such_module:f", "no_such_module"),
        ("os.path:no_such", "no_such"),
        ("os.path:sep", "cannot be called"),
    ],
)
def test_a_controller_that_is_not_there_is_refused_before_joining(text, error, children):
    with pytest.raises(kvstore.KVStoreError, match=error):
        server._controller(text)


def test_the_server_program_says_in_one_line_what_is_wrong(children):
    children.append(Child("-m", "kvstore.server", "--controller", "nothing", KVSTORE_ROLE="server"))
    out, err = children[0].ends(1)
    assert out == "" and err == "kvstore.server: --controller nothing: it is MODULE:FUNC\n"


def test_joining_may_be_tried_again_in_the_same_process(make_cluster):
    cluster = make_cluster(1, 1)
    with pytest.raises(kvstore.TimeoutError):
        Member.join(make_settings("worker", cluster.address, timeout=0.2), make_core=FakeCore)
    until(lambda: not cluster.scheduler.roster.nodes)
    cluster.start()
