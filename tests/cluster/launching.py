"""What the tests of `kvrun` and `LocalCluster` share: processes that are told by a mark."""

import os
import subprocess
import sys
import time
import uuid
from pathlib import Path

STAND_IN = Path(__file__).with_name("stand_in")
# How long something may take that is due at once, on a loaded machine.
LONG = 30
KVRUN = (sys.executable, "-m", "kvstore.launch")


def paths(*folders):
    """A PYTHONPATH with folders before what there is."""
    before = [os.environ["PYTHONPATH"]] if os.environ.get("PYTHONPATH") else []
    return os.pathsep.join([*map(str, folders), *before])


class Marked:
    """Processes that inherit a mark in their environment; no setsid and no fork takes it away.

    Folders are for their PYTHONPATH, the one of the stand-in for the data plane unless said.
    """

    def __init__(self, *folders, stand_in=True, **variables):
        folders = (STAND_IN, *folders) if stand_in else folders
        self.mark = f"KVSTORE_TEST_MARK={uuid.uuid4()}"
        name, _, value = self.mark.partition("=")
        self.env = {**os.environ, "PYTHONPATH": paths(*folders), name: value, **variables}
        self.started = []

    def start(self, *command, **options):
        """A process with the mark."""
        options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, **options}
        process = subprocess.Popen(command, env=self.env, start_new_session=True, **options)
        self.started.append(process)
        return process

    def run(self, *command, **options):
        """Run to the end; what there is then of marked processes has been left behind."""
        process = self.start(*command, **options)
        out, err = process.communicate(timeout=LONG)
        assert self.alive() == {}
        return subprocess.CompletedProcess(command, process.returncode, out, err)

    def alive(self):
        """The command lines of marked processes, by process id."""
        found = {}
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit():
                try:
                    if self.mark.encode() in (entry / "environ").read_bytes():
                        found[int(entry.name)] = (entry / "cmdline").read_bytes()[-200:]
                except OSError:
                    continue  # gone meanwhile, or not ours
        return found

    def wait_until_gone(self):
        until(lambda: not self.alive(), self.alive)

    def close(self):
        """Kill what a failed test has left."""
        for pid in self.alive():
            os.kill(pid, 9)
        for process in self.started:
            for pipe in (process.stdout, process.stderr, process.stdin):
                if pipe is not None:
                    pipe.close()
            process.wait(LONG)


def until(condition, told=str):
    """Wait until a condition of another process's making holds."""
    deadline = time.monotonic() + LONG
    while not condition():
        assert time.monotonic() < deadline, told()
        time.sleep(0.01)


def read_until(process, text):
    """The lines of the process's output up to one that has the text."""
    lines = []
    for line in process.stdout:
        lines.append(line)
        if text in line:
            return lines
    raise AssertionError("".join(lines) + process.stderr.read())
