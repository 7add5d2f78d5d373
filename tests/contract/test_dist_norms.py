"""Layer-wise optimizers on servers: norms of the whole value, however its slices lie apart."""

import contextlib
import functools
import itertools

import numpy as np
import pytest
from helpers import pulled
from inside import Cluster, each

import kvstore
from kvstore import _core, optimizer

SIZES = [(1, 1), (2, 2), (3, 3)]
MANY = 800_003  # elements: several slices, and not whole blocks of squares
BOUND = 3e-7  # of the largest element: the sums of slices are added up in another order

CASES = {
    "lamb": lambda **own: optimizer.LAMB(learning_rate=0.05, wd=0.01, **own),
    "lamb-bounds": lambda **own: optimizer.LAMB(
        learning_rate=0.05, lower_bound=0.5, upper_bound=40, bias_correction=False, **own
    ),
    "lars": lambda **own: optimizer.LARS(
        learning_rate=0.5, momentum=0.9, eta=0.3, wd=0.01, rescale_grad=0.5, **own
    ),
    "lbsgd": lambda **own: optimizer.LBSGD(
        learning_rate=0.1, momentum=0.9, warmup_strategy="lars", wd=0.01, **own
    ),
    "lbsgd-mean": lambda **own: optimizer.LBSGD(
        learning_rate=0.1, warmup_strategy="lars", batch_scale=2, **own
    ),
}


@pytest.fixture(params=CASES)
def made(request):
    return CASES[request.param]


def ids(size):
    return f"{size[0]}x{size[1]}"


@functools.cache
def randoms(shape, dtype, seed):
    return np.random.default_rng(seed).normal(size=shape).astype(dtype)


def distance(got, wanted):
    got, wanted = got.astype(np.float64), wanted.astype(np.float64)
    return np.abs(got - wanted).max() / np.abs(wanted).max()


def compare(
    size, optimizers, dtype=np.float32, rounds=3, kind="dist_sync", compression=None, **options
):
    """Pushes the same to a cluster and to a local store; the largest distance of their values."""
    workers, servers = size
    shapes = {"one": (3, 7), "many": (MANY,)}
    first = {key: randoms(shape, dtype, 1) for key, shape in shapes.items()}
    local = kvstore.create("local")
    worst = 0
    with Cluster(workers, servers, kind, **options) as cluster:
        stores = cluster.all_stores()
        for kv in [local, *stores]:
            if compression is not None:
                kv.set_gradient_compression(compression)
        each([local, *stores], lambda kv: kv.init(list(first), list(first.values())))
        for number in range(rounds):
            if number < len(optimizers):
                each([local, *stores], lambda kv, n=number: kv.set_optimizer(optimizers[n]))
            values = {
                key: [randoms(shape, dtype, (number, rank)) for rank in range(workers)]
                for key, shape in shapes.items()
            }

            def work(kv, values=values):
                kv.push(list(values), [value[kv.rank] for value in values.values()])
                return [pulled(kv, key) for key in values]

            seen = each(stores, work)
            local.push(list(values), list(values.values()))
            for i, key in enumerate(shapes):
                wanted = pulled(local, key)
                assert number == 0 or not (wanted == first[key]).all()
                for mine in seen:
                    assert (mine[i] == seen[0][i]).all()
                    worst = max(worst, distance(mine[i], wanted))
    return worst


@pytest.mark.parametrize("size", SIZES, ids=ids)
def test_a_value_in_slices_takes_the_step_of_a_whole_one(size, made):
    assert compare(size, [made()]) <= BOUND


def test_in_float64_too(made):
    assert compare((2, 2), [made()], np.float64) <= BOUND


@pytest.mark.parametrize("double", [False, True], ids=["plain", "multi_precision"])
def test_in_float16_too(double, made):
    # A factor that differs in its last bit may round an element of the weight the other way.
    assert compare((2, 2), [made(multi_precision=double)], np.float16) <= 2**-11


@pytest.mark.parametrize("params", ["2bit", "1bit"])
def test_of_compressed_pushes_too(params, made):
    compression = {"type": params, "threshold": 0.5}
    assert compare((2, 2), [made()], compression=compression) <= BOUND


@pytest.mark.parametrize("seed", range(6))
def test_in_any_order_of_messages(seed):
    case = list(CASES.values())[seed % len(CASES)]
    options = {"transport": "faulty", "faults": "delay=2,reorder", "seed": seed}
    assert compare((3, 3), [case()], **options) <= BOUND


def test_other_optimizers_give_the_same_bits_before_and_after():
    before = [optimizer.SGD(learning_rate=0.1, momentum=0.9), optimizer.Adam()]
    assert compare((2, 2), before, rounds=3) == 0
    mixed = [optimizer.Adam(), CASES["lamb"](), optimizer.SGD(), CASES["lars"]()]
    assert compare((2, 2), mixed, rounds=5) <= BOUND


def test_a_plain_rate_of_lars_needs_no_norms():
    with Cluster(1, 2) as cluster:
        kv, local = cluster.store(0), kvstore.create("local")
        for one in (kv, local):
            one.set_optimizer(optimizer.LARS(learning_rate=0.5, momentum=0.9))
            one.init("fc_bias", np.ones(MANY, np.float32))
            one.push("fc_bias", randoms(MANY, np.float32, 2))
        assert (pulled(kv, "fc_bias") == pulled(local, "fc_bias")).all()


