"""Users' optimizers on servers of other processes: how permission is given, and what ends."""

import sys
from pathlib import Path

import numpy as np
import pytest
import summing
from killing import Processes
from launching import KVRUN, LONG, Marked, read_until, until
from test_kills import PULL, SOON_S, named

import kvstore
from kvstore.cluster import settings

pytestmark = pytest.mark.ucx

CODE = """
import numpy as np, kvstore, mine
with kvstore.create("dist") as kv:
    kv.set_optimizer(mine.Doubling(lr=0.5))
    kv.init("w", np.ones(3, "float32"))
    kv.push("w", np.ones(3, "float32"))
    print(kv.pull("w").asnumpy())
"""


@pytest.fixture
def real(tmp_path):
    (tmp_path / "mine.py").write_text(
        "import kvstore\n"
        "class Doubling(kvstore.optimizer.Optimizer):\n"
        "    def update(self, key, weight, grad, state):\n"
        "        weight -= 2 * self.lr * grad\n"
    )
    made = Marked(tmp_path, Path(__file__).parent, stand_in=False)
    yield made
    made.close()


@pytest.mark.parametrize("given", ["option", "variable"])
def test_kvrun_lets_servers_import(given, real):
    options = ("--allow-import", "other.one", "--allow-import", "mine")
    if given == "variable":
        real.env["KVSTORE_ALLOW_IMPORT"], options = "other.one,mine", ()
    done = real.run(*KVRUN, "-n", "2", "-s", "2", *options, sys.executable, "-c", CODE)
    assert (done.returncode, done.stderr) == (0, "")
    assert sorted(done.stdout.splitlines()) == [f"[worker {i}] [-1. -1. -1.]" for i in range(2)]


def test_without_permission_the_worker_is_told_how_to_give_it(real):
    options = ("--allow-import", "mine.below")
    done = real.run(*KVRUN, "-n", "1", "-s", "1", *options, sys.executable, "-c", CODE)
    assert done.returncode == 1
    assert "start it with kvrun --allow-import mine, or allow_import='mine' of" in done.stderr


def train():
    with kvstore.create("dist_sync") as kv:
        kv.set_optimizer(summing.Summing(learning_rate=0.5))
        kv.init("w", np.zeros(1_000_000))
        kv.push("w", np.ones(1_000_000))
        return kv.pull("w").asnumpy()[[0, -1]].tolist()


@pytest.mark.parametrize("given", ["summing", ["other", "summing"], None])
def test_servers_of_a_local_cluster(given, monkeypatch):
    if given is None:
        monkeypatch.setenv("KVSTORE_ALLOW_IMPORT", "summing")
    with kvstore.LocalCluster(2, 2, allow_import=given, timeout=LONG) as cluster:
        assert cluster.run(train) == [[-1, -1]] * 2
        assert cluster.run(train) == [[-1, -1]] * 2  # with new servers


@pytest.mark.parametrize("bad", ["1x", "a..b", "mine:Doubling", [3], 7, "a,,b", "a b"])
def test_a_name_that_is_no_module_is_refused(bad):
    with pytest.raises(kvstore.InvalidArgumentError, match=r"allow_import.*a module such as"):
        kvstore.LocalCluster(1, 1, allow_import=bad)
    place = {"role": "server", "scheduler": "127.0.0.1:1"}
    with pytest.raises(kvstore.InvalidArgumentError, match=r"allow_import.*a module such as"):
        settings.read({**place, "allow_import": bad})


def test_kvrun_refuses_it_too(real):
    done = real.run(*KVRUN, "-n", "1", "--allow-import", "a b", "true")
    assert done.returncode == 2
    assert "a module such as" in done.stderr


# ----------------------------------------------------------------------------- while a class runs


@pytest.fixture
def endless():
    """Two workers that wait for an update that does not come back."""
    cluster = Processes([("steps", "")] * 2, 1)
    try:
        for name in cluster.workers():
            line = "kv.set_optimizer(__import__('summing').Endless()) or "
            cluster.tell(name, line + "kv.init('w', np.zeros(4, 'float32'))")
        for name in cluster.workers():
            told = cluster.hear(name)
            assert told.get("value", told) is None
        for name in cluster.workers():
            push = "kv.push('w', np.ones(4, 'float32'))"
            assert cluster.ask(name, push)["value"] is None
        assert cluster.all["server 0"].stdout.readline() == "it waits\n"
        yield cluster
    finally:
        cluster.close()


@pytest.mark.parametrize("victim", ["worker 1", "server 0"])
def test_a_kill_is_told_to_who_waits_for_it(victim, endless):
    endless.tell("worker 0", PULL)
    at = endless.kill(victim)
    told = endless.hear("worker 0")
    assert told["error"] == "PeerLostError" and named(victim) in told["text"], told
    assert told["at"] - at < SOON_S


def test_a_kill_while_states_are_packed_leaves_the_file(tmp_path):
    path = tmp_path / "states"
    path.write_bytes(b"old")
    cluster = Processes([("steps", "")] * 2, 1)
    try:
        for line in (
            "kv.set_optimizer(__import__('summing').Packing())",
            "kv.init('w', np.zeros(4, 'float32'))",
            "kv.push('w', np.ones(4, 'float32'))",
            PULL,
        ):
            for name in cluster.workers():
                cluster.tell(name, line)
            for name in cluster.workers():
                assert "error" not in cluster.hear(name)
        cluster.tell("worker 0", f"kv.save_optimizer_states({str(path)!r})")
        assert cluster.all["server 0"].stdout.readline() == "it packs\n"
        at = cluster.kill("server 0")
        told = cluster.hear("worker 0")
        assert told["error"] == "PeerLostError" and named("server 0") in told["text"], told
        assert told["at"] - at < SOON_S
        assert [one.name for one in tmp_path.iterdir()] == ["states"]
        assert path.read_bytes() == b"old"
    finally:
        cluster.close()


def test_ctrl_c_ends_a_server_whose_class_does_not(real):
    code = CODE.replace("mine.Doubling(lr=0.5)", "mine.Endless()").replace("mine", "summing")
    options = ("--allow-import", "summing")
    process = real.start(*KVRUN, "-n", "1", "-s", "1", *options, sys.executable, "-c", code)
    read_until(process, "it waits")
    process.send_signal(2)
    assert process.wait(LONG) == 130
    until(lambda: real.alive() == {})
