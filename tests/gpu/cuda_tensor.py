"""A small array library over CUDA memory, for tests: tensors, and the ways in which array libraries
show each other their memory.

It works on a real device as on the emulation. All work is only put on a stream: the current one of
the thread and device, as in other libraries. So who reads a tensor without coming after its stream
reads what was there before, and who uses one longer than it holds it finds the memory spoilt.
"""

import ctypes as ct

import ml_dtypes
import numpy as np
from cuda_device import (  # noqa: F401, for tests import it all from here
    DEAD,
    I64,
    INT,
    TO_DEVICE,
    TO_HOST,
    WITHIN,
    CudaError,
    P,
    Stream,
    call,
    current_device,
    current_stream,
    current_streams,
    defaults,
    emu,
    faults,
    made,
    num_devices,
    other_device,
    record,
    settle,
    staging,
    streams,
)

# ---------------------------------------------------------------------------------------- tensors

# By NumPy's name: DLPack's code and bits.
DTYPES = {
    "float64": (2, 64),
    "float32": (2, 32),
    "float16": (2, 16),
    "bfloat16": (4, 16),
    "int8": (0, 8),
    "uint8": (1, 8),
    "int32": (0, 32),
    "int64": (0, 64),
    "float8_e4m3fn": (10, 8),
}


def dtype_of(code, bits):
    name = next(name for name, type_ in DTYPES.items() if type_ == (code, bits))
    return np.dtype(getattr(ml_dtypes, name, None) or name)


class Storage:
    """Memory of a device, freed in the order of the streams that this library used it on."""

    def __init__(self, device, bytes_):
        self.device, self.bytes = device, bytes_
        self.exports = 0  # consumers that hold it
        self.streams = [current_stream(device)]
        self.pointer = made("alloc", device, self.streams[0].handle, max(bytes_, 1))

    def __del__(self):
        if not hasattr(self, "pointer"):
            return
        try:
            self.free()
        except CudaError as error:
            try:
                if error.code != DEAD:
                    self.free()  # the failure was asked for, and of one call
            except CudaError as again:
                faults.append(f"memory is not freed: {again}")

    def free(self):
        home, *others = self.streams
        for other in others:
            home.wait(other)
        call("free", self.device, home.handle, self.pointer)


class Foreign:
    """Somebody else's memory, given back by his deleter."""

    def __init__(self, managed, versioned):
        tensor = managed.contents.tensor
        self.device, self.pointer = tensor.device_id, (tensor.data or 0) + tensor.byte_offset
        self.managed, self.versioned, self.streams = managed, versioned, []

    def __del__(self):
        deleter = self.managed.contents.deleter
        if deleter:
            ct.CFUNCTYPE(None, P)(deleter)(ct.cast(self.managed, P))


