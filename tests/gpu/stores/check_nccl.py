"""Stores of kind `nccl`: each device has the bits of every other, and those of a `local` store."""

import gc
import itertools
import threading

import cuda_tensor as cuda
import numpy as np
import pytest
from check_order import N, Watch, full, is_full
from nccl_twin import ALL, TYPES_16, emu, exact, groups, lists, nccl_twin
from test_optimizers import CASES, COMMON, ids, numbers_of
from twin import DTYPES, FLOATS, draw, same, values

import kvstore
from kvstore import optimizer

SHAPES = [(3, 4), (), (0,), (1,), (257,)]
MANY = cuda.num_devices > 1


def both_of(both):
    return both.kv, both.host


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


# -------------------------------------------------------------------------------------- optimizers


@pytest.mark.parametrize("common", COMMON, ids=["plain", "all"])
@pytest.mark.parametrize("case", CASES, ids=ids)
def test_every_optimizer_leaves_the_same_bits(case, common):
    """16-bit weights with and without a copy in float32."""
    name, own = case
    random = np.random.default_rng(9)
    numbers = {**numbers_of(name, own, common), "multi_precision": bool(common)}
    shapes = [(5, 7), (13, 9), *([()] if name != "groupadagrad" else [])]
    with nccl_twin() as both:
        for kv in both_of(both):
            kv.set_optimizer(optimizer.create(name, **numbers))
        for dtype in FLOATS:
            keys = [f"{shape} {dtype}" for shape in shapes]
            both.init(keys, [draw(random, shape, dtype) for shape in shapes], ALL)
            for _ in range(3):
                both.push(keys, [lists(random, shape, dtype) for shape in shapes], ALL)
                both.push(keys[0], lists(random, shapes[0], dtype), ALL)
        both.agree()


def test_sgld_draws_the_same_numbers_everywhere():
    random = np.random.default_rng(10)
    with nccl_twin() as both:
        for kv in both_of(both):
            kv.set_optimizer(optimizer.SGLD(learning_rate=0.01, wd=0.1))
        for dtype in FLOATS:
            key, bound = str(dtype), {8: 1e-13, 4: 1e-5, 2: 5e-2}[dtype.itemsize]
            both.init(key, draw(random, (9, 5), dtype))
            for _ in range(4):
                both.push(key, lists(random, (9, 5), dtype), ALL)
            both.agree(key, bound=bound)


def test_an_optimizer_is_set_and_changed_in_the_middle():
    random = np.random.default_rng(11)
    rules = (
        lambda: optimizer.SGD(learning_rate=0.5, momentum=0.5),
        lambda: optimizer.Adam(learning_rate=0.1, multi_precision=True),
        lambda: optimizer.SGD(learning_rate=0.5, multi_precision=True),
        lambda: optimizer.LAMB(learning_rate=0.1),
        lambda: optimizer.Adam(learning_rate=0.1),
    )
    with nccl_twin() as both:
        for dtype in FLOATS:
            both.init(str(dtype), draw(random, (17,), dtype))
            both.push(str(dtype), lists(random, (17,), dtype), ALL)
        for rule in rules:
            for kv in both_of(both):
                kv.set_optimizer(rule())
            for dtype in FLOATS:
                for _ in range(2):
                    both.pushpull(str(dtype), lists(random, (17,), dtype), ALL, ALL)
            for kv in both_of(both):
                kv.set_optimizer_params(lr=0.05)
            for dtype in FLOATS:
                both.push(str(dtype), lists(random, (17,), dtype), ALL)
            both.agree()


@pytest.mark.parametrize("name", ["sgd", "adam", "lamb", "nadam", "lbsgd", "groupadagrad"])
def test_states_are_saved_and_loaded_on_all_devices(name, tmp_path):
    random = np.random.default_rng(12)
    numbers = {"learning_rate": 0.1, "multi_precision": True}
    if name in ("sgd", "lbsgd"):
        numbers["momentum"] = 0.9
    early, late = tmp_path / "early", tmp_path / "late"
    with nccl_twin() as both:
        for kv in both_of(both):
            kv.set_optimizer(optimizer.create(name, **numbers))
        for dtype in FLOATS:
            both.init(str(dtype), draw(random, (5, 7), dtype))

        def steps(count):
            for dtype, _ in itertools.product(FLOATS, range(count)):
                both.push(str(dtype), lists(random, (5, 7), dtype), ALL)

        steps(2)
        both.kv.save_optimizer_states(str(early), dump_optimizer=True)
        both.host.save_optimizer_states(str(late), dump_optimizer=True)
        assert early.read_bytes() == late.read_bytes()
        steps(2)
        for kv in both_of(both):
            kv.load_optimizer_states(str(early))
        steps(2)
        both.agree()
        both.kv.save_optimizer_states(str(early), dump_optimizer=True)
        both.host.save_optimizer_states(str(late), dump_optimizer=True)
        assert early.read_bytes() == late.read_bytes()


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


