"""What calls on CUDA tensors cost the host: microseconds a call without any device (push_cost.c),
and what a device is asked for in a call.

    python tests/gpu/push_cost.py
"""

import ctypes
import itertools
import os
import subprocess
import sys
import sysconfig
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
TIMES = 20_000


def build(target):
    flags = "-std=c17 -O2 -fPIC -shared -fvisibility=hidden -Wall -Wextra".split()
    folders = (HERE.parents[1] / "src", sysconfig.get_path("include"))
    sources = [*(f"-I{folder}" for folder in folders), HERE / "push_cost.c"]
    subprocess.run(["gcc", *flags, *sources, "-o", target], check=True)
    return ctypes.CDLL(str(target))


def tensor_class(library):
    new = ctypes.pythonapi.PyCapsule_New
    new.restype, new.argtypes = (
        ctypes.py_object,
        (ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p),
    )
    table = ctypes.addressof(ctypes.c_char.in_dll(library, "cost_exchange"))
    return type(
        "Tensor", (), {"__dlpack_c_exchange_api__": new(table, b"dlpack_exchange_api", None)}
    )


def counts(library):
    library.cost_name.restype, library.cost_count.restype = ctypes.c_char_p, ctypes.c_int64
    names = map(library.cost_name, itertools.count())
    names = itertools.takewhile(lambda name: name is not None, names)
    return {name.decode(): library.cost_count(i) for i, name in enumerate(names)}


def measure(library, call):
    for _ in range(100):
        call()
    before, start = counts(library), time.perf_counter()
    for _ in range(TIMES):
        call()
    taken = (time.perf_counter() - start) / TIMES * 1e6
    done = {name: (n - before[name]) / TIMES for name, n in counts(library).items()}
    return taken, {name: round(n, 2) for name, n in done.items() if n > 0.001}


def main():
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "cost.so")
        library = build(path)
        os.environ["KVSTORE_CUDA_PLUGIN"] = str(path)
        import kvstore

        tensor = tensor_class(library)
        value, other, out = tensor(), tensor(), tensor()
        library.cost_tensor.argtypes = (ctypes.c_int, ctypes.py_object, ctypes.c_int64)
        for i, each in enumerate((value, other, out)):
            library.cost_tensor(i, each, 1000)
        kv = kvstore.create("device")
        kv.init("w", value)
        calls = {
            "push": lambda: kv.push("w", value),
            "push of two": lambda: kv.push("w", [value, other]),
            "pull": lambda: kv.pull("w", out=out),
            "pushpull": lambda: kv.pushpull("w", value, out=out),
        }
        for name, call in calls.items():
            taken, done = measure(library, call)
            print(f"{name:20} {taken:6.2f} µs", *(f"{n:g} {what}" for what, n in done.items()))
        kv.set_optimizer(kvstore.optimizer.SGD(learning_rate=0.1, momentum=0.9))
        for name in ("push", "pushpull"):
            taken, done = measure(library, calls[name])
            print(
                f"{name + ', SGD':20} {taken:6.2f} µs",
                *(f"{n:g} {what}" for what, n in done.items()),
            )
        kv.close()


if __name__ == "__main__":
    sys.exit(main())
