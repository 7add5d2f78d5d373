"""Users' optimizers on servers: a dist store computes what a local store does, bit for bit; what
goes wrong in a class is told and changes nothing."""

import contextlib
import gc
import threading
import weakref

import ml_dtypes
import numpy as np
import own_optimizers as own
import pytest
from beside import beside
from helpers import LONG, pulled, same
from inside import Cluster, each
from test_dist_failures import forget

import kvstore
from kvstore import _core, lr_scheduler, optimizer

ALLOWED = ("own_optimizers",)
FLOATS = (np.float64, np.float32, np.float16, ml_dtypes.bfloat16)
LARGE = 700_000  # float32 elements: more than a slice has


@pytest.fixture(autouse=True)
def fresh():
    own.seen.clear()
    own.go_on.clear()
    own.inside.clear()
    yield
    own.go_on.set()


def values_of(dtypes=FLOATS):
    shapes = (0,), (1,), (20, 50), (), (0, 3)
    return {f"{s} {np.dtype(t)}": np.full(s, 0.25).astype(t) for s in shapes for t in dtypes}


# ------------------------------------------------------------------------------------- the numbers


@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize("workers", [1, 3])
def test_the_same_bits_as_in_a_local_store(workers, wide):
    def make():
        return own.Momentum(
            momentum=0.75,
            wd=0.125,
            lr_scheduler=lr_scheduler.FactorScheduler(2, 0.5, base_lr=0.25),
            lr_mult={"(1,) float32": 0.5},
            multi_precision=wide,
        )

    with beside(workers, allow_import=ALLOWED) as pair:
        pair.set_optimizer(make)
        pair.init(values_of())
        for how in ("push", "pushpull", "handle"):
            for key in values_of():
                pair.push(key, how)
            pair.push(list(values_of()), how)
            pair.check()


def test_numbers_may_change_and_state_stays_with_the_class():
    with beside(2, allow_import=ALLOWED) as pair:
        pair.set_optimizer(lambda: own.Momentum(lr=0.5))
        pair.init(values_of())
        pair.push(list(values_of()))
        pair.set_params(lr=0.25, momentum=0.25, wd=0.5)
        pair.push(list(values_of()))
        pair.set_optimizer(lambda: own.Momentum(lr=0.125))
        pair.push(list(values_of()))
        pair.check()
        pair.set_optimizer(lambda: optimizer.SGD(lr=0.5, momentum=0.5))
        pair.push(list(values_of()))
        pair.set_optimizer(lambda: own.Momentum(lr=0.125))
        pair.push(list(values_of()))
        pair.check()
        pair.delete(["(1,) float32"])
        pair.init({"(1,) float32": np.ones(1, "float32")})
        pair.push(list(values_of()))
        pair.check()


def test_a_class_is_told_counts_and_rates():
    with Cluster(2, 1, allow_import=ALLOWED) as cluster:
        a, b = cluster.all_stores()
        schedule = lr_scheduler.FactorScheduler(1, 0.5, base_lr=1.0)
        made = own.Curious(lr_scheduler=schedule, lr_mult={7: 0.5}, wd=0.5, begin_num_update=4)
        a.set_optimizer(made)
        each([a, b], lambda kv: kv.init([7, 8], [np.ones((2, 3), "f4"), np.ones(5, "f8")]))
        for key in (7, 7, 8):
            for kv in (b, a):
                kv.push(key, np.ones(a.shape(key), a.dtype(key)))
        assert pulled(a, 7)[0, 0] == -3 and pulled(b, 8)[0] == -1
    local = kvstore.create("local")
    before, own.seen[:] = list(own.seen), []
    with local:
        local.set_optimizer(
            own.Curious(
                lr_scheduler=lr_scheduler.FactorScheduler(1, 0.5, base_lr=1.0),
                lr_mult={7: 0.5},
                wd=0.5,
                begin_num_update=4,
            )
        )
        local.init([7, 8], [np.ones((2, 3), "f4"), np.ones(5, "f8")])
        for key in (7, 7, 8):
            local.push(key, np.ones(local.shape(key), local.dtype(key)))
    assert before == own.seen and len(before) == 3
    assert before[0][:4] == (7, (2, 3), "float32", 5)


def test_each_push_counts_in_dist_async():
    with Cluster(3, 2, "dist_async", allow_import=ALLOWED) as cluster:
        stores = cluster.all_stores()
        each(stores, lambda kv: kv.set_optimizer(own.Momentum(lr=0.5, momentum=0.0)))
        each(stores, lambda kv: kv.init("w", np.zeros(9, "f4")))
        for kv in stores:
            kv.push("w", np.full(9, kv.rank + 1, "f4"))
            pulled(kv, "w")  # what a worker has pushed is in what it pulls
        assert (pulled(stores[0], "w") == -3).all()


