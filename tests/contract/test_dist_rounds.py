"""Rounds of a dist store: one push of every worker a round, and what a pull sees of them."""

import numpy as np
import pytest
from helpers import Worker, pulled, same
from inside import Cluster, each

import kvstore

SIZES = [(1, 1), (2, 1), (2, 2), (4, 2), (7, 3)]
BIG = 400_000  # elements of float64: several slices


@pytest.fixture(params=SIZES, ids=lambda size: f"{size[0]}x{size[1]}")
def stores(request):
    """Stores of a cluster of each size with the keys 'w' and 'big'."""
    with Cluster(*request.param) as cluster:
        stores = cluster.all_stores()
        each(stores, lambda kv: kv.init(["w", "big"], [np.zeros(3), np.zeros(BIG)]))
        yield stores


@pytest.fixture
def pair():
    """Two workers who do not wait long; both have the keys 'v' and 'w'."""
    with Cluster(2, 2) as cluster:
        stores = cluster.all_stores(timeout=0.4)
        each(stores, lambda kv: kv.init(["v", "w"], [np.zeros(3), np.zeros(3)]))
        yield stores


def forget(error):
    """Takes the errors away that nobody has been told of."""
    told = []
    while True:
        try:
            kvstore.wait_all()
        except error as found:
            told.append(str(found))
        else:
            return told


def total(stores, weight=1):
    return float(sum(weight * (kv.rank + 1) for kv in stores))


def test_a_round_is_one_push_of_every_worker(stores):
    for number in range(1, 4):
        each(stores, lambda kv, n=number: kv.push("w", np.full(3, n * (kv.rank + 1.0))))
        for kv in stores:
            assert pulled(kv, "w").tolist() == [total(stores, number)] * 3


def test_a_pull_sees_the_newest_value_after_all_earlier_pushes_of_its_worker(stores):
    def work(kv):
        seen = []
        for number in range(1, 6):
            kv.push("w", np.full(3, number * (kv.rank + 1.0)))
            seen.append(pulled(kv, "w").tolist())
        return seen

    expected = [[total(stores, number)] * 3 for number in range(1, 6)]
    assert each(stores, work) == [expected] * len(stores)


def test_a_large_value_is_summed_whole(stores):
    value = np.arange(BIG, dtype=np.float64)

    def work(kv):
        kv.push("big", value + kv.rank)
        return pulled(kv, "big")

    expected = value * len(stores) + sum(range(len(stores)))
    assert all(same(found, expected) for found in each(stores, work))


def test_pushpull_gives_every_worker_the_sum_of_the_round(stores):
    def work(kv):
        out = [np.zeros(3), np.zeros(BIG)]
        kv.pushpull(["w", "big"], [np.full(n, kv.rank + 1.0) for n in (3, BIG)], out=out)
        return out

    for small, big in each(stores, work):
        assert same(small, np.full(3, total(stores)))
        assert same(big, np.full(BIG, total(stores)))


def test_before_any_push_all_workers_pull_what_rank_0_gave_to_init(stores):
    each(stores, lambda kv: kv.init("fresh", np.full(2, kv.rank + 5.0)))
    assert [pulled(kv, "fresh").tolist() for kv in stores] == [[5, 5]] * len(stores)


def test_broadcast_gives_every_worker_the_value_of_rank_0(stores):
    def work(kv):
        out = np.zeros(4)
        kv.broadcast("b", np.full(4, kv.rank + 3.0), out)
        return out.tolist()

    assert each(stores, work) == [[3, 3, 3, 3]] * len(stores)


def test_a_key_that_all_workers_have_deleted_may_be_made_anew_with_another_shape(stores):
    each(stores, lambda kv: kv.push("w", np.ones(3)))
    each(stores, lambda kv: kv.delete("w"))
    for kv in stores:
        assert "w" not in kv
        with pytest.raises(kvstore.KeyNotFoundError, match="'w'"):
            kv.push("w", np.ones(3))
    each(stores, lambda kv: kv.init("w", np.full((2, 2), 7, np.int32)))
    each(stores, lambda kv: kv.push("w", np.ones((2, 2), np.int32)))
    for kv in stores:
        assert same(pulled(kv, "w"), np.full((2, 2), len(stores), np.int32))


