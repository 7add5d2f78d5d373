"""Optimizers, compression, updaters, states and row-sparse values for keys in device memory."""

import cuda_tensor as cuda
import numpy as np
import pytest
from test_optimizers import CASES, COMMON, ids, numbers_of
from twin import FLOATS, INTS, draw, same, store_of, twin, values

import kvstore
from kvstore import optimizer

KINDS = ["device", "local"]
BOTH = (0, 1)
SHAPES = {"small": (5, 7), "rows": (13, 9), "one": (), "none": (0, 3)}


def made(name, numbers):
    return optimizer.create(name, **numbers)


def shapes_of(name):
    return {k: shape for k, shape in SHAPES.items() if shape or name != "groupadagrad"}


def begin(both, random, dtype, shapes=SHAPES):
    for i, (key, shape) in enumerate(shapes.items()):
        both.init(f"{key} {dtype}", draw(random, shape, dtype), (i % 2,))


def steps(both, random, dtype, count=4, shapes=SHAPES):
    for step in range(count):
        for key, shape in shapes.items():
            drawn = [draw(random, shape, dtype) for _ in range(1 + step % 3)]
            both.push(f"{key} {dtype}", drawn if len(drawn) > 1 else drawn[0], (step % 2, 0))


@pytest.mark.parametrize("common", COMMON, ids=["plain", "all"])
@pytest.mark.parametrize("case", CASES, ids=ids)
def test_every_optimizer_steps_as_on_the_host(case, common):
    """16-bit weights with and without a copy in float32."""
    name, own = case
    random = np.random.default_rng(1)
    numbers = numbers_of(name, own, common)
    with twin("device") as both:
        for kv in (both.kv, both.host):
            kv.set_optimizer(made(name, {**numbers, "multi_precision": bool(common)}))
        for dtype in FLOATS:
            begin(both, random, dtype, shapes_of(name))
            steps(both, random, dtype, 4, shapes_of(name))
        both.check()


@pytest.mark.parametrize("name", ["sgd", "adam", "lamb", "lars"])
@pytest.mark.parametrize("kind", ["local", "dist_sync"])
def test_optimizers_of_other_kinds_take_cuda_tensors(kind, name):
    random = np.random.default_rng(2)
    shapes = {"small": (5, 7), "one": ()}
    with twin(kind) as both:
        for kv in (both.kv, both.host):
            kv.set_optimizer(made(name, {"learning_rate": 0.1}))
        for dtype in FLOATS[:2]:
            begin(both, random, dtype, shapes)
            steps(both, random, dtype, 3, shapes)
        both.check()


def test_sgld_draws_the_same_numbers():
    """To a few units in the last place: logarithm and cosine are rounded as the device does it."""
    random = np.random.default_rng(3)
    with twin("device") as both:
        for kv in (both.kv, both.host):
            kv.set_optimizer(optimizer.SGLD(learning_rate=0.01, wd=0.1))
        for dtype in FLOATS:
            begin(both, random, dtype)
            steps(both, random, dtype)
        for key in both.host.keys():  # noqa: SIM118
            wanted = both.host.pull(key).asnumpy()
            got = values(both.kv.pull(key))
            bound = {8: 1e-13, 4: 1e-5, 2: 5e-2}[wanted.dtype.itemsize]
            np.testing.assert_allclose(
                got.astype(np.float64), wanted.astype(np.float64), rtol=bound, atol=bound
            )


def test_pushpull_with_an_optimizer_and_numbers_that_change():
    random = np.random.default_rng(4)
    with twin("device") as both:
        rules = [optimizer.SGD(learning_rate=0.5, momentum=0.9) for _ in range(2)]
        for kv, rule in zip((both.kv, both.host), rules, strict=True):
            kv.set_optimizer(rule)
        both.init("w", draw(random, (6,)), (1,))
        for rate in (0.5, 0.25, 0.125):
            for kv in (both.kv, both.host):
                kv.set_optimizer_params(lr=rate)
            both.pushpull("w", [draw(random, (6,)) for _ in range(2)], BOTH, (1, 0))
        both.check()


def test_an_integer_key_with_an_optimizer_is_refused():
    with kvstore.create("device") as kv:
        kv.set_optimizer(optimizer.SGD())
        for dtype in INTS:
            value = cuda.TableTensor(np.arange(4).astype(dtype))
            kv.init(str(dtype), value)
            with pytest.raises(kvstore.ArrayTypeError, match=str(dtype)):
                kv.push(str(dtype), value)
            assert kv.pull(str(dtype)).asnumpy().tolist() == [0, 1, 2, 3]


