"""A dist store when something is missing: deadlines, lost nodes, faults of the wire, no memory."""

import contextlib
import signal
import threading
import time

import numpy as np
import pytest
from helpers import LONG, Worker, pulled
from inside import Cluster, each

import kvstore
from kvstore import _core

SOON_S = 2.0  # within which a lost node breaks waits
BIG = 400_000  # elements of float64: several slices
SEEDS = 60


def forget(*errors):
    """Takes the errors away that nobody has been told of."""
    while True:
        try:
            kvstore.wait_all()
        except errors:
            continue
        return


def stores_of(cluster, **options):
    stores = cluster.all_stores(**options)
    each(stores, lambda kv: kv.init(["v", "w"], [np.zeros(3), np.zeros(BIG)]))
    return stores


def waiting_calls(kv, out):
    """Calls of worker 0 that wait for worker 1, by name."""
    return {
        "init": lambda: kv.init("x", np.ones(3)),
        "push": lambda: [kv.push("v", np.ones(3)) for _ in range(3)],
        "pull": lambda: (kv.push("v", np.ones(3)), kv.pull("v", out=out)),
        "pushpull": lambda: kv.pushpull("v", np.ones(3), out=out),
        "delete": lambda: kv.delete("v"),
        "handle": lambda: kv.pushpull("v", np.ones(3), out=out, async_op=True).wait(),
    }


WAITING = ("push", "pull", "pushpull", "delete", "handle")


@pytest.mark.parametrize("name", WAITING)
@pytest.mark.parametrize("lost", ["told", "server closed", "worker closed"])
def test_a_lost_node_breaks_every_wait_and_every_later_call_but_close(name, lost):
    with Cluster(2, 2) as cluster:
        kv, other = stores_of(cluster)
        out = np.full(3, 9.0)
        call = waiting_calls(kv, out)[name]
        worker = Worker(call)
        while not any(node.counters()["waiting"] for node in cluster.servers):
            assert worker.is_alive()
        begun = time.monotonic()
        if lost == "told":
            cluster.members[0].core.lose("worker 7 is gone")
            words = "worker 7 is gone"
        elif lost == "server closed":
            cluster.servers[1].close()
            words = "server 1"
        else:
            cluster.members[1].core.close()  # in a cluster the control plane says so
            cluster.members[0].core.lose("worker 1 is gone")
            words = "worker 1 is gone"
        with pytest.raises(kvstore.PeerLostError, match=words):
            worker.result()
        assert time.monotonic() - begun < SOON_S
        for later in waiting_calls(kv, out).values():
            with pytest.raises(kvstore.PeerLostError, match=words):
                later()
        assert out.tolist() == [9, 9, 9]
        if lost == "server closed":
            with pytest.raises(kvstore.PeerLostError, match=words):
                other.pull("w", out=np.zeros(BIG))
        kv.close()
        with pytest.raises(kvstore.ClosedError):
            kv.pull("v", out=out)
        forget(kvstore.PeerLostError, kvstore.ClosedError)


@pytest.mark.parametrize("size", [3, BIG])
def test_after_a_deadline_the_callers_arrays_are_neither_read_nor_written(size):
    key = "v" if size == 3 else "w"
    with Cluster(2, 2) as cluster:
        a, b = stores_of(cluster, timeout=0.4)
        value, out = np.ones(size), np.full(size, 9.0)
        with pytest.raises(kvstore.TimeoutError, match="worker 1 has not pushed"):
            a.pushpull(key, value, out=out)
        value[:] = 77
        b.push(key, np.full(size, 4.0))
        assert (pulled(b, key) == 5).all()
        cluster.members[0].core.drain(LONG)
        assert (out == 9).all()
        assert (pulled(a, key) == 5).all()
        kvstore.wait_all()


@pytest.mark.parametrize("size", [3, BIG])
def test_a_push_that_is_held_back_does_not_read_its_value_after_it_has_raised(size):
    key = "v" if size == 3 else "w"
    with Cluster(2, 2) as cluster:
        a, b = stores_of(cluster, timeout=0.4)
        value = np.ones(size)
        for _ in range(2):
            a.push(key, value)
        with pytest.raises(kvstore.TimeoutError, match="not sent"):
            a.push(key, value)
        value[:] = 77
        forget(kvstore.TimeoutError)
        for _ in range(2):
            b.push(key, np.ones(size))
        assert (pulled(a, key) == 2).all()
        each([a, b], lambda kv: kv.push(key, np.full(size, 3.0)))
        assert (pulled(b, key) == 6).all()


@pytest.mark.parametrize("name", WAITING)
def test_a_deadline_ends_a_call_in_time_and_the_store_works_when_the_worker_comes(name):
    with Cluster(2, 2) as cluster:
        a, b = stores_of(cluster, timeout=0.4)
        begun = time.monotonic()
        with pytest.raises(kvstore.TimeoutError, match=r"'v'.*worker 1 has not"):
            waiting_calls(a, np.zeros(3))[name]()
        assert time.monotonic() - begun < SOON_S
        forget(kvstore.TimeoutError)
        for _ in range({"push": 2, "delete": 0}.get(name, 1)):
            b.push("v", np.ones(3))
        each([a, b], lambda kv: kv.push("v", np.full(3, 5.0)))
        for kv in (a, b):
            assert pulled(kv, "v").tolist() == [10, 10, 10]