def test_a_push_of_the_next_round_waits_for_its_round(pair):
    a, b = pair
    a.push("w", np.full(3, 1.0))
    a.push("w", np.full(3, 10.0))
    b.push("w", np.full(3, 2.0))
    assert pulled(b, "w").tolist() == [3, 3, 3]
    b.push("w", np.full(3, 20.0))
    assert pulled(b, "w").tolist() == [30, 30, 30]
    assert pulled(a, "w").tolist() == [30, 30, 30]


def test_a_pull_does_not_wait_for_pushes_of_others(pair):
    a, b = pair
    a.push("w", np.ones(3))
    assert pulled(b, "w").tolist() == [0, 0, 0]
    b.push("w", np.ones(3))
    assert pulled(a, "w").tolist() == [2, 2, 2]


def test_a_worker_two_rounds_ahead_is_held_back_and_told_who_is_missing(pair):
    a, b = pair
    a.push("w", np.full(3, 1.0))
    a.push("w", np.full(3, 10.0))
    with pytest.raises(kvstore.TimeoutError, match=r"'w'.*worker 1 has not pushed.*not sent"):
        a.push("w", np.full(3, 100.0))
    with pytest.raises(kvstore.TimeoutError, match="worker 1 has not pushed round 0"):
        a.push("w", np.full(3, 1000.0))  # the error of the first; this one is not sent either
    assert len(forget(kvstore.TimeoutError)) <= 2  # of the two that were sent
    for value in (2.0, 20.0):
        b.push("w", np.full(3, value))
    for kv in (a, b):
        assert pulled(kv, "w").tolist() == [30, 30, 30]


def test_a_worker_held_back_goes_on_when_the_others_come():
    with Cluster(2, 2) as cluster:
        a, b = cluster.all_stores()
        each([a, b], lambda kv: kv.init("w", np.zeros(3)))

        def ahead():
            for value in (1.0, 2.0, 3.0, 4.0):
                a.push("w", np.full(3, value))
            return pulled(a, "w").tolist()

        worker = Worker(ahead)
        worker.wait_in_call(ahead)
        for value in (10.0, 20.0, 30.0, 40.0):
            b.push("w", np.full(3, value))
        assert worker.result() == [44, 44, 44]


def test_a_push_behind_a_pull_that_waits_is_not_seen_by_it():
    with Cluster(2, 2) as cluster:
        a, b = cluster.all_stores()
        each([a, b], lambda kv: kv.init("w", np.zeros(3)))
        out = np.zeros(3)
        a.push("w", np.ones(3))
        early = a.pull("w", out=out, async_op=True)
        later = a.push("w", np.full(3, 5.0), async_op=True)
        assert not early.done()
        b.push("w", np.ones(3))
        b.push("w", np.full(3, 5.0))
        for handle in (early, later):
            handle.wait()
        assert out.tolist() == [2, 2, 2]
        assert pulled(a, "w").tolist() == [10, 10, 10]


@pytest.mark.parametrize("call", ["pull", "pushpull"])
def test_a_call_that_waits_for_another_worker_is_told_who(pair, call):
    a, b = pair
    out = np.full(3, 9.0)
    if call == "pull":
        a.push("w", np.ones(3))
        with pytest.raises(kvstore.TimeoutError, match=r"'w'.*worker 1 has not pushed round 0"):
            a.pull("w", out=out)
        with pytest.raises(kvstore.TimeoutError, match="worker 1 has not pushed"):
            kvstore.wait_all()  # of the push
    else:
        with pytest.raises(
            kvstore.TimeoutError, match=r"'w'.*worker 1 has not pushed round 0.*counts as soon as"
        ):
            a.pushpull("w", np.ones(3), out=out)
    assert out.tolist() == [9, 9, 9]
    b.push("w", np.full(3, 4.0))
    assert pulled(a, "w").tolist() == [5, 5, 5]
    kvstore.wait_all()


def test_a_deleted_key_takes_the_pushes_before_it_along(pair):
    a, b = pair
    a.push("w", np.ones(3))
    b.push("w", np.ones(3))
    each([a, b], lambda kv: kv.delete(["v", "w"]))
    for kv in (a, b):
        assert list(kv.keys()) == []
    kvstore.wait_all()


