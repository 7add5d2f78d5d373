"""A small array library over CUDA memory, for tests: tensors, streams, and the ways in which array
libraries show each other their memory.

It works on the plug-in that KVSTORE_CUDA_PLUGIN names, through that one's table (kernels/device.h),
on a real device as on the emulation (emu/), whose controls are `emu` (None on a real device).

All work is only put on a stream: the current one of the thread and device, as in other libraries.
So who reads a tensor without coming after its stream reads what was there before, and who uses one
longer than it holds it finds the memory spoilt.
"""

import contextlib
import ctypes as ct
import os
import threading
import time

import ml_dtypes
import numpy as np

WAIT_S = 60.0
OK, NONE, NO_MEMORY, DEAD, REFUSED = range(5)
TO_DEVICE, TO_HOST, WITHIN = range(3)


class CudaError(RuntimeError):
    """The plug-in's sentence, with its code."""

    def __init__(self, code, sentence):
        super().__init__(sentence)
        self.code = code


# ------------------------------------------------------------------------------------ the plug-in

P, I64, INT = ct.c_void_p, ct.c_int64, ct.c_int
CALLS = {
    "info": (INT, P),
    "peer": (INT, INT, P),
    "owner": (P, P),
    "current": (P,),
    "make_current": (INT,),
    "stream_new": (INT, P),
    "stream_free": (INT, P),
    "stream_wait": (INT, P, P),
    "event_new": (INT, P),
    "event_free": (INT, P),
    "event_record": (INT, P, P),
    "event_done": (INT, P, P),
    "alloc": (INT, P, I64, P),
    "free": (INT, P, P),
    "trim": (INT,),
    "memory": (INT, P, P),
    "host_alloc": (INT, I64, P),
    "host_free": (INT, P),
    "copy": (INT, P, INT, I64, P, P),
    "copy_peer": (INT, P, I64, INT, P, INT, P),
    "zero": (INT, P, I64, P),
}
KERNELS = ("sum", "step", "squares", "encode", "decode")


class Table(ct.Structure):
    _fields_ = [
        ("abi", ct.c_uint32),
        ("bytes", ct.c_uint32),
        ("num_devices", INT),
        ("name", ct.c_char_p),
        *[(name, ct.CFUNCTYPE(INT, *types, ct.c_char_p)) for name, types in CALLS.items()],
        *[(name, P) for name in KERNELS],
    ]


class Emulation:
    """The emulation's controls: emu/emu_control.h."""

    def __init__(self, library):
        for name, result, *types in (
            ("reset", None, ct.c_uint64, INT, ct.c_size_t, INT),
            ("seed", None, ct.c_uint64),
            ("fail_alloc", None, I64, I64),
            ("kill_device", None, INT, I64),
            ("fail_call", None, ct.c_char_p, I64, INT),
            ("run_all", None),
            ("counter", I64, ct.c_char_p),
            ("report", ct.c_char_p),
        ):
            function = getattr(library, f"emu_{name}")
            function.restype, function.argtypes = result, types
            setattr(self, f"_{name}", function)

    def reset(self, seed, devices=2, bytes_=64 << 20, peer=True):
        self._reset(seed, devices, bytes_, peer)

    def seed(self, seed):
        self._seed(seed)

    def fail_alloc(self, n, times=1):
        self._fail_alloc(n, times)

    def kill_device(self, device, n=0):
        self._kill_device(device, n)

    def fail_call(self, name, n, error):
        self._fail_call(name.encode(), n, error)

    def run_all(self):
        self._run_all()

    def counter(self, name):
        return self._counter(name.encode())

    def report(self):
        return self._report().decode()


def open_table(library):
    sentence, table = ct.create_string_buffer(512), Table()
    entry = library.kv_device_open
    entry.argtypes = (ct.c_uint32, ct.c_size_t, P, ct.c_char_p)
    code = entry(1, ct.sizeof(Table), ct.byref(table), sentence)
    if code != OK:
        raise CudaError(code, sentence.value.decode())
    return table


library = ct.CDLL(os.environ["KVSTORE_CUDA_PLUGIN"])
table = open_table(library)
emu = Emulation(library) if hasattr(library, "emu_reset") else None
num_devices = table.num_devices
other_device = num_devices - 1  # another than 0, where there is one
faults = []  # what consumers did wrong


def call(name, *arguments):
    """A call of the table. The thread's current device stays, as other libraries leave it."""
    sentence, before = ct.create_string_buffer(512), INT()
    table.current(ct.byref(before), sentence)
    code = getattr(table, name)(*arguments, sentence)
    table.make_current(before, sentence if code == OK else ct.create_string_buffer(512))
    if code != OK:
        raise CudaError(code, sentence.value.decode())


def made(name, *arguments):
    """The handle or address that a call gives."""
    out = P()
    call(name, *arguments, ct.byref(out))
    return out.value


def current_device(device=None):
    """The thread's current device; with an argument, makes that the one."""
    if device is not None:
        sentence = ct.create_string_buffer(512)
        assert table.make_current(device, sentence) == OK, sentence.value
    out = INT()
    table.current(ct.byref(out), ct.create_string_buffer(512))
    return out.value


# ---------------------------------------------------------------------------------------- streams

local = threading.local()
streams = []  # made, and not freed yet
staging = []  # pinned memory: device, address


