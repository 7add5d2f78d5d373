"""Two workers and two servers as MXNet 1.9.1 ran them: the recorded runs that need no optimizer, no
compression and no row-sparse values."""

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
from inside import Cluster

HERE = Path(__file__).parent
RUNS = {run["name"]: run for run in json.loads((HERE / "dist.json").read_text())}
LATER = ("optimizer", "compression")  # what servers do not do yet
PLAIN = [name for name, run in RUNS.items() if not any(part in run for part in LATER)]


@pytest.fixture(scope="module")
def arrays():
    with np.load(HERE / "dist.npz") as stored:
        return dict(stored)


def test_there_are_runs():
    assert sorted(PLAIN) == ["pushpull", "split_small", "sum", "sum_float"]


def pattern(count, a, b, c):
    """The recipe of the large values, which are not stored."""
    i = np.arange(count, dtype=np.int64)
    return ((i * a + b) % c - c // 2).astype(np.float32)


def first(arrays, run, key):
    name = f"{run['name']}/{key['key']}/w0"
    if key["kind"] != "big":
        return arrays[name]
    return pattern(int(np.prod(key["shape"])), 3, 1, 11).reshape(key["shape"])


def gradients(arrays, run, key, rank, step):
    if key["kind"] != "big":
        return list(arrays[f"{run['name']}/{key['key']}/r{rank}/grad"][step])
    count = int(np.prod(key["shape"]))
    gradient = pattern(count, 5 + step, 100 * rank + step, 13) * np.float32(run.get("big_scale", 1))
    return [gradient.reshape(key["shape"])]


def check(arrays, run, key, rank, entry, pulled):
    name = f"{run['name']}/{key['key']}/r{rank}"
    if key["kind"] == "big":
        digest = hashlib.sha256(pulled.tobytes()).hexdigest()
        assert digest == arrays[f"{name}/sha256"][entry], name
        return
    recorded = arrays[f"{name}/pulled"][entry]
    assert pulled.dtype == recorded.dtype and pulled.shape == recorded.shape
    if (run["name"], key["key"]) == ("sum_float", "dbl"):
        # MXNet's server has summed these in float32.
        assert np.abs(pulled - recorded).max() <= 2e-7 * np.abs(recorded).max()
    else:
        assert pulled.tobytes() == recorded.tobytes(), f"{name} after {entry} pushes"


def replay(arrays, run, kv):
    keys, rank = run["keys"], kv.rank
    names = [key["key"] for key in keys]
    values = [first(arrays, run, key) for key in keys]
    if rank != 0:
        values = [np.full_like(value, 99) for value in values]
    outs = [np.empty_like(value) for value in values]
    kv.init(names, values)
    kv.pull(names, outs)
    for key, out in zip(keys, outs, strict=True):
        check(arrays, run, key, rank, 0, out)
    for step in range(run["steps"]):
        pushed = [gradients(arrays, run, key, rank, step) for key in keys]
        if run.get("pushpull"):
            for name, value, out in zip(names, pushed, outs, strict=True):
                kv.pushpull(name, value, out)
        else:
            for name, value in zip(names, pushed, strict=True):
                kv.push(name, value)
            for name, out in zip(names, outs, strict=True):
                kv.pull(name, out)
        for key, out in zip(keys, outs, strict=True):
            check(arrays, run, key, rank, step + 1, out)


@pytest.mark.parametrize("name", PLAIN)
def test_a_recorded_run_gives_the_recorded_bits(arrays, name):
    run = RUNS[name]
    with Cluster(run["workers"], run["servers"], kind=run["type"]) as cluster:
        cluster.run(lambda kv: replay(arrays, run, kv))
