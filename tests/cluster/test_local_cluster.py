"""`LocalCluster`: runs, their errors and prints, and that its processes end with it."""

import asyncio
import gc
import os
import signal
import sys
import time
import weakref
from pathlib import Path

import nbformat
import numpy as np
import pytest
from launching import LONG, STAND_IN, Marked, paths, read_until, until
from nbclient import NotebookClient

import kvstore
from kvstore import LocalCluster
from kvstore.cluster import run as runs

pytestmark = pytest.mark.ucx

HERE = Path(__file__).parent


@pytest.fixture(autouse=True)
def data_plane(monkeypatch):
    """One that moves nothing, in this process and in those of the clusters."""
    monkeypatch.setattr(runs, "FAILED_S", LONG)
    sys.path.insert(0, str(STAND_IN))
    monkeypatch.setenv("PYTHONPATH", paths(STAND_IN))
    yield
    sys.path.remove(str(STAND_IN))


@pytest.fixture(scope="module")
def shared():
    """A cluster for tests that leave it usable."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", paths(STAND_IN))
        made = LocalCluster(3, 1)
    yield made
    made.close()


def pids(cluster):
    return [process.pid for process in cluster._cluster.processes]


def gone(numbers):
    return not any(Path(f"/proc/{pid}").exists() for pid in numbers)


def rank():
    return int(os.environ["KVSTORE_RANK"])


def join_and_leave(leave=True):
    """What a store does, as far as the scheduler sees it."""
    from kvstore.cluster import member, settings

    one = member.Member.join(settings.read())
    one.barrier(LONG)
    if leave:
        one.close(LONG)
    return one.settings.address, one.rank


def interrupt_the_maker():
    """Ctrl-C in the process that has made the cluster, while this run is under way."""
    if rank() == 0:
        os.kill(os.getppid(), signal.SIGINT)
    signal.pause()


# ------------------------------------------------------------------------------------------ results


def test_results_come_by_rank(shared):
    assert shared.run(rank) == [0, 1, 2]


def test_arguments_and_closures_travel(shared):
    factor = 10
    assert shared.run(lambda a, *, b: (rank() * factor, a, b), "x", b=[1]) == [
        (0, "x", [1]),
        (10, "x", [1]),
        (20, "x", [1]),
    ]


def test_large_arguments_and_results_travel(shared):
    value = np.arange(1 << 21, dtype="float64")
    for number, result in enumerate(shared.run(lambda a: a + rank(), value)):
        assert (result == value + number).all()


def test_workers_keep_what_a_run_has_left(shared):
    shared.run(lambda: setattr(sys, "left_by_a_run", rank()))
    assert shared.run(lambda: sys.left_by_a_run) == [0, 1, 2]


def test_a_class_made_here_comes_back_as_the_same(shared):
    class Local:
        pass

    assert {type(result) for result in shared.run(Local)} == {Local}


def test_modules_are_found_by_the_search_path_of_the_moment(shared, tmp_path, monkeypatch):
    (tmp_path / "module_of_a_test.py").write_text("def f():\n    return 5\n")
    monkeypatch.syspath_prepend(tmp_path)
    from module_of_a_test import f

    assert shared.run(f) == [5, 5, 5]


def test_the_input_of_workers_is_empty(shared):
    def read():
        return sys.stdin.read()

    assert shared.run(read) == [""] * 3


def test_a_submitted_run_is_waited_for_as_long_as_one_likes(shared, tmp_path):
    go = tmp_path / "go"

    def wait():
        while not go.exists():
            time.sleep(0.005)
        return rank()

    run = shared.submit(wait)
    with pytest.raises(kvstore.TimeoutError, match=r"wait.*0\.01 s"):
        run.result(timeout=0.01)
    assert not run.done()
    assert "running" in repr(shared)
    assert "under way" in repr(run)
    with pytest.raises(kvstore.InvalidArgumentError, match="wait"):
        shared.run(rank)
    go.touch()
    assert run.result() == run.result() == [0, 1, 2]
    assert run.done()
    assert shared.run(rank) == [0, 1, 2]


# ------------------------------------------------------------------------------------------- errors


def test_an_exception_is_raised_here_with_its_traceback_and_rank(shared):
    def fail_in_one():
        if rank() == 1:
            raise ZeroDivisionError("divided by nothing")
        return rank()

    with pytest.raises(ZeroDivisionError, match="divided by nothing") as caught:
        shared.run(fail_in_one)
    cause = caught.value.__cause__
    assert cause.rank == 1
    assert str(cause).startswith("in worker 1 (pid ")
    assert "fail_in_one" in str(cause)
    assert "answer_to" not in str(cause)
    assert shared.run(rank) == [0, 1, 2]


def test_an_exception_of_the_package_keeps_its_class(shared):
    def fail():
        raise kvstore.KeyNotFoundError("no key")

    with pytest.raises(kvstore.KeyNotFoundError, match=r"^no key$"):
        shared.run(fail)


def test_what_cannot_travel_is_told_by_its_traceback(shared):
    def fail():
        error = ValueError("holds a lock")
        error.lock = __import__("threading").Lock()
        raise error

    class Odd(Exception):
        def __init__(self, one, two):
            super().__init__(one)

    def fail_oddly():
        raise Odd("first", "second")

    def leave():
        sys.exit(3)

    for function, told in (
        (fail, "ValueError: holds a lock"),
        (fail_oddly, "Odd: first"),
        (leave, "SystemExit: 3"),
    ):
        with pytest.raises(kvstore.KVStoreError, match=f"worker [012] failed: .*{told}"):
            shared.run(function)
    with pytest.raises(TypeError, match="pickle"):
        shared.run(lambda: __import__("threading").Lock())
    assert shared.run(rank) == [0, 1, 2]


def test_what_cannot_be_sent_is_refused(shared):
    import threading

    with pytest.raises(kvstore.ArrayTypeError, match="pickle"):
        shared.run(rank, threading.Lock())
    with pytest.raises(kvstore.ArrayTypeError, match="function"):
        shared.run(3)
    assert shared.run(rank) == [0, 1, 2]


def test_without_cloudpickle_functions_of_modules_work_and_others_say_what_is_missing(
    shared, monkeypatch
):
    monkeypatch.setitem(sys.modules, "cloudpickle", None)
    assert shared.run(rank) == [0, 1, 2]
    with pytest.raises(kvstore.NotBuiltError, match="pip install cloudpickle"):
        shared.run(lambda: 3)
    of_a_cell = type(rank)(rank.__code__, {}, "of_a_cell")
    of_a_cell.__module__, of_a_cell.__qualname__ = "__main__", "of_a_cell"
    monkeypatch.setattr(sys.modules["__main__"], "of_a_cell", of_a_cell, raising=False)
    with pytest.raises(kvstore.NotBuiltError, match="notebook or script"):
        shared.run(of_a_cell)


def test_wrong_arguments_are_refused(monkeypatch):
    for wrong in (0, -1, 1 << 40):
        with pytest.raises(kvstore.InvalidArgumentError, match=f"num_workers={wrong}"):
            LocalCluster(wrong, 1)
    for wrong in (-1, 1 << 40):
        with pytest.raises(kvstore.InvalidArgumentError, match=f"num_servers={wrong}"):
            LocalCluster(1, wrong)
    for wrong in (True, 1.5, "2"):
        with pytest.raises(kvstore.ArrayTypeError, match="num_workers"):
            LocalCluster(wrong, 1)
    for wrong in (0, -1, float("nan"), "long", True):
        with pytest.raises(kvstore.InvalidArgumentError, match="timeout"):
            LocalCluster(1, 1, timeout=wrong)
    monkeypatch.setenv("KVSTORE_TIMEOUT", "soon")
    with pytest.raises(kvstore.InvalidArgumentError, match="KVSTORE_TIMEOUT='soon'"):
        LocalCluster(1, 1)
    with pytest.raises(kvstore.ArrayTypeError, match="controller"):
        LocalCluster(1, 1, controller="module:f")


def test_a_cluster_that_does_not_start_says_what_has_died(monkeypatch, capsys):
    monkeypatch.setenv("KVSTORE_TEST_BROKEN", "server:4")
    with pytest.raises(kvstore.ClosedError, match=r"server 0 \(pid \d+\) ended with exit status 4"):
        LocalCluster(1, 1)
    assert "[server 0] broken by the test\n" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------- prints


def test_prints_come_with_a_prefix_before_the_run_returns(shared, capsys):
    def say():
        print("to", "output")
        print("größer to error", file=sys.stderr)
        sys.stdout.write("no end")

    shared.run(say)
    out, err = capsys.readouterr()
    assert sorted(err.splitlines()) == [f"[worker {r}] größer to error" for r in range(3)]
    assert sorted(out.splitlines()) == [
        f"[worker {r}] {text}" for r in range(3) for text in ("no end", "to output")
    ]


def test_many_prints_come_all_and_in_order(shared, capsys):
    def say():
        for i in range(5000):
            print(rank(), i)

    shared.run(say)
    lines = capsys.readouterr().out.splitlines()
    for r in range(3):
        mine = [line for line in lines if line.startswith(f"[worker {r}] {r} ")]
        assert mine == [f"[worker {r}] {r} {i}" for i in range(5000)]


# ----------------------------------------------------------------------------------------- sessions


def test_runs_that_leave_get_a_new_session_and_those_that_stay_keep_theirs(shared):
    first = shared.run(join_and_leave)
    assert [number for _, number in first] == [0, 1, 2]
    second = shared.run(join_and_leave)
    assert second[0][0] != first[0][0]
    third = shared.run(rank), shared.options["scheduler"]
    assert third[1] != second[0][0]
    assert shared.options["scheduler"] == third[1]


def test_commands_reach_the_controller_and_the_cluster_closes_in_order(capsys):
    secret = "closure"

    def controller(head, body):
        print(secret, head, body)

    def command():
        from kvstore import _dist
        from kvstore.cluster import member, settings

        one = member.Member.join(settings.read())
        if rank() == 0:
            _dist.command(one, 4, "text", LONG)
        one.close(LONG)

    with LocalCluster(2, 2, controller=controller) as cluster:
        cluster.run(command)
    out, err = capsys.readouterr()
    assert sorted(out.splitlines()) == [f"[server {r}] closure 4 text" for r in range(2)]
    assert err == ""


def test_this_process_joins_as_rank_0():
    from fakes import FakeCore

    from kvstore.cluster import member, settings

    with LocalCluster(2, 1, join=True) as cluster:
        assert cluster.run(rank) == [1]
        run = cluster.submit(join_and_leave)
        one = member.Member.join(settings.read(cluster.options), make_core=FakeCore)
        assert (one.rank, one.num_workers) == (0, 2)
        one.barrier(LONG)
        one.close(LONG)
        assert run.result() == [(one.settings.address, 1)]


# ---------------------------------------------------------------------------------- how it all ends


def test_a_cluster_ends_once_and_says_so():
    open_before = len(os.listdir("/proc/self/fd"))
    with LocalCluster(1, 1) as cluster:
        assert repr(cluster) == "<kvstore.LocalCluster: 1 worker, 1 server, ready>"
        numbers = pids(cluster)
        assert len(numbers) == 3
    assert gone(numbers)
    assert repr(cluster) == "<kvstore.LocalCluster: 1 worker, 1 server, closed>"
    until(lambda: len(os.listdir("/proc/self/fd")) <= open_before)  # its thread ends too
    cluster.close()
    with pytest.raises(kvstore.ClosedError, match="closed"):
        cluster.run(rank)
    with pytest.raises(kvstore.ClosedError, match="closed"):
        _ = cluster.options


def test_an_error_in_the_block_ends_the_cluster_at_once():
    with pytest.raises(KeyError), LocalCluster(1, 1) as cluster:
        numbers = pids(cluster)
        run = cluster.submit(signal.pause)
        raise KeyError
    assert gone(numbers)
    with pytest.raises(kvstore.ClosedError, match="KeyError has left its block"):
        run.result()


def test_closing_ends_a_run():
    cluster = LocalCluster(np.int64(1), 1)
    numbers = pids(cluster)
    run = cluster.submit(signal.pause)
    cluster.close()
    assert gone(numbers)
    with pytest.raises(kvstore.ClosedError, match="closed during a run"):
        run.result()


def test_ctrl_c_ends_the_run_and_the_cluster_but_not_this_process():
    cluster = LocalCluster(2, 1)
    numbers = pids(cluster)
    with pytest.raises(KeyboardInterrupt):
        cluster.run(interrupt_the_maker)
    assert gone(numbers)
    assert "ended: a run was interrupted; make a new one" in repr(cluster)
    with pytest.raises(kvstore.ClosedError, match="make a new one"):
        cluster.run(rank)
    cluster.close()


def test_a_run_that_fails_in_one_worker_does_not_wait_for_ever_for_the_others(monkeypatch):
    monkeypatch.setattr(runs, "FAILED_S", 0.1)

    def fail_or_wait():
        if rank() == 1:
            raise ValueError("one has failed")
        signal.pause()

    cluster = LocalCluster(2, 1)
    numbers = pids(cluster)
    with pytest.raises(ValueError, match="one has failed"):
        cluster.run(fail_or_wait)
    assert gone(numbers)
    with pytest.raises(kvstore.ClosedError, match="failed in one worker"):
        cluster.run(rank)


@pytest.mark.parametrize(
    ("which", "descriptors"),
    [("worker 1", True), ("worker 1", False), ("server 0", True), ("scheduler", True)],
)
def test_a_process_that_dies_ends_the_run(which, descriptors, monkeypatch):
    if not descriptors:  # of processes: as on an old system
        monkeypatch.delattr(os, "pidfd_open")
    cluster = LocalCluster(2, 1)
    (victim,) = (p.pid for p in cluster._cluster.processes if p.name == which)
    numbers = pids(cluster)

    def kill():
        if rank() == 0:
            os.kill(victim, signal.SIGKILL)
        signal.pause()

    with pytest.raises(
        kvstore.PeerLostError, match=rf"{which} \(pid {victim}\) was killed by SIGK"
    ):
        cluster.run(kill)
    assert gone(numbers)
    assert f"{which} (pid {victim})" in repr(cluster)


def test_a_cluster_that_nobody_holds_is_gone():
    cluster = LocalCluster(1, 1)
    numbers, held = pids(cluster), weakref.ref(cluster)
    cluster.itself = cluster  # only the collector finds it
    del cluster
    gc.collect()
    assert held() is None
    assert gone(numbers)


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_fork_of_this_process_cannot_use_it_and_does_not_end_it(shared):
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            assert "fork" in repr(shared)
            shared.close()
            shared._kill()
            shared.run(rank)
        except kvstore.ClosedError:
            status = 0
        finally:
            os._exit(status)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert shared.run(rank) == [0, 1, 2]


SCRIPT = """
import signal
from kvstore import LocalCluster
class Local: pass
def function():
    print("up", flush=True)
    return Local()