# ------------------------------------------------------------------------------------------- order


def zeros():
    kv = kvstore.create("nccl")
    kv.init(["w", "v"], [full(0), full(0)])
    return kv


@pytest.mark.emulated
@pytest.mark.parametrize("rule", [None, "sgd", "adam"])
def test_the_host_does_not_wait(rule):
    with zeros() as kv:
        if rule is not None:
            kv.set_optimizer(optimizer.create(rule, learning_rate=1.0))
        given, outs = [full(1, d) for d in ALL], [full(9, d) for d in ALL]
        kv.push(["w", "v"], [given, given])  # connects the devices
        with Watch(400, 300):
            kv.push("w", given)
        with Watch(400, 300):
            kv.pull("w", out=outs)
        with Watch(400, 300):
            kv.pushpull(["w", "v"], [given, given], out=[outs, [full(9, d) for d in ALL]])
        wanted = outs[0].numpy()
        assert all(same(out.numpy(), wanted) for out in outs)


@pytest.mark.parametrize("face", cuda.FACES[:4])
def test_values_are_read_after_the_work_that_makes_them_and_before_what_spoils_them(face):
    with zeros() as kv:
        given = [full(0, d, face) for d in ALL]
        for number in range(1, 7):
            for value in given:
                cuda.current_stream(value.device).busy(3 * value.device + number % 4)
                value.fill_(number)
            kv.push("w", given)
            for value in given:
                value.fill_(1000)
            outs = [full(5, d, face) for d in ALL]
            for out in outs:
                cuda.current_stream(out.device).busy(3)
                out.fill_(77)
            kv.pull("w", out=outs)
            assert all(is_full(out, number * len(ALL)) for out in outs)


def test_streams_need_no_order_of_their_own():
    """Values of a push, and of the keys of a push, on several streams; pulls on others."""
    lanes = [[cuda.Stream(d) for _ in range(2)] for d in ALL]
    with zeros() as kv:
        for number in range(6):
            values_of = {"w": [], "v": []}
            for d, (key, turn) in itertools.product(ALL, (("w", 0), ("v", 1))):
                with lanes[d][(turn + number) % 2] as stream:
                    stream.busy(3)
                    values_of[key].append(full(number, d))
            for d in ALL:  # the current streams are those that the tensors are used on
                for stream in lanes[d]:
                    cuda.current_stream(d).wait(stream)
            kv.push([*values_of], [*values_of.values()])
            for key, d in itertools.product(values_of, ALL):
                with lanes[d][number % 2]:
                    out = full(99, d)
                    kv.pull(key, out=out)
                    assert is_full(out, number * len(ALL))


def test_the_steps_of_a_training_loop():
    """Each step reads what the last has pulled; nothing in the loop waits."""
    with zeros() as kv:
        kv.set_optimizer(optimizer.SGD(learning_rate=1.0))
        weights, gradients = [full(0, d) for d in ALL], [full(0, d) for d in ALL]
        for number in range(15):
            for gradient in gradients:
                gradient.fill_(-1)
            kv.push("w", gradients)
            kv.pull("w", out=weights)
            kv.push("v", weights)
            for gradient in gradients:
                gradient.fill_(number)
        assert all(is_full(weight, 15 * len(ALL)) for weight in weights)
        assert is_full(kv.pull("v"), -(len(ALL) ** 2) * sum(range(1, 16)))


def test_random_programs_end_as_on_the_host(seed):
    random = np.random.default_rng([17, seed])
    lanes = [[cuda.Stream(d) for _ in range(2)] for d in ALL]
    keys, outs = ["a", "b", "c"], []
    with nccl_twin() as both:
        for key, place in zip(keys, (0, ALL[-1], "numpy"), strict=True):
            both.init(key, exact(random, N), (place,))
        for kv in both_of(both):
            kv.set_optimizer(optimizer.SGD(learning_rate=0.5))
        for _ in range(40):
            stack = [lanes[d][random.integers(2)] for d in ALL]
            for stream in stack:
                stream.__enter__()
            some = [key for key in keys if random.integers(2)] or ["a"]
            kind = random.integers(6)
            if kind < 3:
                both.push(some, [lists(random, N) for _ in some], ALL)
            elif kind == 3:
                both.push(some[0], exact(random, N), ("numpy",) if random.integers(2) else (0,))
            else:
                found = [[both.tensor(np.zeros(N, np.float32), d) for d in ALL] for _ in some]
                if kind == 4:
                    both.kv.pull(some, out=found)
                else:
                    drawn = [lists(random, N) for _ in some]
                    both.host.push(some, drawn)
                    both.kv.pushpull(some, both.give(drawn, ALL), out=found)
                    both.spoil()
                for key, of_key in zip(some, found, strict=True):
                    wanted = both.host.pull(key).asnumpy()
                    outs += [(lane, out, wanted) for lane, out in zip(stack, of_key, strict=True)]
            for stream in reversed(stack):
                stream.__exit__()
        for lane, out, wanted in outs:
            with lane:
                assert same(out.numpy(), wanted)
        both.agree()


