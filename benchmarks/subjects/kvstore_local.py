"""The store itself, NumPy arrays in and out."""

import threading

import numpy as np
from worker import repeated, serve

import kvstore

KIB, MIB = 1024, 1024 * 1024


def ones(nbytes, dtype="float32"):
    return np.ones(nbytes // np.dtype(dtype).itemsize, dtype)


def push_pull_1KiB():
    kv, grad, out = kvstore.create("local"), ones(KIB), ones(KIB)
    kv.init("w", grad)

    def run(times):
        for _ in range(times):
            kv.push("w", grad)
            kv.pull("w", out)

    return run, 1


def pushpull_1KiB():
    kv, grad, out = kvstore.create("local"), ones(KIB), ones(KIB)
    kv.init("w", grad)

    def run(times):
        for _ in range(times):
            kv.pushpull("w", grad, out)

    return run, 1


def list_1000x4KiB():
    kv = kvstore.create("local")
    keys = [f"layer{i}.weight" for i in range(1000)]
    grads, outs = [ones(4 * KIB) for _ in keys], [ones(4 * KIB) for _ in keys]
    kv.init(keys, grads)

    def call():
        kv.push(keys, grads)
        kv.pull(keys, outs)

    return repeated(call), 1000


def updater_1KiB():
    kv, grad = kvstore.create("local"), np.zeros(KIB // 4, "float32")

    def add(key, recv, stored):
        stored += recv

    kv.init("w", grad)
    kv.set_updater(add)

    def run(times):
        for _ in range(times):
            kv.push("w", grad)

    return run, 1


def large(nbytes, dtype, num_values):
    kv = kvstore.create("device")
    grads = [ones(nbytes, dtype) for _ in range(num_values)]
    kv.init("w", grads[0])
    return kv, grads, ones(nbytes, dtype)


def sum_4x64MiB():
    kv, grads, _ = large(64 * MIB, "float32", 4)
    return repeated(lambda: kv.push("w", grads)), 1


def sum_4x64MiB_2dst():
    kv, grads, out = large(64 * MIB, "float32", 4)
    return repeated(lambda: kv.pushpull("w", grads, out)), 1


def sum_fp16_4x32MiB():
    kv, grads, _ = large(32 * MIB, "float16", 4)
    return repeated(lambda: kv.push("w", grads)), 1


def push_64MiB():
    kv, grads, _ = large(64 * MIB, "float32", 1)
    return repeated(lambda: kv.push("w", grads[0])), 1


def pull_64MiB():
    kv, _, out = large(64 * MIB, "float32", 1)
    return repeated(lambda: kv.pull("w", out)), 1


def threads(num_threads, calls=20000):
    """Calls of num_threads threads, each on its own keys; per call."""
    kv, grad = kvstore.create("local"), ones(KIB)
    for i in range(num_threads):
        kv.init(f"w{i}", grad)

    def work(key):
        for _ in range(calls):
            kv.push(key, grad)

    def call():
        workers = [threading.Thread(target=work, args=(f"w{i}",)) for i in range(num_threads)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()

    return repeated(call), calls * num_threads


if __name__ == "__main__":
    serve(
        {
            "push_pull_1KiB": push_pull_1KiB,
            "pushpull_1KiB": pushpull_1KiB,
            "list_1000x4KiB": list_1000x4KiB,
            "updater_1KiB": updater_1KiB,
            "sum_4x64MiB": sum_4x64MiB,
            "sum_4x64MiB_2dst": sum_4x64MiB_2dst,
            "sum_fp16_4x32MiB": sum_fp16_4x32MiB,
            "push_64MiB": push_64MiB,
            "pull_64MiB": pull_64MiB,
            "push_1KiB_1_thread": lambda: threads(1),
            "push_1KiB_4_threads": lambda: threads(4),
        }
    )
