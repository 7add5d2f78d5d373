"""Devices for tests: the table (kernels/device.h) of the plug-in that KVSTORE_CUDA_PLUGIN names, a
real one or the emulation (emu/), whose controls are `emu` (None on a real device); streams.
"""

import contextlib
import ctypes as ct
import os
import threading
import time

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
    """All of it is quick. So the GIL is kept: given away at each call it would come back late in a
    process whose other threads are busy."""

    _fields_ = [
        ("abi", ct.c_uint32),
        ("bytes", ct.c_uint32),
        ("num_devices", INT),
        ("name", ct.c_char_p),
        *[(name, ct.PYFUNCTYPE(INT, *types, ct.c_char_p)) for name, types in CALLS.items()],
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
            ("let_copies", None, I64),
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

    def let_copies(self, n):
        self._let_copies(n)

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
