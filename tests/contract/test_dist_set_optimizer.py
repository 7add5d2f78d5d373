"""set_optimizer and its like in dist stores: what workers and servers know after the calls. What
pushes then do is tested with the values."""

import gc
import weakref

import numpy as np
import pytest
from helpers import pulled, same
from inside import Cluster, each

import kvstore
from kvstore import _core
from kvstore.lr_scheduler import FactorScheduler, LRScheduler
from kvstore.optimizer import NAG, SGD, Adam, Optimizer


@pytest.fixture(params=["dist_sync", "dist_async"])
def cluster(request):
    with Cluster(2, 2, kind=request.param) as made:
        yield made


@pytest.fixture
def pair(cluster):
    return cluster.all_stores()


class Own(Optimizer):
    def update(self, key, weight, grad, state):
        weight -= grad


def calls_of(cluster):
    """How many declarations the servers have heard."""
    counts = {len(server.declared.known) for server in cluster.serving}
    assert len(counts) == 1
    return counts.pop()


def test_every_worker_that_calls_has_the_optimizer(cluster, pair):
    each(pair, lambda kv: kv.set_optimizer(SGD(lr=0.5, momentum=0.9)))
    for kv in pair:
        assert kv.is_capable("optimizer") is True
        assert kv.optimizer == SGD(lr=0.5, momentum=0.9)
    assert calls_of(cluster) == 1


def test_a_worker_that_does_not_call_has_none(cluster, pair):
    pair[0].set_optimizer(SGD())
    assert pair[0].optimizer == SGD()
    assert pair[1].optimizer is None
    with pytest.raises(kvstore.InvalidArgumentError, match="call set_optimizer first"):
        pair[1].set_optimizer_params(lr=0.1)
    assert calls_of(cluster) == 1


def test_numbers_change_on_all_servers(cluster, pair):
    each(pair, lambda kv: kv.set_optimizer(SGD(lr=0.5)))
    each(pair, lambda kv: kv.set_optimizer_params(lr=0.25, wd=0.5, lr_mult={"w": 2}))
    pair[0].set_optimizer_params(momentum=0.5)
    for kv, momentum in zip(pair, (0.5, 0), strict=True):
        assert kv.optimizer == SGD(lr=0.25, wd=0.5, lr_mult={"w": 2}, momentum=momentum)
    assert calls_of(cluster) == 3
    assert cluster.serving[0].declared.newest["numbers"]["momentum"] == 0.5


def test_a_new_rate_goes_into_the_schedule_of_each_worker(pair):
    each(pair, lambda kv: kv.set_optimizer(SGD(lr_scheduler=FactorScheduler(2))))
    pair[0].optimizer.lr_scheduler(50)  # the schedules of two workers may be at different places
    each(pair, lambda kv: kv.set_optimizer_params(lr=0.25))
    assert [kv.optimizer.lr_scheduler.base_lr for kv in pair] == [0.25, 0.25]


def test_another_optimizer_than_worker_0s_is_refused_on_that_worker(cluster, pair):
    pair[0].set_optimizer(SGD(lr=0.5))
    with pytest.raises(kvstore.InvalidArgumentError, match=r"worker 1 .*learning_rate is 0.25"):
        pair[1].set_optimizer(SGD(lr=0.25))
    assert pair[1].optimizer is None
    pair[1].set_optimizer(SGD(lr=0.5))
    assert pair[1].optimizer == pair[0].optimizer


def test_the_deadline_is_the_stores(cluster):
    kv = cluster.store(1, timeout=0.2)
    with pytest.raises(kvstore.TimeoutError, match=r"worker 1 waited 0\.2 s; missing: worker 0"):
        kv.set_optimizer(SGD())
    assert kv.optimizer is None


@pytest.mark.parametrize("rank", [0, 1])
def test_what_is_refused_changes_nothing(rank, cluster, pair):
    class OwnSchedule(LRScheduler):
        def __call__(self, num_update):
            return 0.1

    each(pair, lambda kv: kv.set_optimizer(SGD(lr=0.5)))
    kv = pair[rank]
    invalid = kvstore.InvalidArgumentError
    for error, text, call in (
        (kvstore.KVStoreError, "may not import.*:Own", lambda: kv.set_optimizer(Own())),
        (invalid, "must be a built-in", lambda: kv.set_optimizer(SGD(lr_scheduler=abs))),
        (invalid, "built-in", lambda: kv.set_optimizer(SGD(lr_scheduler=OwnSchedule()))),
        (kvstore.ArrayTypeError, "kvstore.optimizer", lambda: kv.set_optimizer("sgd")),
        (invalid, "momentum", lambda: kv.set_optimizer_params(momentum=float("nan"))),
        (invalid, "no number 'speed'", lambda: kv.set_optimizer_params(speed=1)),
        (invalid, "use set_optimizer", lambda: kv.set_updater(None)),
        (OSError, "/nowhere", lambda: kv.save_optimizer_states("/nowhere/file")),
    ):
        with pytest.raises(error, match=text):
            call()
        assert kv.optimizer == SGD(lr=0.5)
    assert calls_of(cluster) == 1


