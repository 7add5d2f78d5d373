"""Work on streams is put in order without the host, and tensors are let go when it is done."""

import gc
import itertools
import threading
import weakref

import cuda_tensor as cuda
import numpy as np
import pytest
from twin import store_of

import kvstore
from kvstore import optimizer

KINDS = ["device", "local"]
BUSY = 80  # pieces of work on a stream before what is looked at …
MOST_RUN = 40  # … of which asking events may run so many
N = 50


def full(number, device=0, face=cuda.TableTensor):
    tensor = face(np.full(N, number, np.float32), device)
    if face is cuda.ReadyTensor:
        cuda.current_stream(device).synchronize()
    return tensor


def is_full(array, number):
    got = array.numpy() if isinstance(array, cuda.Tensor) else np.asarray(array)
    return bool((got == number).all())


@pytest.fixture
def store():
    """A store of the kind `device`, with a key of zeros on device 0."""
    with kvstore.create("device") as kv:
        kv.init("w", full(0))
        yield kv


class Watch:
    """That work was put on streams and the host did not wait for it."""

    def __init__(self, busy=BUSY, most_run=MOST_RUN):
        self.busy, self.most_run = busy, most_run

    def __enter__(self):
        for device in range(cuda.num_devices):
            cuda.current_stream(device).busy(self.busy)
        self.before = cuda.emu.counter("queued")

    def __exit__(self, kind, *_):
        if kind is None:
            assert cuda.emu.counter("queued") > self.before - self.most_run, "the host has waited"


# ------------------------------------------------------------------------------- the host goes on


@pytest.mark.emulated
def test_the_host_does_not_wait_for_push_pull_and_pushpull(store):
    value, out, other = full(1), full(9), full(9, cuda.other_device)
    with Watch():
        store.push("w", value)
        store.pull("w", out=out)
        store.push("w", [value, full(2, cuda.other_device)])
        store.pull("w", out=[other])
    with Watch():
        store.pushpull("w", full(4), out=value)
    assert is_full(out, 1) and is_full(other, 3) and is_full(value, 4)


@pytest.mark.emulated
def test_the_host_does_not_wait_for_an_optimizer(store):
    store.set_optimizer(optimizer.Adam(learning_rate=0.5))
    value, out = full(1), full(9)
    with Watch():
        for _ in range(3):
            store.push("w", value)
        store.pull("w", out=out)
    assert (out.numpy() < -1).all()


@pytest.mark.emulated
def test_the_host_does_not_wait_for_compression(store):
    store.set_gradient_compression({"type": "2bit", "threshold": 0.5})
    value, out = full(1), full(9)
    with Watch():
        store.push("w", [value, full(1, cuda.other_device)])
        store.pull("w", out=out)
    assert is_full(out, 1)


@pytest.mark.emulated
def test_the_host_does_not_wait_for_the_stream_of_an_interface(store):
    value, out = full(1, 0, cuda.InterfaceTensor), full(9, 0, cuda.InterfaceTensor)
    with Watch():
        store.push("w", value)
        store.pull("w", out=out)
    assert is_full(out, 1)


# ----------------------------------------------------------------------------------- work before


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("face", cuda.FACES[:4])
def test_a_value_is_read_after_the_work_that_makes_it(kind, face):
    with store_of(kind) as kv:
        kv.init("w", full(0))
        for number in range(1, 9):
            value = full(0, number % 2 and cuda.other_device, face)
            cuda.current_stream(value.device).busy(10)
            value.fill_(number)
            kv.push("w", value if number % 3 else [value, full(100, 0, face)])
            out = full(0)
            kv.pull("w", out=out)
            assert is_full(out, number if number % 3 else number + 100)


@pytest.mark.parametrize("face", cuda.FACES[:4])
def test_an_out_is_written_after_the_work_on_it(store, face):
    for number in range(1, 6):
        out = full(5, 0, face)
        cuda.current_stream().busy(10)
        store.push("w", full(number))
        out.fill_(77)
        store.pull("w", out=out)
        assert is_full(out, number)


def test_streams_need_no_order_of_their_own(store):
    """Push on one stream, pull on another, of the same or another device; each tensor is used on
    its own only."""
    lanes = [cuda.Stream(d) for d in (0, 0, cuda.other_device, cuda.other_device)]
    for number, (a, b) in enumerate(itertools.permutations(lanes, 2)):
        with a:
            a.busy(5)
            store.push("w", full(number, a.device))
        with b:
            out = full(99, b.device)
            store.pull("w", out=out)
            assert is_full(out, number)


