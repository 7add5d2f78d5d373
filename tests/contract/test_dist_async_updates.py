"""dist_async: each push is applied on its own, with the optimizer of its worker or the newest."""

import numpy as np
import pytest
from beside import beside
from helpers import pulled
from inside import Cluster, each
from test_dist_optimizers import ALL, FLOATS, HOW, NORMS, weights
from test_optimizers import VARIANTS

import kvstore
from kvstore import lr_scheduler, optimizer

BIG = 200_000
NEEDS = "dist_async needs an optimizer on the servers before the first push; call set_optimizer"


@pytest.fixture
def trio():
    """Three workers with the keys 'w' and 'big'."""
    with Cluster(3, 2, "dist_async") as cluster:
        stores = cluster.all_stores(timeout=10)
        each(stores, lambda kv: kv.init(["w", "big"], [np.zeros(3), np.zeros(BIG)]))
        yield stores


@pytest.mark.parametrize("name", VARIANTS)
def test_one_worker_computes_what_a_local_store_does(name):
    common = {k: v for k, v in ALL.items() if k != "wd" or name != "groupadagrad"}
    if name == "test":
        common.pop("clip_gradient")
    own = VARIANTS[name][-1]
    with beside(1, kind="dist_async") as pair:
        shapes = {"small": (4, 5), "large": (4, 5) if name in NORMS else (20_001, 10)}
        values = weights(shapes, FLOATS)
        pair.init(values)
        pair.set_optimizer(
            lambda: optimizer.create(
                name,
                **own,
                **common,
                multi_precision=True,
                lr_scheduler=lr_scheduler.FactorScheduler(2, 0.5, base_lr=0.1, warmup_steps=2),
            )
        )
        for step in range(3):
            pair.push(list(values), HOW[step])
        pair.check()


def test_one_worker_changes_numbers_and_classes_while_training():
    with beside(1, kind="dist_async") as pair:
        pair.init(weights({"a": (5,), "b": (BIG,)}, {"f4": np.float32}))
        for name in ("sgd", "nag", "sgd", "sgd", "adam"):
            pair.set_optimizer(lambda n=name: optimizer.create(n, lr=0.1))
            pair.push(["a f4", "b f4"])
            pair.set_params(lr=0.3, wd=0.01, **({} if name == "adam" else {"momentum": 0.5}))
            if name != "nag":
                pair.push("a f4")
            pair.check()


@pytest.mark.parametrize("callers", [[0], [0, 1, 2], [0, 2]], ids=str)
def test_pushes_that_commute_give_the_exact_total(trio, callers):
    """Workers that never call set_optimizer push too; theirs are applied with the newest."""
    rounds = 20
    each([trio[i] for i in callers], lambda kv: kv.set_optimizer(optimizer.SGD(lr=-1.0)))

    def work(kv):
        random = np.random.default_rng(kv.rank)
        total = dict.fromkeys(["w", "big"], 0)
        for _ in range(rounds):
            key, number = ("w", "big")[random.integers(2)], float(random.integers(-9, 9))
            value = np.full(kv.shape(key), number)
            way = random.integers(4)
            if way == 0:
                kv.push(key, value)
            elif way == 1:
                kv.push(key, [value, value - value], priority=int(number))
            elif way == 2:
                kv.push(key, value, async_op=True).wait()
            else:
                kv.pushpull(key, value, out=np.zeros(kv.shape(key)))
            total[key] += number
        found = {key: pulled(kv, key) for key in total}  # its own have been applied by then
        assert all((value == value[0]).all() for value in [found["w"]])
        return total

    totals = each(trio, work)
    for kv in trio:
        for key in ("w", "big"):
            assert (pulled(kv, key) == sum(total[key] for total in totals)).all()
    kvstore.wait_all()


def test_a_pull_sees_every_push_of_its_own_worker(trio):
    trio[0].set_optimizer(optimizer.SGD(lr=-1.0))
    place = {kv.rank: 1 << (10 * kv.rank) for kv in trio}

    def work(kv):
        for number in range(1, 20):
            kv.push("w", np.full(3, float(place[kv.rank])))
            seen = pulled(kv, "w").astype(np.int64)
            assert (seen // place[kv.rank] % 1024 == number).all()

    each(trio, work)


def test_without_an_optimizer_a_push_is_told_at_the_next_wait_and_changes_nothing(trio):
    for kv in trio:
        with pytest.raises(kvstore.InvalidArgumentError, match=NEEDS):
            kv.push("w", np.ones(3), async_op=True).wait()
        with pytest.raises(kvstore.InvalidArgumentError, match=NEEDS):
            kv.pushpull("big", np.ones(BIG), out=np.zeros(BIG))
        kv.push("w", np.ones(3))
        with pytest.raises(kvstore.InvalidArgumentError, match=NEEDS):
            kvstore.wait_all()
    trio[0].set_optimizer(optimizer.SGD(lr=-1.0))
    each(trio, lambda kv: kv.push(["w", "big"], [np.ones(3), np.ones(BIG)]))
    for kv in trio:  # one's own are applied when one's own pull is answered
        pulled(kv, "w"), pulled(kv, "big")
    for kv in trio:
        assert pulled(kv, "w").tolist() == [3, 3, 3]
        assert (pulled(kv, "big") == 3).all()


def test_integers_are_refused_on_every_worker(trio):
    each(trio, lambda kv: kv.init("n", np.ones(2, np.int32)))
    trio[0].set_optimizer(optimizer.SGD())
    trio[1].set_optimizer(optimizer.SGD())
    for kv in trio:
        with pytest.raises(kvstore.ArrayTypeError, match=r"'n'.*int32.*SGD updates floating"):
            kv.push("n", np.ones(2, np.int32), async_op=True).wait()
        assert pulled(kv, "n").tolist() == [1, 1]


def test_deletes_and_inits_begin_anew(trio):
    trio[0].set_optimizer(optimizer.SGD(lr=-1.0, momentum=0.5))
    for _ in range(3):
        for number in (1.0, 2.5, 4.25):  # m is 1, 1.5, 1.75
            trio[0].push("w", np.ones(3))
            assert pulled(trio[0], "w").tolist() == [number] * 3
        each(trio, lambda kv: kv.delete("w"))
        each(trio, lambda kv: kv.init("w", np.zeros(3)))
