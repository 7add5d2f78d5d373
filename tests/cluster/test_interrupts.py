"""Ctrl-C and deadlines in every call that waits for another process, in clusters of processes."""

import contextlib
import signal
from pathlib import Path

import pytest
from fakes import LONG, until
from killing import Processes

pytestmark = pytest.mark.ucx

SOON_S, HASTY_S = 2.0, 2.0
A, B = "worker 0", "worker 1"
SERVERS = ("server 0", "server 1")
ZEROS, ONES = "np.zeros(4, 'float32')", "np.ones(4, 'float32')"
LARGE = "np.ones(1 << 20, 'float32')"


def is_stopped(pid):
    states = []
    for path in Path(f"/proc/{pid}/task").glob("*/stat"):
        states.append(path.read_text().rpartition(")")[2].split()[0])
    return set(states) == {"T"}


class Steps(Processes):
    """Two workers that do what they are told, and two servers. The key 'w' is there."""

    def __init__(self, timeout=LONG):
        super().__init__([("steps", "")] * 2, 2, timeout=timeout)
        self.both(f"kv.init('w', {ZEROS})")
        self.rounds = 0

    def value(self, name, line):
        told = self.ask(name, line)
        assert "value" in told, (name, line, told)
        return told["value"]

    def both(self, line):
        for name in (A, B):
            self.tell(name, line)
        told = [self.hear(name) for name in (A, B)]
        assert all("value" in one for one in told), (line, told)
        return [one["value"] for one in told]

    def interrupt(self, name, line):
        assert self.value(name, f"interrupted(lambda: {line})") < SOON_S

    def error(self, name, line, kind, *words):
        told = self.ask(name, line)
        assert told.get("error") == kind and all(word in told["text"] for word in words), told

    @contextlib.contextmanager
    def stopped_servers(self):
        for name in SERVERS:
            self.signal(name, signal.SIGSTOP)
        try:
            until(lambda: all(is_stopped(self.all[name].pid) for name in SERVERS))
            yield
        finally:
            for name in SERVERS:
                self.signal(name, signal.SIGCONT)

    def until(self, name, line):
        until(lambda: self.value(name, line))

    def check(self):
        """A round and a barrier, as if nothing had been, and no trace of the test's key."""
        self.both("kv.delete('x') if 'x' in kv else None")
        self.rounds += 1
        value = [2.0 * self.rounds] * 4
        self.both(f"kv.push('w', {self.rounds} * {ONES})")
        assert self.both("kv.pull('w').asnumpy().tolist()") == [value, value]
        self.both("kv.barrier()")


def cluster_of(timeout):
    cluster = Steps(timeout=timeout)
    try:
        yield cluster
        cluster.finish()
    finally:
        cluster.close()


@pytest.fixture(scope="module")
def shared():
    yield from cluster_of(LONG)


@pytest.fixture(scope="module")
def shared_hasty():
    yield from cluster_of(HASTY_S)


@pytest.fixture
def cluster(shared):
    """For calls that end by Ctrl-C."""
    yield shared
    shared.check()


@pytest.fixture
def hasty(shared_hasty):
    """Its calls have a short deadline."""
    yield shared_hasty
    shared_hasty.check()


# ----------------------------------------------------------------------------- init, broadcast

NEW = {
    "init": "kv.init('x', np.full(4, kv.rank + 1.0))",
    "broadcast": "kv.broadcast('x', np.full(4, kv.rank + 1.0), out=out)",
}


@pytest.mark.parametrize("call", NEW)
def test_ctrl_c_ends_a_wait_for_worker_0_to_initialise_a_key(call, cluster):
    cluster.value(B, "globals().update(out=np.full(4, 9.0))")
    cluster.interrupt(B, NEW[call])
    assert cluster.value(B, "('x' in kv, out.tolist())") == [False, [9, 9, 9, 9]]
    cluster.value(A, "kv.init('x', np.full(4, 1.0))")
    assert cluster.value(B, "out.tolist()") == [9, 9, 9, 9]
    cluster.value(B, NEW[call])
    assert cluster.value(B, "kv.pull('x').asnumpy().tolist()") == [1, 1, 1, 1]


@pytest.mark.parametrize("call", NEW)
def test_what_ctrl_c_has_left_of_an_init_by_worker_0_counts_when_servers_come_to_it(call, cluster):
    """Nobody else can know that its caller has not waited, so the key is there for all."""
    cluster.value(A, "globals().update(out=np.full(4, 9.0))")
    with cluster.stopped_servers():
        cluster.interrupt(A, NEW[call])
        assert cluster.value(A, "'x' in kv") is False
    cluster.value(B, "kv.init('x', np.full(4, 2.0))")
    cluster.until(A, "'x' in kv")
    assert cluster.value(A, "out.tolist()") == [9, 9, 9, 9]
    cluster.error(A, NEW["init"], "InvalidArgumentError", "'x' is initialised already")
    assert cluster.both("kv.pull('x').asnumpy().tolist()") == [[1, 1, 1, 1]] * 2