def test_codes_are_decoded_first():
    with Cluster(2, 2, allow_import=ALLOWED) as cluster:
        stores = cluster.all_stores()
        each(stores, lambda kv: kv.set_optimizer(own.Momentum(lr=1, momentum=0.0)))
        each(stores, lambda kv: kv.init("w", np.zeros(1000, "f4")))
        each(stores, lambda kv: kv.set_gradient_compression({"type": "2bit", "threshold": 0.5}))
        each(stores, lambda kv: kv.push("w", np.full(1000, 0.75, "f4")))
        assert (pulled(stores[0], "w") == -1).all()
        each(stores, lambda kv: kv.push("w", np.full(1000, 0.25, "f4")))
        assert (pulled(stores[1], "w") == -2).all()


@pytest.mark.parametrize("sparse", [False, True])
def test_rows(sparse):
    with beside(2, allow_import=ALLOWED) as pair:
        pair.set_optimizer(lambda: own.Rows(lr=0.5))
        value = np.arange(30, dtype="f4").reshape(10, 3)
        pair.init({"t": kvstore.RowSparse.from_dense(value) if sparse else value})
        for step in range(3):
            rows = [
                kvstore.RowSparse(np.full((2, 3), rank + 1, "f4"), [step, step + 3 + rank], (10, 3))
                for rank in range(2)
            ]
            each(pair.stores, lambda kv, rows=rows: kv.push("t", rows[kv.rank]))
            pair.local.push("t", rows)
        expected = pair.local.pull("t")
        for kv in pair.stores:
            found = kv.pull("t")
            if sparse:
                assert found.indices.tolist() == expected.indices.tolist()
                assert same(found.data, expected.data)
            else:
                assert same(found.asnumpy(), expected.asnumpy())


# ---------------------------------------------------------------------------------- keys are whole


