"""What every subject of the benchmarks shares: the loop that measures a job when told to.

A subject is a process of its own, in an environment of its own. The driver (run.py) sends a line
for each measurement, `JOB SECONDS`, and gets one back: JSON with the median seconds of one call.
The arrays of a job are made at its first measurement and kept.
"""

import json
import statistics
import sys
import time


def repeated(call):
    """A job's loop, for calls so long that one more function call does not count."""

    def run(times):
        for _ in range(times):
            call()

    return run


def measure(run, budget):
    """Median seconds of a call, from batches that take a few milliseconds each."""
    run(1)
    start = time.perf_counter()
    run(1)
    batch = max(1, int(0.005 / max(time.perf_counter() - start, 1e-9)))
    times = []
    end = time.perf_counter() + budget
    while time.perf_counter() < end or len(times) < 3:
        start = time.perf_counter()
        run(batch)
        times.append((time.perf_counter() - start) / batch)
    return statistics.median(times)


def serve(jobs, measure=measure):
    """Answer the driver until it closes the pipe.

    Parameters
    ----------
    jobs : dict
        Job name -> function without arguments that makes the arrays and returns `run(times)`,
        which makes the calls to measure, and how many units (keys, calls) one call stands for.
    measure : function
        `measure(run, seconds)` returns the median cost of one call.
    """
    ready = {}
    print(json.dumps({"jobs": sorted(jobs)}), flush=True)
    for line in sys.stdin:
        name, budget = line.split()
        try:
            if name not in ready:
                ready[name] = jobs[name]()
            run, units = ready[name]
            reply = {"seconds": measure(run, float(budget)) / units}
        except Exception as error:  # the driver shows it beside the job
            reply = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(reply), flush=True)
