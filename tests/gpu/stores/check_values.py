"""Values in CUDA memory have the results, bit for bit, of the same values on the host."""

import cuda_tensor as cuda
import numpy as np
import pytest
from twin import DTYPES, draw, same, store_of, twin

import kvstore

KINDS = ["device", "local", "dist_sync", "dist_device_sync"]
SHAPES = [(3, 4), (), (0,), (1,), (257,)]
BOTH = (0, 1)


def every(random, dtypes=DTYPES):
    """A key for each type and shape."""
    return {f"{dtype} {shape}": draw(random, shape, dtype) for dtype in dtypes for shape in SHAPES}


@pytest.mark.parametrize("kind", KINDS)
def test_every_type_and_shape(kind):
    random = np.random.default_rng(1)
    with twin(kind) as both:
        for key, value in every(random).items():
            again = [draw(random, value.shape, value.dtype) for _ in range(6)]
            both.init(key, value)
            both.check(key)
            both.push(key, again[0])
            both.check(key)
            both.push(key, again[1:4], BOTH)
            both.check(key)
            both.pushpull(key, again[4:], BOTH, (1, 0))
            both.check(key)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("face", cuda.FACES[1:])
def test_every_face(kind, face):
    random = np.random.default_rng(2)
    types = [t for t in DTYPES if t.name != "bfloat16" or issubclass(face, cuda.MethodTensor)]
    with twin(kind, face) as both:
        for dtype in types:
            key = str(dtype)
            both.init(key, draw(random, (5, 2), dtype))
            both.push(key, draw(random, (5, 2), dtype))
            both.push(key, [draw(random, (5, 2), dtype) for _ in range(3)], BOTH)
            both.check(key)
            both.pushpull(key, draw(random, (5, 2), dtype))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("places", [(0, "numpy"), ("ndarray", 1, 0), ("numpy", "ndarray"), (1,)])
def test_values_of_host_and_devices_together(kind, places):
    random = np.random.default_rng(3)
    with twin(kind) as both:
        for first in {*places, 0}:
            key = f"first {first}"
            both.init(key, draw(random, (7, 3)), (first,))
            for count in (1, 2, 5):
                both.push(key, [draw(random, (7, 3)) for _ in range(count)], places)
                both.check(key)
            both.pushpull(key, [draw(random, (7, 3)) for _ in range(3)], places, places)
            both.check(key)


@pytest.mark.parametrize("kind", KINDS)
def test_lists_of_keys_with_the_same_key_twice(kind):
    random = np.random.default_rng(4)
    keys = ["a", "b", "a", "c", "b"]
    shapes = {"a": (4,), "b": (2, 3), "c": ()}

    def values(each=1):
        drawn = [[draw(random, shapes[key]) for _ in range(each)] for key in keys]
        return [value[0] for value in drawn] if each == 1 else drawn

    with twin(kind) as both:
        both.init(list("abc"), [draw(random, shapes[key]) for key in "abc"], (1, 0))
        both.check()
        both.push(keys, values(), (0, "numpy", 1))
        both.check()
        both.push(keys, values(3), BOTH)
        both.check()
        both.pushpull(keys[1:4], values()[1:4], BOTH, ("numpy", 0))
        both.check()


@pytest.mark.parametrize("kind", KINDS)
def test_broadcast_and_lists_of_outs(kind):
    random = np.random.default_rng(5)
    first, second = draw(random, (6,)), draw(random, (2, 2), "int64")
    with store_of(kind) as kv:
        outs = [cuda.TableTensor(np.zeros(6, np.float32), d) for d in range(cuda.num_devices)]
        both = [np.zeros((2, 2), np.int64), cuda.TableTensor(np.zeros((2, 2), np.int64))]
        kv.broadcast(["x", "y"], [cuda.TableTensor(first), second], out=[outs, both])
        assert all(same(out.numpy(), first) for out in outs)
        assert same(both[0], second) and same(both[1].numpy(), second)


@pytest.mark.parametrize("kind", KINDS)
def test_large_arrays_and_many_small_ones(kind):
    random = np.random.default_rng(6)
    with twin(kind) as both:
        both.init("large", draw(random, 200_003), (1,))
        for places in (BOTH, (0,), ("numpy", 1)):
            both.push("large", [draw(random, 200_003) for _ in range(3)], places)
            both.check("large")
        keys = list(range(80))
        with twin(kind) as small:
            small.init(keys, [draw(random, (1 + key % 5,)) for key in keys], BOTH)
            small.push(keys, [draw(random, (1 + key % 5,)) for key in keys], BOTH)
            small.check()


