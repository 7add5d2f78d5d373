"""Python updaters on values in CUDA memory: what they are given, in which order, for how long."""

import gc
import sys
import types

import cuda_tensor as cuda
import numpy as np
import pytest

import kvstore

BOTH = range(cuda.num_devices)


def numbers(shape=(3, 4)):
    return np.arange(np.prod(shape, dtype=int), dtype=np.float32).reshape(shape)


def zeros(face=cuda.TableTensor, device=0):
    return face(np.zeros((3, 4), np.float32), device)


@pytest.fixture
def store():
    with kvstore.create("device") as kv:
        yield kv


@pytest.mark.parametrize("face", [face for face in cuda.FACES if face is not cuda.ReadyTensor])
@pytest.mark.parametrize("home", BOTH)
def test_every_face_has_its_library_and_its_order(store, face, home):
    def add(key, recv, stored):
        places.append((key, recv.device, stored.device))
        cuda.current_stream(home).busy(10)
        stored.add_(recv)

    places = []
    store.init("w", zeros(face, home))
    store.set_updater(add)
    for number in range(4):
        with cuda.Stream(number % cuda.num_devices) as side:
            side.busy(10)
            store.push("w", face(numbers() + number, side.device))
        out = face(np.ones((3, 4), np.float32), home)
        store.pull("w", out=out)
        assert (out.numpy() == (number + 1) * numbers() + sum(range(number + 1))).all()
    assert places == [("w", home, home)] * 4


def test_several_values_are_summed_for_it(store):
    store.init("w", zeros())
    store.set_updater(lambda key, recv, stored: stored.add_(recv, 2))
    for count in (1, 2, 5):
        store.push("w", [cuda.TableTensor(numbers(), i % cuda.num_devices) for i in range(count)])
    assert (store.pull("w").asnumpy() == 16 * numbers()).all()


def test_arrays_that_are_kept_stay_memory(store):
    def keep(key, recv, stored):
        kept.extend([recv, stored])
        stored.add_(recv)

    kept, into = [], []
    store.init("w", zeros())
    store.set_updater(keep)
    for _ in range(3):
        store.push("w", cuda.TableTensor(numbers()))
    assert (store.pull("w").asnumpy() == 3 * numbers()).all()
    store.set_updater(None)
    store.delete("w")
    for tensor in kept:
        tensor.fill_(7)
        cuda.current_stream().busy(10)
        assert (tensor.numpy() == 7).all()
        into.append(zeros())
    stream = cuda.current_stream()
    for tensor, other in zip(kept, into, strict=True):
        stream.busy(10)
        pointers = tensor.storage.pointer, other.storage.pointer
        cuda.call("copy", 0, stream.handle, cuda.WITHIN, 48, *pointers)
    kept.clear()
    del tensor
    gc.collect()
    kvstore.wait_all()
    assert all((other.numpy() == 7).all() for other in into)


def adder(seen):
    """An updater that tells where it works."""

    def add(key, recv, stored):
        seen.append(type(stored))
        if isinstance(stored, np.ndarray):
            stored += recv
        else:
            stored.add_(recv)

    return add


def test_host_values_bring_the_key_home(store):
    seen = []
    store.init("w", zeros())
    store.set_updater(adder(seen))
    for value in (numbers(), cuda.TableTensor(numbers()), kvstore.array(numbers())):
        store.push("w", value)
    assert (store.pull("w").asnumpy() == 3 * numbers()).all()
    assert seen == [np.ndarray, cuda.TableTensor, np.ndarray]


def test_the_first_of_several_values_tells_where_the_updater_works(store):
    """The others come there, from devices or the host."""

    seen = []
    store.init("w", zeros())
    store.set_updater(adder(seen))
    value, wide = numbers(), np.repeat(numbers(), 2).reshape(3, 4, 2)[..., 0]
    for device in BOTH:
        there = [cuda.TableTensor(value, device), cuda.MethodTensor(value, device)]
        for values in ([value, *there], [*there, value], [wide, *there], [kvstore.array(value)]):
            store.push("w", values)
            there[0].fill_(0)
            there[0].fill_(value)
    assert (store.pull("w").asnumpy() == 10 * len(BOTH) * value).all()
    assert seen == [np.ndarray, cuda.TableTensor, np.ndarray, np.ndarray] * len(BOTH)


