"""A cluster that works for long: what comes back is right, and no process grows.

Short here; `tests/run.py soak` lets it run for ten minutes.
"""

import os
import threading

import pytest
from killing import Processes

pytestmark = pytest.mark.ucx

SECONDS = float(os.environ.get("KVSTORE_SOAK_SECONDS", "4"))
SAMPLES = 40
GROWTH = 16 << 20  # bytes that a process may have more at the end than after a third of the time


def resident(pid):
    with open(f"/proc/{pid}/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def test_a_cluster_works_for_long_and_does_not_grow(tmp_path, capsys):
    cluster = Processes([("soak", str(tmp_path / "states"))] * 2, 2)
    try:
        samples = {name: [] for name in cluster.all}
        for _ in range(SAMPLES):
            threading.Event().wait(SECONDS / SAMPLES)
            for name, process in cluster.all.items():
                assert process.poll() is None, (name, process.communicate())
                samples[name].append(resident(process.pid))
        for name in cluster.workers():
            cluster.tell(name, "enough")
        for name, news in cluster.end().items():
            (steps,) = [one["steps"] for one in news if "steps" in one]
            assert steps > SECONDS, (name, news)
    finally:
        cluster.close()
    grown = {name: max(sizes) - max(sizes[: SAMPLES // 3]) for name, sizes in samples.items()}
    with capsys.disabled():
        told = ", ".join(f"{name} {size / 2**20:.1f} MiB" for name, size in grown.items())
        print(f" [{steps} steps; grown since a third of the time: {told}]", end="")
    if SECONDS >= 60:  # before that the pools are still being filled
        assert max(grown.values()) < GROWTH, (grown, samples)
