"""Copies between host and devices overlap with messages: what has come goes on while the rest is
on its way. Not by the clock: the emulation leaves copies undone until a test has seen what it
wants."""

import contextlib
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import cuda_tensor as cuda
import numpy as np
import pytest
from check_bad import NEVER, REFUSED_BY_RUNTIME
from check_death import survives
from inside import Cluster, each
from twin import same, twin

import kvstore

WAIT_S = 30.0
SHORT_S = 1.5  # a deadline that is to be missed, and is long enough for the rest
MIB = 1 << 20  # a slice, here and on the wire
SHARED = [Path(__file__).parent, Path(__file__).parents[2] / "contract"]


def until(condition):
    deadline = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < deadline, "what must come does not come"
        time.sleep(0)


@contextlib.contextmanager
def copies_left(n):
    """So many copies run meanwhile."""
    cuda.emu.let_copies(n)
    try:
        yield
    finally:
        cuda.emu.let_copies(-1)


@contextlib.contextmanager
def beside():
    """`start(function, …)` runs it in a thread of its own, with this one's current streams."""
    streams = cuda.current_streams()

    def run(function, *arguments):
        cuda.current_streams().update(streams)
        return function(*arguments)

    with ThreadPoolExecutor(4) as pool:
        try:
            yield lambda function, *arguments: pool.submit(run, function, *arguments)
        finally:
            cuda.emu.let_copies(-1)


def ready(array, device=0):
    """A tensor that is there on all streams."""
    tensor = cuda.TableTensor(array, device)
    cuda.current_stream(device).synchronize()
    return tensor


