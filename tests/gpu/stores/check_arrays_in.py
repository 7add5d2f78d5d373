"""CUDA arrays where the binding itself reads them: copied to the host, after the work that makes
them; and what is said of those that cannot be."""

import ctypes as ct
import os
import sys
import time
import types

import cuda_tensor as cuda
import ml_dtypes
import numpy as np
import pytest

import kvstore
from kvstore import _core, compression

ORDERED = [face for face in cuda.FACES if face is not cuda.ReadyTensor]
BOTH = range(cuda.num_devices)


def numbers(shape=(3, 4), dtype=np.float32):
    return (np.arange(np.prod(shape, dtype=int)) % 100).reshape(shape).astype(dtype)


def late(face, array, device=0, **options):
    """A tensor whose values are written by work that is still to come."""
    tensor = face(np.zeros_like(array), device, **options)
    cuda.current_stream(device).busy(10)
    return tensor.fill_(array)


# ------------------------------------------------------------------------------------- copies


@pytest.mark.parametrize("face", ORDERED)
@pytest.mark.parametrize("device", BOTH)
def test_an_array_is_copied_after_the_work_on_it(face, device):
    for _ in range(4):
        with cuda.Stream(device):
            a = kvstore.array(late(face, numbers(), device))
        assert a.asnumpy().tolist() == numbers().tolist() and a.device == "cpu"


def test_an_array_without_a_stream_is_ready():
    tensor = cuda.ReadyTensor(numbers())
    cuda.current_stream().synchronize()
    assert kvstore.array(tensor).asnumpy().tolist() == numbers().tolist()


@pytest.mark.parametrize("face", ORDERED)
@pytest.mark.parametrize("shape", [(), (0,), (1,), (2, 0, 3), (5, 1, 7), (20000,)])
def test_every_shape(face, shape):
    a = kvstore.array(late(face, numbers(shape)))
    assert a.shape == shape and a.asnumpy().tolist() == numbers(shape).tolist()


@pytest.mark.parametrize("layout", ["plain", "offset"])
def test_every_type(layout):
    for name in ("float64", "float32", "float16", "int8", "uint8", "int32", "int64"):
        for face in ORDERED:
            a = kvstore.array(late(face, numbers(dtype=name), layout=layout))
            assert a.dtype == name and a.asnumpy().tolist() == numbers(dtype=name).tolist()
    value = numbers(dtype=ml_dtypes.bfloat16)
    a = kvstore.array(late(cuda.TableTensor, value, layout=layout))
    assert a.dtype == "bfloat16" and a.asnumpy().tobytes() == value.tobytes()


def test_other_types_are_converted():
    tensor = late(cuda.TableTensor, numbers(dtype=np.int64))
    for dtype in ("float64", "int8", "bfloat16"):
        a = kvstore.array(tensor, dtype=dtype)
        assert a.dtype == dtype and a.asnumpy().tolist() == numbers().tolist()
    a = kvstore.array(late(cuda.TableTensor, numbers(dtype=ml_dtypes.bfloat16)), dtype="float32")
    assert a.asnumpy().tolist() == numbers().tolist()
    odd = cuda.TableTensor(numbers(dtype=ml_dtypes.float8_e4m3fn))
    for options in ({}, {"dtype": "float32"}):
        with pytest.raises(kvstore.ArrayTypeError, match="float8_e4m3fn"):
            kvstore.array(odd, **options)


def test_row_sparse_arrays_are_made_of_cuda_arrays():
    ids = np.array([1, 4, 6], np.int32)
    for face in ORDERED:
        data, where = late(face, numbers()), late(face, ids)
        a = kvstore.RowSparse(data, where, (9, 4))
        assert a.device == "cpu" and a.indices.tolist() == [1, 4, 6]
        assert a.data.tolist() == numbers().tolist()
        dense = numbers() * (np.arange(3) % 2)[:, None].astype(np.float32)
        a = kvstore.RowSparse.from_dense(late(face, dense))
        assert a.indices.tolist() == [1] and (np.asarray(a.data) == dense[1:2]).all()
    with pytest.raises(kvstore.InvalidArgumentError, match=r"copy=False.*host memory"):
        kvstore.RowSparse(data, np.arange(3), (9, 4), copy=False)
    with pytest.raises(kvstore.ArrayTypeError, match="indices must be integers, not float32"):
        kvstore.RowSparse(data, cuda.TableTensor(numbers((3,))), (9, 4))


