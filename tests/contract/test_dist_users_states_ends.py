"""Saves and loads of users' optimizers that a deadline, a loss, a fault or a lack of memory ends:
the file is the old one or the new one, and training goes on."""

import contextlib
import threading
import time

import numpy as np
import own_optimizers as own
import pytest
from helpers import LONG, pulled, same
from inside import Cluster, each
from test_dist_failures import forget
from test_dist_users_states import ALLOWED, fresh, local, momentum, path, place, refused, train

import kvstore
from kvstore import _core, state_file

numpy_io = pytest.importorskip("safetensors.numpy", reason="mlkvstore[state] is not installed")

__all__ = ["fresh", "path"]  # fixtures


def waiting(cluster, **options):
    """Stores whose key "a" has been pushed, and whose server is in an update of "b"."""
    stores = cluster.all_stores(**options)
    each(stores, lambda kv: kv.set_optimizer(own.Waiting()))
    each(stores, lambda kv: kv.init(["a", "b"], [np.ones(3), np.ones(3)]))
    own.go_on.set()
    each(stores, lambda kv: kv.push("a", np.ones(3)))
    each(stores, lambda kv: pulled(kv, "a"))
    own.go_on.clear()
    own.inside.clear()
    handles = [kv.push("b", np.ones(3), async_op=True) for kv in stores]
    assert own.inside.wait(LONG)
    return stores, handles


@pytest.mark.parametrize("rank", [0, 1])
def test_the_deadline_while_a_class_runs(rank, path):
    """For another key of that server, whose thread packs states too."""
    path.write_bytes(b"old")
    with Cluster(2, 1, allow_import=ALLOWED) as cluster:
        stores, handles = waiting(cluster, timeout=1)
        with refused("key 'a': what an optimizer in Python keeps .* not", kvstore.TimeoutError):
            stores[rank].save_optimizer_states(path)
        assert path.read_bytes() == b"old"
        own.go_on.set()
        for handle in handles:
            with contextlib.suppress(kvstore.TimeoutError):
                handle.wait()
        assert (pulled(stores[rank], "b") == -1).all()
        stores[rank].save_optimizer_states(path)
        assert [entry[:2] for entry in state_file.read(path)[0]["keys"]] == [("a", 1), ("b", 1)]


def until_two_wait(cluster):
    """The push, and the state."""
    while cluster.servers[0].counters()["waiting"] < 2:
        time.sleep(0.001)


@pytest.mark.parametrize("how", ["close", "delete"])
def test_what_ends_while_a_state_is_waited_for(how, path):
    path.write_bytes(b"old")
    cluster = Cluster(1, 1, allow_import=ALLOWED)
    (kv,), (handle,) = waiting(cluster)
    if how == "close":
        saving = threading.Thread(target=lambda: errors.append(error_of(kv, path)))
        errors = []
        saving.start()
        until_two_wait(cluster)
        cluster.servers[0].close()
        own.go_on.set()
        saving.join()
        assert isinstance(errors[0], kvstore.PeerLostError), errors
        assert path.read_bytes() == b"old"
        with pytest.raises(kvstore.PeerLostError):
            handle.wait()
    else:
        thread = threading.Thread(target=lambda: kv.save_optimizer_states(path))
        thread.start()
        until_two_wait(cluster)
        own.go_on.set()
        kv.delete("a")
        thread.join()
        handle.wait()
        kv.save_optimizer_states(path)
        assert [entry[0] for entry in state_file.read(path)[0]["keys"]] == ["b"]
    cluster.close()


def error_of(kv, path):
    try:
        kv.save_optimizer_states(path)
    except BaseException as error:
        return error


def test_pushes_that_come_while_a_state_is_packed_wait(path):
    """None of them is refused, lost, or in the file."""
    with Cluster(1, 1, allow_import=ALLOWED) as cluster:
        (kv,), (handle,) = waiting(cluster)
        saving = threading.Thread(target=lambda: kv.save_optimizer_states(path))
        saving.start()
        until_two_wait(cluster)
        later = kv.push("a", np.ones(3), async_op=True)
        own.go_on.set()
        saving.join()
        for one in (handle, later):
            one.wait()
        assert [entry[:2] for entry in state_file.read(path)[0]["keys"]] == [("a", 1), ("b", 1)]
        kv.save_optimizer_states(path)
        assert [entry[:2] for entry in state_file.read(path)[0]["keys"]] == [("a", 2), ("b", 1)]


