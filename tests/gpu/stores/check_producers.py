"""The tensors of PyTorch and CuPy, on streams of their own. Only a GPU has any."""

import contextlib
import importlib

import cuda_tensor as cuda
import numpy as np
import pytest

import kvstore

COUNT = 1 << 20


class Torch:
    def __init__(self, torch):
        self.torch = torch
        self.there = torch.cuda.is_available()

    def full(self, value):
        """Ready on all streams."""
        tensor = self.torch.full((COUNT,), float(value), device="cuda")
        self.torch.cuda.synchronize()
        return tensor

    def fill(self, tensor, value):
        tensor.fill_(value)

    def stream(self):
        return self.torch.cuda.stream(self.torch.cuda.Stream())

    def matrix(self):
        return self.torch.ones((4096, 4096), device="cuda")

    def event(self):
        event = self.torch.cuda.Event()
        event.record()
        return event.query

    def numpy(self, tensor):
        return tensor.cpu().numpy()


class CuPy:
    def __init__(self, cupy):
        self.cupy = cupy
        self.there = cupy.is_available()

    def full(self, value):
        tensor = self.cupy.full(COUNT, value, "float32")
        self.cupy.cuda.Device().synchronize()
        return tensor

    def fill(self, tensor, value):
        tensor.fill(value)

    def stream(self):
        return self.cupy.cuda.Stream(non_blocking=True)

    def matrix(self):
        return self.cupy.ones((4096, 4096), "float32")

    def event(self):
        event = self.cupy.cuda.Event()
        event.record()
        return lambda: event.done

    def numpy(self, tensor):
        return self.cupy.asnumpy(tensor)


@pytest.fixture(params=[("torch", Torch), ("cupy", CuPy)], ids=lambda param: param[0])
def library(request):
    name, face = request.param
    if cuda.emu is not None:
        pytest.skip("this is the emulation, and the library knows only real devices")
    try:
        found = face(importlib.import_module(name))
    except ImportError:
        pytest.skip(f"{name} is not installed")
    if not found.there:
        pytest.skip(f"{name} finds no GPU")
    return found


@pytest.fixture
def store(library):
    with kvstore.create("device") as kv:
        kv.init("w", library.full(0))
        yield kv


def keep_busy(library):
    """Work on the current stream that takes much longer than the calls behind it."""
    matrix = library.matrix()
    for _ in range(50):
        matrix = matrix @ matrix / 4096


@contextlib.contextmanager
def late(library):
    with library.stream():
        keep_busy(library)
        yield


def holds(library, tensor, value):
    np.testing.assert_array_equal(library.numpy(tensor), np.full(COUNT, value, "float32"))


def test_a_push_comes_after_what_its_stream_has_to_do_and_before_what_follows(library, store):
    gradient, out = library.full(1), library.full(-1)
    with late(library):
        library.fill(gradient, 3)
        store.push("w", gradient)
        library.fill(gradient, 0)
        store.pull("w", out)
        more = out + 1
        holds(library, more, 4)


def test_another_stream_sees_the_push(library, store):
    gradient, out = library.full(1), library.full(-1)
    with late(library):
        library.fill(gradient, 5)
        store.push("w", gradient)
    with library.stream():
        store.pull("w", out)
        holds(library, out, 5)


def test_the_host_does_not_wait(library, store):
    gradient = library.full(1)
    store.push("w", gradient)  # kernels are loaded
    with late(library):
        busy_is_over = library.event()
        store.push("w", gradient)
        assert not busy_is_over()


def test_a_training_loop_on_a_side_stream(library, store):
    store.set_optimizer(kvstore.optimizer.SGD(learning_rate=0.5))
    gradient, weight = library.full(0), library.full(0)
    with late(library):
        for step in range(20):
            library.fill(gradient, step)
            store.pushpull("w", gradient, weight)
        holds(library, weight, -0.5 * sum(range(20)))


def test_an_updater_gets_tensors_of_the_library(library, store):
    seen = []

    def update(key, recv, stored):
        seen.append(type(recv))
        stored += recv

    store.set_updater(update)
    gradient, out = library.full(1), library.full(-1)
    with late(library):
        library.fill(gradient, 2)
        store.push("w", gradient)
        store.pull("w", out)
        holds(library, out, 2)
    assert seen == [type(gradient)]
