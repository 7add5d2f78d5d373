"""Measures the store against what the machine can do and against its peers, in one run.

    python benchmarks/run.py                all jobs: a table, and of each family of jobs.py a plot
                                            and a record in benchmarks/results/
    python benchmarks/run.py --only FAMILY  one family; dist_slow, which takes minutes, root, ip and
                                            tc, only so
    python benchmarks/run.py --quick        short, table only
    python benchmarks/run.py --make-peers   first installs PyTorch, FBGEMM and MXNet 1.9.1 into
                                            build/peers/

Every subject is a process of its own. Rounds are interleaved: in each round every subject measures
a job right after the others, and ratios are taken within a round, so that a machine whose speed
drifts does not favour anybody. Quoted are medians over the rounds. "limit" is a plain C program
(limit.c, limit_train.c, limit_dist.c) that does the least work: one function call a call, one pass
over memory, one message a value.
"""

import argparse
import datetime
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import venv
from pathlib import Path

from jobs import FAMILIES

HERE = Path(__file__).resolve().parent
BUILD = HERE.parent / "build"
PEERS = {
    "torch": ["torch==2.13.0", "numpy", "setuptools"],
    "fbgemm": ["torch==2.13.0", "fbgemm-gpu-cpu==1.8.0", "numpy", "setuptools"],
    "mxnet": ["mxnet==1.9.1", "numpy==1.23.5", "requests"],
}
TITLES = {
    "limit": "limit of the machine",
    "dict": "dict",
    "numpy": "NumPy",
    "torch": "torch",
    "compiled": "torch.compile",
    "fbgemm": "fbgemm",
    "gloo": "gloo",
    "views": "gloo, no copies",
    "sums": "no optimizer",
    "few": "2 workers, 2 servers",
    "uncompressed": "uncompressed",
    "mxnet": "MXNet",
    "1 thread": "1 thread",
}
MARKS = {
    "limit": ("|", "black"),
    "dict": ("s", "#7f7f7f"),
    "numpy": ("s", "#7f7f7f"),
    "torch": ("o", "#ee4c2c"),
    "compiled": ("D", "#8c2d19"),
    "fbgemm": ("v", "#9467bd"),
    "gloo": ("o", "#ee4c2c"),
    "views": ("D", "#8c2d19"),
    "sums": ("s", "#7f7f7f"),
    "few": ("s", "#7f7f7f"),
    "uncompressed": ("s", "#7f7f7f"),
    "mxnet": ("^", "#1f77b4"),
}


class Subject:
    """A process that measures when told to."""

    def __init__(self, python, script, *args):
        env = {**os.environ, "PYTHONUNBUFFERED": "1"}
        self.process = subprocess.Popen(
            [python, HERE / "subjects" / script, *args],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=env,
        )
        first = self.process.stdout.readline()
        self.jobs = json.loads(first)["jobs"] if first else []

    def measure(self, job, budget):
        if job not in self.jobs or self.process.poll() is not None:
            return None
        print(job, budget, file=self.process.stdin, flush=True)
        line = self.process.stdout.readline()
        reply = json.loads(line) if line else {"error": "the process ended"}
        if "error" in reply:
            print(f"{self.process.args[1].name}: {job}: {reply['error']}", file=sys.stderr)
            self.jobs.remove(job)
            return None
        return reply["seconds"]

    def close(self):
        self.process.stdin.close()
        self.process.wait(60)


class Limit:
    """A limit program, compiled for this machine."""

    def __init__(self, name, jobs):
        self.program, self.jobs = BUILD / name, jobs
        BUILD.mkdir(exist_ok=True)
        compiler = os.environ.get("CC", "cc")
        flags = ["-std=c17", "-O3", "-march=native", "-pthread"]
        source = HERE / f"{name}.c"
        subprocess.run([compiler, *flags, source, "-lm", "-o", self.program], check=True)

    def measure(self, job, budget):
        name = self.jobs[job].limit
        if name is None:
            return None
        # Small jobs are repeated inside a measurement; large ones take about 10 ms each.
        reps = max(3, round(budget / 0.03))
        output = subprocess.run(
            [self.program, "--job", name, "--reps", str(reps)],
            check=True,
            capture_output=True,
            text=True,
        ).stdout
        return json.loads(output)["seconds"]

    def close(self):
        pass


def peer_python(name):
    python = BUILD / "peers" / name / "bin" / "python"
    return python if python.exists() else None


def make_peers():
    for name, packages in PEERS.items():
        folder = BUILD / "peers" / name
        if peer_python(name) is None:
            venv.create(folder, with_pip=True)
        python = folder / "bin" / "python"
        done = subprocess.run([python, "-m", "pip", "install", "-q", *packages])
        if done.returncode != 0:
            print(f"{name}: could not be installed, will be reported as not there")
            shutil.rmtree(folder)


def start_subjects(family):
    subjects = {"limit": Limit(family.limit, family.jobs)}
    for name, (environment, *command) in family.subjects.items():
        if python := peer_python(environment) if environment else sys.executable:
            subjects[name] = Subject(python, *command)
    return subjects


