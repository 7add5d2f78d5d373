"""`kvrun`: what it runs, what it prints, how it ends, and that it leaves nothing behind."""

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from launching import KVRUN, LONG, Marked, read_until, until

from kvstore.cluster import launch

pytestmark = pytest.mark.ucx

# A worker that joins the cluster and leaves it again, with a data plane that moves nothing.
MEMBER = """
from kvstore.cluster import member, settings
one = member.Member.join(settings.read())
print("joined as", one.rank, flush=True)
"""


@pytest.fixture
def marked(tmp_path):
    """Starts `kvrun` with a scheduler and servers that are there and do nothing."""
    made = Marked(tmp_path, KVSTORE_TEST_IDLE="1")
    yield made
    made.close()


@pytest.fixture
def real(tmp_path):
    """Starts `kvrun` with the scheduler and the servers of the package."""
    made = Marked(tmp_path)
    yield made
    made.close()


def shell(*numbers_and_script):
    *numbers, script = numbers_and_script
    return (*KVRUN, *map(str, numbers), "sh", "-c", script)


# ------------------------------------------------------------------------------------- what it runs


def test_every_worker_gets_its_place_and_every_cluster_its_own_token(real):
    real.env.update(DMLC_ROLE="server", DMLC_NODE_HOST="stale", KVSTORE_RANK="7")
    script = (
        'echo "$KVSTORE_ROLE $KVSTORE_RANK of $KVSTORE_NUM_WORKERS $KVSTORE_NUM_SERVERS, '
        '$DMLC_ROLE $DMLC_NUM_WORKER $DMLC_NUM_SERVER$DMLC_NODE_HOST, $KVSTORE_TIMEOUT"; '
        'test "$KVSTORE_SCHEDULER" = "$DMLC_PS_ROOT_URI:$DMLC_PS_ROOT_PORT"; '
        'echo "token $KVSTORE_TOKEN"'
    )
    tokens = set()
    for _ in range(2):
        done = real.run(*shell("-n", 2, "-s", 2, "--timeout", 45, script))
        assert (done.returncode, done.stderr) == (0, "")
        lines = sorted(done.stdout.splitlines())
        assert [line for line in lines if "token" not in line] == [
            f"[worker {rank}] worker {rank} of 2 2, worker 2 2, 45" for rank in range(2)
        ]
        found = set(re.findall(r"token (\w{32,})", done.stdout))
        assert len(found) == 1
        tokens |= found
    assert len(tokens) == 2


def test_arguments_reach_the_command_as_they_are(marked):
    code = "import sys; print(sys.argv[1:])"
    arguments = ["-n", "a b", "$HOME", "", "--", "'"]
    done = marked.run(*KVRUN, "-n1", "--", sys.executable, "-S", "-c", code, *arguments)
    assert done.stdout == f"[worker 0] {arguments}\n"
    assert done.returncode == 0


def test_the_input_of_workers_is_empty(marked):
    done = marked.run(*shell("-n", 1, "cat; echo end"), stdin=subprocess.PIPE)
    assert done.stdout == "[worker 0] end\n"


def test_a_cluster_that_was_used_ends_by_itself(real, tmp_path):
    (tmp_path / "mine.py").write_text(
        "def controller(head, body):\n    print('got', head, body, flush=True)\n"
    )
    code = MEMBER + (
        "from kvstore import _dist\n"
        "one.barrier(30)\n"
        "if one.rank == 0: _dist.command(one, 3, 'text', 30)\n"
        "one.close(30)\n"
    )
    controller = ("--controller", "mine:controller")
    done = real.run(*KVRUN, "-n", "2", "-s", "2", *controller, sys.executable, "-c", code)
    assert (done.returncode, done.stderr) == (0, "")
    assert sorted(done.stdout.splitlines()) == [
        "[server 0] got 3 text",
        "[server 1] got 3 text",
        "[worker 0] joined as 0",
        "[worker 1] joined as 1",
    ]


def test_the_script_of_the_package_is_this_one():
    text = (Path(__file__).parents[2] / "pyproject.toml").read_text()
    assert f'kvrun = "{launch.main.__module__}:{launch.main.__name__}"' in text


# ----------------------------------------------------------------------------------- what it prints


def test_output_comes_line_by_line_to_the_stream_it_was_for(marked):
    script = "echo one; echo two >&2; printf '\\rhalf\\rrest'; printf 'three' >&2"
    done = marked.run(*shell("-n", 1, script), text=False)
    assert done.returncode == 0
    lines = b"".join(b"[worker 0] " + text for text in (b"one\n", b"\r", b"half\r", b"rest\n"))
    assert done.stdout == lines
    assert done.stderr == b"[worker 0] two\n[worker 0] three\n"