# -------------------------------------------------------------------------- threads, ends, devices


@pytest.mark.parametrize("stores", [1, 2])
def test_threads_push_different_keys_at_once(stores):
    """To one store, or to two that share their devices."""
    failed, at_once = [], threading.Barrier(4)

    def work(kv, me):
        streams = [cuda.Stream(d) for d in ALL]
        try:
            for stream in streams:
                stream.__enter__()
            at_once.wait(60)
            for number in range(6):
                given, outs = [full(number, d) for d in ALL], [full(99, d) for d in ALL]
                for stream in streams:
                    stream.busy(2)
                kv.push([str(me), "sum"], [given, [full(-1, d) for d in ALL]])
                for value in given:
                    value.fill_(1000)
                kv.pull(str(me), out=outs)
                assert all(is_full(out, -len(ALL) * sum(range(number + 1))) for out in outs)
        except BaseException as error:
            failed.append(error)
        finally:
            for stream in reversed(streams):
                stream.__exit__()

    made = [kvstore.create("nccl") for _ in range(stores)]
    for kv in made:
        kv.set_optimizer(optimizer.SGD(learning_rate=1.0))
        kv.init(["sum", *"0123"], [full(0) for _ in range(5)])
    threads = [threading.Thread(target=work, args=(made[i % stores], i)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failed == []
    for kv in made:
        assert is_full(kv.pull("sum"), 24 / stores * len(ALL))
        kv.close()


@pytest.mark.devices
def test_the_threads_current_device_stays():
    before = cuda.current_device()
    with zeros() as kv:
        for device in ALL:
            cuda.current_device(device)
            given = [full(1, d) for d in ALL]
            cuda.current_device(device)
            kv.push("w", given)
            kv.pull("w", out=given)
            kv.pushpull(["w", "v"], [given, [full(1, d) for d in ALL]])
            assert cuda.current_device() == device
    cuda.current_device(before)


def test_async_op():
    with zeros() as kv:
        for number in range(1, 5):
            outs = [full(0, d) for d in ALL]
            handles = [
                kv.push("w", [full(number, d) for d in ALL], async_op=True),
                kv.pull("w", out=outs, async_op=True),
            ]
            for handle in handles:
                assert handle.wait() is None and handle.exception() is None
            assert all(is_full(out, number * len(ALL)) for out in outs)


@pytest.mark.emulated
def test_what_is_closed_leaves_nothing():
    """While work is under way, too; not even communicators, with the object still there."""
    before = emu.counter("live")
    for number in range(3):
        kv, outs = zeros(), [full(0, d) for d in ALL]
        kv.set_optimizer(optimizer.SGD(learning_rate=1.0, momentum=0.5))
        for d in ALL:
            cuda.current_stream(d).busy(20)
        kv.push(["w", "v"], [[full(-1, d) for d in ALL] for _ in "wv"])
        assert emu.counter("live") == before + (len(ALL) if MANY else 0)
        kv.pull("w", out=outs)
        if number == 1:
            kv.delete("w")
        kv.close()
        assert emu.counter("live") == before
        rubbish = [full(1000, d) for d in ALL for _ in range(4)]
        assert all(is_full(out, len(ALL)) for out in outs)
        del rubbish
        with pytest.raises(kvstore.ClosedError):
            kv.push("w", outs)
    gc.collect()


@pytest.mark.emulated
@pytest.mark.devices
def test_a_push_that_is_repeated_makes_no_new_things():
    with zeros() as kv:
        given, outs = [full(1, d) for d in ALL], [full(0, d) for d in ALL]
        calls = ("cudaEventCreateWithFlags", "cudaStreamCreateWithFlags", "cudaHostAlloc")
        calls += ("cudaDeviceSynchronize", "cudaStreamSynchronize")
        for _ in range(4):
            kv.pushpull("w", given, out=outs)
            cuda.emu.run_all()
        before, live = [cuda.emu.counter(n) for n in calls], cuda.emu.counter("live_allocations")
        for _ in range(8):
            kv.pushpull("w", given, out=outs)
            cuda.emu.run_all()
        assert [cuda.emu.counter(n) for n in calls] == before
        assert cuda.emu.counter("live_allocations") <= live
        assert emu.counter("inits") >= len(ALL)


@pytest.mark.parametrize("dtype", TYPES_16, ids=str)
def test_masters_stay_the_same_on_all_devices(dtype):
    """Many small steps, which 16 bits alone would lose."""
    random = np.random.default_rng(18)
    with nccl_twin() as both:
        for kv in both_of(both):
            kv.set_optimizer(optimizer.SGD(learning_rate=1e-3, momentum=0.9, multi_precision=True))
        both.init("w", draw(random, (40,), dtype))
        for step in range(20):
            both.push("w", lists(random, (40,), dtype), (0,) if step == 10 else ALL)
        both.agree()
