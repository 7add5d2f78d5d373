"""Values of a dist store: every size and type, lists, strides, NDArrays, handles."""

import asyncio

import numpy as np
import pytest
from helpers import Worker, pulled, same
from inside import Cluster, each

import kvstore

TYPES = ["float64", "float32", "float16", "bfloat16", "int8", "uint8", "int32", "int64"]
SHAPES = [(), (0,), (3, 0, 2), (1,), (7,), (16384,), (16385,), (5, 3000), (300_001,), (1310, 1000)]


@pytest.fixture
def cluster():
    with Cluster(2, 2) as cluster:
        yield cluster


@pytest.fixture
def pair(cluster):
    return cluster.all_stores()


def init(stores, keys, values):
    each(stores, lambda kv: kv.init(keys, values))


def sent(cluster, rank=0):
    return cluster.members[rank].core.counters()["messages_sent"]


def received(cluster, rank=0):
    return cluster.members[rank].core.counters()["messages_received"]


@pytest.mark.parametrize("dtype", TYPES)
def test_lists_of_all_sizes_come_back_exactly_in_every_type(pair, dtype):
    if dtype == "bfloat16":
        ml_dtypes = pytest.importorskip("ml_dtypes", reason="NumPy's bfloat16 is in ml_dtypes")
        dtype = ml_dtypes.bfloat16
    keys = list(range(len(SHAPES)))
    values = [(np.arange(np.prod(shape, dtype=int)) % 50).astype(dtype) for shape in SHAPES]
    values = [value.reshape(shape) for value, shape in zip(values, SHAPES, strict=True)]

    def work(kv):
        kv.init(keys, values)
        seen = [pulled(kv, key) for key in keys]
        outs = [np.zeros_like(value) for value in values]
        kv.pushpull(keys, values, out=outs)
        kv.push(keys, outs)
        return seen, outs, [pulled(kv, key) for key in keys]

    for seen, outs, last in each(pair, work):
        assert all(same(a, b) for a, b in zip(seen, values, strict=True))
        assert all(same(a, b + b) for a, b in zip(outs, values, strict=True))
        assert all(same(a, b + b + b + b) for a, b in zip(last, values, strict=True))


def test_a_list_of_keys_is_one_round_trip(cluster, pair):
    keys = [f"k{i}" for i in range(50)]
    values = [np.full(10, i, "float32") for i in range(50)]
    outs = [np.zeros(10, "float32") for _ in keys]
    a, b = pair
    a.init("first", np.zeros(3))
    b.init("first", np.zeros(3))
    for call, most in [
        (lambda kv: kv.init(keys, values), 3),  # the names, and the values to two servers
        (lambda kv: kv.push(keys, values), 2),
        (lambda kv: kv.pull(keys, out=outs) if kv is a else None, 2),
        (lambda kv: kv.pushpull(keys, values, out=outs if kv is a else None), 2),
    ]:
        each(pair, lambda kv: kv.pull("first", out=np.zeros(3)))
        for member in cluster.members:
            member.core.drain(10)
        before = sent(cluster), received(cluster)
        each(pair, call)
        cluster.members[0].core.drain(10)
        assert 1 <= sent(cluster) - before[0] <= most
        assert received(cluster) - before[1] <= most


def test_value_lists_are_summed_in_the_worker_before_they_are_sent(cluster, pair):
    init(pair, "w", np.zeros(50_000))
    before = [member.core.counters()["bytes_sent"] for member in cluster.members]
    each(pair, lambda kv: kv.push("w", [np.full(50_000, kv.rank + i) for i in (1.0, 2.0, 3.0)]))
    for kv in pair:
        assert (pulled(kv, "w") == 6 + 9).all()
    for member, bytes_ in zip(cluster.members, before, strict=True):
        assert member.core.counters()["bytes_sent"] - bytes_ < 2 * 400_000


def test_every_out_of_a_key_gets_the_value(pair):
    init(pair, ["v", "w"], [np.arange(4.0), np.arange(200_000.0)])
    for kv in pair:
        outs = [[np.zeros(4), np.zeros(8)[::2]], [np.zeros(200_000) for _ in range(3)]]
        kv.pull(["v", "w"], out=outs)
        assert all((out == np.arange(4.0)).all() for out in outs[0])
        assert all((out == np.arange(200_000.0)).all() for out in outs[1])