@pytest.mark.parametrize("rank", [0, 1])
def test_a_lost_server(rank, path):
    with local(momentum) as kv:
        train([kv])
        kv.save_optimizer_states(path)
    old = path.read_bytes()
    with place(momentum, servers=2) as stores:
        train(stores)
        stores[0]._place()[0].cluster.servers[1].close()
        for call in (stores[rank].save_optimizer_states, stores[rank].load_optimizer_states):
            with refused("server 1", kvstore.PeerLostError):
                call(path)
        assert path.read_bytes() == old
    forget(kvstore.PeerLostError)


# ------------------------------------------------------------------------------ memory and the wire


@pytest.mark.parametrize("verb", ["save", "load"])
def test_every_allocation_may_fail(verb, path):
    values = {"w": np.ones(3, "f4"), "more": np.ones(20_000, "f4")}
    with local(momentum, values) as kv:
        train([kv], 2, values)
        kv.save_optimizer_states(path)
        middle = {key: pulled(kv, key) for key in values}
        train([kv], 1, values)
        end = {key: pulled(kv, key) for key in values}
    old = path.read_bytes()
    nth, hit = 0, True
    while hit:
        nth += 1
        with contextlib.ExitStack() as stack:
            (kv,) = stack.enter_context(place(momentum, values, 1, 1))
            if verb == "save":
                train([kv], 2, values)
                pulled(kv, "w"), pulled(kv, "more")
            stack.enter_context(contextlib.suppress(kvstore.PeerLostError))
            _core.fault_set("alloc", nth)
            try:
                getattr(kv, f"{verb}_optimizer_states")(path)
                done = True
            except (MemoryError, kvstore.InvalidArgumentError) as error:
                assert "memory" in str(error).lower() or str(error) == "", (nth, error)
                done = False
            finally:
                hit = _core.fault_set("alloc", 0) >= nth
            if verb == "save":
                if not done:
                    assert path.read_bytes() == old
                train([kv], 1, values)
                for key in values:
                    assert same(pulled(kv, key), end[key])
                continue
            kv.load_optimizer_states(path)
            kv.delete(list(values))
            kv.init(list(values), list(middle.values()))
            kv.load_optimizer_states(path)
            train([kv], 1, values)
            for key in values:
                assert same(pulled(kv, key), end[key])
        forget(kvstore.PeerLostError, MemoryError)
    assert nth > 10 and done


KINDS = ("delay=1,reorder", "reorder,kill", "reorder,fail", "reorder,short")


@pytest.mark.parametrize("seed", range(8))
def test_faults_of_the_wire(seed, path):
    """The right numbers or a typed error, and the old file or the new one."""
    random = np.random.default_rng(seed)
    workers, servers = (int(n) for n in random.integers(1, 4, 2))
    kind = KINDS[seed % 4]
    if seed % 4:
        kind += f"={random.integers(0, workers + servers)}:{random.integers(10, 60)}"
    values = {"w": np.ones(3), "large": np.ones(40_000)}
    path.write_bytes(b"old")
    options = {"transport": "faulty", "seed": seed, "faults": kind, "allow_import": ALLOWED}
    try:
        cluster = Cluster(workers, servers, **options)
    except kvstore.KVStoreError:
        assert seed % 4
        return
    failed, barrier = [], threading.Barrier(workers)

    def work(kv):
        try:
            if kv.rank == 0:
                kv.set_optimizer(momentum())
            kv.init(list(values), list(values.values()))
            for key, value in values.items():
                kv.push(key, value)
                kv.pull(key)
            barrier.wait(LONG)
            if kv.rank == workers - 1:
                kv.save_optimizer_states(path)
                kv.load_optimizer_states(path)
            barrier.wait(LONG)
            for key, value in values.items():
                kv.push(key, value)
                assert same(pulled(kv, key), 1 - value * workers * 0.5 * 2.5), key
        except (kvstore.PeerLostError, kvstore.ClosedError, threading.BrokenBarrierError) as error:
            failed.append(error)
            barrier.abort()
            for node in cluster.nodes():
                node.lose("the test says so")

    with cluster:
        each(cluster.all_stores(timeout=LONG), work)
    assert not failed or seed % 4
    assert path.read_bytes() == b"old" or len(numpy_io.load_file(path)) == 2
    assert failed or path.read_bytes() != b"old"
    forget(kvstore.PeerLostError, kvstore.ClosedError)
