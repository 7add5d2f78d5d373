"""Faults of the wire under pushes with optimizers and codes: the right numbers or a typed error."""

import numpy as np
import pytest
from helpers import LONG
from inside import Cluster, each
from test_dist_failures import BIG, forget

import kvstore
from kvstore import optimizer

KINDS = ("delay=1,reorder", "reorder,kill", "reorder,fail", "reorder,short")
WAYS = ("optimizer", "2bit", "1bit", "2bit optimizer", "norms")
SIZES = [1, 5000, BIG // 2]
ROUNDS = 5


def value_of(way, step):
    """What codes stand for as it is: a number whose residual is 0 afterwards."""
    if "1bit" in way:
        return (-1.0, 1.0)[step % 2]
    return ((step % 3) - 1) / 2 if "2bit" in way else float(step)


def expected_of(way, workers):
    """The keys' values after each round."""
    if way == "norms":
        with kvstore.create("local") as local:
            local.set_optimizer(optimizer.LAMB(learning_rate=0.5))
            local.init(list(range(3)), [np.ones(size) for size in SIZES])
            for step in range(ROUNDS):
                values = [[np.full(size, value_of(way, step))] * workers for size in SIZES]
                local.push(list(range(3)), values)
                yield [local.pull(key).asnumpy() for key in range(3)]
        return
    total = 1.0
    for step in range(ROUNDS):
        total = value_of(way, step) * workers + (total if "optimizer" in way else 0)
        yield [np.full(size, total) for size in SIZES]


def prepare(kv, way):
    kv.init(list(range(3)), [np.ones(size) for size in SIZES])
    if "bit" in way:
        kv.set_gradient_compression({"type": way[:4], "threshold": 0.5})
    if kv.rank != 0:
        return  # it would wait for worker 0, of whose end no control plane tells it here
    if way == "norms":
        kv.set_optimizer(optimizer.LAMB(learning_rate=0.5))
    elif "optimizer" in way:
        kv.set_optimizer(optimizer.SGD(learning_rate=-1.0))


def close(out, wanted, way):
    if way == "norms":  # of slices, added up in another order
        return np.abs(out - wanted).max() <= 1e-12
    return (out == wanted).all()


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("seed", range(12))
def test_every_call_ends_with_the_right_numbers_or_a_typed_error(seed, way):
    random = np.random.default_rng([seed, WAYS.index(way)])
    workers, servers = (int(n) for n in random.integers(1, 4, 2))
    kind = KINDS[seed % 4]
    if seed % 4:
        kind += f"={random.integers(0, workers + servers)}:{random.integers(3, 40)}"
    failed, expected = [], list(expected_of(way, workers))
    try:
        cluster = Cluster(workers, servers, transport="faulty", seed=seed, faults=kind)
    except kvstore.KVStoreError:
        assert seed % 4
        return
    with cluster:
        keys = list(range(3))

        def work(kv):
            rng = np.random.default_rng([seed, kv.rank])
            try:
                prepare(kv, way)
                for step in range(ROUNDS):
                    outs = [np.zeros(size) for size in SIZES]
                    values = [np.full(size, value_of(way, step)) for size in SIZES]
                    if rng.integers(2):
                        kv.pushpull(keys, values, out=outs)
                    else:
                        kv.push([2, 0, 1], values[2:] + values[:2])
                        kv.pull(keys, out=outs)
                    for out, wanted in zip(outs, expected[step], strict=True):
                        assert close(out, wanted, way), (step, out, wanted)
            except (kvstore.PeerLostError, kvstore.ClosedError) as error:
                failed.append(error)
                for node in cluster.nodes():
                    node.lose("the test says so")

        each(cluster.all_stores(timeout=LONG), work)
        assert not failed or seed % 4
    forget(kvstore.PeerLostError, kvstore.ClosedError)