def test_strided_values_and_outs(pair):
    init(pair, ["v", "w"], [np.zeros((30, 4))[:, ::2], np.zeros(100_000)[::-1]])

    def work(kv):
        grid, line = np.arange(120.0).reshape(30, 4), np.arange(200_000.0)
        out = [np.full((2, 30), -1.0).T, np.full(200_000, -1.0)]
        kv.pushpull(["v", "w"], [grid[:, 1::2], line[::-2]], out=[out[0], out[1][::2]])
        assert same(out[0].copy(), 2 * grid[:, 1::2])
        assert same(out[1][::2].copy(), 2 * line[::-2])
        assert (out[1][1::2] == -1).all()

    each(pair, work)


def test_an_out_may_be_the_value(pair):
    init(pair, ["v", "w"], [np.zeros(3), np.zeros(100_000)])

    def work(kv):
        values = [np.full(3, kv.rank + 1.0), np.full(100_000, kv.rank + 1.0)]
        kv.pushpull(["v", "w"], values)
        kv.pushpull("v", values[0], out=values[0])
        return values

    for small, large in each(pair, work):
        assert (small == 6).all()
        assert (large == 3).all()


def test_ndarrays_pass_values_from_key_to_key(pair):
    init(pair, ["v", "w", "x"], [np.zeros(70_000)] * 3)

    def work(kv):
        array = kvstore.full(70_000, kv.rank + 1.0, "float64")
        for _ in range(3):
            for key in ("v", "w", "x"):
                kv.push(key, array)
                kv.pull(key, out=array)
        return array.asnumpy()

    for found in each(pair, work):
        assert (found == 3 * 2**8).all()


def test_a_pull_into_an_ndarray_returns_at_once_and_reads_wait(pair):
    a, b = pair
    init(pair, "w", np.zeros(3))
    a.push("w", kvstore.ones(3, "float64"))
    out = kvstore.zeros(3, "float64")
    a.pull("w", out=out)
    new = a.pull("w")
    b.push("w", np.full(3, 4.0))
    assert out.asnumpy().tolist() == new.asnumpy().tolist() == [5, 5, 5]


def test_a_value_may_be_changed_once_push_has_returned(pair):
    a, b = pair
    init(pair, ["v", "w"], [np.zeros(3), np.zeros(400_000)])
    value = [np.ones(3), np.ones(400_000)]
    a.push(["v", "w"], value)
    for array in value:
        array[:] = 99
    b.push(["v", "w"], [np.ones(3), np.ones(400_000)])
    for kv in pair:
        assert (pulled(kv, "v") == 2).all()
        assert (pulled(kv, "w") == 2).all()


def test_a_handle_is_done_when_the_other_worker_has_come(pair):
    a, b = pair
    init(pair, "w", np.zeros(3))
    out = np.zeros(3)
    handle = a.pushpull("w", np.ones(3), out=out, async_op=True)
    assert not handle.done()
    assert handle.exception() is None
    with pytest.raises(kvstore.TimeoutError, match="it goes on"):
        handle.wait(0.01)
    b.push("w", np.ones(3))
    handle.wait()
    assert handle.done()
    assert out.tolist() == [2, 2, 2]


def test_a_handle_can_be_awaited_while_the_loop_runs(pair):
    a, b = pair
    init(pair, "w", np.zeros(3))

    async def main():
        out = np.zeros(3)
        handle = a.pushpull("w", np.ones(3), out=out, async_op=True)
        waiting = asyncio.ensure_future(awaited(handle))
        await asyncio.sleep(0)
        assert not waiting.done()
        b.push("w", np.full(3, 2.0))
        await waiting
        return out.tolist()

    async def awaited(handle):
        await handle

    assert asyncio.run(main()) == [3, 3, 3]


def test_a_handle_carries_the_error_and_nobody_else_is_told(cluster):
    a, b = cluster.all_stores(timeout=0.4)
    init([a, b], "w", np.zeros(3))
    handle = a.pushpull("w", np.ones(3), out=np.zeros(3), async_op=True)
    with pytest.raises(kvstore.TimeoutError, match="worker 1 has not pushed round 0"):
        handle.wait()
    assert isinstance(handle.exception(), kvstore.TimeoutError)
    kvstore.wait_all()
    b.push("w", np.ones(3))
    assert pulled(a, "w").tolist() == [2, 2, 2]