def test_a_delete_by_one_worker_only_names_the_others_and_deletes_nothing(pair):
    a, b = pair
    with pytest.raises(kvstore.TimeoutError, match=r"'w'.*worker 1 has not deleted it"):
        a.delete("w")
    assert "w" in a
    each([a, b], lambda kv: kv.push("w", np.ones(3)))
    assert pulled(a, "w").tolist() == [2, 2, 2]
    each([b, a], lambda kv: kv.delete("w"))
    assert "w" not in a
    assert "w" not in b


def test_init_by_another_worker_than_rank_0_names_worker_0(pair):
    a, b = pair
    with pytest.raises(kvstore.TimeoutError, match=r"'x'.*worker 0 has not initialised"):
        b.init("x", np.zeros(3))
    assert "x" not in b
    a.init("x", np.full(3, 2.0))
    b.init("x", np.full(3, 3.0))
    assert pulled(b, "x").tolist() == [2, 2, 2]


def test_a_second_init_raises_and_changes_nothing(pair):
    for kv in pair:
        with pytest.raises(kvstore.InvalidArgumentError, match="'w' is initialised already"):
            kv.init("w", np.ones(3))
        with pytest.raises(kvstore.InvalidArgumentError, match="'w' is initialised already"):
            kv.broadcast(["y", "w"], [np.ones(3)] * 2, [np.ones(3), np.ones(3)])
        assert sorted(kv.keys()) == ["v", "w"]
        assert pulled(kv, "w").tolist() == [0, 0, 0]


@pytest.mark.parametrize(
    ("value", "error", "words"),
    [
        (np.zeros(4), kvstore.InvalidArgumentError, r"\(3,?\) on worker 0.*\(4,?\) here"),
        (np.zeros((3, 1)), kvstore.InvalidArgumentError, r"\(3,?\) on worker 0.*\(3, 1\) here"),
        (np.zeros(3, np.float32), kvstore.ArrayTypeError, "float64 on worker 0, float32 here"),
    ],
    ids=["length", "dimensions", "type"],
)
@pytest.mark.parametrize("first", [0, 1])
def test_what_disagrees_with_rank_0_raises_there_and_makes_no_key(pair, value, error, words, first):
    a, b = pair

    def refused():
        with pytest.raises(error, match=rf"'x'.*{words}"):
            b.init(["x", "y"], [value, np.zeros(2)])
        assert sorted(b.keys()) == ["v", "w"]

    worker = Worker(refused) if first == 1 else None
    if worker is not None:
        worker.wait_in_call(refused)
    a.init(["x", "y"], [np.zeros(3), np.zeros(2)])
    if worker is not None:
        worker.result()
    else:
        refused()
    b.init(["x", "y"], [np.ones(3), np.ones(2)])
    each([a, b], lambda kv: kv.push("x", np.ones(3)))
    assert pulled(b, "x").tolist() == [2, 2, 2]


def test_unknown_keys_raise_at_once(pair):
    for kv in pair:
        for call in (
            lambda kv=kv: kv.push("no", np.zeros(3)),
            lambda kv=kv: kv.pull("no", out=np.zeros(3)),
            lambda kv=kv: kv.pushpull(["w", "no"], [np.ones(3), np.zeros(3)]),
            lambda kv=kv: kv.delete("no"),
        ):
            with pytest.raises(kvstore.KeyNotFoundError, match="'no'"):
                call()
        assert pulled(kv, "w").tolist() == [0, 0, 0]


def test_workers_may_push_lists_in_opposite_order(stores):
    keys = [f"k{i}" for i in range(20)]
    each(stores, lambda kv: kv.init(keys, [np.zeros(5)] * len(keys)))

    def work(kv):
        mine = keys if kv.rank % 2 == 0 else keys[::-1]
        for _ in range(5):
            kv.push(mine, [np.full(5, float(key[1:])) for key in mine])
        return [pulled(kv, key).tolist() for key in keys]

    expected = [[float(i * len(stores))] * 5 for i in range(len(keys))]
    assert each(stores, work) == [expected] * len(stores)