@pytest.mark.parametrize("kind", ["device", "local"])
def test_more_values_and_outs_than_one_launch_takes(kind):
    random = np.random.default_rng(7)
    with twin(kind) as both:
        for key, dtype in enumerate(("float32", "float16", "int8")):
            both.init(key, draw(random, 33, dtype))
            both.push(key, [draw(random, 33, dtype) for _ in range(100)], BOTH)
            both.check(key)
            outs = [cuda.TableTensor(np.zeros(33, dtype), i % cuda.num_devices) for i in range(140)]
            both.kv.pull(key, out=outs)
            wanted = both.host.pull(key).asnumpy()
            assert all(same(out.numpy(), wanted) for out in outs)


@pytest.mark.parametrize("kind", KINDS)
def test_an_array_that_begins_inside_its_memory(kind):
    random = np.random.default_rng(8)
    with twin(kind) as both:
        for dtype in DTYPES:
            key, value = str(dtype), draw(random, (9,), dtype)
            both.init(key, np.zeros_like(value))
            both.host.push(key, value)
            both.kv.push(key, cuda.TableTensor(value, layout="offset"))
            both.check(key)
            out = cuda.TableTensor(np.zeros_like(value), layout="offset")
            both.kv.pull(key, out=out)
            assert same(out.numpy(), value)


@pytest.mark.parametrize("kind", KINDS)
def test_one_tensor_given_twice_counts_twice(kind):
    with twin(kind) as both:
        both.init("w", np.zeros(5, np.float32))
        value = np.arange(5, dtype=np.float32)
        tensor = cuda.TableTensor(value)
        both.host.push("w", [value, value, value])
        both.kv.push("w", [tensor, tensor, tensor])
        both.check("w")
        assert same(tensor.numpy(), value)


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_pushed_is_not_changed_nor_kept(kind):
    value = np.arange(6, dtype=np.float32)
    with store_of(kind) as kv:
        first, pushed = cuda.TableTensor(value), cuda.TableTensor(value + 1)
        kv.init("w", first)
        kv.push("w", pushed)
        kv.push("w", [pushed, cuda.TableTensor(value, cuda.other_device)])
        assert same(first.numpy(), value) and same(pushed.numpy(), value + 1)
        pushed.fill_(1000)
        assert same(kv.pull("w").asnumpy(), 2 * value + 1)


@pytest.mark.parametrize("kind", KINDS)
def test_keys_are_deleted_and_begin_anew(kind):
    random = np.random.default_rng(9)
    with twin(kind) as both:
        for shape, place in (((3,), 0), ((2, 2), 1), ((0,), 0), ((5,), "numpy")):
            both.init("w", draw(random, shape), (place,))
            both.push("w", [draw(random, shape) for _ in range(2)], BOTH)
            both.check("w")
            for kv in (both.kv, both.host):
                kv.delete("w")
                assert "w" not in kv


@pytest.mark.parametrize("kind", KINDS)
def test_the_store_tells_of_a_key_on_a_device(kind):
    with store_of(kind) as kv:
        kv.init("w", cuda.TableTensor(np.zeros((2, 3), np.float16)))
        assert (kv.shape("w"), str(kv.dtype("w")), kv.stype("w")) == ((2, 3), "float16", "default")
        with pytest.raises(kvstore.InvalidArgumentError, match="w"):
            kv.init("w", cuda.TableTensor(np.zeros((2, 3), np.float16)))


@pytest.mark.parametrize("kind", KINDS)
def test_strided_arrays_of_the_host_with_a_key_on_a_device(kind):
    wide = np.arange(18, dtype=np.float32)
    with store_of(kind) as kv:
        kv.init("w", cuda.TableTensor(np.zeros(9, np.float32)))
        kv.push("w", [cuda.TableTensor(np.ones(9, np.float32)), wide[::2]])
        out = np.zeros(18, np.float32)
        kv.pull("w", out=out[1::2])
        assert same(out[1::2].copy(), wide[::2] + 1) and not out[::2].any()
