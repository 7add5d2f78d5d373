"""Apache MXNet 1.9.1's KVStore, the store whose interface this one keeps. Every call waits for its
result, as the store's own calls do."""

import mxnet as mx
import numpy as np
from worker import repeated, serve

KIB, MIB = 1024, 1024 * 1024


def ones(nbytes, dtype="float32"):
    return mx.nd.ones(nbytes // np.dtype(dtype).itemsize, dtype=dtype)


def push_pull_1KiB():
    kv, grad, out = mx.kv.create("local"), ones(KIB), ones(KIB)
    kv.init("w", grad)

    def run(times):
        for _ in range(times):
            kv.push("w", grad)
            kv.pull("w", out)
            out.wait_to_read()

    return run, 1


def pushpull_1KiB():
    kv, grad, out = mx.kv.create("local"), ones(KIB), ones(KIB)
    kv.init("w", grad)

    def run(times):
        for _ in range(times):
            kv.pushpull("w", grad, out)
            out.wait_to_read()

    return run, 1


def list_1000x4KiB():
    kv = mx.kv.create("local")
    keys = [f"layer{i}.weight" for i in range(1000)]
    grads, outs = [ones(4 * KIB) for _ in keys], [ones(4 * KIB) for _ in keys]
    kv.init(keys, grads)

    def call():
        kv.push(keys, grads)
        kv.pull(keys, outs)
        mx.nd.waitall()

    return repeated(call), 1000


def updater_1KiB():
    kv, grad = mx.kv.create("local"), mx.nd.zeros(KIB // 4)

    def add(key, recv, stored):
        stored += recv

    kv.init("w", grad)
    kv._set_updater(add)

    def run(times):
        for _ in range(times):
            kv.push("w", grad)
            mx.nd.waitall()

    return run, 1


def large(nbytes, dtype, num_values, call_of):
    def make():
        kv = mx.kv.create("local")
        grads = [ones(nbytes, dtype) for _ in range(num_values)]
        out = ones(nbytes, dtype)
        kv.init("w", grads[0])

        def call():
            call_of(kv, grads, out)
            mx.nd.waitall()

        return repeated(call), 1

    return make


if __name__ == "__main__":

    def push(kv, grads, out):
        kv.push("w", grads)

    serve(
        {
            "push_pull_1KiB": push_pull_1KiB,
            "pushpull_1KiB": pushpull_1KiB,
            "list_1000x4KiB": list_1000x4KiB,
            "updater_1KiB": updater_1KiB,
            "sum_4x64MiB": large(64 * MIB, "float32", 4, push),
            "sum_4x64MiB_2dst": large(
                64 * MIB, "float32", 4, lambda kv, grads, out: kv.pushpull("w", grads, out)
            ),
            "sum_fp16_4x32MiB": large(32 * MIB, "float16", 4, push),
            # A lone pushed array becomes the stored one there, without a copy: pull is what copies.
            "pull_64MiB": large(64 * MIB, "float32", 1, lambda kv, grads, out: kv.pull("w", out)),
        }
    )
