"""Recorded runs of MXNet 1.9.1 replayed on the store and on the tests' model, bit for bit."""

import json
from pathlib import Path

import numpy as np
import pytest
from helpers import same
from model import Model, Rows

import kvstore

HERE = Path(__file__).parent
TRACES = json.loads((HERE / "traces.json").read_text())


@pytest.fixture(scope="module")
def arrays():
    with np.load(HERE / "traces.npz") as stored:
        return dict(stored)


def fetch(reference, arrays, rows):
    """The array of a reference; `rows` makes a row-sparse one."""
    if isinstance(reference, list):
        return [fetch(r, arrays, rows) for r in reference]
    if isinstance(reference, str):
        return arrays[reference].copy()
    name = reference["rs"]
    return rows(arrays[name + ".data"], arrays[name + ".indices"], reference["shape"])


def flat(nested):
    return [a for n in nested for a in flat(n)] if isinstance(nested, list) else [nested]


def poisoned(like, rows):
    """Arrays of the same form, with contents that no result has."""
    if isinstance(like, list):
        return [poisoned(a, rows) for a in like]
    if isinstance(like, np.ndarray):
        return np.full(like.shape, 113, like.dtype)
    return rows(np.full((1, *like.shape[1:]), 113, like.dtype), [0], like.shape)


def compressed(outs, op):
    """A single out as it is given by most callers: without a list around it."""
    if not isinstance(op["key"], list):
        return outs[0] if len(outs) == 1 else outs
    return [o[0] if len(o) == 1 else o for o in outs]


def twice(key, recv, stored):
    stored[...] = np.asarray(stored) + np.asarray(recv) * 2


def check(out, right, where):
    if isinstance(right, np.ndarray):
        assert same(out, right), where
    else:
        assert same(out.indices, right.indices), where
        assert same(out.data, right.data), where


def replay(trace, store, arrays, rows):
    store.set_updater(twice if trace["updater"] else None)
    for number, op in enumerate(trace["ops"]):
        key, kind = op["key"], op["op"]
        value = fetch(op.get("value", []), arrays, rows)
        priority = {"priority": op["priority"]} if "priority" in op else {}
        if kind in ("init", "push"):
            getattr(store, kind)(key, value, **priority)
            continue
        if "result_dense" in op:
            expected = fetch([op["result_dense"]] * op["n_out"], arrays, rows)
            outs = [poisoned(rows.zeros(e.shape, e.dtype), rows) for e in expected]
        else:
            expected = fetch(op["result"], arrays, rows)
            outs = poisoned(expected, rows)
        if op["n_out"] is None:
            outs = value if isinstance(value, list) else [value]
            store.pushpull(key, value, **priority)
        elif kind == "pull":
            ignore = {"ignore_sparse": op["ignore_sparse"]} if "ignore_sparse" in op else {}
            store.pull(key, out=compressed(outs, op), **ignore, **priority)
        elif kind == "row_sparse_pull":
            ids = fetch(op["row_ids"], arrays, rows)
            store.row_sparse_pull(key, out=compressed(outs, op), row_ids=ids, **priority)
        else:
            getattr(store, kind)(key, value, compressed(outs, op), **priority)
        if "result_dense" in op:
            outs = [np.asarray(out) for out in outs]
        for out, right in zip(flat(outs), flat(expected), strict=True):
            check(out, right, (trace["name"], number, op))


class ModelStore(Model):
    """The model under the store's call names: priorities change nothing there."""

    def set_updater(self, updater):
        self.updater = updater

    def push(self, key, value, priority=0):
        super().push(key, value)

    def pull(self, key, out=None, priority=0, ignore_sparse=True):
        super().pull(key, out, ignore_sparse)

    def row_sparse_pull(self, key, out=None, priority=0, row_ids=None):
        super().row_sparse_pull(key, out, row_ids)

    def pushpull(self, key, value, out=None, priority=0):
        super().pushpull(key, value, out)


def test_all_operations_that_were_recorded_are_here():
    operations = [op for trace in TRACES for op in trace["ops"]]
    kinds = {op["op"]: 0 for op in operations}
    for op in operations:
        kinds[op["op"]] += 1
    assert sum(kinds.values()) == 540
    assert kinds["row_sparse_pull"] == 55


@pytest.mark.parametrize("trace", TRACES, ids=lambda t: t["name"])
def test_the_store_answers_as_recorded(kv, trace, arrays):
    replay(trace, kv, arrays, kvstore.RowSparse)


@pytest.mark.parametrize("trace", TRACES, ids=lambda t: t["name"])
def test_the_model_answers_as_recorded(trace, arrays):
    replay(trace, ModelStore(), arrays, Rows)


@pytest.mark.parametrize("trace", TRACES[::5], ids=lambda t: t["name"])
def test_ndarrays_give_the_recorded_answers_too(trace, arrays):
    with kvstore.create("local") as kv:
        replay(trace, NDArrayStore(kv), arrays, kvstore.RowSparse)


class NDArrayStore:
    """The store called with NDArrays instead of NumPy's; results come back into the caller's."""

    def __init__(self, kv):
        self.kv = kv
        self.set_updater = kv.set_updater
        self.row_sparse_pull = kv.row_sparse_pull

    def convert(self, nested):
        if isinstance(nested, list):
            return [self.convert(n) for n in nested]
        return kvstore.array(nested) if isinstance(nested, np.ndarray) else nested

    def back(self, nested, arrays):
        for out, array in zip(flat(nested), flat(arrays), strict=True):
            if out is not array:
                out[...] = array.asnumpy()

    def init(self, key, value):
        self.kv.init(key, self.convert(value))

    def push(self, key, value, priority=0):
        self.kv.push(key, self.convert(value), priority)

    def pull(self, key, out, priority=0, ignore_sparse=True):
        outs = self.convert(out)
        self.kv.pull(key, outs, priority, ignore_sparse)
        self.back(out, outs)

    def pushpull(self, key, value, out=None, priority=0):
        values, outs = self.convert(value), None if out is None else self.convert(out)
        self.kv.pushpull(key, values, outs, priority)
        self.back(value if out is None else out, values if out is None else outs)

    def broadcast(self, key, value, out):
        outs = self.convert(out)
        self.kv.broadcast(key, self.convert(value), outs)
        self.back(out, outs)