@pytest.mark.parametrize("failing", [0, 1])
def test_a_server_that_fails_leaves_the_worker_as_it_was(failing, cluster, pair):
    pair[0].set_optimizer(SGD())
    cluster.serving[failing].core = None
    with pytest.raises(kvstore.KVStoreError, match="not all servers have taken the optimizer Adam"):
        pair[0].set_optimizer(Adam())
    assert pair[0].optimizer == SGD()
    cluster.serving[failing].core = cluster.servers[failing]
    pair[0].set_optimizer(Adam())
    assert pair[0].optimizer == Adam()


def test_rates_that_all_workers_change_at_each_step_are_those_of_a_local_store():
    def train(kv, values):
        kv.set_optimizer(SGD(lr=0.5, momentum=0.5))
        kv.init("w", np.zeros(3))
        for step in range(1, 30):
            if step % 3:
                kv.set_optimizer_params(lr=1 / step)
            kv.push("w", values)
        return pulled(kv, "w")

    with Cluster(3, 2) as cluster, kvstore.create("local") as alone:
        values = [np.full(3, rank + 1.0) for rank in range(3)]
        expected = train(alone, values)
        for found in cluster.run(lambda kv: train(kv, values[kv.rank])):
            assert same(found, expected)


def test_every_allocation_of_set_optimizer_may_fail():
    for nth in range(1, 100):
        with Cluster(1, 2) as cluster:
            kv = cluster.store()
            kv.set_optimizer(SGD(lr=0.5))
            kv.init("w", np.zeros(3))
            _core.fault_set("alloc", nth)
            try:
                kv.set_optimizer(SGD(lr=0.25))
            except (MemoryError, kvstore.KVStoreError) as error:
                assert isinstance(error, MemoryError) or "MemoryError" in str(error)
                rate = 0.5
            else:
                rate = 0.25
            finally:
                hit = _core.fault_set("alloc", 0) >= nth
            assert kv.optimizer == SGD(lr=rate)
            kv.push("w", np.ones(3))
            assert pulled(kv, "w").tolist() == [-rate] * 3
        if not hit:
            assert nth > 3 and rate == 0.25
            return
    raise AssertionError("the call never came through")


def test_closed_stores_say_so(pair):
    for kv in pair:
        kv.close()
        for call in (lambda kv=kv: kv.set_optimizer(SGD()), lambda kv=kv: kv.optimizer):
            with pytest.raises(kvstore.ClosedError):
                call()


def test_each_worker_sets_its_own_compression(pair):
    pair[1].set_gradient_compression({"type": "2bit", "threshold": 0.5})
    pair[1].set_gradient_compression({"type": "none"})
    with pytest.raises(kvstore.InvalidArgumentError, match="threshold"):
        pair[0].set_gradient_compression({"type": "2bit", "threshold": 0})


def test_a_schedule_that_holds_its_store_is_collected_with_it():
    with Cluster(1, 1) as cluster:
        kv = cluster.store()
        schedule = FactorScheduler(2)
        schedule.kv = kv
        kv.set_optimizer(NAG(lr_scheduler=schedule))
        gone = weakref.ref(kv)
        cluster.stores.clear()
        del kv, schedule
        gc.collect()
        assert gone() is None


# --------------------------------------------------------------------- the server's data plane


NUMBERS = {"learning_rate": 0.1, "momentum": 0.5}


@pytest.fixture
def node():
    with Cluster(1, 1) as cluster:
        yield cluster.servers[0]


def test_a_server_takes_an_optimizer_again_and_again(node):
    for number in (1, 2**64 - 1, 1):
        node.add_optimizer(number, "sgd", NUMBERS, {"lazy_update": False}, 0, 1)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ((0, "sgd", NUMBERS, {}, 0, 1), "not 0"),
        ((1, "nothing", NUMBERS, {}, 0, 1), "no built-in optimizer"),
        ((1, 3, NUMBERS, {}, 0, 1), "no built-in optimizer"),
        ((1, "sgd", {**NUMBERS, "momentum": "x"}, {}, 0, 1), "momentum"),
        ((1, "sgd", {**NUMBERS, "learning_rate": np.nan}, {}, 0, 1), "learning_rate"),
        ((1, "sgd", {**NUMBERS, "clip_gradient": -1}, {}, 0, 1), "clip_gradient"),
    ],
)
def test_a_server_checks_an_optimizer(arguments, text, node):
    with pytest.raises(kvstore.InvalidArgumentError, match=text):
        node.add_optimizer(*arguments)


@pytest.mark.parametrize("arguments", [(), (1, "sgd", [], {}, 0, 1), (1, "sgd", {}, {}, "0", 1)])
def test_a_server_checks_the_types_of_an_optimizer(arguments, node):
    with pytest.raises(TypeError):
        node.add_optimizer(*arguments)


def test_only_a_server_that_is_open_takes_optimizers(node):
    with Cluster(1, 1) as other:
        with pytest.raises(kvstore.InvalidArgumentError, match="given to servers"):
            other.members[0].core.add_optimizer(1, "sgd", NUMBERS, {}, 0, 1)
        server = other.servers[0]
    with pytest.raises(kvstore.ClosedError):
        server.add_optimizer(1, "sgd", NUMBERS, {}, 0, 1)


def test_local_stores_declare_nothing():
    with kvstore.create("local") as kv:
        kv.set_optimizer(SGD(lr_scheduler=lambda n: 0.1))
        kv.set_optimizer(Own())
        assert isinstance(kv.optimizer, Own)
        assert kv._place() is None
    assert _core.lock_violations() == 0
