"""Files of training states written and read by whole clusters of processes."""

import numpy as np
import pytest
import summing
from helpers import same
from launching import LONG

import kvstore
from kvstore.lr_scheduler import FactorScheduler
from kvstore.optimizer import Adam

pytest.importorskip("safetensors", reason="mlkvstore[state] is not installed")

SHAPES = {"small": (3,), "large": (300_001,)}
STOP, STEPS = 2, 4


def make(name):
    kind = {"adam": Adam, "own": summing.Averaging}[name]
    return kind(lr=0.1, lr_scheduler=FactorScheduler(step=3, factor=0.5))


def numbers(key, step):
    return np.random.default_rng([len(key), step]).normal(size=SHAPES[key]).astype("float32")


def train(kv, steps):
    """Worker 0 has the gradients, so that the number of workers is no matter."""
    for step in steps:
        for key, shape in SHAPES.items():
            kv.push(key, numbers(key, step) if kv.rank == 0 else np.zeros(shape, "float32"))


def values_of(kv):
    return {key: kv.pull(key).asnumpy() for key in SHAPES}


def begin(kind, path, name, saver):
    """The first half; the saver's is another rank than the one that counts."""
    with kvstore.create(kind) as kv:
        kv.set_optimizer(make(name))
        kv.init(list(SHAPES), [numbers(key, 100) for key in SHAPES])
        train(kv, range(STOP))
        values = values_of(kv)
        kv.barrier()
        if kv.rank == saver:
            kv.save_optimizer_states(path, dump_optimizer=True)
        kv.barrier()
        return values


def go_on(kind, path, name, values, loader):
    with kvstore.create(kind) as kv:
        if name == "own":  # by which keys are not cut
            kv.set_optimizer(make(name))
        kv.init(list(SHAPES), [values[key] for key in SHAPES])
        kv.barrier()
        if kv.rank == loader:
            kv.load_optimizer_states(path)
        kv.barrier()
        train(kv, range(STOP, STEPS))
        return values_of(kv)


@pytest.mark.parametrize("name", ["adam", "own"])
def test_a_cluster_goes_on_as_another_one(name, tmp_path):
    path = str(tmp_path / "states")
    options = {"allow_import": "summing", "timeout": LONG}
    with kvstore.create() as kv:
        kv.set_optimizer(make(name))
        kv.init(list(SHAPES), [numbers(key, 100) for key in SHAPES])
        train(kv, range(STEPS))
        end = values_of(kv)
    with kvstore.LocalCluster(2, 2, **options) as cluster:
        values = cluster.run(begin, "dist_sync", path, name, 1)
    with kvstore.LocalCluster(3, 1, **options) as cluster:
        for found in cluster.run(go_on, "dist_sync", path, name, values[0], 2):
            for key, value in end.items():
                assert same(found[key], value), key
    found = go_on("local", path, name, values[0], 0)
    assert all(same(found[key], value) for key, value in end.items())