@pytest.mark.parametrize("name", ("init", *WAITING))
def test_a_worker_that_leaves_early_ends_what_waits_for_it_and_every_later_call(name):
    gone = 0 if name == "init" else 1
    with Cluster(3, 2) as cluster:
        stores = stores_of(cluster)
        a, b = (kv for kv in stores if kv.rank != gone)
        each(stores, lambda kv: kv.push(["v", "w"], [np.ones(3), np.ones(BIG)]))
        out = np.full(3, 9.0)

        def call(kv, name, out):  # what becomes of a push is told by a pull at the latest
            return waiting_calls(kv, out)[name](), kv.pull("v", out=out)

        worker = Worker(call, a, name, out)
        while not any(node.counters()["waiting"] for node in cluster.servers):
            assert worker.is_alive()
        begun = time.monotonic()
        stores[gone].close()
        words = f"worker {gone} has left the cluster"
        with pytest.raises(kvstore.PeerLostError, match=f"key '(v|x)'.*{words}"):
            worker.result()
        assert out.tolist() == [9, 9, 9]
        for later in (name, "handle"):
            with pytest.raises(kvstore.PeerLostError, match=words):
                call(b, later, np.zeros(3))
        assert time.monotonic() - begun < SOON_S
        # The cluster is not lost, and what all had pushed counts.
        forget(kvstore.PeerLostError)
        assert (pulled(b, "w") == 3).all()
        b.close()
        forget(kvstore.PeerLostError)


def test_a_worker_that_leaves_after_its_last_push_is_missed_by_nobody():
    with Cluster(3, 2) as cluster:
        a, b, c = stores_of(cluster)
        keys, values = ["v", "w"], [np.ones(3), np.ones(BIG)]
        for _ in range(2):
            c.push(keys, values)
        leaving = Worker(c.close)  # it waits until the others have pushed as often
        for _ in range(2):
            each([a, b], lambda kv: kv.push(keys, values))
        leaving.result()
        for kv in (a, b):
            assert pulled(kv, "v").tolist() == [3, 3, 3] and (pulled(kv, "w") == 3).all()
        with pytest.raises(kvstore.PeerLostError, match=r"worker 2 .* after 2 pushes"):
            a.pushpull("v", np.ones(3))
        forget(kvstore.PeerLostError)


# Of pushes only the third waits, and nobody can tell when it has begun.
@pytest.mark.parametrize("name", ("pull", "pushpull", "handle"))
def test_ctrl_c_ends_a_call_and_the_store_works_when_the_worker_comes(name):
    with Cluster(2, 2) as cluster:
        a, b = stores_of(cluster)
        out, main = np.full(3, 9.0), threading.main_thread().ident
        call, sent = waiting_calls(a, out)[name], []

        def interrupt():
            deadline = time.monotonic() + LONG
            while time.monotonic() < deadline:
                if sum(n.counters()["waiting"] for n in cluster.servers) >= 1:
                    break
            sent.append(time.monotonic())
            signal.pthread_kill(main, signal.SIGINT)

        worker = Worker(interrupt)
        with pytest.raises(KeyboardInterrupt):
            call()
            signal.sigtimedwait([], LONG)
        assert time.monotonic() - sent[0] < SOON_S
        worker.result()
        b.push("v", np.ones(3))
        each([a, b], lambda kv: kv.push("v", np.full(3, 5.0)))
        for kv in (a, b):
            assert pulled(kv, "v").tolist() == [10, 10, 10]
        if name != "handle":
            assert out.tolist() == [9, 9, 9]
        kvstore.wait_all()