def run(family, rounds, budget):
    """Seconds by job and subject, one entry a round."""
    subjects = start_subjects(family)
    if not subjects["kvstore"].jobs:
        raise SystemExit("kvstore does not run in this Python: pip install -e '.[test]' first")
    times = {job: {name: [] for name in subjects} for job in family.jobs}
    try:
        for number in range(rounds):
            for job in family.jobs:
                for name, subject in subjects.items():
                    seconds = subject.measure(job, budget)
                    if seconds is not None:
                        times[job][name].append(seconds)
            print(f"{family.limit}: round {number + 1} of {rounds}", file=sys.stderr)
    finally:
        for subject in subjects.values():
            subject.close()
    if "push_1KiB_4_threads" in times:
        times["push_1KiB_4_threads"]["1 thread"] = times["push_1KiB_1_thread"]["kvstore"]
    return times


def ratio(times, job, other):
    """How many times as fast as the other: the median of the rounds' ratios."""
    pairs = zip(times[job].get(other, []), times[job]["kvstore"], strict=False)
    ratios = [theirs / ours for theirs, ours in pairs]
    return statistics.median(ratios) if ratios else None


def human(seconds):
    for unit, scale in (("ns", 1e-9), ("µs", 1e-6), ("ms", 1e-3)):
        if seconds < 1000 * scale:
            return f"{seconds / scale:.3g} {unit}"
    return f"{seconds:.3g} s"


def short(number):
    return f"{number:,.0f}" if number >= 1000 else f"{number:.3g}"


def against(times, job, other, goal):
    """A ratio beside its goal."""
    found = ratio(times, job, other)
    if found is None:
        return f"not there, goal {short(goal)}"
    return f"{short(found)} ×, goal {short(goal)}{'' if found >= goal else ' (below)'}"


def table(results):
    """The rows of the result: job, time, limit, and each ratio beside its goal."""
    lines = [
        "| job | kvstore | limit | speed against the limit | speed against peers |",
        "|---|---|---|---|---|",
    ]
    for name, times in results.items():
        for job, (title, _, goals) in FAMILIES[name].jobs.items():
            ours = human(statistics.median(times[job]["kvstore"]))
            limit = times[job]["limit"]
            cells = {other: against(times, job, other, goal) for other, goal in goals.items()}
            at_best = cells.pop("limit", "–")
            peers = "; ".join(f"{TITLES[other]} {text}" for other, text in cells.items()) or "–"
            least = human(statistics.median(limit)) if limit else "–"
            lines.append(f"| {title} | {ours} | {least} | {at_best} | {peers} |")
    return "\n".join(lines)


def plot(jobs, times, path):
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = [job for job in jobs if any(times[job].get(other) for other in MARKS)]
    figure, axes = pyplot.subplots(figsize=(9, 0.5 * len(rows) + 1.4), layout="constrained")
    for other, (mark, colour) in MARKS.items():
        points = [(ratio(times, job, other), row) for row, job in enumerate(rows)]
        points = [(1 / x, y) for x, y in points if x is not None]
        if points:
            size = 18 if mark == "|" else 7
            axes.plot(
                *zip(*points, strict=True),
                mark,
                color=colour,
                label=TITLES[other],
                markersize=size,
            )
    axes.axvline(1, color="#2ca02c", linewidth=2, label="kvstore")
    axes.set_xscale("log")
    axes.set_yticks(range(len(rows)), [jobs[job].title for job in rows])
    axes.invert_yaxis()
    axes.set_xlabel("speed relative to kvstore (left: slower)")
    axes.grid(axis="x", which="both", alpha=0.25)
    figure.legend(loc="outside upper center", ncols=6, frameon=False)
    figure.savefig(path, dpi=120)


def processor():
    """The processor's name, where the system tells."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="two short rounds, no files")
    parser.add_argument("--make-peers", action="store_true", help="install the peers first")
    parser.add_argument("--only", choices=FAMILIES, help="measure one family")
    parser.add_argument("--rounds", type=int, default=9)
    options = parser.parse_args()
    if options.make_peers:
        make_peers()
    rounds, budget = (2, 0.05) if options.quick else (options.rounds, 0.3)
    every = [name for name, family in FAMILIES.items() if not family.asked_only]
    names = [options.only] if options.only else every
    results = {name: run(FAMILIES[name], rounds, budget) for name in names}
    print(table(results))
    if options.quick:
        return
    machine = {
        "date": datetime.date.today().isoformat(),
        "machine": platform.machine(),
        "processor": processor(),
        "processors": os.cpu_count(),
        "python": platform.python_version(),
    }
    for name, times in results.items():
        path = HERE / "results" / name
        record = {"machine": machine, "seconds": times}
        path.with_suffix(".json").write_text(json.dumps(record, indent=1) + "\n")
        plot(FAMILIES[name].jobs, times, path.with_suffix(".png"))


if __name__ == "__main__":
    main()
