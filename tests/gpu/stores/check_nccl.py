"""Stores of kind `nccl`: each device has the bits of every other, and those of a `local` store."""

import cuda_tensor as cuda
import numpy as np
import pytest
from nccl_twin import ALL, both_of, exact, groups, lists, nccl_twin
from twin import DTYPES, FLOATS, draw, same, values

import kvstore
from kvstore import optimizer

SHAPES = [(3, 4), (), (0,), (1,), (257,)]


# ------------------------------------------------------------------------------------------- sums


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_type_and_shape(dtype):
    random = np.random.default_rng(1)
    with nccl_twin() as both:
        for shape in SHAPES:
            key = str(shape)
            both.init(key, exact(random, shape, dtype))
            for places in (ALL, ALL[::-1]):
                with groups(1 if np.prod(shape) > 0 else 0):
                    both.push(key, lists(random, shape, dtype), places)
                both.agree(key)
                both.pushpull(key, lists(random, shape, dtype), places, ALL)
                both.agree(key)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_floats_are_rounded_once_by_two_devices_and_nearly_so_by_more(dtype):
    random = np.random.default_rng(2)
    bound = None
    if cuda.num_devices > 2:
        bound = {8: 1e-14, 4: 1e-5, 2: 5e-2}[dtype.itemsize]
    with nccl_twin() as both:
        both.init("w", draw(random, 300, dtype))
        for _ in range(4):
            both.push("w", lists(random, 300, dtype, make=draw), ALL)
            both.agree("w", bound=bound)


@pytest.mark.parametrize("face", cuda.FACES[1:])
def test_every_face(face):
    random = np.random.default_rng(3)
    with nccl_twin(face) as both:
        for dtype in ("float32", "float16", "int64"):
            both.init(dtype, exact(random, (5, 2), dtype))
            for _ in range(3):
                both.push(dtype, lists(random, (5, 2), dtype), ALL)
                both.agree(dtype)
            both.pushpull(dtype, lists(random, (5, 2), dtype), ALL, ALL)


def test_a_list_of_keys_is_one_group():
    random = np.random.default_rng(4)
    shapes = {"a": (4,), "b": (2, 3), "c": (), "d": (1000,)}
    dtypes = dict(zip(shapes, ("float32", "float16", "int8", "float64"), strict=True))
    with nccl_twin() as both:
        both.init([*shapes], [exact(random, s, dtypes[k]) for k, s in shapes.items()], ALL)
        for _ in range(3):
            with groups(1, keys=4):
                both.push([*shapes], [lists(random, s, dtypes[k]) for k, s in shapes.items()], ALL)
            both.agree()
        outs = [
            [both.tensor(exact(random, s, dtypes[k]), d) for d in ALL] for k, s in shapes.items()
        ]
        both.kv.pull([*shapes], out=outs)
        for key, of_key in zip(shapes, outs, strict=True):
            assert all(same(out.numpy(), both.host.pull(key).asnumpy()) for out in of_key)
        given = [lists(random, s, dtypes[k]) for k, s in shapes.items()]
        both.pushpull([*shapes], given, ALL, ALL)
        both.agree()


def test_large_arrays_and_many_keys():
    random = np.random.default_rng(5)
    with nccl_twin() as both:
        both.init("large", exact(random, 200_003), ALL)
        keys = [f"small {i}" for i in range(70)]
        both.init(keys, [exact(random, (1 + i % 5,)) for i in range(70)], ALL)
        for _ in range(2):
            both.push("large", lists(random, 200_003), ALL)
            with groups(1, keys=70):
                both.push(keys, [lists(random, (1 + i % 5,)) for i in range(70)], ALL)
        both.agree()


def test_a_key_that_stands_twice_in_a_list():
    random = np.random.default_rng(6)
    with nccl_twin() as both:
        both.init(["a", "b"], [exact(random, (4,)) for _ in range(2)], ALL)
        for _ in range(2):
            with groups(0):
                both.push(["a", "b", "a"], [lists(random, (4,)) for _ in range(3)], ALL)
            both.agree()
        both.push(["a", "b"], [lists(random, (4,)) for _ in range(2)], ALL)
        both.agree()


def test_in_place_and_broadcast_and_outs_elsewhere():
    random = np.random.default_rng(7)
    with nccl_twin() as both:
        first = exact(random, (6,))
        outs = [both.tensor(np.zeros(6, np.float32), d) for d in ALL]
        both.host.init("w", first)
        both.kv.broadcast("w", both.tensor(first), out=outs)
        assert all(same(out.numpy(), first) for out in outs)
        for _ in range(3):
            given = lists(random, (6,))
            tensors = [both.tensor(value, d) for d, value in enumerate(given)]
            both.host.push("w", given)
            both.kv.pushpull("w", tensors)
            assert all(same(t.numpy(), both.host.pull("w").asnumpy()) for t in tensors)
            host_out = np.zeros(6, np.float32)
            both.host.push("w", given)
            more = [both.tensor(host_out, ALL[-1]), both.tensor(host_out, ALL[-1])]
            tensors = [both.tensor(value, d) for d, value in enumerate(given)]
            both.kv.pushpull("w", tensors, out=[*more, host_out])
            wanted = both.host.pull("w").asnumpy()
            assert all(same(values(out), wanted) for out in (*more, host_out))
            both.agree()