@pytest.mark.parametrize("seed", range(SEEDS))
def test_faults_of_the_wire_end_every_call_with_the_right_bytes_or_a_typed_error(seed):
    random = np.random.default_rng(seed)
    workers, servers = (int(n) for n in random.integers(1, 4, 2))
    kind = ("delay=1,reorder", "reorder,kill", "reorder,fail", "reorder,short")[seed % 4]
    if seed % 4:
        # Numbers of nodes: what is one's own number does nothing.
        kind += f"={random.integers(0, workers + servers)}:{random.integers(3, 30)}"
    sizes = [1, 5000, BIG // 2]
    failed = []
    try:
        cluster = Cluster(workers, servers, transport="faulty", seed=seed, faults=kind)
    except kvstore.KVStoreError:
        assert seed % 4
        return
    with cluster:
        stores = cluster.all_stores(timeout=LONG)

        def lose(error):
            failed.append(error)
            for node in cluster.nodes():
                node.lose("the test says so")

        def work(kv):
            rng = np.random.default_rng([seed, kv.rank])
            try:
                kv.init(list(range(3)), [np.zeros(size) for size in sizes])
                for number in range(1, 5):
                    outs = [np.zeros(size) for size in sizes]
                    values = [np.full(size, float(number)) for size in sizes]
                    if rng.integers(2):
                        kv.pushpull([0, 1, 2], values, out=outs)
                    else:
                        kv.push([2, 0, 1], values[2:] + values[:2])
                        kv.pull([0, 1, 2], out=outs)
                    assert all((out == number * workers).all() for out in outs)
            except (kvstore.PeerLostError, kvstore.ClosedError) as error:
                lose(error)

        each(stores, work)
        assert not failed or seed % 4
    forget(kvstore.PeerLostError, kvstore.ClosedError)


def calls_without_memory(kv):
    return {
        "init": lambda: kv.init("x", np.ones(3)),
        "push": lambda: kv.push(["v", "w"], [np.ones(3), [np.ones(BIG)] * 2]),
        "pull": lambda: kv.pull(["v", "w"], out=[np.zeros(6)[::2], np.zeros(BIG)]),
        "pushpull": lambda: kv.pushpull("v", np.ones(6)[::2], out=np.zeros(3)),
        "async": lambda: kv.pushpull("v", np.ones(3), out=np.zeros(3), async_op=True).wait(),
        "delete": lambda: kv.delete("v"),
    }


@pytest.mark.parametrize("name", ["init", "push", "pull", "pushpull", "async", "delete"])
def test_every_allocation_may_fail(name):
    for nth in range(1, 300):
        with Cluster(1, 2) as cluster:
            (kv,) = stores_of(cluster)
            call = calls_without_memory(kv)[name]
            _core.fault_set("alloc", nth)
            try:
                call()
            except (MemoryError, kvstore.PeerLostError):
                pass
            finally:
                cluster_lost = False
                with contextlib.suppress(MemoryError, kvstore.PeerLostError):
                    cluster.members[0].core.drain(LONG)
                hit = _core.fault_set("alloc", 0) >= nth
            with contextlib.suppress(MemoryError, kvstore.PeerLostError):
                kvstore.wait_all()
            try:
                if "v" in kv:
                    found = pulled(kv, "v")
                    assert found.tolist() in ([0, 0, 0], [1, 1, 1])
                    kv.push("v", np.full(3, 8.0))
                    assert pulled(kv, "v").tolist() == [8, 8, 8]
                if "x" in kv:
                    assert pulled(kv, "x").tolist() == [1, 1, 1]
            except kvstore.PeerLostError:
                cluster_lost = True  # a message for which a node had no memory ends its session
            assert hit or not cluster_lost
            forget(MemoryError, kvstore.PeerLostError)
        if not hit:
            return
    raise AssertionError("the call never came through")


def test_threads_share_a_store_and_take_lists_in_opposite_order():
    keys = list(range(8))
    with Cluster(1, 2) as cluster:
        kv = cluster.store()
        kv.init(keys, [np.zeros(2000)] * 8)

        def work(number):
            mine = keys if number % 2 else keys[::-1]
            for i in range(20):
                kv.push(mine, [np.full(2000, float(number * 100 + i))] * 8)
                outs = [np.zeros(2000) for _ in mine]
                kv.pull(mine, out=outs)
                assert all((out == out[0]).all() and out[0] >= 100 for out in outs)

        for worker in [Worker(work, number) for number in (1, 2, 3, 4)]:
            worker.result()


@pytest.mark.parametrize("seed", range(20))
def test_random_programs_of_two_workers_give_what_numpy_gives(seed):
    """Every round is the same keys for both; how each asks for them is its own."""
    random = np.random.default_rng(seed)
    sizes = [1, 100, 30_000]
    rounds = [sorted(random.choice(3, random.integers(1, 4), replace=False)) for _ in range(12)]
    model, expected = [np.zeros(size) for size in sizes], []
    for number, keys in enumerate(rounds, 1):
        for key in keys:
            model[key] = np.full(sizes[key], number * 3.0)
        expected.append([array.copy() for array in model])

    def work(kv):
        rng = np.random.default_rng([seed, kv.rank])
        kv.init([0, 1, 2], [np.zeros(size) for size in sizes])
        for number, chosen in enumerate(rounds, 1):
            keys = [int(key) for key in chosen]
            values = [np.full(sizes[key], number * (kv.rank + 1.0)) for key in keys]
            outs = [np.zeros(sizes[key]) for key in keys]
            way = rng.integers(4)
            if way == 0:
                kv.pushpull(keys, values, out=outs)
            elif way == 1:
                for key, value, out in zip(keys, values, outs, strict=True):
                    kv.push(key, value, priority=int(rng.integers(-3, 3)))
                    kv.pull(key, out=out)
            elif way == 2:
                kv.push(keys, [kvstore.array(value) for value in values])
                outs = [array.asnumpy() for array in kv.pull(keys)]
            else:
                handles = [kv.push(keys, values, async_op=True)]
                handles.append(kv.pull(keys, out=outs, async_op=True))
                for handle in reversed(handles):
                    handle.wait()
            for key, out in zip(keys, outs, strict=True):
                assert (out == expected[number - 1][key]).all(), (number, key, way)
        return [pulled(kv, key) for key in range(3)]

    with Cluster(2, 1 + seed % 3) as cluster:
        for found in cluster.run(work):
            assert all((a == b).all() for a, b in zip(found, model, strict=True))
