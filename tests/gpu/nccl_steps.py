"""A worker of an `nccl` store over several processes that does what it is told, a line at a time,
and answers each with a line of JSON."""

import ctypes
import json
import os
import signal
import sys
import threading

import cuda_tensor as cuda
import numpy as np

import kvstore  # noqa: F401, the lines use it
from kvstore import optimizer

library = ctypes.CDLL(os.environ["KVSTORE_NCCL"])
library.emu_nccl_counter.restype = ctypes.c_int64


class Doubling(optimizer.Optimizer):
    """One in Python, which no store over several processes takes."""

    def update(self, key, weight, grad, state, rate):
        weight += 2 * grad


def at(number, device=0, shape=(4,), dtype="float32"):
    """A tensor full of a number."""
    return cuda.TableTensor(np.full(shape, number, dtype), device)


def tensors(array):
    """One on each device: the array, times 1, 2, …"""
    return [cuda.TableTensor(array * (d + 1), d) for d in range(cuda.num_devices)]


def hexes(outs):
    """The bits of arrays, on the host or on devices."""
    return [
        (one.numpy() if hasattr(one, "numpy") else np.asarray(one)).tobytes().hex() for one in outs
    ]


def values(kv, key):
    """A key's value for the host, from the first device, and from each of them."""
    shape, dtype = kv.shape(key), kv.dtype(key)
    outs = [np.zeros(shape, dtype), *(at(0, d, shape, dtype) for d in range(cuda.num_devices))]
    kv.pull(key, out=outs)
    bits = hexes(outs)
    assert len(set(bits)) == 1, bits
    return np.asarray(outs[0], "float64").ravel().tolist()


def counter(what):
    return library.emu_nccl_counter(what.encode())


def fault(what, n=1):
    library.emu_nccl_fault(what.encode(), ctypes.c_int64(n))


def interrupted_soon():
    threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT)).start()


def say(**news):
    print(json.dumps(news), flush=True)


def main():
    names = globals()
    say(value="here")
    for line in sys.stdin:
        try:
            try:
                say(value=eval(line, names))
            except SyntaxError:
                exec(line, names)
                say(value=None)
        except (Exception, KeyboardInterrupt) as error:
            say(error=type(error).__name__, text=str(error))
    mistakes = cuda.emu.counter("mistakes")
    say(value=[mistakes, str(cuda.emu.report()) if mistakes else ""])


if __name__ == "__main__":
    main()