def test_row_ids_come_from_devices():
    with kvstore.create() as kv:
        kv.init("w", kvstore.RowSparse(numbers(), [1, 4, 6], (9, 4)))
        for dtype in (np.int64, np.int32, np.uint8):
            out = kv.row_sparse_pull(
                "w", row_ids=late(cuda.TableTensor, np.array([[6, 4], [6, 0]], dtype))
            )
            assert out.indices.tolist() == [0, 4, 6]
        for face in ORDERED:
            ids = [late(face, np.array(rows)) for rows in ([6, 0], [4])]
            outs = [kvstore.RowSparse.zeros((9, 4), "float32") for _ in ids]
            kv.row_sparse_pull("w", out=outs, row_ids=ids)
            assert [out.indices.tolist() for out in outs] == [[0, 6], [4]]


@pytest.mark.devices
def test_an_interface_without_elements_may_name_a_stream_of_any_device():
    for device in BOTH:
        empty = cuda.InterfaceTensor(numbers((0, 4)), device)
        assert kvstore.array(empty).shape == (0, 4)
        with kvstore.create("device") as kv:
            kv.init("w", empty)
            kv.push("w", [empty, cuda.InterfaceTensor(numbers((0, 4)))])
            kv.pull("w", out=empty)


def test_gradients_and_codes_come_from_devices():
    params = {"type": "2bit", "threshold": 2.0}
    residual, wanted = np.zeros((3, 4), np.float32), np.zeros((3, 4), np.float32)
    codes = compression.encode(late(cuda.TableTensor, numbers()), residual, params)
    assert codes.tolist() == compression.encode(numbers(), wanted, params).tolist()
    assert residual.tolist() == wanted.tolist()
    back = compression.decode(late(cuda.MethodTensor, codes), (3, 4), params)
    assert back.tolist() == compression.decode(codes, (3, 4), params).tolist()
    with pytest.raises(kvstore.ArrayTypeError, match=r"residual is changed in place.*host memory"):
        compression.encode(numbers(), cuda.TableTensor(numbers()), params)


# ---------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize("face", ORDERED)
def test_strided_arrays_are_told_how_to_be_contiguous(face):
    tensor = face(numbers(), layout="strided")
    for use in (kvstore.array, kvstore.RowSparse.from_dense):
        with pytest.raises(kvstore.InvalidArgumentError, match=r"\.contiguous\(\)"):
            use(tensor)
    with pytest.raises(kvstore.InvalidArgumentError, match=r"\.contiguous\(\)"):
        kvstore.array(tensor, dtype="float64")


def test_memory_of_other_devices_is_refused():
    tensor, ids = cuda.RocmTensor(numbers()), cuda.RocmTensor(np.arange(3))
    params = {"type": "2bit", "threshold": 2.0}
    for use in (
        lambda: kvstore.array(tensor),
        lambda: kvstore.RowSparse.from_dense(tensor),
        lambda: kvstore.RowSparse(tensor, np.arange(3), (9, 4)),
        lambda: kvstore.RowSparse(numbers(), ids, (9, 4)),
        lambda: compression.encode(tensor, np.zeros((3, 4), np.float32), params),
    ):
        with pytest.raises(kvstore.ArrayTypeError, match="host first"):
            use()


def test_a_device_that_is_not_there_is_named():
    class Elsewhere(cuda.MethodTensor):
        def __dlpack__(self, *, max_version=None):
            managed = cuda.exported(self)
            managed.tensor.device_id = number
            return cuda.new_capsule(
                ct.addressof(managed), cuda.VERSIONED_NAME, ct.cast(cuda.drop_capsule, ct.c_void_p)
            )

    number = cuda.num_devices
    with pytest.raises(kvstore.DeviceError, match=f"no CUDA device {number}: .* sees {number}"):
        kvstore.array(Elsewhere(numbers()))
    for number in (-1, 2**31 - 1):
        with pytest.raises(kvstore.ArrayTypeError, match=f"CUDA device {number}, which cannot"):
            kvstore.array(Elsewhere(numbers()))


@pytest.mark.emulated
def test_a_copy_that_fails_is_a_device_error():
    tensor = cuda.TableTensor(numbers())
    cuda.emu.fail_call("cudaMemcpyAsync", 1, 1)
    with pytest.raises(kvstore.DeviceError):
        kvstore.array(tensor)
    assert kvstore.array(tensor).asnumpy().tolist() == numbers().tolist()


