"""The README's section on several processes: its programs, started by its commands."""

import re
import shlex
import sys
from pathlib import Path

import pytest
from launching import KVRUN, Marked

pytestmark = pytest.mark.ucx

README = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
SECTION = re.search(r"^## Several processes\n(.*?)^## ", README, re.MULTILINE | re.DOTALL)[1]
PROGRAMS = re.findall(r"^```py\n(.*?)^```$", SECTION, re.MULTILINE | re.DOTALL)
COMMANDS = [
    line for block in re.findall(r"^```sh\n(.*?)^```$", SECTION, re.M | re.S)
    for line in block.splitlines()
]  # fmt: skip
SUM = "[3. 3. 3.]"


@pytest.fixture
def marked():
    made = Marked(stand_in=False)
    yield made
    made.close()


@pytest.fixture
def train(tmp_path):
    assert len(PROGRAMS) == 3 and "Save this as `train.py`" in SECTION
    assert f"Both workers print `{SUM}`" in SECTION
    (tmp_path / "train.py").write_text(PROGRAMS[0])


def words(command):
    """What a shell would make of a line, with this Python for every other."""
    return [sys.executable if w == "python" else w for w in shlex.split(command, comments=True)]


def test_kvrun_runs_the_program(train, marked, tmp_path):
    (command,) = (words(line) for line in COMMANDS if line.startswith("kvrun"))
    done = marked.run(*KVRUN, *command[1:], cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert sorted(done.stdout.splitlines()) == [
        f"[worker {rank}] {rank} of 2 has {SUM}" for rank in range(2)
    ]


def test_the_script_of_a_local_cluster_prints_a_result_of_each_worker(marked, tmp_path):
    (tmp_path / "script.py").write_text(PROGRAMS[1])
    done = marked.run(sys.executable, "script.py", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert re.findall(r"array\((.*?), dtype=float32\)", done.stdout) == ["[30., 30., 30.]"] * 2


def test_the_servers_of_a_local_cluster_train(marked, tmp_path):
    (tmp_path / "script.py").write_text(PROGRAMS[2])
    done = marked.run(sys.executable, "script.py", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    told = re.search(r"# both have (\[.*\])", PROGRAMS[2])[1].replace(" ", ", ")
    assert re.findall(r"array\((.*?), dtype=float32\)", done.stdout) == [told] * 2


def test_the_roles_started_one_by_one_make_the_same_cluster(train, marked, tmp_path):
    (exported,) = (words(line)[1:] for line in COMMANDS if line.startswith("export "))
    marked.env.update(variable.split("=", 1) for variable in exported)
    marked.env["KVSTORE_SCHEDULER"] = "127.0.0.1:0"
    started = []
    for line in COMMANDS:
        if not line.startswith("KVSTORE_ROLE="):
            continue
        role, *command = words(line)
        marked.env["KVSTORE_ROLE"] = role.partition("=")[2]
        for _ in range(2 if "# twice" in line else 1):
            started.append(marked.start(*command, cwd=tmp_path))
        if role == "KVSTORE_ROLE=scheduler":
            told = started[0].stderr.readline()
            marked.env["KVSTORE_SCHEDULER"] = re.search(r"127\.0\.0\.1:\d+", told)[0]
    assert len(started) == 5
    outs = [process.communicate(timeout=60) for process in started]
    assert [process.returncode for process in started] == [0] * 5, outs
    printed = sorted(line for out, _ in outs for line in out.splitlines())
    assert printed == [f"{rank} of 2 has {SUM}" for rank in range(2)]
