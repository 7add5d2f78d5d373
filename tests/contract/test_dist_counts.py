"""What counts as a push of a key when calls end early: the step that servers take next tells."""

import numpy as np
import pytest
from helpers import pulled
from inside import Cluster, each
from test_dist_failures import forget

import kvstore
from kvstore import optimizer

MAKES = {
    "adam": lambda: optimizer.Adam(learning_rate=0.1),
    "nadam": lambda: optimizer.Nadam(learning_rate=0.1),
    "sgd": lambda: optimizer.SGD(
        momentum=0.5,
        lr_scheduler=kvstore.lr_scheduler.MultiFactorScheduler([2, 3, 4, 5], 0.5),
    ),
}
ONE = np.ones(3, np.float32)


@pytest.fixture(params=MAKES)
def make(request):
    return MAKES[request.param]


def after(make, pushes):
    """The value after so many rounds of ones of two workers."""
    with kvstore.create("local") as kv:
        kv.set_optimizer(make())
        kv.init("w", ONE)
        for _ in range(pushes):
            kv.push("w", [ONE, ONE])
        return pulled(kv, "w").tolist()


@pytest.fixture
def stores(make):
    with Cluster(2, 2) as cluster:
        stores = cluster.all_stores(timeout=0.4)
        stores[0].set_optimizer(make())
        each(stores, lambda kv: kv.init(["v", "w"], [ONE, ONE]))
        yield stores


def test_a_push_that_was_not_sent_does_not_count(make, stores):
    first, second = stores
    for _ in range(2):
        first.push("w", ONE)
    for _ in range(2):
        with pytest.raises(kvstore.TimeoutError, match="worker 1 has not pushed"):
            first.push("w", ONE)
    forget(kvstore.TimeoutError)
    for _ in range(2):
        second.push("w", ONE)
    assert pulled(second, "w").tolist() == after(make, 2)
    each(stores, lambda kv: kv.push("w", ONE))
    for kv in stores:
        assert pulled(kv, "w").tolist() == after(make, 3)


@pytest.mark.parametrize("late", [0, 1])
def test_a_push_counts_that_a_deadline_ended_after_it_was_sent(late, make, stores):
    other = stores[1 - late]
    with pytest.raises(kvstore.TimeoutError, match=f"worker {late} has not pushed"):
        other.pushpull("w", ONE, out=ONE.copy())
    stores[late].push("w", ONE)
    each(stores, lambda kv: kv.push("w", ONE))
    for kv in stores:
        assert pulled(kv, "w").tolist() == after(make, 2)
    forget(kvstore.TimeoutError)


def test_calls_that_are_refused_do_not_count(make, stores):
    for kv in stores:
        for call in (
            lambda kv=kv: kv.push("w", np.ones(4, np.float32)),
            lambda kv=kv: kv.push(["w", "v"], [ONE, np.ones(3)]),
            lambda kv=kv: kv.push(["w", "no"], [ONE, ONE]),
            lambda kv=kv: kv.pushpull("w", ONE, out=np.ones(2, np.float32)),
        ):
            with pytest.raises(kvstore.KVStoreError):
                call()
    for _ in range(2):
        each(stores, lambda kv: kv.push("w", ONE))
    for kv in stores:
        assert pulled(kv, "w").tolist() == after(make, 2)


def test_a_round_that_fails_on_the_servers_changes_nothing_of_the_other_keys(make):
    """Worker 1 pushes with an optimizer that the servers have not got."""
    with Cluster(2, 2, "dist_async") as cluster:
        first, second = cluster.all_stores(timeout=5)
        first.set_optimizer(make())
        each([first, second], lambda kv: kv.init("w", ONE))
        numbers, flags = {"learning_rate": 0.5}, {}
        second._optimizer_set(optimizer.SGD(), "sgd", numbers, flags, None, [], 0, 12345)
        with pytest.raises(kvstore.InvalidArgumentError, match=r"worker 1.*optimizer that server"):
            second.push("w", ONE, async_op=True).wait()
        assert pulled(first, "w").tolist() == ONE.tolist()
        first.push("w", ONE + ONE)
        assert pulled(first, "w").tolist() == after(make, 1)
        assert pulled(second, "w").tolist() == after(make, 1)