# ----------------------------------------------------------------------------------- streams


class Asked(cuda.MethodTensor):
    """Remembers the streams that it was asked for."""

    def __dlpack__(self, **keywords):
        self.streams = [*getattr(self, "streams", []), keywords.get("stream", "none")]
        return super().__dlpack__(**keywords)


def test_an_unknown_library_is_asked_for_the_stores_stream():
    tensor = Asked(numbers())
    for _ in range(2):
        kvstore.array(tensor)
    first, own, again, same = tensor.streams
    assert (first, again) == ("none", "none") and own == same and own not in (None, 0, 1, 2)
    assert all(own != stream.handle for stream in (*cuda.streams, *cuda.defaults))


@pytest.mark.parametrize("name", ["torch", "cupy"])
@pytest.mark.parametrize("device", BOTH)
def test_a_known_library_tells_its_stream(monkeypatch, name, device):
    def current(number):
        calls.append(number)
        handle = cuda.current_stream(number).handle or 0
        return types.SimpleNamespace(
            **{"torch": {"cuda_stream": handle}, "cupy": {"ptr": handle}}[name]
        )

    calls, library = [], types.ModuleType(name)
    getter = {"torch": "current_stream", "cupy": "get_current_stream"}[name]
    library.cuda = types.SimpleNamespace(**{getter: current})
    monkeypatch.setitem(sys.modules, name, library)
    kind = type("Tensor", (Asked,), {"__module__": f"{name}.deep.inside"})
    for _ in range(4):
        with cuda.Stream(device):
            tensor = late(kind, numbers(), device)
            a = kvstore.array(tensor)
        assert a.asnumpy().tolist() == numbers().tolist() and tensor.streams == ["none"]
    assert calls == [device] * 4
    del library.cuda
    with pytest.raises(kvstore.ArrayTypeError) as info:
        kvstore.array(tensor)
    assert isinstance(info.value.__cause__, AttributeError)
    del info


class OneCapsule(cuda.MethodTensor):
    """Gives everybody the same capsule."""

    capsule = None

    def __dlpack__(self, **keywords):
        if self.capsule is None:
            self.capsule = super().__dlpack__(**keywords)
        return self.capsule


def test_a_capsule_is_taken_once(monkeypatch):
    def current(number):
        if thieves:
            assert kvstore.array(thieves.pop()).asnumpy().tolist() == numbers().tolist()
        return types.SimpleNamespace(cuda_stream=cuda.current_stream(number).handle or 0)

    library = types.ModuleType("torch")
    library.cuda = types.SimpleNamespace(current_stream=current)
    monkeypatch.setitem(sys.modules, "torch", library)
    known = type("Known", (OneCapsule,), {"__module__": "torch"})
    tensor, thieves = known(numbers()), []
    kvstore.array(tensor)
    with pytest.raises(kvstore.ArrayTypeError, match="no capsule with a tensor"):
        kvstore.array(tensor)
    # By somebody who comes while the library is asked for its stream.
    tensor = known(numbers())
    thieves.append(tensor)
    with pytest.raises(kvstore.ArrayTypeError, match="somebody else has taken"):
        kvstore.array(tensor)
    assert not thieves


def test_a_library_that_takes_no_stream_is_refused():
    class Old(cuda.MethodTensor):
        def __dlpack__(self, *, max_version=None):
            return super().__dlpack__(max_version=max_version)

    with pytest.raises(kvstore.ArrayTypeError) as info:
        kvstore.array(Old(numbers()))
    assert "stream" in str(info.value.__cause__)
    del info


@pytest.mark.devices
def test_a_tensor_that_moves_between_two_questions_is_refused():
    class Moves(cuda.MethodTensor):
        def __dlpack__(self, *, stream=None, **keywords):
            other = self if stream is None else cuda.MethodTensor(numbers(), cuda.other_device)
            return cuda.MethodTensor.__dlpack__(other, stream=None, **keywords)

    with pytest.raises(kvstore.ArrayTypeError, match="on CUDA device 0, and then"):
        kvstore.array(Moves(numbers()))


