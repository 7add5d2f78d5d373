"""Calls on CUDA tensors in dist stores when something fails: the wire, memory of the host."""

import contextlib

import cuda_tensor as cuda
import numpy as np
import pytest
from inside import Cluster, each
from twin import same

import kvstore
from kvstore import _core

SIZES = [1, 5000, 40_000, 600_000]  # elements: two go in a message of their own, one in slices
FAULTS = ("delay=1,reorder", "reorder,kill", "reorder,fail", "reorder,short")
LOST = (kvstore.PeerLostError, kvstore.ClosedError)


def tensors(number):
    return [cuda.TableTensor(np.full(size, number, np.float32)) for size in SIZES]


def forget(*errors):
    """Takes the errors away that nobody has been told of."""
    while True:
        try:
            return kvstore.wait_all()
        except errors:
            continue


@pytest.mark.parametrize("number", range(8))
def test_faults_of_the_wire_end_every_call_with_the_right_bytes_or_a_typed_error(seed, number):
    random = np.random.default_rng([seed, number])
    kind, lost = FAULTS[number % 4], []
    if number % 4:
        kind += f"={random.integers(0, 4)}:{random.integers(3, 30)}"
    try:
        cluster = Cluster(2, 2, "dist_device_sync", "faulty", seed=seed * 8 + number, faults=kind)
    except kvstore.KVStoreError:
        assert number % 4
        return
    keys = list(range(len(SIZES)))
    with cluster:

        def work(kv):
            try:
                kv.init(keys, [np.zeros(size, np.float32) for size in SIZES])
                for step in range(1, 5):
                    outs, values = tensors(55), [[t, t] for t in tensors(step)]
                    if step % 2:
                        kv.pushpull(keys, values, outs)
                    else:
                        kv.push(keys[::-1], values[::-1])
                        kv.pull(keys, outs)
                    assert all((out.numpy() == 4 * step).all() for out in outs)
            except LOST as error:
                lost.append(error)
                for node in cluster.nodes():
                    node.lose("the test says so")

        each(cluster.all_stores(timeout=60), work)
        assert not lost or number % 4
    forget(*LOST)


def test_every_allocation_of_the_host_may_fail(seed):
    size = SIZES[-1]
    wanted = np.ones(size, np.float32)
    for nth in range(1, 1000):
        with Cluster(1, 2, kind="dist_device_sync") as cluster:
            kv, told = cluster.store(), None
            kv.init([0, 1], [np.zeros(size, np.float32), np.zeros(3, np.float32)])
            values = [cuda.TableTensor(wanted), cuda.TableTensor(wanted[:3])]
            outs = [cuda.TableTensor(0 * wanted), cuda.TableTensor(0 * wanted[:3])]
            _core.fault_set("alloc", nth)
            try:
                kv.pushpull([0, 1], values, outs)
            except (MemoryError, kvstore.KVStoreError) as error:
                told = error
            with contextlib.suppress(MemoryError, *LOST):
                cluster.members[0].core.drain(60)
            hit = _core.fault_set("alloc", 0) >= nth
            forget(MemoryError, *LOST)
            assert told or all(same(out.numpy(), wanted[: out.shape[0]]) for out in outs)
            lost = False
            try:
                got = kv.pull(0).asnumpy()
                assert same(got, wanted) or (told and not got.any())
                kv.push(0, values[0])
            except LOST:
                lost = True  # a message for which a node had no memory ends its session
            assert hit or not (told or lost), told
            told = None  # its traceback holds the tensors
        forget(MemoryError, *LOST)
        if not hit:
            return
    raise AssertionError("the call never came through")
