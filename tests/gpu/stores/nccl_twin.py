"""A store of kind `nccl` next to a `local` one, with numbers whose sums are exact in any order."""

import contextlib
import ctypes
import os

import cuda_tensor as cuda
import ml_dtypes
import numpy as np
from twin import INTS, Twin, draw, same, values

import kvstore

ALL = tuple(range(cuda.num_devices))
TYPES_16 = [np.dtype(np.float16), np.dtype(ml_dtypes.bfloat16)]


class Emulated:
    """The controls of the stand-in for NCCL: ../emu_nccl.h."""

    def __init__(self, library):
        self._fault, self._counter = library.emu_nccl_fault, library.emu_nccl_counter
        self._fault.argtypes = (ctypes.c_char_p, ctypes.c_int64)
        self._counter.argtypes, self._counter.restype = (ctypes.c_char_p,), ctypes.c_int64

    def fault(self, what, n=1):
        self._fault(what.encode(), n)

    def counter(self, what):
        return self._counter(what.encode())


emu = Emulated(ctypes.CDLL(os.environ["KVSTORE_NCCL"])) if cuda.emu is not None else None


def exact(random, shape, dtype="float32"):
    """Any integers, or eighths that every float type adds up without rounding."""
    if np.dtype(dtype) in INTS:
        return draw(random, shape, dtype)
    return np.asarray(random.integers(-16, 17, shape) / 8, dtype)


def lists(random, shape, dtype="float32", count=cuda.num_devices, make=exact):
    return [make(random, shape, dtype) for _ in range(count)]


def both_of(both):
    return both.kv, both.host


class NcclTwin(Twin):
    def agree(self, *keys, bound=None):
        """All devices have the same bits, and those of the host: or, with a bound, nearly."""
        for key in keys or self.host.keys():
            wanted = self.host.pull(key).asnumpy()
            outs = [self.tensor(np.full_like(wanted, 66), device) for device in ALL]
            outs += [np.full_like(wanted, 66), kvstore.empty(wanted.shape, self.kv.dtype(key))]
            self.kv.pull(key, out=outs)
            got = [values(out) for out in outs]
            assert all(same(one, got[0]) for one in got), (key, got)
            if bound is None:
                assert same(got[0], wanted), (key, got[0], wanted)
            else:
                a, b = (np.asarray(x, np.float64) for x in (got[0], wanted))
                np.testing.assert_allclose(a, b, rtol=bound, atol=bound)


@contextlib.contextmanager
def nccl_twin(face=cuda.TableTensor, **options):
    with (
        kvstore.create("nccl", **options) as kv,
        kvstore.create("local", **options) as host,
    ):
        yield NcclTwin(kv, host, face)


@contextlib.contextmanager
def groups(calls, keys=1):
    """So many calls in the block go by NCCL, of so many keys each. Where there is one device none
    does."""
    if emu is None:
        yield
        return
    before = [emu.counter(what) for what in ("groups", "puts")]
    yield
    now = [emu.counter(what) for what in ("groups", "puts")]
    calls *= cuda.num_devices > 1
    assert [b - a for a, b in zip(before, now, strict=True)] == [calls, calls * keys]