def test_keys_are_deleted_and_begin_anew():
    random = np.random.default_rng(8)
    with nccl_twin() as both:
        for kv in both_of(both):
            kv.set_optimizer(optimizer.Adam(learning_rate=0.25))
        for shape, place in (((3,), 0), ((2, 2), ALL[-1]), ((0,), 0), ((5,), "numpy"), ((3,), 0)):
            both.init("w", exact(random, shape), (place,))
            for _ in range(2):
                both.push("w", lists(random, shape), ALL)
                both.agree("w")
            for kv in both_of(both):
                kv.delete("w")


# --------------------------------------------------------------------------- what goes another way


def other_ways(random, both):
    """Pushes that NCCL does not do, by name."""

    def same_to_both(call):
        for kv in both_of(both):
            call(kv)

    def updated():
        both.kv.set_updater(lambda key, recv, stored: stored.add_(recv))
        both.host.set_updater(lambda key, recv, stored: np.add(stored, recv, out=stored))
        both.push("w", lists(random, (6, 2)), ALL)
        same_to_both(lambda kv: kv.set_updater(None))

    def coded():
        same_to_both(lambda kv: kv.set_gradient_compression({"type": "2bit", "threshold": 0.5}))
        both.push("w", lists(random, (6, 2)), ALL)
        same_to_both(lambda kv: kv.set_gradient_compression({"type": "none"}))

    def rows():
        value = kvstore.RowSparse(exact(random, (2, 2)), [1, 4], (6, 2))
        same_to_both(lambda kv: kv.push("w", [value, value]))

    return {
        "one value": lambda: both.push("w", exact(random, (6, 2)), (ALL[-1],)),
        "one device twice": lambda: both.push("w", lists(random, (6, 2), count=2), (ALL[-1],)),
        "numpy": lambda: both.push("w", lists(random, (6, 2)), ("numpy",)),
        "numpy and cuda": lambda: both.push("w", lists(random, (6, 2), count=2), (0, "numpy")),
        "ndarray": lambda: both.push("w", exact(random, (6, 2)), ("ndarray",)),
        "updater": updated,
        "compression": coded,
        "rows": rows,
    }


WAYS = [*other_ways(None, None)]


@pytest.mark.parametrize("rule", [None, "sgd", "adam"])
@pytest.mark.parametrize("way", WAYS)
def test_what_is_not_for_nccl_goes_another_way_and_back(way, rule):
    if rule is not None and way == "updater":
        pytest.skip("an updater takes the place of an optimizer")
    random = np.random.default_rng(13)
    with nccl_twin() as both:
        if rule is not None:
            for kv in both_of(both):
                kv.set_optimizer(optimizer.create(rule, learning_rate=0.25))
        both.init("w", exact(random, (6, 2)))
        for _ in range(3):
            with groups(0):
                other_ways(random, both)[way]()
            both.agree()
            with groups(2):
                for _ in range(2):
                    both.push("w", lists(random, (6, 2)), ALL)
            both.agree()


def test_a_key_of_the_host_comes_to_the_devices_with_its_state():
    random = np.random.default_rng(14)
    with nccl_twin() as both:
        for kv in both_of(both):
            kv.set_optimizer(optimizer.Adam(learning_rate=0.25, multi_precision=True))
        for dtype in FLOATS:
            both.init(str(dtype), draw(random, (9,), dtype), ("numpy",))
            for places in (("numpy",), ALL, (ALL[-1],), ALL, ("ndarray",), ALL):
                both.push(str(dtype), lists(random, (9,), dtype), places)
                both.agree(str(dtype))


@pytest.mark.parametrize("rule", [None, "adam"])
def test_a_set_of_other_devices_goes_another_way(rule):
    if cuda.num_devices < 3:
        pytest.skip("needs three devices")
    random = np.random.default_rng(15)
    with nccl_twin() as both:
        if rule is not None:
            for kv in both_of(both):
                kv.set_optimizer(optimizer.create(rule, learning_rate=0.25))
        both.init(["a", "b"], [exact(random, (5,)) for _ in range(2)])
        for team in ((0, 2), (2, 0), (0, 2)):
            with groups(1):
                both.push("a", lists(random, (5,), count=2), team)
            both.agree()
        for others in ((0, 1), (1, 2), (0, 1, 2)):
            with groups(0):
                both.push("a", lists(random, (5,), count=len(others)), others)
                both.push(["a", "b"], [lists(random, (5,), count=len(others))] * 2, others)
            both.agree()
            with groups(1, keys=2):
                both.push(["a", "b"], [lists(random, (5,), count=2) for _ in range(2)], (2, 0))
            both.agree()
        mixed = [lists(random, (5,), count=2), lists(random, (5,), count=3)]
        with groups(0):
            both.push(["a", "b"], mixed, (0, 2, 1))
        both.agree()


def test_row_sparse_keys_and_pulls_of_rows():
    random = np.random.default_rng(16)
    with nccl_twin() as both:
        both.init("w", exact(random, (6, 2)))
        both.push("w", lists(random, (6, 2)), ALL)
        for kv in both_of(both):
            kv.init("rows", kvstore.RowSparse(np.ones((2, 2), np.float32), [0, 3], (6, 2)))
            kv.push("rows", [kvstore.RowSparse(np.ones((1, 2), np.float32), [1], (6, 2))] * 2)
        for key in ("w", "rows"):
            outs = [kvstore.RowSparse.zeros((6, 2), "float32") for _ in range(2)]
            for kv, out in zip(both_of(both), outs, strict=True):
                kv.row_sparse_pull(key, out=out, row_ids=np.array([4, 1]))
            assert same(outs[0].indices, outs[1].indices) and same(outs[0].data, outs[1].data)
        both.agree("w")