def test_the_error_of_a_push_is_told_once_by_the_next_wait_on_its_key(cluster):
    a, b = cluster.all_stores(timeout=0.4)
    init([a, b], ["v", "w"], [np.zeros(3)] * 2)
    a.push("w", np.ones(3))
    worker = Worker(cluster.members[0].core.drain, 10)
    worker.result()
    assert pulled(a, "v").tolist() == [0, 0, 0]
    with pytest.raises(kvstore.TimeoutError, match="'w': worker 1 has not pushed"):
        a.pull("w", out=np.zeros(3))
    kvstore.wait_all()
    b.push("w", np.ones(3))
    assert pulled(a, "w").tolist() == [2, 2, 2]


def test_wait_all_waits_for_what_other_workers_have_to_bring(pair):
    a, b = pair
    init(pair, "w", np.zeros(3))
    handle = a.push("w", np.ones(3), async_op=True)

    def wait():
        kvstore.wait_all()
        return handle.done()

    worker = Worker(wait)
    worker.wait_in_call(wait)
    b.push("w", np.ones(3))
    assert worker.result()


def test_priorities_do_not_change_the_values(pair):
    keys = list(range(12))
    init(pair, keys, [np.zeros(40_000)] * 12)

    def work(kv):
        for number in range(3):
            for key in keys:
                kv.push(key, np.full(40_000, float(key + number)), priority=key * (-1) ** key)
        outs = [np.zeros(40_000) for _ in keys]
        handles = [
            kv.pull(key, out=outs[key], priority=-key, async_op=True) for key in reversed(keys)
        ]
        for handle in handles:
            handle.wait()
        return outs

    for outs in each(pair, work):
        assert all((out == 2 * (key + 2)).all() for key, out in enumerate(outs))


def test_dist_async_needs_an_optimizer_and_lets_pulls_work():
    with Cluster(2, 2, kind="dist_async") as cluster:
        stores = cluster.all_stores()
        init(stores, "w", np.full(3, 5.0))
        for kv in stores:
            assert kv.type == "dist_async"
            assert pulled(kv, "w").tolist() == [5, 5, 5]
            with pytest.raises(kvstore.InvalidArgumentError, match="set_optimizer"):
                kv.push("w", np.ones(3))
                cluster.members[kv.rank].core.drain(10)
                pulled(kv, "w")
            with pytest.raises(kvstore.InvalidArgumentError, match="set_optimizer"):
                kv.pushpull("w", np.ones(3), out=np.zeros(3))
            assert pulled(kv, "w").tolist() == [5, 5, 5]
        kvstore.wait_all()


def test_a_row_sparse_out_is_left_out_with_a_warning(pair):
    init(pair, ["v", "w"], [np.ones(2), np.ones((4, 2))])
    out, left = np.zeros(2), kvstore.RowSparse.zeros((4, 2), "float64")
    with pytest.warns(UserWarning, match="'w'"):
        pair[0].pull(["v", "w"], out=[out, left])
    assert out.tolist() == [1, 1]
    assert left.indices.size == 0
    pair[0].pull("w", out=left)


def test_an_updater_is_refused_and_set_optimizer_named(pair):
    for call in (pair[0].set_updater, pair[0]._set_updater):
        with pytest.raises(kvstore.InvalidArgumentError, match="set_optimizer"):
            call(lambda key, recv, stored: None)


@pytest.mark.parametrize(
    ("call", "arguments"),
    [
        ("init", ("w", np.zeros(3))),
        ("push", ("w", np.zeros(3))),
        ("pull", ("w",)),
        ("pushpull", ("w", np.zeros(3))),
        ("broadcast", ("w", np.zeros(3), np.zeros(3))),
        ("delete", ("w",)),
        ("keys", ()),
        ("barrier", ()),
        ("set_optimizer", (kvstore.optimizer.SGD(),)),
        ("set_gradient_compression", ({"type": "1bit"},)),
        ("send_command_to_servers", (1, "")),
    ],
)
def test_in_a_servers_process_the_calls_say_to_serve(call, arguments):
    kv = kvstore.KVStore("dist_sync", _member=None)
    assert kv.type == "dist_sync"
    with pytest.raises(kvstore.InvalidArgumentError, match=r"call kvstore\.serve\(\)"):
        getattr(kv, call)(*arguments)
    kv.close()