# ----------------------------------------------------------------------------------- compression


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("params", [("2bit", 0.5), ("1bit", 0.0), ("2bit", 2.0)])
@pytest.mark.parametrize("places", [(0,), BOTH, ("numpy", 0)], ids=str)
def test_compressed_pushes_are_those_of_the_host(kind, params, places):
    random = np.random.default_rng(5)
    with twin(kind) as both:
        for kv in (both.kv, both.host):
            kv.set_gradient_compression({"type": params[0], "threshold": params[1]})
        for dtype in (*FLOATS, INTS[2]):
            begin(both, random, dtype, {"a": (37,), "b": (3, 4), "c": (0,)})
            steps(both, random, dtype, 5, {"a": (37,), "b": (3, 4), "c": (0,)})
            for _ in range(2):
                both.push(f"a {dtype}", [draw(random, (37,), dtype) for _ in range(3)], places)
        both.check()


def test_compression_with_an_optimizer_and_a_change_of_type():
    random = np.random.default_rng(6)
    with twin("device") as both:
        for kv in (both.kv, both.host):
            kv.set_optimizer(optimizer.Adam(learning_rate=0.1))
        both.init("w", draw(random, (50,)))
        for kind in ("2bit", "1bit", "none", "2bit"):
            for kv in (both.kv, both.host):
                kv.set_gradient_compression({"type": kind})
            for count in (1, 3, 2):
                both.push("w", [draw(random, (50,)) for _ in range(count)], BOTH)
        both.check()


# -------------------------------------------------------------------------------------- updaters


@pytest.mark.parametrize("kind", KINDS)
def test_an_updater_gets_tensors_of_the_library(kind):
    seen = []

    def add(key, recv, stored):
        seen.append((key, type(recv), type(stored)))
        if kind == "local":
            np.add(stored, 2 * recv, out=stored)
        else:
            stored.add_(recv, 2)
            recv.fill_(1000)

    random = np.random.default_rng(7)
    with twin(kind) as both:
        both.init("w", draw(random, (4, 2)))
        both.host.set_updater(lambda key, recv, stored: np.add(stored, 2 * recv, out=stored))
        both.kv.set_updater(add)
        for places in ((0,), BOTH, (0, "numpy")):
            for count in (1, 2, 3):
                both.push("w", [draw(random, (4, 2)) for _ in range(count)], places)
        both.check()
    assert len(seen) == 9
    library = cuda.Tensor if kind == "device" else np.ndarray
    assert all(key == "w" and all(issubclass(t, library) for t in types) for key, *types in seen)


def test_an_updater_is_in_order_with_other_streams():
    with kvstore.create("device") as kv:
        kv.init("w", cuda.TableTensor(np.zeros(9, np.float32), cuda.other_device))
        kv.set_updater(lambda key, recv, stored: stored.add_(recv))
        side = cuda.Stream()
        for number in range(5):
            with side:
                side.busy(10)
                value = cuda.TableTensor(np.full(9, number, np.float32))
                kv.push("w", value)
                value.fill_(1000)
            out = cuda.TableTensor(np.zeros(9, np.float32))
            kv.pull("w", out=out)
            assert (out.numpy() == sum(range(number + 1))).all()
            cuda.current_stream().wait(side)


def test_what_an_updater_raises_comes_out_and_the_next_push_works():
    def fail(key, recv, stored):
        raise ZeroDivisionError("mine")

    with kvstore.create("device") as kv:
        kv.init("w", cuda.TableTensor(np.zeros(3, np.float32)))
        kv.set_updater(fail)
        with pytest.raises(ZeroDivisionError, match="mine") as info:
            kv.push("w", cuda.TableTensor(np.ones(3, np.float32)))
        assert list(info.value.updated_keys) == []
        del info
        kv.set_updater(None)
        kv.push("w", cuda.TableTensor(np.ones(3, np.float32)))
        assert kv.pull("w").asnumpy().tolist() == [1, 1, 1]


# ---------------------------------------------------------------------------------------- states


@pytest.mark.parametrize("name", ["sgd", "adam", "lamb", "nadam", "lbsgd", "groupadagrad"])
@pytest.mark.parametrize("into", KINDS)
def test_states_are_saved_and_loaded(name, into, tmp_path):
    """Into a store of either kind: the next steps are the same bits."""
    random = np.random.default_rng(8)
    numbers = {"learning_rate": 0.1, "multi_precision": True}
    if name in ("sgd", "lbsgd"):
        numbers["momentum"] = 0.9
    with twin("device") as both:
        for kv in (both.kv, both.host):
            kv.set_optimizer(made(name, numbers))
        for dtype in FLOATS:
            begin(both, random, dtype, shapes_of(name))
            steps(both, random, dtype, 3, shapes_of(name))
        files = tmp_path / "device", tmp_path / "host"
        both.kv.save_optimizer_states(str(files[0]), dump_optimizer=True)
        both.host.save_optimizer_states(str(files[1]), dump_optimizer=True)
        assert files[0].read_bytes() == files[1].read_bytes()
        with twin(into) as again:
            for key in both.host.keys():  # noqa: SIM118
                again.init(key, both.host.pull(key).asnumpy(), (1,))
            for kv in (again.kv, again.host):
                kv.load_optimizer_states(str(files[0]))
            for kv in (both.kv, both.host):
                kv.load_optimizer_states(str(files[1]))
            for dtype in FLOATS:
                for key, shape in shapes_of(name).items():
                    value = draw(random, shape, dtype)
                    both.push(f"{key} {dtype}", value)
                    again.push(f"{key} {dtype}", value, (1,))
            both.check()
            again.check()
            for key in both.host.keys():  # noqa: SIM118
                assert same(both.host.pull(key).asnumpy(), again.host.pull(key).asnumpy())


