"""Recorded runs of MXNet 1.9.1 replayed on the store and on the tests' model, bit for bit.

Row-sparse keys are left out, since the store has no row-sparse values yet: operations on them
alone are not run, and lists are run without their places. How many is asserted, so that nothing
else can slip away. A row-sparse value pushed to a dense key counts as zero in the rows it lacks, so
it is pushed as the dense array that it stands for.
"""

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from helpers import same
from model import Model

import kvstore

HERE = Path(__file__).parent
TRACES = json.loads((HERE / "traces.json").read_text())
LEFT_OUT = {"init": 11, "push": 44, "pull": 32, "row_sparse_pull": 55}
SHORTENED = {"init": 15, "push": 26}


@pytest.fixture(scope="module")
def arrays():
    with np.load(HERE / "traces.npz") as stored:
        return dict(stored)


def is_sparse(value):
    """Whether the value of one key, a reference or a list of them, holds a row-sparse one."""
    return any(isinstance(v, dict) for v in (value if isinstance(value, list) else [value]))


def dense_part(op, sparse_keys):
    """The operation without its row-sparse keys; None if nothing is left."""
    if not isinstance(op["key"], list):
        return None if op["key"] in sparse_keys else op
    kept = [i for i, key in enumerate(op["key"]) if key not in sparse_keys]
    if not kept:
        return None
    short = {name: [op[name][i] for i in kept] for name in ("key", "value", "result") if name in op}
    return {**op, **short}


def dense_operations(trace, counts):
    sparse_keys = set()
    for op in trace["ops"]:
        if op["op"] in ("init", "broadcast"):
            keys, values = op["key"], op["value"]
            if not isinstance(keys, list):
                keys, values = [keys], [values]
            sparse_keys |= {k for k, v in zip(keys, values, strict=True) if is_sparse(v)}
        dense = dense_part(op, sparse_keys)
        if dense is None:
            counts["left out", op["op"]] += 1
        else:
            if dense["key"] != op["key"]:
                counts["shortened", op["op"]] += 1
            yield dense


def fetch(reference, arrays):
    if isinstance(reference, list):
        return [fetch(r, arrays) for r in reference]
    if isinstance(reference, str):
        return arrays[reference].copy()
    data = arrays[reference["rs"] + ".data"]
    dense = np.zeros(reference["shape"], data.dtype)
    dense[arrays[reference["rs"] + ".indices"]] = data
    return dense


def flat(nested):
    return [a for n in nested for a in flat(n)] if isinstance(nested, list) else [nested]


def poisoned(like):
    """Arrays of the same form, with contents that no result has."""
    if isinstance(like, list):
        return [poisoned(a) for a in like]
    return np.full(like.shape, 113, like.dtype)


def compressed(outs, op):
    """A single out as it is given by most callers: without a list around it."""
    if not isinstance(op["key"], list):
        return outs[0] if len(outs) == 1 else outs
    return [o[0] if len(o) == 1 else o for o in outs]


def twice(key, recv, stored):
    stored += recv * 2


def replay(trace, store, arrays, counts):
    store.set_updater(twice) if trace["updater"] else store.set_updater(None)
    for number, op in enumerate(dense_operations(trace, counts)):
        counts["run"] += 1
        key, kind = op["key"], op["op"]
        value = fetch(op.get("value", []), arrays)
        priority = {"priority": op["priority"]} if "priority" in op else {}
        if kind in ("init", "push"):
            getattr(store, kind)(key, value, **priority)
            continue
        expected = fetch(op["result"], arrays)
        if op["n_out"] is None:
            outs = value if isinstance(value, list) else [value]
            store.pushpull(key, value, **priority)
        else:
            outs = poisoned(expected)
            given = compressed(outs, op)
            if kind == "pull":
                store.pull(key, out=given, **priority)
            else:
                getattr(store, kind)(key, value, given, **priority)
        for out, right in zip(flat(outs), flat(expected), strict=True):
            assert same(out, right), (trace["name"], number, op)


class ModelStore(Model):
    """The model under the store's call names: priorities change nothing there."""

    def set_updater(self, updater):
        self.updater = updater

    def push(self, key, value, priority=0):
        super().push(key, value)

    def pull(self, key, out=None, priority=0):
        super().pull(key, out)

    def pushpull(self, key, value, out=None, priority=0):
        super().pushpull(key, value, out)


@pytest.mark.parametrize("trace", TRACES, ids=lambda t: t["name"])
def test_the_store_answers_as_recorded(kv, trace, arrays):
    replay(trace, kv, arrays, Counter())


@pytest.mark.parametrize("trace", TRACES, ids=lambda t: t["name"])
def test_the_model_answers_as_recorded(trace, arrays):
    replay(trace, ModelStore(), arrays, Counter())


def test_only_row_sparse_keys_are_left_out(arrays):
    counts = Counter()
    for trace in TRACES:
        replay(trace, ModelStore(), arrays, counts)
    assert {k[1]: n for k, n in counts.items() if k[0] == "left out"} == LEFT_OUT
    assert {k[1]: n for k, n in counts.items() if k[0] == "shortened"} == SHORTENED
    assert counts["run"] == sum(len(t["ops"]) for t in TRACES) - sum(LEFT_OUT.values())


@pytest.mark.parametrize("trace", TRACES[::5], ids=lambda t: t["name"])
def test_ndarrays_give_the_recorded_answers_too(trace, arrays):
    with kvstore.create("local") as kv:
        replay(trace, NDArrayStore(kv), arrays, Counter())


class NDArrayStore:
    """The store called with NDArrays instead of NumPy's; results come back into the caller's."""

    def __init__(self, kv):
        self.kv = kv
        self.set_updater = kv.set_updater

    def convert(self, nested):
        if isinstance(nested, list):
            return [self.convert(n) for n in nested]
        return kvstore.array(nested)

    def back(self, nested, arrays):
        for out, array in zip(flat(nested), flat(arrays), strict=True):
            out[...] = array.asnumpy()

    def init(self, key, value):
        self.kv.init(key, self.convert(value))

    def push(self, key, value, priority=0):
        self.kv.push(key, self.convert(value), priority)

    def pull(self, key, out, priority=0):
        outs = self.convert(out)
        self.kv.pull(key, outs, priority)
        self.back(out, outs)

    def pushpull(self, key, value, out=None, priority=0):
        values, outs = self.convert(value), None if out is None else self.convert(out)
        self.kv.pushpull(key, values, outs, priority)
        self.back(value if out is None else out, values if out is None else outs)

    def broadcast(self, key, value, out):
        outs = self.convert(out)
        self.kv.broadcast(key, self.convert(value), outs)
        self.back(out, outs)
