"""The library that the other tests here push and pull with does what they rely on."""

import ctypes as ct
import gc
import itertools
import weakref

import cuda_tensor as cuda
import ml_dtypes
import numpy as np
import pytest

DTYPES = [*(np.dtype(name) for name in cuda.DTYPES if hasattr(np, name)), ml_dtypes.bfloat16]


def numbers(shape, dtype=np.float32):
    return (np.arange(np.prod(shape, dtype=int)) % 100).reshape(shape).astype(dtype)


@pytest.mark.parametrize("layout", ["plain", "strided", "offset"])
@pytest.mark.parametrize("shape", [(), (0,), (1,), (3, 4), (2, 0, 3), (5, 1, 7)])
def test_what_is_put_there_comes_back(shape, layout):
    for dtype, device in itertools.product(DTYPES, range(cuda.num_devices)):
        tensor = cuda.Tensor(numbers(shape, dtype), device, layout=layout)
        assert tensor.numpy().dtype == np.dtype(dtype) and tensor.numpy().shape == shape
        assert tensor.numpy().tobytes() == numbers(shape, dtype).tobytes()
        tensor.fill_(7)
        assert (tensor.numpy() == 7).all()


@pytest.mark.emulated
def test_work_is_only_queued():
    queued = cuda.emu.counter("queued")
    tensor = cuda.Tensor(numbers(10))
    tensor.fill_(2)
    cuda.current_stream().busy(10)
    assert cuda.emu.counter("queued") >= queued + 12
    tensor.numpy()


@pytest.mark.emulated
def test_another_stream_that_does_not_wait_reads_something_else():
    wrong = 0
    for _ in range(8):
        tensor, side = cuda.Tensor(numbers(10)), cuda.Stream()
        with side:
            wrong += (tensor.numpy() != numbers(10)).any()
    assert wrong > 0
    tensor = cuda.Tensor(numbers(10))
    side.wait(cuda.current_stream())
    with side:
        assert (tensor.numpy() == numbers(10)).all()


@pytest.mark.parametrize("face", [cuda.TableTensor, cuda.MethodTensor, cuda.LegacyTensor])
def test_from_dlpack_is_in_place_ordered_and_gives_back(face):
    tensor, side = face(numbers((2, 3)), cuda.other_device), cuda.Stream(cuda.other_device)
    other = cuda.from_dlpack(tensor, side)
    with side:
        assert (other.numpy() == numbers((2, 3))).all() and other.device == tensor.device
        other.fill_(4)
    cuda.current_stream(cuda.other_device).wait(side)
    assert (tensor.numpy() == 4).all() and tensor.exports == 1
    del other
    assert tensor.exports == 0


def test_a_capsule_that_nobody_takes_gives_back():
    tensor = cuda.MethodTensor(numbers(3))
    capsule = tensor.__dlpack__(max_version=(1, 0))
    assert tensor.exports == 1
    del capsule
    assert tensor.exports == 0


@pytest.mark.parametrize("readonly", [False, True])
@pytest.mark.parametrize("layout", ["plain", "strided", "offset"])
def test_the_table_tells_all_and_holds_the_memory(layout, readonly):
    get = ct.pythonapi.PyCapsule_GetPointer
    get.restype, get.argtypes = ct.c_void_p, (ct.py_object, ct.c_char_p)
    capsule = cuda.TableTensor.__dlpack_c_exchange_api__
    table = cuda.ExchangeTable.from_address(get(capsule, cuda.TABLE_NAME))
    assert (table.major, table.minor) == (1, 3)
    from_object = ct.PYFUNCTYPE(ct.c_int, ct.py_object, ct.c_void_p)(table.from_object)
    current_stream = ct.PYFUNCTYPE(ct.c_int, ct.c_int, ct.c_int, ct.c_void_p)(table.current_stream)

    value = cuda.TableTensor(
        numbers((3, 4), np.float16), cuda.other_device, layout=layout, readonly=readonly
    )
    out = ct.c_void_p()
    assert from_object(value, ct.byref(out)) == 0
    managed = cuda.Versioned.from_address(out.value)
    tensor = managed.tensor
    assert (tensor.device_type, tensor.device_id) == (cuda.CUDA, cuda.other_device)
    assert (tensor.code, tensor.bits, tensor.lanes) == (2, 16, 1)
    assert tensor.shape[: tensor.ndim] == [3, 4] and managed.flags == readonly
    assert bool(tensor.strides) == (layout == "strided")
    if tensor.strides:
        assert tensor.strides[:2] == [8, 2]
    assert tensor.byte_offset == (6 if layout == "offset" else 0)

    storage = weakref.ref(value.storage)
    del value
    gc.collect()
    assert storage().exports == 1
    ct.CFUNCTYPE(None, ct.c_void_p)(managed.deleter)(out)
    assert storage() is None

    with cuda.Stream() as side:
        assert current_stream(cuda.CUDA, 0, ct.byref(out)) == 0 and out.value == side.handle
    assert current_stream(cuda.CUDA, 0, ct.byref(out)) == 0
    assert out.value == cuda.current_stream().handle


@pytest.mark.emulated
def test_memory_is_freed_when_its_stream_comes_there():
    tensor = cuda.Tensor(numbers(10))
    live = cuda.emu.counter("live_allocations")
    cuda.current_stream().busy(5)
    del tensor
    cuda.current_stream().synchronize()
    assert cuda.emu.counter("live_allocations") == live  # the stream's own memory came in between


def test_a_deleter_that_is_called_twice_is_told():
    tensor = cuda.TableTensor(numbers(3))
    managed = cuda.exported(tensor)
    for _ in range(2):
        cuda.delete(ct.addressof(managed))
    assert cuda.settle() == ["a tensor was deleted twice"] and tensor.exports == 0