def test_a_tensor_in_host_memory_is_asked_once():
    class Host:
        asked = 0

        def __dlpack__(self, **keywords):
            self.asked += 1
            assert "stream" not in keywords
            return numbers().__dlpack__(**keywords)

    tensor = Host()
    assert kvstore.array(tensor).asnumpy().tolist() == numbers().tolist() and tensor.asked == 1


@pytest.mark.devices
@pytest.mark.parametrize("face", cuda.FACES)
def test_the_current_device_stays(face):
    for device in BOTH:
        cuda.current_device(device)
        try:
            tensor = face(numbers(), cuda.num_devices - 1 - device)
            cuda.current_stream(tensor.device).synchronize()
            kvstore.array(tensor)
            assert cuda.current_device() == device
        finally:
            cuda.current_device(0)


# ----------------------------------------------------------------------------- the interface


class Changed(cuda.InterfaceTensor):
    """With entries of its interface changed, or left out where they are `...`."""

    entries = ()

    def order(self):
        return {**super().order(), **dict(self.entries)}

    @property
    def __cuda_array_interface__(self):
        given = super().__cuda_array_interface__
        return {name: entry for name, entry in given.items() if entry is not ...}


def changed(**entries):
    tensor = Changed(numbers())
    tensor.entries = entries
    return tensor


def test_version_2_and_what_may_be_missing():
    tensor = changed(version=2, strides=..., mask=None, stream=...)
    cuda.current_stream().synchronize()
    assert kvstore.array(tensor).asnumpy().tolist() == numbers().tolist()
    empty = Changed(numbers((0, 4)))
    empty.entries = {"data": (0, False)}
    assert kvstore.array(empty).shape == (0, 4)
    assert kvstore.array(changed(strides=(16, 4))).asnumpy().tolist() == numbers().tolist()


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"version": 1}, "version 1 of __cuda_array_interface__, understood are 2 and 3"),
        ({"version": 4}, "version 4"),
        ({"mask": 5}, "mask"),
        ({"stream": 0}, "must not be 0"),
        ({"data": (0, False)}, "12 elements came without memory"),
        ({"data": (4096, False)}, "0x1000, which is on no CUDA device"),
        ({"data": 4096}, "pointer and whether"),
        ({"shape": [3, 4]}, "shape of an array is no tuple"),
        ({"shape": (1,) * 99}, "shape of an array is no tuple"),
        ({"strides": (4,)}, "strides of an array is no tuple of 2"),
        ({"typestr": ">f4"}, "no element type of a store"),
        ({"typestr": "|V3"}, "no element type of a store"),
    ],
)
def test_an_interface_that_is_not_understood(entries, message):
    with pytest.raises(kvstore.ArrayTypeError, match=message):
        kvstore.array(changed(**entries))


@pytest.mark.parametrize(
    "entries",
    [
        *({name: ...} for name in ("shape", "typestr", "data", "version")),
        {"stream": "x"},
        {"data": ("x", False)},
        {"shape": ("x", 4)},
        {"strides": (16, 2**70)},
        {"version": None},
    ],
)
def test_an_interface_with_nonsense_keeps_the_cause(entries):
    with pytest.raises(kvstore.ArrayTypeError) as info:
        kvstore.array(changed(**entries))
    assert isinstance(info.value.__cause__, (KeyError, TypeError, ValueError, OverflowError))
    del info


def test_dlpack_goes_before_the_interface():
    class Twice(Asked):
        __cuda_array_interface__ = property(lambda self: 1 / 0)

    assert kvstore.array(late(Twice, numbers())).asnumpy().tolist() == numbers().tolist()


# ---------------------------------------------------------------------------------------- fork


def test_a_forked_child_leaves_devices_to_its_parent():
    """What is under way is its parent's, also when the child ends in order."""
    with kvstore.create("device") as kv:
        kv.init("w", cuda.TableTensor(numbers()))
        cuda.current_stream().busy(20)
        tensor = cuda.TableTensor(numbers())
        kv.push("w", tensor)
        child = os.fork()
        if child == 0:
            try:
                with kvstore.create() as own:
                    own.init("w", numbers())
                    assert kvstore.array(numbers()).shape == (3, 4)
                    with pytest.raises(kvstore.DeviceError, match="forked"):
                        own.push("w", tensor)
                assert tensor.exports > 0
                begun = time.monotonic()
                _core._shut_down()
                assert time.monotonic() - begun < 4
                os._exit(0)
            finally:
                os._exit(1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        assert (kv.pull("w").asnumpy() == numbers()).all()
