"""The order of work in stores of kind `nccl`, their threads, and what is left of them."""

import gc
import itertools
import threading
import weakref

import cuda_tensor as cuda
import numpy as np
import pytest
from check_order import N, Watch, full, is_full
from nccl_twin import ALL, both_of, emu, exact, lists, nccl_twin
from twin import same

import kvstore
from kvstore import optimizer

MANY = cuda.num_devices > 1


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


def test_the_values_of_a_push_are_on_several_streams():
    """Those of each key on another one, and their owners go on there; pulls on others."""
    lanes = [[cuda.Stream(d) for _ in range(3)] for d in ALL]
    with zeros() as kv:
        for number in range(8):
            given = {"w": [], "v": []}
            for d, (turn, key) in itertools.product(ALL, enumerate(given)):
                with lanes[d][turn] as stream:
                    stream.busy(5 * turn)
                    given[key].append(full(number, d, cuda.InterfaceTensor))
                    given[key][-1].order = lambda handle=stream.handle: {"stream": handle}
            kv.push([*given], [*given.values()])
            for d, (turn, key) in itertools.product(ALL, enumerate(given)):
                with lanes[d][turn]:
                    given[key][d].fill_(1000)
            for d, key in itertools.product(ALL, given):
                with lanes[d][number % 3]:
                    out = full(99, d)
                    kv.pull(key, out=out)
                    assert is_full(out, number * len(ALL))


@pytest.mark.emulated
def test_tensors_are_held_until_their_use_is_over():
    with zeros() as kv:
        kv.push("w", [full(1, d) for d in ALL])
        cuda.emu.run_all()
        given = [full(2, d) for d in ALL]
        for d in ALL:
            cuda.current_stream(d).busy(400)
        kv.push("w", given)
        storages = [weakref.ref(tensor.storage) for tensor in given]
        del given
        assert all(storage() is not None for storage in storages)
        cuda.emu.run_all()
        for number in range(6):
            kv.push("w", [full(number, d) for d in ALL])
            cuda.emu.run_all()
        assert all(storage() is None for storage in storages)


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