cluster = LocalCluster(2, 1)
assert [type(result) for result in cluster.run(function)] == [Local, Local]
"""


@pytest.fixture
def marked():
    made = Marked()
    yield made
    made.close()


def test_a_script_that_forgets_to_close_leaves_nothing(marked):
    done = marked.run(sys.executable, "-c", SCRIPT)
    assert (done.returncode, done.stderr) == (0, "")
    assert sorted(done.stdout.splitlines()) == ["[worker 0] up", "[worker 1] up"]


def test_killing_the_maker_leaves_no_process(marked):
    # The fork keeps the pipes open, which is no reason for the others to live on.
    hang = "cluster.submit(signal.pause)\nimport os\npid = os.fork()\n"
    hang += "if pid: print('hangs', pid, flush=True)\nsignal.pause()\n"
    process = marked.start(sys.executable, "-W", "ignore", "-c", SCRIPT + hang)
    fork = int(read_until(process, "hangs")[-1].split()[1])
    process.kill()
    until(lambda: set(marked.alive()) == {fork}, marked.alive)


# Those of the notebook's own machinery are not ours to mend.
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning")
def test_a_notebook_makes_runs_interrupts_and_makes_it_again(marked, tmp_path, monkeypatch):
    make = """
from kvstore import LocalCluster
cluster = LocalCluster(2, 1)
cluster
"""
    run = """