@pytest.mark.parametrize("form", ["dense", "row-sparse"])
@pytest.mark.parametrize("face", [cuda.TableTensor, cuda.MethodTensor])
def test_outs_on_devices_beside_outs_of_the_package_get_what_it_has_left(store, face, form):
    def add(key, recv, stored):
        if isinstance(stored, cuda.Tensor):
            stored.add_(recv)
        else:
            stored[...] = np.asarray(stored) + np.asarray(recv)

    value = numbers() + 1
    rows = kvstore.RowSparse.from_dense(value)
    store.init("w", rows if form == "row-sparse" else zeros())
    store.set_updater(add)
    wanted = value * (form == "row-sparse")
    for given in (rows, *([zeros().fill_(value), value] if form == "dense" else [])):
        outs = [face(np.full((3, 4), 9, np.float32), device) for device in BOTH]
        own = [kvstore.zeros((3, 4)), kvstore.RowSparse.zeros((3, 4), "float32")]
        plain, strided = np.zeros((3, 4), np.float32), np.zeros((3, 8), np.float32)[:, ::2]
        store.pushpull("w", given, out=[*outs, *own, plain, strided])
        wanted = wanted + value
        assert all((out.numpy() == wanted).all() for out in outs)
        assert all((np.asarray(out) == wanted).all() for out in (*own, plain, strided))


def test_a_store_that_merges_on_the_host_gives_numpy_arrays():
    def add(key, recv, stored):
        stored += recv

    with kvstore.create("local") as local:
        local.init("w", zeros())
        local.set_updater(add)
        local.push("w", [cuda.TableTensor(numbers(), device) for device in BOTH])
        assert (local.pull("w").asnumpy() == len(BOTH) * numbers()).all()


@pytest.mark.parametrize("module", ["nowhere", "bare.inside"])
def test_a_library_that_makes_no_arrays_is_refused(store, monkeypatch, module):
    monkeypatch.setitem(sys.modules, "bare", types.ModuleType("bare"))
    face = type("Strange", (cuda.TableTensor,), {"__module__": module})
    store.init("w", zeros())
    store.set_updater(lambda key, recv, stored: pytest.fail("it must not be called"))
    with pytest.raises(
        kvstore.ArrayTypeError, match=r"CUDA device 0.*'Strange' has no from_dlpack"
    ):
        store.push("w", face(numbers()))
    assert (store.pull("w").asnumpy() == 0).all()
    store.set_updater(lambda key, recv, stored: stored.add_(recv))
    store.push("w", cuda.TableTensor(numbers()))
    assert (store.pull("w").asnumpy() == numbers()).all()


def test_a_library_that_fails_to_make_them_says_so(store, monkeypatch):
    def fail(array):
        raise BufferError("not mine")

    library = types.ModuleType("fails")
    library.from_dlpack = fail
    monkeypatch.setitem(sys.modules, "fails", library)
    store.init("w", zeros())
    store.set_updater(lambda key, recv, stored: pytest.fail("it must not be called"))
    with pytest.raises(BufferError, match="not mine") as info:
        store.push("w", type("Strange", (cuda.TableTensor,), {"__module__": "fails"})(numbers()))
    del info


def test_what_a_library_may_ask_of_the_memory(store, monkeypatch):
    def look(array):
        assert array.__dlpack_device__() == (cuda.CUDA, 0)
        for wrong, options in (
            (BufferError, {"copy": True}),
            (BufferError, {"dl_device": (1, 0)}),
            (TypeError, {"dl_device": 1}),
            (TypeError, {"stream": "x"}),
        ):
            with pytest.raises(wrong):
                array.__dlpack__(**options)
        for options in ({"stream": -1}, {"max_version": (1, 0)}, {"dl_device": (cuda.CUDA, 0)}):
            array.__dlpack__(**options)
        looked.append(array)
        return cuda.from_dlpack(array)

    looked, library = [], types.ModuleType("looks")
    library.from_dlpack = look
    monkeypatch.setitem(sys.modules, "looks", library)
    store.init("w", zeros())
    store.set_updater(lambda key, recv, stored: stored.add_(recv))
    store.push("w", type("Strange", (cuda.TableTensor,), {"__module__": "looks"})(numbers()))
    assert (store.pull("w").asnumpy() == numbers()).all() and len(looked) == 2
    looked.clear()