@pytest.mark.parametrize("sparse", [False, True])
def test_a_large_key_lies_whole_on_a_server(sparse):
    with Cluster(2, 2, allow_import=ALLOWED) as cluster:
        stores = cluster.all_stores()
        each(stores, lambda kv: kv.set_optimizer(own.Rows(lr=0.5) if sparse else own.Curious()))
        value = np.ones((LARGE // 100, 100), "f4")
        given = kvstore.RowSparse.from_dense(value) if sparse else value
        each(stores, lambda kv: kv.init("large", given))
        each(stores, lambda kv: kv.push("large", given))
        out = stores[0].pull("large")
        assert ((out.todense() if sparse else out.asnumpy()) == (0 if sparse else -1)).all()
        assert sorted(node.counters()["slices"] for node in cluster.servers) == [0, 1]


def test_a_key_that_was_cut_before_is_refused_at_the_push():
    with Cluster(1, 2, allow_import=ALLOWED) as cluster:
        kv = cluster.store()
        kv.init(["large", "small"], [np.ones(LARGE, "f4"), np.ones(3, "f4")])
        kv.set_optimizer(own.Curious())
        with pytest.raises(
            kvstore.InvalidArgumentError,
            match=r"'large'.* 4 slices.*call set_optimizer before init",
        ):
            kv.push("large", np.ones(LARGE, "f4"))
        assert (pulled(kv, "large") == 1).all()
        kv.push("small", np.ones(3, "f4"))
        assert (pulled(kv, "small") == 0).all()


# -------------------------------------------------------------------------------- what goes wrong


def refusals():
    main = type("Main", (own.Strict,), {"__module__": "__main__"})
    gone = type("Gone", (own.Strict,), {"__module__": "own_optimizers"})
    elsewhere = type("Elsewhere", (own.Strict,), {"__module__": "own_optimizers_not"})
    other = type("Other", (own.Strict,), {"__module__": "own_optimizers.missing"})
    return {
        "of a script": (main(), "Main is defined in a script or notebook.*allow_import"),
        "of a function": (own.inner(), "Inner is defined in a function"),
        "not there": (gone(), "this server cannot import the optimizer own_optimizers:Gone"),
        "no permission": (elsewhere(), "may not import.* --allow-import own_optimizers_not,"),
        "no module": (other(), "cannot import the optimizer own_optimizers.missing:Other"),
        "no update": (own.NoUpdate(), "NoUpdate has no update"),
        "no JSON": (own.Strict(options={1: 2}), r"options=\{1: 2\} cannot travel"),
        "nan": (own.Strict(options=float("nan")), "options=nan cannot travel"),
        "an object": (own.Strict(options=threading), "options=<module"),
        "schedule": (own.Strict(lr_scheduler=lambda n: 1.0), "the schedule must be a built-in"),
    }


@pytest.mark.parametrize("name", refusals())
def test_an_optimizer_that_servers_cannot_have_is_refused_on_every_worker(name):
    made, words = refusals()[name]
    with Cluster(2, 2, allow_import=ALLOWED) as cluster:
        stores = cluster.all_stores()
        for kv in stores:
            kv.init(1, np.ones(3)) if kv.rank == 0 else None
            with pytest.raises(kvstore.KVStoreError, match=words):
                kv.set_optimizer(made)
            assert kv.optimizer is None


def test_without_permission_nothing_is_imported():
    with Cluster(1, 1) as cluster:
        kv = cluster.store()
        with pytest.raises(kvstore.KVStoreError, match=r"may not import .*own_optimizers:Strict"):
            kv.set_optimizer(own.Strict())


def test_workers_that_disagree_are_told_the_argument():
    with Cluster(2, 2, allow_import=ALLOWED) as cluster:
        a, b = cluster.all_stores()
        a.set_optimizer(own.Momentum(momentum=0.5))
        with pytest.raises(
            kvstore.InvalidArgumentError, match=r"momentum is 0\.25.* worker 0 0\.5"
        ):
            b.set_optimizer(own.Momentum(momentum=0.25))
        with pytest.raises(kvstore.InvalidArgumentError, match="class own_optimizers:Strict, that"):
            b.set_optimizer(own.Strict())
        b.set_optimizer(own.Momentum(momentum=0.5))


def test_integer_keys_are_refused():
    with Cluster(1, 1, allow_import=ALLOWED) as cluster:
        kv = cluster.store()
        kv.set_optimizer(own.Curious())
        kv.init("n", np.ones(3, "i4"))
        with pytest.raises(kvstore.ArrayTypeError, match=r"'n'.*int32.*floating"):
            kv.push("n", np.ones(3, "i4"))


@pytest.mark.parametrize(
    ("number", "words"),
    [
        (1, "RuntimeError: one is too few"),
        (2, "returns nothing"),
        (3, "keeps its shape"),
        (4, r"RuntimeError: \\ud800"),
        (5, "Silent, which tells nothing: ValueError"),
    ],
)
def test_an_update_that_fails_is_told_to_all_and_leaves_the_value(number, words):
    with Cluster(2, 2, allow_import=ALLOWED) as cluster:
        stores = cluster.all_stores()
        each(stores, lambda kv: kv.set_optimizer(own.Failing()))
        each(stores, lambda kv: kv.init("w", np.zeros(4, "f4")))

        def fails(kv):
            with pytest.raises(kvstore.KVStoreError, match=f"'w'.*Failing.*{words}"):
                kv.pushpull("w", np.full(4, number / 2, "f4"), out=np.empty(4, "f4"))

        each(stores, fails)
        each(stores, lambda kv: kv.push("w", np.full(4, 6.0, "f4")))
        for kv in stores:
            assert (pulled(kv, "w") == 12).all()


def test_an_optimizer_that_was_set_too_long_ago_is_forgotten(monkeypatch):
    monkeypatch.setattr("kvstore._python_optimizer.MOST", 1)
    with Cluster(2, 1, allow_import=ALLOWED) as cluster:
        a, b = cluster.all_stores()
        a.set_optimizer(own.Momentum(lr=0.5, momentum=0.0))
        each([a, b], lambda kv: kv.init("w", np.ones(3, "f4")))
        handle = a.push("w", np.ones(3, "f4"), async_op=True)
        a.set_optimizer_params(lr=0.25)
        for push in (b.push("w", np.ones(3, "f4"), async_op=True), handle):
            with pytest.raises(kvstore.InvalidArgumentError, match=r"'w'.* 1 calls ago.*forgotten"):
                push.wait()
        each([a, b], lambda kv: kv.push("w", np.ones(3, "f4")))
        assert (pulled(a, "w") == 0.5).all()


def test_other_keys_go_on_and_pulls_keep_their_deadline_while_a_class_runs():
    with Cluster(1, 1, allow_import=ALLOWED) as cluster:
        kv = cluster.store(timeout=0.3)
        kv.init(["a", "b"], [np.ones(3, "f4"), np.ones(3, "f4")])
        kv.set_optimizer(own.Waiting())
        kv.push("a", np.ones(3, "f4"))
        assert own.inside.wait(LONG)
        assert (pulled(kv, "b") == 1).all()
        with pytest.raises(kvstore.TimeoutError, match="'a'"):
            pulled(kv, "a")
        own.go_on.set()
        forget(kvstore.TimeoutError)  # the push's own
        assert (pulled(kv, "a") == 0).all()


def test_a_cluster_may_close_while_a_class_runs():
    cluster = Cluster(1, 1, allow_import=ALLOWED)
    kv = cluster.store(timeout=0.3)
    kv.init("a", np.ones(3, "f4"))
    kv.set_optimizer(own.Waiting())
    kv.push("a", np.ones(3, "f4"))
    assert own.inside.wait(LONG)
    for node in cluster.servers:
        node.close()
    own.go_on.set()
    with pytest.raises(kvstore.PeerLostError, match="server 0 is gone"):
        pulled(kv, "a")
    cluster.close()
    forget(kvstore.PeerLostError)


def test_states_go_with_their_keys_and_with_the_cluster(monkeypatch):
    alive = []

    class State(np.ndarray):
        pass

    def create_state(self, key, weight):
        state = np.zeros_like(weight).view(State)
        alive.append(weakref.ref(state))
        return state

    def count():
        gc.collect()
        return sum(one() is not None for one in alive)

    monkeypatch.setattr(own.Momentum, "create_state", create_state)
    ones = [np.ones(3, "f4")] * 3
    with Cluster(1, 1, allow_import=ALLOWED) as cluster:
        kv = cluster.store()
        kv.set_optimizer(own.Momentum())
        kv.init([1, 2, 3], ones)
        kv.push([1, 2, 3], ones)
        assert [pulled(kv, key)[0] for key in (1, 2, 3)] == [ones[0][0] - 0.01] * 3
        assert count() == 3
        kv.delete(1)
        kv.push(2, ones[0])  # the thread that serves frees what is left
        kv.push(3, ones[0])
        pulled(kv, 2), pulled(kv, 3)
        assert count() == 2
    del kv, cluster
    kvstore.create("local").close()
    assert count() == 0


@pytest.mark.parametrize("rows", [False, True])
def test_every_allocation_may_fail(rows):
    value = np.zeros((4, 3), "f4")
    gradient = kvstore.RowSparse(np.ones((2, 3), "f4"), [1, 3], (4, 3)) if rows else value + 1
    after = np.zeros((4, 3), "f4")
    after[[1, 3] if rows else slice(None)] = -1
    nth, hit, found = 0, True, None
    while hit:
        nth += 1
        with Cluster(1, 1, allow_import=ALLOWED) as cluster, contextlib.ExitStack() as stack:
            kv = cluster.store()
            kv.set_optimizer(own.Rows(lr=1) if rows else own.Curious())
            kv.init("w", value)
            # A server that had no memory for a message is lost.
            stack.enter_context(contextlib.suppress(kvstore.PeerLostError))
            _core.fault_set("alloc", nth)
            try:
                kv.push("w", gradient)
                found = pulled(kv, "w")
            except MemoryError as error:
                assert "no memory" in str(error) or str(error) == ""
            except kvstore.InvalidArgumentError as error:  # in the class, or what shows it
                assert "MemoryError" in str(error)
            finally:
                hit = _core.fault_set("alloc", 0) >= nth
            forget(MemoryError, kvstore.InvalidArgumentError, kvstore.PeerLostError)
            found = pulled(kv, "w")
            assert same(found, value) or same(found, after), nth
        forget(kvstore.PeerLostError)
    assert nth > 3 and same(found, after)


def test_calls_out_of_turn_are_refused():
    with Cluster(1, 1) as cluster:
        kv, node = cluster.store(), cluster.servers[0]
        node.add_optimizer(1, "a:B", {}, {}, 0, 1)
        for call in (lambda n: n.next_update(0.001), lambda n: n.end_update(None, None, None)):
            with pytest.raises(kvstore.InvalidArgumentError, match=r"updates are a server's"):
                call(cluster.members[0].core)
        assert cluster.members[0].core.wake() is None
        with pytest.raises(kvstore.InvalidArgumentError, match=r"no update is under way"):
            node.end_update(None, None, None)
        assert node.next_update(0.001) is None
        node.wake()
        assert node.next_update(60) is None
        kv.close()
    for call in (lambda: node.next_update(0.001), lambda: node.end_update(None, None, None)):
        with pytest.raises((kvstore.ClosedError, kvstore.InvalidArgumentError)):
            call()
