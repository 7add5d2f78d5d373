"""What the subjects of several processes share: workers that make calls of a job when told to.

A subject's own process leads. It starts the workers and whatever else they need; each worker
connects to it and is told to make so many calls of a job. A worker times its own loop, in which
only the calls themselves wait for other workers, and the slower worker's time counts. Processes
that outlive the leader are ended by the system.
"""

import contextlib
import ctypes
import json
import math
import os
import select
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

from worker import serve

WORKERS = SERVERS = 2
MIB = 1024 * 1024
DEADLINE = 120  # seconds, for the start of the workers and for each batch of calls
UNITS = {
    "push_pull_64MiB": 1,
    "resnet50": 1,
    "push_resnet50": 1,
    "rows_adagrad": 1,
    "pushpull_4KiB": 1,
    "list_1000x4KiB": 1000,
    "processor_64MiB": 2 * 64 * MIB,  # bytes that the workers push, each of which they pull too
}
ADDRESS = "BENCHMARK_LEADER"
PR_SET_PDEATHSIG = 1
LIBC = ctypes.CDLL(None)


def end_with_parent():
    LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def resnet50():
    """Elements of ResNet-50's 161 parameters, in the order of its layers."""
    sizes = []

    def convolution(inputs, outputs, area):
        sizes.extend([inputs * outputs * area, outputs, outputs])

    inputs = 64
    convolution(3, inputs, 49)
    for stage, blocks in enumerate((3, 4, 6, 3)):
        inner = 64 << stage
        for block in range(blocks):
            convolution(inputs, inner, 1)
            convolution(inner, inner, 9)
            convolution(inner, 4 * inner, 1)
            if block == 0:
                convolution(inputs, 4 * inner, 1)
            inputs = 4 * inner
    return [*sizes, 1000 * inputs, 1000]


def processor_seconds():
    """Processor time that the processes under this one have used so far."""
    parents = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            after_name = stat.read_text().rpartition(")")[2].split()
        except OSError:  # has just ended
            continue
        parents[int(stat.parent.name)] = int(after_name[1])
    below, found = {os.getpid()}, 0
    while len(below) > found:
        found = len(below)
        below |= {child for child, parent in parents.items() if parent in below}
    below.remove(os.getpid())
    # The clock of another process, as clock_getcpuclockid gives it.
    return sum(time.clock_gettime((~process << 3) | 2) for process in below)


class Cluster:
    """The processes of a subject.

    Parameters
    ----------
    commands : list
        Of each process to start: its arguments and what its environment has beside this one's.
    num_workers : int
        How many workers will connect.
    """

    def __init__(self, commands, num_workers):
        self.commands, self.num_workers = commands, num_workers
        self.processes, self.workers = [], {}

    def __enter__(self):
        try:
            self._start()
        except BaseException:
            self._end(grace=0)
            raise
        return self

    def __exit__(self, kind, error, traceback):
        self._end(grace=20 if kind is None else 0)

    def _start(self):
        with tempfile.TemporaryDirectory() as folder, socket.socket(socket.AF_UNIX) as listener:
            listener.bind(f"{folder}/leader")
            listener.listen(self.num_workers)
            listener.settimeout(0.5)
            for arguments, more in self.commands:
                self.processes.append(
                    subprocess.Popen(
                        [sys.executable, *arguments],
                        env={**os.environ, ADDRESS: f"{folder}/leader", **more},
                        stdin=subprocess.DEVNULL,
                        stdout=sys.stderr,
                        preexec_fn=end_with_parent,  # noqa: PLW1509 - there is one thread
                    )
                )
            end = time.monotonic() + DEADLINE
            while len(self.workers) < self.num_workers:
                try:
                    connection = listener.accept()[0]
                except TimeoutError:
                    if any(process.poll() is not None for process in self.processes):
                        raise RuntimeError("a process ended at its start") from None
                    if time.monotonic() > end:
                        raise
                    continue
                connection.settimeout(DEADLINE)
                self.workers[connection] = connection.makefile("rw")

    def _end(self, grace):
        """Workers end when nobody leads them, and the others after them or by force."""
        for connection, stream in self.workers.items():
            with contextlib.suppress(OSError):  # what was not sent yet cannot be any more
                stream.close()
            connection.close()
        for force in (None, subprocess.Popen.terminate, subprocess.Popen.kill):
            for process in self.processes:
                if force and process.poll() is None:
                    force(process)
            end = time.monotonic() + (5 if force else grace)
            for process in self.processes:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(max(0, end - time.monotonic()))

    def seconds(self, job, times):
        """How long the slower worker took for so many calls."""
        replies = []
        try:
            for stream in self.workers.values():
                print(job, times, file=stream, flush=True)
            waiting = list(self.workers)
            while waiting:
                ready = select.select(waiting, [], [], DEADLINE)[0]
                if not ready:
                    raise TimeoutError("no reply in time")
                replies += [json.loads(self.workers[each].readline()) for each in ready]
                waiting = [each for each in waiting if each not in ready]
            errors = [reply["error"] for reply in replies if "error" in reply]
            if errors:
                raise RuntimeError("; ".join(errors))
        except (OSError, ValueError, RuntimeError) as error:
            self._end(grace=0)  # others may wait for that worker, and a late reply would mislead
            raise RuntimeError(f"a worker is lost: {error}") from error
        return max(reply["seconds"] for reply in replies)

    def processor_seconds(self, job, times):
        """Processor time of all processes for so many calls."""
        before = processor_seconds()
        self.seconds(job, times)
        return processor_seconds() - before


def measure(run, budget):
    """Median cost of a call, from loops so long that it hardly counts who began first."""
    run(1)
    start = time.perf_counter()
    run(1)
    once = time.perf_counter() - start
    batch = max(3, math.ceil(0.05 / once)) if once < 1 else 1
    costs = []
    end = time.perf_counter() + budget
    while time.perf_counter() < end or len(costs) < 3:
        costs.append(run(batch) / batch)
    return statistics.median(costs)


def lead(commands, num_workers=WORKERS):
    """Be the subject: start the processes and answer the driver.

    Parameters
    ----------
    commands, num_workers
        As of `Cluster`; so many of the processes, or that they start, call `work`.
    """

    with Cluster(commands, num_workers) as cluster:

        def job(name):
            if name == "processor_64MiB":
                return partial(cluster.processor_seconds, "push_pull_64MiB"), UNITS[name]
            return partial(cluster.seconds, name), UNITS[name]

        serve({name: partial(job, name) for name in UNITS}, measure)


def work(jobs):
    """Be a worker until nobody leads any more.

    Parameters
    ----------
    jobs : dict
        Job name -> function without arguments that makes the arrays and returns `run(times)`.
    """
    ready = {}
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(os.environ[ADDRESS])
        stream = connection.makefile("rw")
        for line in stream:
            name, times = line.split()
            try:
                if name not in ready:
                    ready[name] = jobs[name]()
                start = time.perf_counter()
                ready[name](int(times))
                reply = {"seconds": time.perf_counter() - start}
            except Exception as error:  # the driver shows it beside the job
                reply = {"error": f"{type(error).__name__}: {error}"}
            print(json.dumps(reply), file=stream, flush=True)
