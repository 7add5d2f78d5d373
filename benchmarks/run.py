"""Measures the store against what the machine can do and against its peers, in one run.

    python benchmarks/run.py              all jobs, table, plot and benchmarks/results/local.json
    python benchmarks/run.py --quick      short, table only
    python benchmarks/run.py --make-peers first installs PyTorch and MXNet 1.9.1 into build/peers/

Every subject is a process of its own. Rounds are interleaved: in each round every subject measures
a job right after the others, and ratios are taken within a round, so that a machine whose speed
drifts does not favour anybody. Quoted are medians over the rounds. "limit" is a plain C program
(limit.c) that does the least work: one function call a call, one pass over memory.
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

HERE = Path(__file__).resolve().parent
BUILD = HERE.parent / "build"
PEERS = {
    "torch": ["torch==2.13.0", "numpy", "setuptools"],
    "mxnet": ["mxnet==1.9.1", "numpy==1.23.5", "requests"],
}
PEER_TITLES = {"dict": "dict", "torch": "torch", "compiled": "torch.compile", "mxnet": "MXNet"}

# Job -> (title, the limit's job, goals as ratios of speed: the store's to the limit's and to each
# peer's).
JOBS = {
    "push_pull_1KiB": (
        "push + pull, 1 KiB",
        "push_pull_1KiB",
        {"limit": 1 / 6, "dict": 3, "mxnet": 50},
    ),
    "pushpull_1KiB": (
        "pushpull, 1 KiB",
        "pushpull_1KiB",
        {"limit": 1 / 5, "dict": 4, "mxnet": 80},
    ),
    "list_1000x4KiB": (
        "push + pull, 1,000 keys of 4 KiB, a key",
        "list_1000x4KiB",
        {"limit": 1 / 2, "dict": 2.5, "mxnet": 15},
    ),
    "updater_1KiB": ("push with updater, 1 KiB", None, {"dict": 0.7, "mxnet": 35}),
    "sum_4x64MiB": (
        "sum of 4 × 64 MiB float32",
        "sum_4x64MiB",
        {"limit": 0.9, "compiled": 1.0, "torch": 1.4, "mxnet": 3.2},
    ),
    "sum_4x64MiB_2dst": (
        "the same, pushpull into one out",
        "sum_4x64MiB_2dst",
        {"limit": 0.9, "compiled": 1.1, "mxnet": 3.3},
    ),
    "sum_fp16_4x32MiB": (
        "sum of 4 × 32 MiB float16",
        "sum_fp16_4x32MiB",
        {"limit": 0.85, "compiled": 1.0, "torch": 1.6, "mxnet": 80},
    ),
    "push_64MiB": ("push of 64 MiB", "copy_64MiB", {"limit": 0.9, "torch": 1.25}),
    "pull_64MiB": ("pull of 64 MiB", "copy_64MiB", {"limit": 0.9, "torch": 1.25, "mxnet": 1.5}),
    "push_1KiB_1_thread": ("push of 1 KiB, 1 thread", None, {}),
    "push_1KiB_4_threads": ("push of 1 KiB, 4 threads, own keys", None, {"1 thread": 1.0}),
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
    """limit.c, compiled for this machine."""

    def __init__(self):
        self.program = BUILD / "limit"
        BUILD.mkdir(exist_ok=True)
        compiler = os.environ.get("CC", "cc")
        flags = ["-std=c17", "-O3", "-march=native", "-pthread"]
        subprocess.run([compiler, *flags, HERE / "limit.c", "-o", self.program], check=True)

    def measure(self, job, budget):
        name = JOBS[job][1]
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


def start_subjects():
    subjects = {
        "kvstore": Subject(sys.executable, "kvstore_local.py"),
        "limit": Limit(),
        "dict": Subject(sys.executable, "dict_numpy.py"),
    }
    if python := peer_python("torch"):
        subjects["torch"] = Subject(python, "torch_cpu.py")
        subjects["compiled"] = Subject(python, "torch_cpu.py", "--compiled")
    if python := peer_python("mxnet"):
        subjects["mxnet"] = Subject(python, "mxnet_local.py")
    return subjects


def run(rounds, budget):
    """Seconds by job and subject, one entry a round."""
    subjects = start_subjects()
    if not subjects["kvstore"].jobs:
        raise SystemExit("kvstore does not run in this Python: pip install -e '.[test]' first")
    times = {job: {name: [] for name in subjects} for job in JOBS}
    try:
        for number in range(rounds):
            for job in JOBS:
                for name, subject in subjects.items():
                    seconds = subject.measure(job, budget)
                    if seconds is not None:
                        times[job][name].append(seconds)
            print(f"round {number + 1} of {rounds}", file=sys.stderr)
    finally:
        for subject in subjects.values():
            subject.close()
    for job, one in (("push_1KiB_4_threads", "push_1KiB_1_thread"),):
        times[job]["1 thread"] = times[one]["kvstore"]
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


def table(times):
    """The rows of the result: job, time, limit, and each ratio beside its goal."""
    lines = [
        "| job | kvstore | limit | speed against the limit | speed against peers |",
        "|---|---|---|---|---|",
    ]
    for job, (title, _, goals) in JOBS.items():
        ours = human(statistics.median(times[job]["kvstore"]))
        limit = times[job]["limit"]
        cells = []
        for other, goal in goals.items():
            found = ratio(times, job, other)
            shown = "not there" if found is None else f"{found:.3g} ×"
            mark = "" if found is None or found >= goal else " (below)"
            name = PEER_TITLES.get(other, other)
            cells.append((other, f"{name} {shown}, goal {goal:.2g}{mark}"))
        against_limit = "".join(text for other, text in cells if other == "limit")
        against_peers = "; ".join(text for other, text in cells if other != "limit")
        lines.append(
            f"| {title} | {ours} | {human(statistics.median(limit)) if limit else '–'} "
            f"| {against_limit.removeprefix('limit ') or '–'} | {against_peers or '–'} |"
        )
    return "\n".join(lines)


def plot(times, path):
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    marks = {
        "limit": ("|", "black"),
        "dict": ("s", "#7f7f7f"),
        "torch": ("o", "#ee4c2c"),
        "compiled": ("D", "#8c2d19"),
        "mxnet": ("^", "#1f77b4"),
    }
    jobs = [job for job in JOBS if any(times[job].get(other) for other in marks)]
    figure, axes = pyplot.subplots(figsize=(9, 0.5 * len(jobs) + 1.4), layout="constrained")
    for other, (mark, colour) in marks.items():
        points = [(ratio(times, job, other), row) for row, job in enumerate(jobs)]
        points = [(1 / x, y) for x, y in points if x is not None]
        if points:
            label = PEER_TITLES.get(other, "limit of the machine")
            size = 18 if mark == "|" else 7
            axes.plot(*zip(*points, strict=True), mark, color=colour, label=label, markersize=size)
    axes.axvline(1, color="#2ca02c", linewidth=2, label="kvstore")
    axes.set_xscale("log")
    axes.set_yticks(range(len(jobs)), [JOBS[job][0] for job in jobs])
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
    parser.add_argument("--rounds", type=int, default=9)
    options = parser.parse_args()
    if options.make_peers:
        make_peers()
    times = run(2, 0.05) if options.quick else run(options.rounds, 0.3)
    print(table(times))
    if options.quick:
        return
    results = HERE / "results"
    machine = {
        "date": datetime.date.today().isoformat(),
        "machine": platform.machine(),
        "processor": processor(),
        "processors": os.cpu_count(),
        "python": platform.python_version(),
    }
    record = {"machine": machine, "seconds": times}
    (results / "local.json").write_text(json.dumps(record, indent=1) + "\n")
    plot(times, results / "local.png")


if __name__ == "__main__":
    main()
