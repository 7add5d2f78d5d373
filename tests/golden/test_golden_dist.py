"""Two workers and two servers as MXNet 1.9.1 ran them."""

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
from inside import Cluster

import kvstore

HERE = Path(__file__).parent
RUNS = {run["name"]: run for run in json.loads((HERE / "dist.json").read_text())}
# Where the recorded bits are not due: (run, key) and the tolerance, of the largest element.
CLOSE = {
    ("sum_float", "dbl"): 2e-7,  # MXNet's server has summed these in float32
    ("sgd", 5): 2e-3,  # float16 without multi_precision: MXNet computes in float16
}


@pytest.fixture(scope="module")
def arrays():
    with np.load(HERE / "dist.npz") as stored:
        return dict(stored)


def test_there_are_runs():
    assert len(RUNS) == 12


def pattern(count, a, b, c):
    """The recipe of the large values, which are not stored."""
    i = np.arange(count, dtype=np.int64)
    return ((i * a + b) % c - c // 2).astype(np.float32)


def cut(arrays, name, part, entry):
    """Entry number `entry` of those that lie one after the other in `name`.`part`."""
    splits = arrays[f"{name}.splits"]
    return arrays[f"{name}{part}"][splits[entry] : splits[entry + 1]]


def first(arrays, run, key):
    name = f"{run['name']}/{key['key']}/w0"
    if key["kind"] != "big":
        value = arrays[name]
        return kvstore.RowSparse.from_dense(value) if key["kind"] == "rs" else value
    return pattern(int(np.prod(key["shape"])), 3, 1, 11).reshape(key["shape"])


def gradients(arrays, run, key, rank, step):
    name = f"{run['name']}/{key['key']}/r{rank}/grad"
    if key["kind"] == "rs":
        count = key.get("values", 1)
        return [
            kvstore.RowSparse(
                cut(arrays, name, ".data", at), cut(arrays, name, ".indices", at), key["shape"]
            )
            for at in range(step * count, (step + 1) * count)
        ]
    if key["kind"] != "big":
        return list(arrays[name][step])
    count = int(np.prod(key["shape"]))
    gradient = pattern(count, 5 + step, 100 * rank + step, 13) * np.float32(run.get("big_scale", 1))
    return [gradient.reshape(key["shape"])]


def check(arrays, run, key, rank, entry, pulled):
    name = f"{run['name']}/{key['key']}/r{rank}"
    if key["kind"] == "big":
        digest = hashlib.sha256(pulled.tobytes()).hexdigest()
        assert digest == arrays[f"{name}/sha256"][entry], name
        return
    if key["kind"] == "rs":
        recorded = cut(arrays, f"{name}/pulled", ".data", entry)
        assert pulled.indices.tolist() == cut(arrays, f"{name}/pulled", ".indices", entry).tolist()
        pulled = pulled.data
    else:
        recorded = arrays[f"{name}/pulled"][entry]
    assert pulled.dtype == recorded.dtype and pulled.shape == recorded.shape
    tolerance = CLOSE.get((run["name"], key["key"]))
    if tolerance is not None:
        assert np.abs(pulled - recorded).max() <= tolerance * np.abs(recorded).max()
    else:
        assert pulled.tobytes() == recorded.tobytes(), f"{name} after {entry} pushes"


def pull(arrays, run, kv, names, outs, entry):
    for key, name, out in zip(run["keys"], names, outs, strict=True):
        if key["kind"] == "rs":
            asked = f"{run['name']}/{key['key']}/r{kv.rank}/row_ids"
            kv.row_sparse_pull(name, out, row_ids=cut(arrays, asked, "", entry))
        else:
            kv.pull(name, out)


def prepare(run, kv):
    if "compression" in run:
        kv.set_gradient_compression(run["compression"])
    if "optimizer" in run:
        keywords = dict(run["optimizer"])
        kv.set_optimizer(getattr(kvstore.optimizer, keywords.pop("optimizer"))(**keywords))


def replay(arrays, run, kv):
    keys, rank = run["keys"], kv.rank
    names = [key["key"] for key in keys]
    values = [first(arrays, run, key) for key in keys]
    outs = [
        kvstore.RowSparse.zeros(value.shape, value.dtype)
        if isinstance(value, kvstore.RowSparse)
        else np.empty_like(value)
        for value in values
    ]
    if rank != 0:
        values = [
            value if isinstance(value, kvstore.RowSparse) else np.full_like(value, 99)
            for value in outs
        ]
    kv.init(names, values)
    prepare(run, kv)
    pull(arrays, run, kv, names, outs, 0)
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
            pull(arrays, run, kv, names, outs, step + 1)
        for key, out in zip(keys, outs, strict=True):
            check(arrays, run, key, rank, step + 1, out)


@pytest.mark.parametrize("name", sorted(RUNS))
def test_a_recorded_run_gives_the_recorded_bits(arrays, name):
    run = RUNS[name]
    with Cluster(run["workers"], run["servers"], kind=run["type"]) as cluster:
        cluster.run(lambda kv: replay(arrays, run, kv))
