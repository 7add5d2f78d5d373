"""Compressed pushes of a dist store: each worker encodes what it has merged, with a residual of its
own for each key, and servers decode and sum in the order of the ranks."""

import warnings

import ml_dtypes
import numpy as np
import pytest
from helpers import pulled, same
from inside import Cluster, each

import kvstore
from kvstore import compression, optimizer

TWO = {"type": "2bit", "threshold": 0.5}
ONE = {"type": "1bit", "threshold": 0.25}
FLOATS = [np.float64, np.float32, np.float16, ml_dtypes.bfloat16]
SIZES = {"none": (0,), "one": (1,), "zero": (), "some": (7, 9), "large": (300_001,)}


def wide(dtype):
    return np.float64 if dtype == np.float64 else np.float32


class Sender:
    """What a worker's pushes become on the wire, by way of the public codec."""

    def __init__(self, params=None):
        self.params, self.residuals = params, {}

    def send(self, key, values):
        dtype = values[0].dtype
        merged = np.asarray(sum(v.astype(wide(dtype)) for v in values), wide(dtype)).astype(dtype)
        if self.params is None:
            return merged.astype(wide(dtype))
        residual = self.residuals.setdefault(key, np.zeros(merged.shape, wide(dtype)))
        codes = compression.encode(merged, residual, self.params)
        return compression.decode(
            codes, merged.shape, self.params, dtype=np.dtype(wide(dtype)).name
        )


def total(senders, key, drawn):
    """The sum of a round in the wide type."""
    return sum(sender.send(key, values) for sender, values in zip(senders, drawn, strict=True))


def draw(random, shape, dtype, counts):
    return [
        [np.asarray(random.normal(size=shape), dtype) for _ in range(count)] for count in counts
    ]


def push(stores, key, drawn, how="push"):
    """A round; what pushpull has given."""

    def work(kv):
        values = drawn[kv.rank]
        values = values if len(values) > 1 else values[0]
        if how == "pushpull":
            out = np.empty(kv.shape(key), kv.dtype(key))
            kv.pushpull(key, values, out=out)
            return out
        kv.push(key, values)
        return None

    return each(stores, work)


@pytest.fixture
def trio():
    with Cluster(3, 2) as cluster:
        stores = cluster.all_stores()
        yield stores


@pytest.fixture
def pair():
    with Cluster(2, 2) as cluster:
        yield cluster.all_stores()


@pytest.mark.parametrize("dtype", FLOATS, ids=lambda t: t.__name__)
@pytest.mark.parametrize("params", [TWO, ONE], ids=["2bit", "1bit"])
@pytest.mark.parametrize("size", SIZES)
def test_a_round_is_the_sum_of_what_the_codes_say(size, params, dtype, trio):
    random, senders = np.random.default_rng(5), [Sender(params) for _ in trio]
    each(trio, lambda kv: kv.set_gradient_compression(params))
    each(trio, lambda kv: kv.init("w", np.ones(SIZES[size], dtype)))
    assert all((pulled(kv, "w") == 1).all() for kv in trio)
    for step, counts in enumerate([(1, 1, 1), (2, 1, 3), (1, 1, 1)]):
        drawn = draw(random, SIZES[size], dtype, counts)
        expected = np.asarray(total(senders, "w", drawn), wide(dtype)).astype(dtype)
        outs = push(trio, "w", drawn, ("push", "pushpull")[step % 2])
        for kv, out in zip(trio, outs, strict=True):
            assert same(pulled(kv, "w"), expected)
            assert out is None or same(out, expected)


@pytest.mark.parametrize("dtype", FLOATS, ids=lambda t: t.__name__)
@pytest.mark.parametrize("params", [TWO, ONE], ids=["2bit", "1bit"])
@pytest.mark.parametrize("name", ["sgd", "adam", "ftrl"])
def test_an_optimizer_gets_the_sum_of_what_the_codes_say(name, params, dtype, trio):
    random, senders = np.random.default_rng(6), [Sender(params) for _ in trio]
    keys = {"small": (4, 5), "large": (300_001,)}
    with kvstore.create("local") as local:
        for kv in (local, trio[0]):
            kv.set_optimizer(optimizer.create(name, lr=0.1, multi_precision=True))
        each(trio, lambda kv: kv.set_gradient_compression(params))
        for key, shape in keys.items():
            first = random.normal(size=shape).astype(dtype)
            each([*trio, local], lambda kv, k=key, f=first: kv.init(k, f))
            for step in range(3):
                drawn = draw(random, shape, dtype, (1, 1, 1))
                sent = [s.send(key, values) for s, values in zip(senders, drawn, strict=True)]
                # The codes stand for numbers that every type has, so that this list is what comes.
                local.push(key, [value.astype(dtype) for value in sent])
                push(trio, key, drawn, ("push", "pushpull")[step % 2])
                assert all(same(pulled(kv, key), pulled(local, key)) for kv in trio)