def test_values_of_one_push_come_from_several_streams(store):
    outs, sides = [], [cuda.Stream(0), cuda.Stream(0)]
    for number in range(5):
        values = []
        for side in sides:
            with side:
                side.busy(3)
                values.append(full(number))
        for side in sides:
            cuda.current_stream().wait(side)
        store.push("w", values)
        outs.append((full(99), 2 * number))
        store.pull("w", out=outs[-1][0])
    assert all(is_full(out, number) for out, number in outs)


# ------------------------------------------------------------------------------------ work after


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("face", cuda.FACES[:4])
def test_a_value_may_be_written_right_after_its_push(kind, face):
    with store_of(kind) as kv:
        kv.init("w", full(0))
        value, other = full(0, 0, face), full(0, cuda.other_device, face)
        for number in range(1, 9):
            value.fill_(number)
            other.fill_(10)
            kv.push("w", value if number % 2 else [value, other])
            value.fill_(1000)
            other.fill_(1000)
            assert is_full(kv.pull("w"), number if number % 2 else number + 10)


@pytest.mark.parametrize("face", [cuda.MethodTensor, cuda.LegacyTensor, cuda.ReadyTensor])
def test_where_the_stream_is_not_known_the_host_waits(store, face):
    """So that any stream may write into the value afterwards, and read the out."""
    side = cuda.Stream()
    for number in range(1, 7):
        value, out = full(number, 0, face), full(0, 0, face)
        store.push("w", value)
        store.pull("w", out=out)
        with side:
            value.fill_(1000)
            assert is_full(out, number)
        assert is_full(store.pull("w"), number)
        cuda.current_stream().wait(side)


def test_an_init_may_be_overwritten_too():
    with kvstore.create("device") as kv:
        for number in range(6):
            value = full(number, number % 2 and cuda.other_device)
            kv.init(number, value)
            value.fill_(1000)
        assert [is_full(kv.pull(number), number) for number in range(6)] == [True] * 6


def test_a_pull_is_not_overtaken_by_a_later_push(store):
    early, late = cuda.Stream(), cuda.Stream(cuda.other_device)
    store.push("w", full(1))
    with early:
        early.busy(30)
        out = full(0)
        store.pull("w", out=out)
    with late:
        store.push("w", full(2, cuda.other_device))
        assert is_full(store.pull("w"), 2)
    with early:
        assert is_full(out, 1)


def test_the_steps_of_a_training_loop(store):
    """Each step reads what the last has pulled; nothing in the loop waits."""
    store.set_optimizer(optimizer.SGD(learning_rate=1.0))
    store.init("steps", full(0, cuda.other_device))
    weight, gradient = full(0), full(0)
    for number in range(20):
        gradient.fill_(-1)
        store.push("w", gradient)
        store.pull("w", out=weight)
        store.push("steps", weight)
        gradient.fill_(number)
    assert is_full(weight, 20) and is_full(store.pull("steps"), -sum(range(1, 21)))


# -------------------------------------------------------------------------------------- lifetimes


@pytest.mark.emulated
@pytest.mark.parametrize("call", ["push", "push two", "pull", "pushpull"])
def test_a_tensor_is_held_until_its_use_is_over(store, call):
    tensor = full(3)
    with Watch():
        if call == "push":
            store.push("w", tensor)
        elif call == "push two":
            store.push("w", [tensor, full(4, cuda.other_device)])
        elif call == "pull":
            store.pull("w", out=tensor)
        else:
            store.pushpull("w", tensor)
    assert tensor.exports >= 1
    storage = weakref.ref(tensor.storage)
    del tensor
    assert storage() is not None
    cuda.emu.run_all()
    for number in range(3):
        store.push("w", full(number))
    assert storage() is None, "it is held though its use is over"


@pytest.mark.emulated
def test_calls_on_host_memory_let_tensors_go_too(store):
    tensor = full(3)
    store.push("w", tensor)
    cuda.emu.run_all()
    store.init("host", np.zeros(2))
    for _ in range(3):
        store.push("host", np.ones(2))
    assert tensor.exports == 0