@pytest.mark.parametrize("size", [(1, 1), (3, 2)], ids=ids)
def test_of_row_sparse_gradients_too(size, made):
    workers, servers = size
    first = randoms((9_000, 100), np.float32, 1)
    local, worst = kvstore.create("local"), 0
    with Cluster(workers, servers) as cluster:
        stores = cluster.all_stores()
        each([local, *stores], lambda kv: kv.init("w", first))
        each([local, *stores], lambda kv: kv.set_optimizer(made()))
        for number in range(3):
            values = []
            for rank in range(workers):
                chosen = np.random.default_rng((number, rank)).choice(9_000, 50 * rank, False)
                data = randoms((50 * rank, 100), np.float32, (number, rank))
                values.append(kvstore.RowSparse(data, np.sort(chosen), first.shape))

            def work(kv, values=values):
                kv.push("w", values[kv.rank])
                return pulled(kv, "w")

            seen = each(stores, work)
            local.push("w", values)
            worst = max(worst, *(distance(mine, pulled(local, "w")) for mine in seen))
    assert worst <= BOUND


# -------------------------------------------------------------------------------- asynchronous


def test_asynchronous_pushes_of_one_worker_are_those_of_a_local_store(made):
    assert compare((1, 3), [made()], kind="dist_async") <= BOUND


def lars(weight, gradients):
    for gradient in gradients:
        rate = 0.5 * 0.3 * np.linalg.norm(weight) / np.linalg.norm(gradient)
        weight = weight - rate * gradient
    return weight


@pytest.mark.parametrize("seed", range(4))
def test_all_slices_take_asynchronous_pushes_in_one_order(seed):
    first = randoms(MANY, np.float64, 1)
    gradients = [
        [randoms(MANY, np.float64, (rank, i)) * (i + 1) for i in (0, 1)] for rank in (0, 1)
    ]
    options = {"transport": "faulty", "faults": "delay=2,reorder", "seed": seed}
    with Cluster(2, 3, "dist_async", **options) as cluster:
        stores = cluster.all_stores()
        each(stores, lambda kv: kv.init("w", first))
        each(stores, lambda kv: kv.set_optimizer(optimizer.LARS(learning_rate=0.5, eta=0.3)))

        def work(kv):
            for gradient in gradients[kv.rank]:
                kv.push("w", gradient)
            return pulled(kv, "w")

        each(stores, work)
        got = pulled(stores[0], "w")
    choices = ["0011", "0101", "0110", "1001", "1010", "1100"]
    distances = []
    for choice in choices:
        taken = [iter(gradients[0]), iter(gradients[1])]
        distances.append(distance(got, lars(first, [next(taken[int(rank)]) for rank in choice])))
    assert min(distances) <= BOUND, distances


def test_a_worker_without_the_optimizer_is_told_so():
    with Cluster(2, 2, "dist_async") as cluster:
        stores = cluster.all_stores()
        each(stores, lambda kv: kv.init("w", np.zeros(MANY, np.float32)))
        stores[0].set_optimizer(CASES["lars"]())
        with pytest.raises(kvstore.InvalidArgumentError, match=r"worker 1 pushed without it"):
            stores[1].push("w", np.ones(MANY, np.float32))
            pulled(stores[1], "w")
            kvstore.wait_all()


# ------------------------------------------------------------------------------------- the rest


def test_a_key_can_be_deleted_and_made_again():
    with Cluster(2, 2) as cluster:
        stores = cluster.all_stores()
        each(stores, lambda kv: kv.set_optimizer(CASES["lamb"]()))
        for _ in range(3):

            def work(kv):
                kv.init("w", randoms(MANY, np.float32, 1))
                kv.push("w", randoms(MANY, np.float32, 2))
                value = pulled(kv, "w")
                kv.delete("w")
                return value

            a, b = each(stores, work)
            assert (a == b).all()


def test_integers_are_refused_on_every_slice():
    with Cluster(1, 2) as cluster:
        kv = cluster.store(0)
        kv.set_optimizer(CASES["lamb"]())
        kv.init("w", np.zeros(MANY, np.int32))
        with pytest.raises(kvstore.ArrayTypeError, match="floating"):
            kv.push("w", np.ones(MANY, np.int32))
            pulled(kv, "w")
            kvstore.wait_all()


def forget():
    """Takes the errors away that nobody has been told of."""
    while True:
        try:
            return kvstore.wait_all()
        except (MemoryError, kvstore.PeerLostError):
            pass


SHARED = (700, 100)  # of float32: enough for a slice on each of two servers


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("form", ["dense", "rows"])
def test_without_memory_a_round_is_taken_by_all_slices_or_by_none(form, seed):
    ones, steps, failed = np.ones(SHARED, np.float32), set(), 0
    rows = kvstore.RowSparse(ones[::2], np.arange(0, 700, 2), SHARED)
    for nth in itertools.count(seed + 1, 4):  # until an attempt needs fewer allocations than nth
        with Cluster(1, 2) as cluster:
            kv = cluster.store(0, timeout=10)
            kv.set_optimizer(CASES["lamb"]())
            kv.init("w", ones)
            _core.fault_set("alloc", nth)
            try:
                kv.push("w", rows if form == "rows" else ones)
                pulled(kv, "w")
            except (MemoryError, kvstore.PeerLostError):
                failed += 1
            finally:
                passed = _core.fault_set("alloc", 0)
            forget()
            with contextlib.suppress(kvstore.PeerLostError):
                value = pulled(kv, "w")
                assert (value[::2] == value[0, 0]).all() and (value[1::2] == value[1, 0]).all()
                steps.add(float(value[0, 0]))
        if passed < nth:
            break
    assert failed > 0
    assert len(steps - {1.0}) == 1