def test_residuals_are_saved_with_the_states(tmp_path):
    random = np.random.default_rng(9)
    with twin("device") as both:
        for kv in (both.kv, both.host):
            kv.set_optimizer(optimizer.SGD(learning_rate=0.5))
            kv.set_gradient_compression({"type": "2bit", "threshold": 0.7})
        both.init("w", draw(random, (21,)))
        both.push("w", [draw(random, (21,)) for _ in range(2)], BOTH)
        for kv, name in ((both.kv, "device"), (both.host, "host")):
            kv.save_optimizer_states(str(tmp_path / name))
        assert (tmp_path / "device").read_bytes() == (tmp_path / "host").read_bytes()
        for kv in (both.kv, both.host):
            kv.load_optimizer_states(str(tmp_path / "device"))
        both.push("w", [draw(random, (21,)) for _ in range(2)], BOTH)
        both.check()


def test_a_key_that_is_deleted_begins_without_states():
    random = np.random.default_rng(10)
    with twin("device") as both:
        for kv in (both.kv, both.host):
            kv.set_optimizer(optimizer.Adam())
        for shape in ((4,), (2, 3), (4,)):
            both.init("w", draw(random, shape))
            both.push("w", draw(random, shape))
            both.push("w", [draw(random, shape) for _ in range(2)], BOTH)
            both.check()
            both.kv.delete("w")
            both.host.delete("w")


# ------------------------------------------------------------------------------------ row-sparse


def rows_of(random, shape, dtype):
    rows = np.sort(random.choice(shape[0], size=random.integers(0, shape[0]), replace=False))
    return kvstore.RowSparse(draw(random, (len(rows), *shape[1:]), dtype), rows, shape)


@pytest.mark.parametrize("name", [None, "sgd", "adam"])
def test_row_sparse_values_of_a_key_in_device_memory(name):
    random = np.random.default_rng(11)
    with twin("device") as both:
        if name is not None:
            for kv in (both.kv, both.host):
                kv.set_optimizer(made(name, {"learning_rate": 0.1}))
        for dtype in FLOATS[:2]:
            key = str(dtype)
            both.init(key, draw(random, (9, 4), dtype))
            for step in range(5):
                value = [rows_of(random, (9, 4), dtype) for _ in range(1 + step % 2)]
                for kv in (both.kv, both.host):
                    kv.push(key, value)
                both.check(key)
                both.push(key, draw(random, (9, 4), dtype), (step % 2,))
                ids = random.integers(0, 9, 5)
                for call in ("pull", "row_sparse_pull"):
                    outs = [kvstore.RowSparse.zeros((9, 4), key) for _ in range(2)]
                    for kv, out in zip((both.kv, both.host), outs, strict=True):
                        if call == "pull":
                            kv.pull(key, out=out, ignore_sparse=False)
                        else:
                            kv.row_sparse_pull(key, out=out, row_ids=ids)
                    assert same(outs[0].indices, outs[1].indices)
                    assert same(outs[0].data, outs[1].data)


def test_a_row_sparse_key_is_made_dense_in_device_memory():
    random = np.random.default_rng(12)
    with twin("device") as both:
        value = rows_of(random, (9, 4), "float32")
        for kv in (both.kv, both.host):
            kv.init("rows", value)
        out, wanted = cuda.TableTensor(np.ones((9, 4), np.float32)), value.todense()
        both.kv.pull("rows", out=out)
        assert same(out.numpy(), wanted)
        with pytest.raises(kvstore.ArrayTypeError, match="rows"):
            both.kv.push("rows", out)


@pytest.mark.parametrize("kind", ["device", "local", "dist_sync"])
def test_row_ids_may_be_on_a_device(kind):
    ids = cuda.TableTensor(np.array([3, 0, 3], np.int64))
    with store_of(kind) as kv:
        kv.init("rows", kvstore.RowSparse.from_dense(np.ones((5, 2), np.float32)))
        assert kv.row_sparse_pull("rows", row_ids=ids).indices.tolist() == [0, 3]
