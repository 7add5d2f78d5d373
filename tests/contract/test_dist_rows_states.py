"""Files of training states of row-sparse keys in dist stores: rows that were never touched are
zeros in the file, and training goes on elsewhere bit for bit."""

import contextlib

import numpy as np
import pytest
from helpers import has_rows, same, sparse
from inside import Cluster, each

import kvstore
from kvstore.optimizer import SGD, Adam, GroupAdaGrad

safetensors = pytest.importorskip("safetensors.numpy", reason="mlkvstore[state] is not installed")

SHAPE = (40_000, 4)  # on two servers and more
JOBS = {
    "adam": (lambda: Adam(lr=0.1), "float32"),
    "momentum": (lambda: SGD(lr=0.1, momentum=0.9, wd=0.25, lazy_update=False), "float64"),
    "a number for each row": (lambda: GroupAdaGrad(lr=0.1), "float32"),
    "half": (lambda: SGD(lr=0.1, momentum=0.9, multi_precision=True), "float16"),
}


def gradient(step, dtype):
    rng = np.random.default_rng(step)
    ids = np.sort(rng.choice(SHAPE[0], 50, replace=False))
    return kvstore.RowSparse(rng.normal(size=(50, SHAPE[1])).astype(dtype), ids, SHAPE)


@contextlib.contextmanager
def place(where, value, make):
    """The stores of "local" or of a cluster of (workers, servers), with the key 's'."""
    with contextlib.ExitStack() as stack:
        if where == "local":
            stores = [stack.enter_context(kvstore.create("local"))]
        else:
            stores = stack.enter_context(Cluster(*where)).all_stores()
        each(stores, lambda kv: kv.set_optimizer(make()))
        each(stores, lambda kv: kv.init("s", value))
        yield stores


def train(stores, steps, dtype):
    none = kvstore.RowSparse.zeros(SHAPE, dtype)
    each(stores, lambda kv: [kv.push("s", none if kv.rank else gradient(i, dtype)) for i in steps])


def rows_of(kv):
    value = kv.pull("s")
    return value.indices.tolist(), value.data.tobytes()


@pytest.mark.parametrize("name", JOBS)
@pytest.mark.parametrize("there", ["local", (1, 3), (3, 2)], ids=str)
@pytest.mark.parametrize("here", ["local", (2, 2)], ids=str)
def test_training_goes_on_elsewhere(name, here, there, tmp_path):
    make, dtype = JOBS[name]
    first, path = kvstore.RowSparse.zeros(SHAPE, dtype), tmp_path / "states"
    with place("local", first, make) as (one,):
        train([one], range(3), dtype)
        one.save_optimizer_states(tmp_path / "expected")
        train([one], range(3, 6), dtype)
        expected = rows_of(one)
    with place(here, first, make) as stores:
        train(stores, range(3), dtype)
        stores[0].save_optimizer_states(path)
        middle = stores[0].pull("s")
        middle.wait_to_read()
    files = [safetensors.load_file(file) for file in (path, tmp_path / "expected")]
    assert files[0].keys() == files[1].keys()
    assert all(same(value, files[1][name]) for name, value in files[0].items())
    with place(there, middle, make) as stores:
        stores[0].load_optimizer_states(path)
        train(stores, range(3, 6), dtype)
        assert [rows_of(kv) for kv in stores] == [expected] * len(stores)


def test_state_of_a_row_that_is_not_stored_is_refused(tmp_path):
    path, make = tmp_path / "states", JOBS["adam"][0]
    with place("local", kvstore.RowSparse.zeros(SHAPE, "float32"), make) as (one,):
        train([one], range(2), "float32")
        one.save_optimizer_states(path)
    with place((2, 2), sparse({1: 1}, SHAPE, "float32"), make) as stores:
        with pytest.raises(kvstore.InvalidArgumentError, match=r"'s'.*a row that the key's value"):
            stores[0].load_optimizer_states(path)
        assert has_rows(stores[1].pull("s"), {1: 1})
