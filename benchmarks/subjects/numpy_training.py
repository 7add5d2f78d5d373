"""The training jobs that one writes by hand with NumPy."""

import numpy as np
from worker import repeated, serve

KIB, MIB = 1024, 1024 * 1024


def sgd_1KiB():
    store, grad = {"w": np.ones(KIB // 4, "float32")}, np.ones(KIB // 4, "float32")

    def run(times):
        for _ in range(times):
            store["w"] -= 0.01 * grad

    return run, 1


def encode_64MiB():
    gradient = np.random.default_rng(0).standard_normal(16 * MIB, "float32")
    residual, threshold = np.zeros_like(gradient), np.float32(0.5)

    def encode():
        np.add(residual, gradient, out=residual)
        above, below = residual >= threshold, residual <= -threshold
        np.subtract(residual, threshold, out=residual, where=above)
        np.add(residual, threshold, out=residual, where=below)
        bits = np.empty((len(residual), 2), bool)
        np.logical_or(above, below, out=bits[:, 0])
        bits[:, 1] = above
        return np.packbits(bits)

    return repeated(encode), 1


if __name__ == "__main__":
    serve({"sgd_1KiB": sgd_1KiB, "encode_64MiB": encode_64MiB})