def test_types_and_thresholds_change_between_rounds(pair):
    random, shape = np.random.default_rng(7), (200_001,)
    each(pair, lambda kv: kv.init("w", np.zeros(shape, np.float32)))
    senders = [Sender(), Sender()]
    changes = [
        (TWO, TWO),
        ({**TWO, "threshold": 2.0}, TWO),  # the residuals stay
        (TWO, None),
        (ONE, TWO),
        (None, None),
        ({"type": "2bit", "threshold": 0.125}, {"type": "1bit", "threshold": 0}),
        (TWO, ONE),
    ]
    for params in changes:
        for kv, sender, new in zip(pair, senders, params, strict=True):
            if (new or {}).get("type") != (sender.params or {}).get("type"):
                sender.residuals.clear()
            sender.params = new
            kv.set_gradient_compression(new or {"type": "none"})
        for _ in range(2):
            drawn = draw(random, shape, np.float32, (1, 1))
            push(pair, "w", drawn)
            expected = total(senders, "w", drawn)
            assert all(same(pulled(kv, "w"), expected) for kv in pair)


@pytest.mark.parametrize("alone", [0, 1])
def test_one_worker_alone_compresses(pair, alone):
    random, senders = np.random.default_rng(8), [Sender(), Sender()]
    pair[alone].set_gradient_compression(TWO)
    senders[alone].params = TWO
    each(pair, lambda kv: kv.init("w", np.zeros(50_000, np.float16)))
    for _ in range(3):
        drawn = draw(random, (50_000,), np.float16, (1, 1))
        push(pair, "w", drawn)
        expected = total(senders, "w", drawn).astype(np.float16)
        assert all(same(pulled(kv, "w"), expected) for kv in pair)


def test_each_key_of_a_list_has_its_residual_and_a_delete_takes_it_away(pair):
    random, senders = np.random.default_rng(9), [Sender(TWO), Sender(TWO)]
    keys = ["a", "b", "n"]
    each(pair, lambda kv: kv.set_gradient_compression(TWO))
    values = [np.zeros(40, np.float32), np.zeros(40, np.float64), np.zeros(40, np.int8)]
    each(pair, lambda kv: kv.init(keys, values))
    for step in range(6):
        drawn = {
            key: draw(random, (40,), value.dtype, (1, 1))
            for key, value in zip(keys, values, strict=True)
        }
        each(pair, lambda kv, d=drawn: kv.push(keys, [d[key][kv.rank] for key in keys]))
        expected = [total(senders, key, drawn[key]) for key in keys[:2]]
        expected.append(drawn["n"][0][0] + drawn["n"][1][0])  # as they are
        for kv in pair:
            assert all(same(pulled(kv, key), e) for key, e in zip(keys, expected, strict=True))
        if step == 2:
            each(pair, lambda kv: kv.delete("a"))
            each(pair, lambda kv: kv.init("a", values[0]))
            for sender in senders:
                sender.residuals.pop("a")


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_is_not_finite_is_warned_of_once_a_key_on_its_worker(pair, bad):
    each(pair, lambda kv: kv.set_gradient_compression(TWO))
    each(pair, lambda kv: kv.init("w", np.zeros(3, np.float32)))
    values = [np.array([0.7, bad, 0], np.float32), np.array([0.7, 0.7, 0], np.float32)]
    for first in (True, False):
        for kv, value in zip(pair, values, strict=True):
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                kv.push("w", value)
            assert len(caught) == (first and kv is pair[0])
            assert all("'w'" in str(one.message) for one in caught)
        assert pulled(pair[1], "w").tolist() == [1, 0.5 if np.isnan(bad) else 1, 0]


def test_async_pushes_are_compressed_too():
    with Cluster(2, 2, "dist_async") as cluster:
        stores = cluster.all_stores()
        stores[0].set_optimizer(optimizer.SGD(lr=-1.0))
        each(stores, lambda kv: kv.set_gradient_compression(TWO))
        each(stores, lambda kv: kv.init("w", np.zeros(200_000)))
        for _ in range(5):
            each(stores, lambda kv: kv.push("w", np.full(200_000, 0.25)))  # 0, then 1/2, …
        each(stores, lambda kv: pulled(kv, "w"))
        assert all((pulled(kv, "w") == 2.0).all() for kv in stores)


@pytest.mark.parametrize(("params", "part"), [(TWO, 16), (ONE, 32)], ids=["2bit", "1bit"])
def test_fewer_bytes_go_over_the_wire(params, part):
    size = 1 << 20
    value = np.full(size, 0.7, np.float32)
    with Cluster(2, 2) as cluster:
        stores = cluster.all_stores()

        def sent(pushes):
            before = [member.core.counters()["bytes_sent"] for member in cluster.members]
            for _ in range(pushes):
                each(stores, lambda kv: kv.pushpull("w", value, out=np.empty_like(value)))
            after = [member.core.counters()["bytes_sent"] for member in cluster.members]
            return [b - a for a, b in zip(before, after, strict=True)]

        each(stores, lambda kv: kv.init("w", np.zeros(size, np.float32)))
        plain = sent(2)
        each(stores, lambda kv: kv.set_gradient_compression(params))
        coded = sent(2)
        for a, b in zip(plain, coded, strict=True):
            assert a >= 2 * value.nbytes
            assert 2 * value.nbytes / part <= b <= 2 * value.nbytes / part + 4000