def test_lines_of_many_workers_are_never_mixed(marked):
    script = "i=0; while [ $i -lt 400 ]; do echo $KVSTORE_RANK $i; i=$((i+1)); done"
    done = marked.run(*shell("-n", 4, script))
    assert done.returncode == 0
    for rank in range(4):
        mine = [line for line in done.stdout.splitlines() if line.startswith(f"[worker {rank}]")]
        assert mine == [f"[worker {rank}] {rank} {i}" for i in range(400)]


def test_bytes_that_are_no_text_and_endless_lines_pass(marked):
    code = r"import os; os.write(1, b'\xff\x00x\n'); os.write(1, b'a' * 200000)"
    done = marked.run(*KVRUN, "-n1", sys.executable, "-S", "-c", code, text=False)
    first, *rest = done.stdout.split(b"\n")
    assert first == b"[worker 0] \xff\x00x"
    assert b"".join(line.removeprefix(b"[worker 0] ") for line in rest) == b"a" * 200000


def test_a_reader_that_goes_away_ends_the_run(marked):
    process = marked.start(*KVRUN, "-n", "2", "yes")
    assert read_until(process, "y")
    process.stdout.close()
    assert process.wait(LONG) == 128 + signal.SIGPIPE
    assert marked.alive() == {}
    assert process.stderr.read() == ""


# -------------------------------------------------------------------------------------- how it ends


@pytest.mark.parametrize(
    ("failure", "status", "told"),
    [
        ("exit 7", 7, "ended with exit status 7"),
        ("kill -KILL $$", 137, "was killed by SIGKILL"),
        ("kill -TERM $$", 143, "was killed by SIGTERM"),
    ],
)
def test_the_first_failure_ends_all_and_gives_its_status(marked, failure, status, told):
    script = f"if [ $KVSTORE_RANK = 1 ]; then {failure}; fi; exec sleep 1000"
    done = marked.run(*shell("-n", 2, script))
    assert done.returncode == status
    assert done.stderr == f"kvrun: worker 1 {told}\n"


def test_a_worker_that_dies_while_the_cluster_runs_is_named_not_what_it_takes_down(real):
    code = MEMBER + (
        "import os, signal\n"
        "one.barrier(30)\n"
        "if one.rank == 1: os.kill(os.getpid(), signal.SIGKILL)\n"
        "one.barrier(30)\n"
    )
    done = real.run(*KVRUN, "-n", "2", sys.executable, "-c", code)
    assert done.returncode == 137
    assert "kvrun: worker 1 was killed by SIGKILL\n" in done.stderr


def test_a_program_that_cannot_be_run_is_said(marked, tmp_path):
    done = marked.run(*KVRUN, "-n", "1", "no-such-program")
    assert (done.returncode, done.stdout) == (127, "")
    assert "'no-such-program'" in done.stderr
    script = tmp_path / "script"
    script.write_text("#!/no/such/interpreter\n")
    script.chmod(0o755)
    done = marked.run(*KVRUN, "-n", "1", script)
    assert done.returncode in (126, 127)
    assert "worker 0" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ((), "-n"),
        (("-n", "2"), "no COMMAND"),
        (("-n", "2", "--"), "no COMMAND"),
        (("-n", "0", "true"), "'0'"),
        (("-n", "-1", "true"), "'-1'"),
        (("-n", "two", "true"), "'two'"),
        (("-n", "9" * 30, "true"), "from 1 to"),
        (("-n", "4000", "-s", "4000", "true"), "no more than"),
        (("-n", "1", "-s", "00", "true"), "'00'"),
        (("-n", "1", "--timeout", "nan", "true"), "'nan'"),
        (("-n", "1", "--timeout", "-3", "true"), "'-3'"),
        (("-n", "1", "--controller", "module", "true"), "MODULE:FUNCTION"),
    ],
)
def test_a_wrong_command_line_is_refused(capsys, arguments, told):
    with pytest.raises(SystemExit) as caught:
        launch.main(arguments)
    assert caught.value.code == 2
    assert told in capsys.readouterr().err