class Stream:
    """A stream of a device; in a `with` block the current one of this thread and device."""

    def __init__(self, device=0, *, default=False):
        self.device = device
        self.handle = None if default else made("stream_new", device)
        self.scratch = None
        if not default:
            streams.append(self)

    def __enter__(self):
        before = current_streams()
        local.before = (*getattr(local, "before", ()), before.get(self.device))
        before[self.device] = self
        return self

    def __exit__(self, *_):
        *local.before, last = local.before
        current_streams()[self.device] = last or defaults[self.device]

    def wait(self, other):
        """What is put on this stream later comes after all that is on the other one now."""
        if self is other:
            return
        event = record(other)
        call("stream_wait", self.device, self.handle, event)
        call("event_free", other.device, event)

    def busy(self, count=60):
        """Puts work on the stream that has nothing to do with any tensor."""
        if self.scratch is None:
            self.scratch = made("alloc", self.device, self.handle, 64)
        for _ in range(count):
            call("zero", self.device, self.handle, 64, self.scratch)

    def synchronize(self):
        event = record(self)
        wait_for(self.device, event)
        call("event_free", self.device, event)

    def free(self):
        """The work on it goes on."""
        if self.scratch is not None:
            call("free", self.device, self.handle, self.scratch)
            self.scratch = None
        if self.handle is not None:
            streams.remove(self)
            call("stream_free", self.device, self.handle)
            self.handle = None


defaults = [Stream(device, default=True) for device in range(num_devices)]


def current_streams():
    if not hasattr(local, "streams"):
        local.streams = dict(enumerate(defaults))
    return local.streams


def current_stream(device=0):
    return current_streams()[device]


def record(stream):
    """A new event at the end of what is on the stream."""
    event = made("event_new", stream.device)
    call("event_record", stream.device, event, stream.handle)
    return event


def wait_for(device, event):
    done, deadline = ct.c_bool(), time.monotonic() + WAIT_S
    while not done:
        call("event_done", device, event, ct.byref(done))
        assert time.monotonic() < deadline, "a stream does not come to its end"


def settle():
    """Waits for everything, frees what the library keeps, and tells what consumers did wrong."""
    alive = [device for device in range(num_devices) if is_alive(device)]
    for stream in (*defaults, *streams):
        if stream.device in alive:
            stream.synchronize()
            stream.free()
    streams.clear()
    for device, address in staging:
        if device in alive:
            call("host_free", device, address)
    staging.clear()
    told, faults[:] = list(faults), []
    return told


def is_alive(device):
    with contextlib.suppress(CudaError):
        defaults[device].synchronize()
        return True
    return False


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
        home, *others = self.streams
        try:
            for other in others:
                home.wait(other)
            call("free", self.device, home.handle, self.pointer)
        except CudaError as error:
            if error.code != DEAD:
                faults.append(f"memory is not freed: {error}")


class Foreign:
    """Somebody else's memory, given back by his deleter."""

    def __init__(self, managed, versioned):
        tensor = managed.contents.tensor
        self.device, self.pointer = tensor.device_id, tensor.data + tensor.byte_offset
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
        laid = self.laid_out(array)
        self.storage = Storage(device, laid.nbytes)
        self.put(laid)

    @classmethod
    def over(cls, storage, shape, dtype):
        tensor = cls.__new__(cls)
        tensor.shape, tensor.dtype, tensor.storage = tuple(shape), np.dtype(dtype), storage
        tensor.layout, tensor.readonly = "plain", False
        return tensor

    device = property(lambda self: self.storage.device)
    exports = property(lambda self: self.storage.exports)
    byte_offset = property(lambda self: 3 * self.dtype.itemsize * (self.layout == "offset"))

    @property
    def strides(self):
        """In elements, None when contiguous."""
        if self.layout != "strided":
            return None
        return tuple(stride // self.dtype.itemsize for stride in self.laid_out().strides[:-1])

    def laid_out(self, array=None):
        """The bytes of the memory when the tensor has these values."""
        if self.layout == "plain":
            return np.ascontiguousarray(array).reshape(-1)
        if self.layout == "offset":
            return np.concatenate([np.zeros(3, self.dtype), array.reshape(-1)])
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
        call(
            "copy", self.device, stream.handle, TO_DEVICE, laid.nbytes, host, self.storage.pointer
        )

    def fill_(self, array):
        """Puts the writing of these values on the current stream."""
        self.put(self.laid_out(np.broadcast_to(np.asarray(array, self.dtype), self.shape)))
        return self

    def numpy(self):
        """The values, after the work on the current stream."""
        count = 1 if not self.shape else int(np.prod(self.shape))
        laid = np.zeros(
            {"plain": count, "offset": count + 3, "strided": (*self.shape, 2)}[self.layout],
            self.dtype,
        )
        if laid.nbytes > 0:
            stream, host = self.used(), made("host_alloc", self.device, laid.nbytes)
            pointer = self.storage.pointer
            call("copy", self.device, stream.handle, TO_HOST, laid.nbytes, pointer, host)
            stream.synchronize()
            laid = np.frombuffer(ct.string_at(host, laid.nbytes), self.dtype).reshape(laid.shape)
            call("host_free", self.device, host)
        if self.layout == "strided":
            return laid[..., 0].copy()
        return laid[self.byte_offset // self.dtype.itemsize :].reshape(self.shape).copy()

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
            "data": (self.storage.pointer + self.byte_offset, self.readonly),
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
