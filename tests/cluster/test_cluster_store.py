"""Stores of whole clusters of processes, over the real data plane: the values of a local store."""

import signal
import sys
from pathlib import Path

import numpy as np
import pytest
import store_program
from helpers import same
from launching import KVRUN, LONG, Marked, read_until

import kvstore
from kvstore import optimizer

pytestmark = pytest.mark.ucx

HERE = Path(__file__).parent
SIZES = [(1, 1), (2, 1), (2, 2), (4, 2)]


@pytest.fixture
def marked():
    made = Marked(HERE, stand_in=False)
    yield made
    made.close()


def assert_same_as_alone(results, num_workers):
    expected = store_program.alone(num_workers)
    assert len(results) == num_workers
    for found in results:
        assert list(found) == list(expected)
        for name, value in expected.items():
            assert same(found[name], value), name


def commands_got(num_servers):
    return sorted(
        f"[server {rank}] got {head} {body}"
        for rank in range(num_servers)
        for head, body in store_program.COMMANDS
    )


@pytest.mark.parametrize(("num_workers", "num_servers"), SIZES)
def test_kvrun_gives_the_values_of_a_local_store(marked, tmp_path, num_workers, num_servers):
    done = marked.run(
        *KVRUN,
        *("-n", str(num_workers), "-s", str(num_servers), "--timeout", str(LONG)),
        *("--controller", "store_program:controller"),
        *(sys.executable, store_program.__file__, str(tmp_path)),
    )
    assert (done.returncode, done.stderr) == (0, "")
    results = [dict(np.load(tmp_path / f"{rank}.npz")) for rank in range(num_workers)]
    assert_same_as_alone(results, num_workers)
    assert sorted(done.stdout.splitlines()) == commands_got(num_servers)


@pytest.mark.parametrize(("num_workers", "num_servers"), SIZES)
def test_a_local_cluster_gives_the_values_of_a_local_store(capsys, num_workers, num_servers):
    with kvstore.LocalCluster(
        num_workers, num_servers, controller=store_program.controller, timeout=LONG
    ) as cluster:
        for _ in range(2 if num_workers > num_servers == 1 else 1):
            assert_same_as_alone(cluster.run(store_program.with_cluster), num_workers)
            out, err = capsys.readouterr()
            assert err == ""
            assert sorted(out.splitlines()) == commands_got(num_servers)


def step_with_norms(gradients):
    with kvstore.create("dist_sync") as kv:
        kv.set_optimizer(optimizer.LAMB(learning_rate=0.1, wd=0.01))
        kv.init("w", np.ones_like(gradients[0]))
        for gradient in gradients:
            kv.push("w", gradient * (kv.rank + 1))
        return kv.pull("w").asnumpy()


def test_servers_tell_each_other_their_norms():
    gradients = np.random.default_rng(1).normal(size=(3, 900_000)).astype("float32")
    local = kvstore.create("local")
    local.set_optimizer(optimizer.LAMB(learning_rate=0.1, wd=0.01))
    local.init("w", np.ones_like(gradients[0]))
    for gradient in gradients:
        local.push("w", [gradient, gradient * 2])
    wanted = local.pull("w").asnumpy()
    with kvstore.LocalCluster(2, 2, timeout=LONG) as cluster:
        for value in cluster.run(step_with_norms, gradients):
            assert np.abs(value - wanted).max() <= 3e-7 * np.abs(wanted).max()


def keep_a_store(how):
    kv = kvstore.create("dist_sync")
    kv.init("w", np.zeros(3, "float32"))
    kv.push("w", np.ones(3, "float32"))
    pulled = kv.pull("w").asnumpy()
    kv.barrier()
    if how == "raise":
        raise ValueError(kv.rank)
    if how == "keep":
        sys.kept = kv
    return pulled.tolist()


def use_the_kept_store():
    kv = sys.__dict__.pop("kept")
    kv.push("w", np.full(3, 5, "float32"))
    return kv.pull("w").asnumpy().tolist()


def test_a_run_finds_the_store_that_one_before_has_kept_and_none_that_was_dropped():
    with kvstore.LocalCluster(2, 1, timeout=LONG) as cluster:
        assert cluster.run(keep_a_store, "drop") == [[2, 2, 2]] * 2
        with pytest.raises(ValueError, match=r"^[01]$"):
            cluster.run(keep_a_store, "raise")
        assert cluster.run(keep_a_store, "keep") == [[2, 2, 2]] * 2
        assert cluster.run(use_the_kept_store) == [[10, 10, 10]] * 2
        assert cluster.run(keep_a_store, "drop") == [[2, 2, 2]] * 2


def test_a_worker_that_is_killed_breaks_the_others_waits_and_ends_the_run(marked):
    code = (
        "import os, signal, sys, numpy as np, kvstore\n"
        "kv = kvstore.create('dist_sync')\n"
        "kv.init('w', np.zeros(3, 'float32'))\n"
        "print('up', flush=True)\n"
        "if kv.rank == 1: os.kill(os.getpid(), signal.SIGKILL)\n"
        "kv.push('w', np.ones(3, 'float32'))\n"
        "kv.pull('w')\n"
        "kv.barrier()\n"
    )
    done = marked.run(*KVRUN, "-n", "2", sys.executable, "-c", code)
    assert done.returncode == 128 + signal.SIGKILL
    assert "kvrun: worker 1 was killed by SIGKILL\n" in done.stderr


def test_ctrl_c_ends_workers_that_wait_for_a_store(marked):
    code = (
        "import numpy as np, kvstore\n"
        "kv = kvstore.create('dist_sync')\n"
        "kv.init('w', np.zeros(3, 'float32'))\n"
        "print('up', flush=True)\n"
        "if kv.rank == 0: kv.barrier()\n"
        "import signal; signal.pause()\n"
    )
    process = marked.start(*KVRUN, "-n", "2", sys.executable, "-c", code)
    read_until(process, "up")
    read_until(process, "up")
    process.send_signal(signal.SIGINT)
    assert process.wait(2 * LONG) == 128 + signal.SIGINT
    assert marked.alive() == {}


def test_this_process_is_a_worker_among_those_of_its_cluster():
    controller = store_program.controller
    with kvstore.LocalCluster(2, 1, controller=controller, join=True, timeout=LONG) as cluster:
        run = cluster.submit(store_program.with_cluster)
        mine = store_program.with_cluster(**cluster.options)
        assert_same_as_alone([mine, *run.result()], 2)