@pytest.mark.parametrize("status", [0, 5])
def test_a_scheduler_that_does_not_start_ends_it(marked, status):
    marked.env["KVSTORE_TEST_BROKEN"] = f"scheduler:{status}"
    done = marked.run(*shell("-n", 1, "exec sleep 1000"))
    assert done.returncode == (status or 1)
    assert "[scheduler] broken by the test\n" in done.stderr
    assert "kvrun: the scheduler ended" in done.stderr or "scheduler ended with" in done.stderr


def test_a_server_that_fails_ends_it(marked):
    marked.env["KVSTORE_TEST_BROKEN"] = "server:6"
    done = marked.run(*shell("-n", 1, "exec sleep 1000"))
    assert done.returncode == 6
    assert "kvrun: server 0 ended with exit status 6\n" in done.stderr


def test_a_controller_that_is_not_there_ends_it(real):
    controller = ("--controller", "no_such_module:f")
    done = real.run(*KVRUN, "-n", "1", *controller, "sleep", "1000")
    assert done.returncode == 1
    assert "no_such_module" in done.stderr


def test_a_starter_that_ignores_the_end_of_children_changes_nothing(marked):
    ignoring = "import os, signal, sys; signal.signal(signal.SIGCHLD, signal.SIG_IGN);"
    ignoring += "os.execv(sys.argv[1], sys.argv[1:])"
    done = marked.run(sys.executable, "-S", "-c", ignoring, *shell("-n", 1, "exit 9"))
    assert done.returncode == 9


# ----------------------------------------------------------------------------- nothing stays behind


@pytest.mark.parametrize(
    ("send", "number"),
    [
        (os.kill, signal.SIGINT),
        (os.killpg, signal.SIGINT),
        (os.kill, signal.SIGTERM),
        (os.kill, signal.SIGHUP),
    ],
)
def test_a_signal_ends_everything(marked, send, number):
    process = marked.start(*shell("-n", 2, "sleep 1000 & echo up; wait"))
    read_until(process, "up")
    read_until(process, "up")
    send(process.pid, number)
    assert process.wait(LONG) == 128 + number
    assert marked.alive() == {}
    assert process.stderr.read() == ""


def test_workers_may_clean_up_after_ctrl_c(marked):
    code = (
        "import time\ntry:\n    print('up', flush=True); time.sleep(1000)\n"
        "except KeyboardInterrupt:\n    print('cleaned up')\n"
    )
    process = marked.start(*KVRUN, "-n", "1", sys.executable, "-S", "-c", code)
    read_until(process, "up")
    process.send_signal(signal.SIGINT)
    read_until(process, "[worker 0] cleaned up")
    assert process.wait(LONG) == 130


def test_a_second_ctrl_c_kills_what_will_not_end(marked):
    script = "trap 'echo told' INT; echo up; while :; do sleep 0.01; done"
    process = marked.start(*shell("-n", 1, script))
    read_until(process, "up")
    process.send_signal(signal.SIGINT)
    read_until(process, "told")
    process.send_signal(signal.SIGINT)
    assert process.wait(LONG) == 130
    assert marked.alive() == {}


def test_a_grace_ends_what_will_not_end_and_what_nobody_reads(marked):
    stubborn = marked.start(*shell("-n", 1, "trap '' TERM; echo up; while :; do sleep 0.01; done"))
    unread = marked.start(*shell("-n", 1, "echo up; exec yes"))
    read_until(stubborn, "up")
    read_until(unread, "up")
    io = Path(f"/proc/{unread.pid}/io")
    until(
        lambda: int(re.search(r"wchar: (\d+)", io.read_text())[1]) > 60_000
    )  # a pipe holds 65,536
    unread.send_signal(signal.SIGINT)
    stubborn.send_signal(signal.SIGTERM)
    assert (unread.wait(LONG), stubborn.wait(LONG)) == (130, 143)
    assert marked.alive() == {}


def test_what_a_worker_leaves_running_is_ended(marked):
    done = marked.run(*shell("-n", 1, "sleep 1000 & echo $!"))
    assert done.returncode == 0
    assert done.stdout.startswith("[worker 0] ")


def test_killing_the_launcher_leaves_no_process(real):
    process = real.start(*shell("-n", 2, "-s", 2, "sleep 1000 & echo up; wait"))
    read_until(process, "up")
    read_until(process, "up")
    process.kill()
    real.wait_until_gone()


@pytest.mark.parametrize("when", [2, 4])
def test_killing_the_launcher_while_it_starts_leaves_no_process(marked, when):
    process = marked.start(*KVRUN, "-n", "3", "-s", "1", "sleep", "1000")
    until(lambda: len(marked.alive()) >= when)
    process.kill()
    marked.wait_until_gone()