def numbers(slices, salt=0):
    """A value of so many slices."""
    return (np.arange(slices * MIB // 4) % 1009 + salt).astype(np.float32)


def sent(cluster, rank=0):
    return cluster.members[rank].core.counters()["bytes_sent"]


def calls():
    """How many copies have been put on streams."""
    return cuda.emu.counter("cudaMemcpyAsync")


# ----------------------------------------------------------------------------------- going out


@pytest.mark.emulated
@pytest.mark.parametrize("kind", ["dist_sync", "dist_device_sync"])
def test_a_slice_is_sent_while_the_next_is_copied(seed, kind):
    array = numbers(4, seed)
    with Cluster(1, 2, kind=kind) as cluster, beside() as start:
        kv = cluster.store()
        kv.init("w", np.zeros_like(array))
        value, before = ready(array), sent(cluster)
        with copies_left(2):
            push = start(kv.push, "w", value)
            until(lambda: sent(cluster) >= before + 2 * MIB)
            assert not push.done() and sent(cluster) < before + 3 * MIB
        push.result(WAIT_S)
        assert same(kv.pull("w").asnumpy(), array)


@pytest.mark.emulated
def test_a_key_is_sent_while_the_next_is_copied(seed):
    arrays = [numbers(1, seed + i)[: 20000 + i] for i in range(3)]
    with Cluster(1, 2, kind="dist_sync") as cluster, beside() as start:
        kv = cluster.store()
        kv.init([0, 1, 2], [np.zeros_like(array) for array in arrays])
        values, before = [ready(array) for array in arrays], sent(cluster)
        with copies_left(1):
            push = start(kv.push, [0, 1, 2], values)
            until(lambda: sent(cluster) >= before + arrays[0].nbytes)
            assert not push.done() and sent(cluster) < before + 2 * arrays[0].nbytes
        push.result(WAIT_S)
        for key, array in enumerate(arrays):
            assert same(kv.pull(key).asnumpy(), array)


@pytest.mark.emulated
@pytest.mark.devices
def test_a_slice_of_a_sum_is_sent_while_the_next_is_copied(seed):
    arrays = [numbers(4, seed), numbers(4, 5)]
    with Cluster(1, 2, kind="dist_device_sync") as cluster, beside() as start:
        kv = cluster.store()
        kv.init("w", np.zeros_like(arrays[0]))
        values, before = [ready(a, device) for device, a in enumerate(arrays)], sent(cluster)
        with copies_left(2):  # one from device to device
            push = start(kv.push, "w", values)
            until(lambda: sent(cluster) >= before + MIB)
            assert not push.done() and sent(cluster) < before + 2 * MIB
        push.result(WAIT_S)
        assert same(kv.pull("w").asnumpy(), arrays[0] + arrays[1])


@pytest.mark.emulated
def test_a_key_is_merged_while_the_next_is_copied(seed):
    arrays = [numbers(1, seed), numbers(1, seed + 1)]
    with kvstore.create("local") as kv, beside() as start:
        kv.init([0, 1], [np.zeros_like(array) for array in arrays])
        values = [ready(array) for array in arrays]
        with copies_left(1):
            push = start(kv.push, [0, 1], values)
            until(lambda: same(kv.pull(0).asnumpy(), arrays[0]))
            assert not push.done()
        push.result(WAIT_S)
        assert same(kv.pull(1).asnumpy(), arrays[1])


# ------------------------------------------------------------------------------------ coming in


@pytest.mark.emulated
def test_a_key_goes_on_while_the_next_is_on_the_wire(seed):
    arrays = [numbers(1, seed)[:20000], numbers(1, seed + 1)[:30000]]
    with Cluster(2, 2, kind="dist_sync") as cluster, beside() as start:
        kvs = cluster.all_stores()
        each(kvs, lambda kv: kv.init([0, 1], [np.zeros_like(array) for array in arrays]))
        outs, before = [ready(np.zeros_like(array)) for array in arrays], calls()
        kvs[0].push([0, 1], arrays)
        kvs[1].push(0, arrays[0])
        pull = start(kvs[0].pull, [0, 1], outs)  # of key 1 there is no new value yet
        until(lambda: calls() > before)
        assert not pull.done() and calls() == before + 1
        kvs[1].push(1, arrays[1])
        pull.result(WAIT_S)
        for out, array in zip(outs, arrays, strict=True):
            assert same(out.numpy(), 2 * array)


@pytest.mark.emulated
def test_a_slice_goes_on_while_the_next_is_on_the_wire(seed):
    array = numbers(4, seed)
    with Cluster(2, 2, kind="dist_sync") as cluster, beside() as start:
        kvs = cluster.all_stores()
        each(kvs, lambda kv: kv.init("w", np.zeros_like(array)))
        value, out = ready(array), ready(np.zeros_like(array))
        with copies_left(1):
            before = calls()
            push = start(kvs[1].push, "w", value)  # of which one slice comes to its server
            until(lambda: calls() == before + 4)
            pushpull = start(kvs[0].pushpull, "w", array, out)
            until(lambda: calls() > before + 4)
            assert not push.done() and not pushpull.done() and calls() == before + 5
        push.result(WAIT_S)
        pushpull.result(WAIT_S)
        assert same(out.numpy(), 2 * array)


# --------------------------------------------------------------------------------- right numbers


@pytest.mark.parametrize("codec", ["none", "2bit"])
@pytest.mark.parametrize("kind", ["local", "dist_sync", "dist_device_sync"])
def test_the_numbers_are_those_of_the_host(seed, kind, codec):
    random = np.random.default_rng(seed)
    shapes = {
        "large": 3 * MIB // 4 + 5,
        "small": 100,
        "middle": 40000,
        "whole": MIB // 4,
        "none": 0,
    }

    def values(places):
        draw = [random.normal(size=(places, n)).astype(np.float32) for n in shapes.values()]
        return [list(value) for value in draw]

    with twin(kind) as both:
        both.init(list(shapes), [value[0] for value in values(1)])
        for kv in (both.kv, both.host):
            kv.set_gradient_compression({"type": codec, "threshold": 0.5})
        if codec == "none" or kind == "local":
            both.push(list(shapes), values(2), (0, cuda.other_device))
            both.push(list(shapes), values(3), (0, "numpy", 0))
        for _ in range(3):
            both.push(list(shapes), [value[0] for value in values(1)])
            both.check()
        both.pushpull(list(shapes), [value[0] for value in values(1)])
        both.push("large", random.normal(size=shapes["large"]).astype(np.float32))
        both.check("large")


@pytest.mark.parametrize("dtype", ["float16", "int64"])
def test_the_numbers_of_other_types_are_too(seed, dtype):
    with twin("dist_device_sync") as both:
        count = MIB // 2 + 3
        both.init("w", np.zeros(count, dtype))
        for i in range(3):
            array = (np.arange(count) % 7 + i).astype(dtype)
            both.push("w", [array, array], (0, cuda.other_device))
            both.check()


def test_a_pull_behind_another_leaves_its_answer_alone(seed):
    arrays = {name: numbers(2, salt) for salt, name in enumerate("abc")}
    with Cluster(1, 2, kind="dist_sync") as cluster:
        kv = cluster.store()
        kv.init(list(arrays), list(arrays.values()))
        outs = {name: ready(np.zeros_like(array)) for name, array in arrays.items()}
        for name, out in outs.items():
            kv.pull(name, out)
        for name, out in outs.items():
            assert same(out.numpy(), arrays[name]), name


# ------------------------------------------------------------------------------------------ ends


@pytest.mark.emulated
def test_a_push_that_has_not_begun_changes_nothing(seed):
    array = numbers(2, seed)
    with Cluster(1, 2, kind="dist_sync") as cluster:
        kv = cluster.store(timeout=SHORT_S)
        kv.init("w", np.zeros_like(array))
        value, before = ready(array), sent(cluster)
        with copies_left(0), pytest.raises(kvstore.TimeoutError, match="CUDA device 0"):
            kv.push("w", value)
        assert sent(cluster) == before
        kv.push("w", value)
        assert same(kv.pull("w").asnumpy(), array)


@pytest.mark.emulated
def test_a_push_that_has_begun_goes_out_whole(seed):
    array = numbers(4, seed)
    with Cluster(1, 2, kind="dist_sync") as cluster, beside() as start:
        kv = cluster.store(timeout=SHORT_S)
        kv.init("w", np.zeros_like(array))
        value, before = ready(array), sent(cluster)
        with copies_left(1):
            late = time.monotonic() + SHORT_S
            push = start(kv.push, "w", value)
            until(lambda: sent(cluster) >= before + MIB)
            until(lambda: time.monotonic() > late)  # its deadline is over
            assert not push.done()
        with contextlib.suppress(kvstore.TimeoutError):
            push.result(WAIT_S)
        assert same(kv.pull("w").asnumpy(), array)


def test_a_call_that_is_not_answered_whole_ends_in_time(seed):
    array = numbers(2, seed)
    with Cluster(2, 2, kind="dist_sync") as cluster:
        kvs = [cluster.store(0, timeout=SHORT_S), cluster.store(1)]
        each(kvs, lambda kv: kv.init([0, 1], [np.zeros_like(array)] * 2))
        outs = [ready(np.zeros_like(array)) for _ in range(2)]
        kvs[1].push(0, array)
        with pytest.raises(kvstore.TimeoutError):
            kvs[0].pushpull([0, 1], [array, array], outs)
        kvs[1].push(1, array)
        kvs[0].pull([0, 1], outs)
        assert all(same(out.numpy(), 2 * array) for out in outs)


# By how many calls the failure moves on each time.
CALLS = {"cudaEventRecord": 1, "cudaMemcpyAsync": 1, "cudaHostAlloc": 1, "cudaEventQuery": 3}


@pytest.mark.emulated
@pytest.mark.parametrize("name", CALLS)
def test_each_call_of_the_runtime_may_fail_once(seed, name):
    array, zeros = numbers(3, 1), numbers(3) * 0
    for n in range(1, 1000, CALLS[name]):
        with Cluster(1, 2, kind="dist_device_sync") as cluster:
            kv, told = cluster.store(), ""
            kv.init("w", zeros)
            value, out, before = ready(array), ready(zeros), cuda.emu.counter(name)
            cuda.emu.fail_call(name, n, REFUSED_BY_RUNTIME)
            try:
                kv.pushpull("w", value, out)
            except kvstore.DeviceError as error:
                told = str(error)
            made = cuda.emu.counter(name) - before
            cuda.emu.fail_call(name, NEVER, REFUSED_BY_RUNTIME)
            if "the store left them" in told:
                with pytest.raises(kvstore.PeerLostError):
                    kv.pull("w")
            else:
                got = kv.pull("w").asnumpy()
                assert same(got, array) or (told and same(got, zeros)), (n, told)
            assert told or same(out.numpy(), array), n
        if made < n:
            break
    else:
        raise AssertionError(f"{name} was called a thousand times")


@pytest.mark.emulated
@pytest.mark.devices
def test_a_device_that_dies_in_the_middle_ends_the_push_and_the_store(seed):
    body = f"""
sys.path[:0] = {[*map(str, SHARED)]!r}
import check_overlap as overlap
from inside import Cluster, each
array = overlap.numbers(4)
with Cluster(2, 2, kind="dist_device_sync") as cluster, overlap.beside() as start:
    kvs = cluster.all_stores(timeout=600)
    each(kvs, lambda kv: kv.init("w", np.zeros_like(array)))
    value, before = overlap.ready(array), overlap.sent(cluster)
    with overlap.copies_left(1):
        push = start(attempt, kvs[0].push, "w", value)
        overlap.until(lambda: overlap.sent(cluster) >= before + overlap.MIB)
        cuda.emu.kill_device(0)
        told = push.result(60)
    assert told.startswith("DeviceError: ") and "device 0" in told, told
    assert "so the store left them" in told, told
    told = attempt(kvs[0].push, "w", array)
    assert told.startswith("PeerLostError: ") and "device 0" in told, told
    kvs[0].close()
    told = attempt(kvs[1].pushpull, "w", array, array.copy()) # it does not wait for its deadline
    assert told and "worker 0" in told, told
print("survived")
"""
    survives(body, seed, epilogue="")