class Tensor:
    """An array on a device. Subclasses show it to other libraries, each in one way.

    `layout`: "plain"; "strided", where only every other element counts; "offset", where it begins
    three elements behind the start of its memory.
    """

    def __init__(self, array, device=0, *, layout="plain", readonly=False):
        array = np.asarray(array)
        self.shape, self.dtype = array.shape, array.dtype
        self.layout, self.readonly = layout, readonly
        self.byte_offset = 3 * self.dtype.itemsize if layout == "offset" else 0
        laid = self.laid_out(array)
        self.storage = Storage(device, self.byte_offset + laid.nbytes)
        self.put(laid)

    @classmethod
    def over(cls, storage, shape, dtype, byte_offset=0, readonly=False):
        """A view of memory that is there."""
        tensor = cls.__new__(cls)
        tensor.shape, tensor.dtype, tensor.storage = tuple(shape), np.dtype(dtype), storage
        tensor.layout, tensor.byte_offset, tensor.readonly = "plain", byte_offset, readonly
        return tensor

    device = property(lambda self: self.storage.device)
    exports = property(lambda self: self.storage.exports)
    pointer = property(lambda self: self.storage.pointer + self.byte_offset)

    @property
    def strides(self):
        """In elements, None when contiguous."""
        if self.layout != "strided":
            return None
        return tuple(stride // self.dtype.itemsize for stride in self.laid_out().strides[:-1])

    def laid_out(self, array=None):
        """The bytes of the memory when the tensor has these values."""
        if self.layout != "strided":
            return np.ascontiguousarray(array).reshape(-1)
        both = np.ones((*self.shape, 2), self.dtype)
        if array is not None:
            both[..., 0] = array
        return both

    def used(self):
        stream = current_stream(self.device)
        if all(stream is not known for known in self.storage.streams):
            self.storage.streams.append(stream)
        return stream

    def put(self, laid):
        if laid.nbytes == 0:
            return
        stream, host = self.used(), made("host_alloc", self.device, laid.nbytes)
        staging.append((self.device, host))
        ct.memmove(host, laid.tobytes(), laid.nbytes)
        call("copy", self.device, stream.handle, TO_DEVICE, laid.nbytes, host, self.pointer)

    def fill_(self, array):
        """Puts the writing of these values on the current stream."""
        self.put(self.laid_out(np.broadcast_to(np.asarray(array, self.dtype), self.shape)))
        return self

    def numpy(self):
        """The values, after the work on the current stream."""
        laid = np.zeros((*self.shape, *(2,) * (self.layout == "strided")), self.dtype)
        if laid.nbytes > 0:
            stream, host = self.used(), made("host_alloc", self.device, laid.nbytes)
            call("copy", self.device, stream.handle, TO_HOST, laid.nbytes, self.pointer, host)
            stream.synchronize()
            laid = np.frombuffer(ct.string_at(host, laid.nbytes), self.dtype).reshape(laid.shape)
            call("host_free", self.device, host)
        return (laid[..., 0] if self.layout == "strided" else laid).copy()

    # In place, for updaters: on the host, for this is no mathematics library.
    def add_(self, other, factor=1):
        return self.fill_(self.numpy() + factor * other.numpy())


# ----------------------------------------------------------------------------------------- DLPack


class DLTensor(ct.Structure):
    _fields_ = [
        ("data", P),
        ("device_type", ct.c_int32),
        ("device_id", ct.c_int32),
        ("ndim", ct.c_int32),
        ("code", ct.c_uint8),
        ("bits", ct.c_uint8),
        ("lanes", ct.c_uint16),
        ("shape", ct.POINTER(I64)),
        ("strides", ct.POINTER(I64)),
        ("byte_offset", ct.c_uint64),
    ]


class Managed(ct.Structure):
    _fields_ = [("tensor", DLTensor), ("context", P), ("deleter", P)]


class Versioned(ct.Structure):
    _fields_ = [
        ("major", ct.c_uint32),
        ("minor", ct.c_uint32),
        ("context", P),
        ("deleter", P),
        ("flags", ct.c_uint64),
        ("tensor", DLTensor),
    ]


assert ct.sizeof(Managed) == 64 and ct.sizeof(Versioned) == 80
CUDA, ROCM = 2, 10
held = {}  # what consumers hold, by the address of its struct


@ct.CFUNCTYPE(None, P)
def delete(address):
    found = held.pop(address, None)
    if found is None:
        faults.append("a tensor was deleted twice")
    else:
        found[1].exports -= 1


def exported(tensor, versioned=True, device_type=CUDA):
    """A new managed tensor."""
    ndim, strides = len(tensor.shape), tensor.strides
    shape = (I64 * ndim)(*tensor.shape)
    managed = Versioned(1, 3) if versioned else Managed()
    managed.tensor = DLTensor(
        tensor.storage.pointer,
        device_type,
        tensor.device,
        ndim,
        *DTYPES[tensor.dtype.name],
        1,
        shape,
        (I64 * ndim)(*strides) if strides is not None else None,
        tensor.byte_offset,
    )
    managed.deleter = ct.cast(delete, P)
    if versioned:
        managed.flags = 1 if tensor.readonly else 0
    held[ct.addressof(managed)] = managed, tensor.storage, shape
    tensor.storage.exports += 1
    return managed


NAME, VERSIONED_NAME, TABLE_NAME = b"dltensor", b"dltensor_versioned", b"dlpack_exchange_api"
USED, VERSIONED_USED = b"used_dltensor", b"used_dltensor_versioned"
pythonapi = ct.pythonapi
is_capsule = ct.PYFUNCTYPE(INT, P, ct.c_char_p)(("PyCapsule_IsValid", pythonapi))
in_capsule = ct.PYFUNCTYPE(P, P, ct.c_char_p)(("PyCapsule_GetPointer", pythonapi))
set_name = ct.PYFUNCTYPE(INT, P, ct.c_char_p)(("PyCapsule_SetName", pythonapi))
new_capsule = ct.PYFUNCTYPE(ct.py_object, P, ct.c_char_p, P)(("PyCapsule_New", pythonapi))


@ct.PYFUNCTYPE(None, P)
def drop_capsule(capsule):
    """One that nobody has taken deletes its tensor itself."""
    for name in (NAME, VERSIONED_NAME):
        if is_capsule(capsule, name):
            delete(in_capsule(capsule, name))


class MethodTensor(Tensor):
    """Shown by `__dlpack__`, as an unknown library does it: a consumer that names a stream finds
    that stream ordered after the tensor's; else nothing is ordered."""

    versioned, device_type = True, CUDA

    def __dlpack_device__(self):
        return (self.device_type, self.device)

    def __dlpack__(self, *, stream=None, max_version=None, dl_device=None, copy=None):
        if stream is not None and stream != -1:
            assert stream != 0, "0 is no stream in DLPack: 1 is the default one"
            event = record(current_stream(self.device))
            call("stream_wait", self.device, None if stream == 1 else stream, event)
            call("event_free", self.device, event)
        versioned = self.versioned and max_version is not None and max_version[0] >= 1
        managed = exported(self, versioned, self.device_type)
        name = VERSIONED_NAME if versioned else NAME
        return new_capsule(ct.addressof(managed), name, ct.cast(drop_capsule, P))


class LegacyTensor(MethodTensor):
    """A library of the time before versions."""

    versioned = False


class RocmTensor(MethodTensor):
    device_type = ROCM


class InterfaceTensor(Tensor):
    """Shown by `__cuda_array_interface__`, with the stream to be ordered after."""

    @property
    def __cuda_array_interface__(self):
        strides = self.strides
        return {
            "shape": self.shape,
            "typestr": self.dtype.str,
            "data": (self.pointer, self.readonly),
            "version": 3,
            "strides": strides and tuple(n * self.dtype.itemsize for n in strides),
            **self.order(),
        }

    def order(self):
        return {"stream": current_stream(self.device).handle or 1}


class ReadyTensor(InterfaceTensor):
    """The same without a stream: whoever hands it out has waited for its work."""

    def order(self):
        return {}


# ----------------------------------------------------------------------------------- the exchange


class ExchangeTable(ct.Structure):
    _fields_ = [
        ("major", ct.c_uint32),
        ("minor", ct.c_uint32),
        ("previous", P),
        ("allocate", P),
        ("from_object", P),
        ("to_object", P),
        ("borrow", P),
        ("current_stream", P),
    ]


asked = {"from_object": 0, "current_stream": 0}


@ct.PYFUNCTYPE(INT, ct.py_object, ct.POINTER(P))
def from_object(tensor, out):
    asked["from_object"] += 1
    out[0] = ct.addressof(exported(tensor))
    return 0


@ct.PYFUNCTYPE(INT, ct.POINTER(Versioned), ct.POINTER(P))
def to_object(managed, out):
    tensor = imported(managed, versioned=True)
    pythonapi.Py_IncRef(ct.py_object(tensor))
    out[0] = id(tensor)
    return 0


@ct.PYFUNCTYPE(INT, ct.c_int32, ct.c_int32, ct.POINTER(P))
def tell_stream(device_type, device, out):
    asked["current_stream"] += 1
    assert device_type == CUDA
    stream = current_streams().get(device)
    out[0] = stream and stream.handle
    return 0


exchange = ExchangeTable(
    1, 3, None, None, *(ct.cast(f, P) for f in (from_object, to_object)), None, None
)
exchange.current_stream = ct.cast(tell_stream, P)


class TableTensor(Tensor):
    """Shown by the exchange table, and by `__dlpack__` to those who do not know it."""

    __dlpack_c_exchange_api__ = new_capsule(ct.addressof(exchange), TABLE_NAME, None)
    versioned, device_type = True, CUDA
    __dlpack__, __dlpack_device__ = MethodTensor.__dlpack__, MethodTensor.__dlpack_device__


def imported(managed, versioned):
    foreign = Foreign(managed, versioned)
    tensor = managed.contents.tensor
    if tensor.device_type != CUDA:
        raise BufferError("only CUDA memory comes in here")
    shape = tensor.shape[: tensor.ndim]
    return TableTensor.over(foreign, shape, dtype_of(tensor.code, tensor.bits))


def from_dlpack(array, stream=None):
    """Another library's CUDA array, in place, for use on a stream (the current one)."""
    _, device = array.__dlpack_device__()
    handle = (stream or current_stream(device)).handle
    capsule = array.__dlpack__(stream=handle or 1, max_version=(1, 3))
    for name, used, kind in ((VERSIONED_NAME, VERSIONED_USED, Versioned), (NAME, USED, Managed)):
        if is_capsule(id(capsule), name):
            managed = ct.cast(in_capsule(id(capsule), name), ct.POINTER(kind))
            set_name(id(capsule), used)
            return imported(managed, kind is Versioned)
    raise BufferError("no capsule with a tensor")


FACES = (TableTensor, MethodTensor, LegacyTensor, InterfaceTensor, ReadyTensor)