import os, signal
offset = 5
def cell():
    print("hello")
    return offset + int(os.environ["KVSTORE_RANK"])
cluster.run(cell)
"""
    interrupt = """
def stop():
    os.kill(os.getppid(), signal.SIGINT) if os.environ["KVSTORE_RANK"] == "0" else None
    signal.pause()
try:
    cluster.run(stop)
except KeyboardInterrupt:
    print(cluster)
"""
    fail = "cluster.run(lambda: 1 / 0)"
    close = "cluster.close()"
    cells = [make, run, run, make, fail, run, interrupt, close]
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(text) for text in cells])
    notebook.cells[cells.index(fail)].metadata["tags"] = ["raises-exception"]
    # The kernel of this very interpreter, whatever else is installed on the machine.
    monkeypatch.setenv("JUPYTER_PATH", str(Path(sys.prefix) / "share" / "jupyter"))
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    client = NotebookClient(
        notebook,
        timeout=2 * LONG,
        kernel_name="python3",
        resources={"metadata": {"path": tmp_path}},
    )
    asyncio.run(client.async_execute(env=marked.env))
    for number, text in enumerate(cells):
        outputs = notebook.cells[number].outputs
        streams = "".join(o.text for o in outputs if o.output_type == "stream")
        shown = [o.data["text/plain"] for o in outputs if o.output_type == "execute_result"]
        errors = [o for o in outputs if o.output_type == "error"]
        if text == run:
            assert shown == ["[5, 6]"]
            assert sorted(streams.splitlines()) == ["[worker 0] hello", "[worker 1] hello"]
        elif text == interrupt:
            assert "a run was interrupted; make a new one" in streams
        elif text == make:
            assert shown == ["<kvstore.LocalCluster: 2 workers, 1 server, ready>"]
        elif text == fail:
            assert [error.ename for error in errors] == ["ZeroDivisionError"]
            assert "in worker" in "".join(errors[0].traceback)
        assert bool(errors) == (text == fail)
    until(lambda: not marked.alive(), marked.alive)