def test_the_deadline_of_an_init_says_who_is_missing_or_that_the_key_may_be_there(hasty):
    hasty.error(B, NEW["init"], "TimeoutError", "'x'", "worker 0 has not initialised")
    words = ("'x'", "server 0", "has not answered", "it may be initialised all the same")
    with hasty.stopped_servers():
        hasty.error(A, NEW["init"], "TimeoutError", *words)
    hasty.until(A, "'x' in kv")
    hasty.value(B, NEW["init"])


# ------------------------------------------------------------------------------------- delete


def test_a_delete_that_ctrl_c_has_ended_may_still_happen(cluster):
    cluster.both(f"kv.init('x', {ZEROS})")
    cluster.interrupt(A, "kv.delete('x')")
    assert cluster.value(A, "kv.pull('x').asnumpy().tolist()") == [0, 0, 0, 0]
    cluster.tell(A, f"kv.push('x', {ONES})")  # waits behind the delete
    cluster.value(B, "kv.delete('x')")
    told = cluster.hear(A)
    assert told["error"] == "KeyNotFoundError" and "key 'x' was deleted before" in told["text"]
    cluster.error(A, f"kv.push('x', {ONES})", "KeyNotFoundError", "'x'")
    assert cluster.both("'x' in kv") == [False, False]
    cluster.both("kv.init('x', np.zeros(7))")
    assert cluster.both("kv.pull('x').asnumpy().tolist()") == [[0] * 7] * 2


def test_a_delete_that_ctrl_c_has_ended_and_nobody_else_asks_for_does_not_happen(hasty):
    hasty.both(f"kv.init('x', {ZEROS})")
    hasty.interrupt(A, "kv.delete('x')")
    hasty.both(f"kv.push('x', {ONES})")  # worker 0's waits behind the delete, for its deadline
    assert hasty.both("kv.pull('x').asnumpy().tolist()") == [[2, 2, 2, 2]] * 2


# --------------------------------------------------------------------------------- held pushes


@pytest.mark.parametrize("value", [ONES, LARGE], ids=["small", "large"])
def test_ctrl_c_ends_a_push_that_is_held_back_and_its_value_may_be_changed(value, cluster):
    cluster.both(f"kv.init('x', 0 * {value})")
    cluster.value(A, f"globals().update(value={value})")
    for _ in range(2):
        cluster.value(A, "kv.push('x', value)")
    cluster.interrupt(A, "kv.push('x', value)")
    cluster.value(A, "value.fill(77)")
    for _ in range(3):  # the one that was ended counts
        cluster.value(B, f"kv.push('x', {value})")
    both = "[kv.pull('x').asnumpy()[i].item() for i in (0, -1)]"
    assert cluster.both(both) == [[2, 2]] * 2
    cluster.both(f"kv.push('x', 2 * {value})")
    assert cluster.both(both) == [[4, 4]] * 2


# --------------------------------------------------------------------- the control plane's calls


def test_ctrl_c_ends_a_barrier_and_the_next_one_takes_all_again(cluster):
    cluster.interrupt(A, "kv.barrier()")
    assert cluster.value(A, "kv.num_dead_node()") == 0  # its answer comes behind the withdrawal
    cluster.interrupt(B, "kv.barrier()")
    assert cluster.value(B, "kv.num_dead_node()") == 0
    cluster.both("kv.barrier()")


def test_the_deadline_of_a_barrier_names_who_is_missing(hasty):
    hasty.error(A, "kv.barrier()", "TimeoutError", "worker 1 (")
    hasty.both("kv.barrier()")


def test_ctrl_c_and_deadlines_end_a_command_and_later_ones_are_run(hasty):
    hasty.interrupt(A, "kv.send_command_to_servers(1, '4')")
    names = ("command 2", "server 0 (", "server 1 (")
    hasty.error(A, "kv.send_command_to_servers(2, '0')", "TimeoutError", *names)
    while "error" in (told := hasty.ask(B, "kv.send_command_to_servers(3, '0')")):
        assert told["error"] == "TimeoutError"


CLOSES = {
    "waits for the others": "None",
    "waits for what it has pushed": f"kv.push('w', {ONES})",
}


@pytest.mark.parametrize("before", CLOSES)
def test_ctrl_c_ends_close_which_has_closed_all_the_same(before):
    for cluster in cluster_of(LONG):
        cluster.value(A, CLOSES[before])
        cluster.interrupt(A, "kv.close()")
        cluster.error(A, "kv.pull('w')", "ClosedError", "closed")
        cluster.error(B, "kv.barrier()", "PeerLostError", "worker 0 (", "has left")
