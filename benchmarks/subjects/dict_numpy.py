"""A Python dict with np.copyto: what one writes without a store."""

import numpy as np
from worker import repeated, serve

KIB = 1024


def ones(nbytes):
    return np.ones(nbytes // 4, "float32")


def push_pull_1KiB():
    store, grad, out = {"w": ones(KIB)}, ones(KIB), ones(KIB)

    def run(times):
        for _ in range(times):
            np.copyto(store["w"], grad)
            np.copyto(out, store["w"])

    return run, 1


def list_1000x4KiB():
    keys = [f"layer{i}.weight" for i in range(1000)]
    store = {key: ones(4 * KIB) for key in keys}
    grads, outs = [ones(4 * KIB) for _ in keys], [ones(4 * KIB) for _ in keys]

    def call():
        for key, grad in zip(keys, grads, strict=True):
            np.copyto(store[key], grad)
        for key, out in zip(keys, outs, strict=True):
            np.copyto(out, store[key])

    return repeated(call), 1000


def updater_1KiB():
    store, grad = {"w": np.zeros(KIB // 4, "float32")}, np.zeros(KIB // 4, "float32")

    def add(key, recv, stored):
        stored += recv

    def run(times):
        for _ in range(times):
            add("w", grad, store["w"])

    return run, 1


if __name__ == "__main__":
    serve(
        {
            "push_pull_1KiB": push_pull_1KiB,
            "pushpull_1KiB": push_pull_1KiB,
            "list_1000x4KiB": list_1000x4KiB,
            "updater_1KiB": updater_1KiB,
        }
    )