def test_memory_that_is_let_go_at_once_is_not_anothers_too_early(store):
    for number in range(1, 10):
        cuda.current_stream().busy(4)
        store.push("w", [full(number), full(number, cuda.other_device)])
        rubbish = [full(1000, d) for d in range(cuda.num_devices) for _ in range(4)]
        assert is_full(store.pull("w"), 2 * number)
        del rubbish


def test_a_side_stream_may_be_freed_after_its_push(store):
    for number in range(1, 6):
        side, out = cuda.Stream(), full(0)
        with side:
            value = full(number)
            store.push("w", value)
        cuda.current_stream().wait(side)
        cuda.defaults[0].wait(side)
        side.free()
        store.pull("w", out=out)
        assert is_full(out, number)


def test_a_store_closes_and_keys_go_while_work_is_under_way():
    for number in range(4):
        kv, out, other = kvstore.create("device"), full(0), full(0, cuda.other_device)
        kv.init("w", full(number))
        kv.set_optimizer(optimizer.SGD(learning_rate=1.0, momentum=0.5))
        cuda.current_stream().busy(20)
        kv.push("w", full(-1))
        kv.pull("w", out=[out, other])
        if number % 2:
            kv.delete("w")
        kv.close()
        del kv
        gc.collect()
        rubbish = [full(1000, d) for d in range(cuda.num_devices) for _ in range(4)]
        assert is_full(out, number + 1) and is_full(other, number + 1)
        del rubbish


@pytest.mark.emulated
def test_a_push_that_is_repeated_makes_no_new_things(store):
    value, out = full(1), full(0)
    calls = ("cudaMallocFromPoolAsync", "cudaEventCreateWithFlags", "cudaStreamCreateWithFlags")
    calls += ("cudaHostAlloc", "cudaDeviceSynchronize", "cudaStreamSynchronize")
    for _ in range(3):
        store.push("w", value)
        store.pull("w", out=out)
        cuda.emu.run_all()
    before = [cuda.emu.counter(name) for name in calls]
    launches = cuda.emu.counter("launches") + cuda.emu.counter("copies")
    for _ in range(10):
        store.push("w", value)
        cuda.emu.run_all()
    assert [cuda.emu.counter(name) for name in calls] == before
    assert cuda.emu.counter("launches") + cuda.emu.counter("copies") <= launches + 10


# ------------------------------------------------------------------------- threads, async, devices


@pytest.mark.devices
def test_the_threads_current_device_stays(store):
    before = cuda.current_device()
    for device in range(cuda.num_devices):
        cuda.current_device(device)
        values = [full(1, d) for d in range(cuda.num_devices)]
        cuda.current_device(device)
        store.push("w", values)
        store.pull("w", out=values)
        store.pushpull("w", values[-1])
        assert cuda.current_device() == device
    cuda.current_device(before)


@pytest.mark.parametrize("kind", KINDS)
def test_async_op(kind):
    with store_of(kind) as kv:
        kv.init("w", full(0))
        for number in range(1, 5):
            value, out = full(number), full(0, cuda.other_device)
            handles = [
                kv.push("w", value, async_op=True),
                kv.pull("w", out=out, async_op=True),
            ]
            for handle in handles:
                assert handle.wait() is None and handle.done() and handle.exception() is None
            assert is_full(out, number)
            kv.pushpull("w", [value, full(1, cuda.other_device)], out=out, async_op=True).wait()
            assert is_full(out, number + 1)


@pytest.mark.parametrize("kind", KINDS)
def test_threads_with_streams_of_their_own(kind):
    """Each has a key of its own, and all add to one that they share."""
    failed, at_once = [], threading.Barrier(4)

    def work(kv, me):
        try:
            with cuda.Stream(me % cuda.num_devices) as stream:
                device = stream.device
                at_once.wait(60)
                for number in range(8):
                    value, out = full(number, device), full(99, device)
                    stream.busy(3)
                    kv.push(["sum", str(me)], [full(-1, device), value])
                    value.fill_(1000)
                    kv.pull(str(me), out=out)
                    assert is_full(out, -sum(range(number + 1)))
        except BaseException as error:
            failed.append(error)

    with store_of(kind) as kv:
        kv.set_optimizer(optimizer.SGD(learning_rate=1.0))
        kv.init(["sum", *"0123"], [full(0) for _ in range(5)])
        threads = [threading.Thread(target=work, args=(kv, i)) for i in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert failed == []
        assert is_full(kv.pull("sum"), 32)
