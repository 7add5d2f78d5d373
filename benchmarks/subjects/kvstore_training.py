"""The store's own training jobs: updates by its optimizers, rows of a table, compression.

A call on a NumPy array returns when its work is done. One on a row-sparse array returns at once, so
these jobs wait for it.
"""

import functools

import numpy as np
from rows import SHAPE, gradients, in_turn, unsorted_ids
from worker import repeated, serve

import kvstore
from kvstore import optimizer

KIB, MIB = 1024, 1024 * 1024


def ones(nbytes):
    return np.ones(nbytes // 4, "float32")


def store(value, how):
    kv = kvstore.create("local")
    kv.set_optimizer(how)
    kv.init("w", value)
    return kv


def momentum():
    return optimizer.SGD(learning_rate=0.01, momentum=0.9)


def sgd_momentum_64MiB():
    kv, grad = store(ones(64 * MIB), momentum()), ones(64 * MIB)
    return repeated(lambda: kv.push("w", grad)), 1


def sgd_momentum_4x64MiB():
    kv, grads = store(ones(64 * MIB), momentum()), [ones(64 * MIB) for _ in range(4)]
    return repeated(lambda: kv.push("w", grads)), 1


def adam_64MiB_pull():
    kv, grad, out = store(ones(64 * MIB), optimizer.Adam()), ones(64 * MIB), ones(64 * MIB)
    return repeated(lambda: kv.pushpull("w", grad, out)), 1


def adagrad_64MiB():
    kv, grad = store(ones(64 * MIB), optimizer.AdaGrad()), ones(64 * MIB)
    return repeated(lambda: kv.push("w", grad)), 1


def sgd_1KiB():
    kv, grad = store(ones(KIB), optimizer.SGD()), ones(KIB)

    def run(times):
        for _ in range(times):
            kv.push("w", grad)

    return run, 1


def sgd_1KiB_handle():
    kv, grad = store(ones(KIB), optimizer.SGD()), ones(KIB)

    def run(times):
        for _ in range(times):
            kv.push("w", grad, async_op=True).wait()

    return run, 1


def momentum_list_1000x4KiB():
    kv = kvstore.create("local")
    kv.set_optimizer(momentum())
    keys = [f"layer{i}.weight" for i in range(1000)]
    grads = [ones(4 * KIB) for _ in keys]
    kv.init(keys, grads)
    return repeated(lambda: kv.push(keys, grads)), 1000


def table(how):
    return store(np.ones(SHAPE, "float32"), how)


@functools.cache
def row_gradients():
    return [kvstore.RowSparse(data, ids, SHAPE) for ids, data in gradients()]


def rows_pull():
    kv, out = table(optimizer.SGD()), kvstore.RowSparse.zeros(SHAPE)

    def call(ids):
        kv.row_sparse_pull("w", out, row_ids=ids)
        kvstore.wait_all()

    return in_turn(call, unsorted_ids()), 1


def rows_push(how, grads):
    kv = table(how)

    def call(grad):
        kv.push("w", grad)
        kvstore.wait_all()

    return in_turn(call, grads), 1


def rows_sgd():
    return rows_push(optimizer.SGD(), row_gradients())


def rows_sgd_handle():
    kv = table(optimizer.SGD())
    return in_turn(lambda grad: kv.push("w", grad, async_op=True).wait(), row_gradients()), 1


def rows_sgd_4():
    grads = row_gradients()
    return rows_push(optimizer.SGD(), [grads[i : i + 4] for i in range(0, len(grads), 4)])


def rows_adam():
    return rows_push(optimizer.Adam(), row_gradients())


def rows_pull_adagrad():
    kv, out = table(optimizer.AdaGrad()), kvstore.RowSparse.zeros(SHAPE)

    def call(batch):
        ids, grad = batch
        kv.row_sparse_pull("w", out, row_ids=ids)
        kvstore.wait_all()
        kv.push("w", grad)
        kvstore.wait_all()

    return in_turn(call, list(zip(unsorted_ids(), row_gradients(), strict=True))), 1


def encode_64MiB():
    gradient = np.random.default_rng(0).standard_normal(16 * MIB, "float32")
    residual = np.zeros_like(gradient)
    params = {"type": "2bit", "threshold": 0.5}
    return repeated(lambda: kvstore.compression.encode(gradient, residual, params)), 1


if __name__ == "__main__":
    serve(
        {
            "sgd_momentum_64MiB": sgd_momentum_64MiB,
            "sgd_momentum_4x64MiB": sgd_momentum_4x64MiB,
            "adam_64MiB_pull": adam_64MiB_pull,
            "adagrad_64MiB": adagrad_64MiB,
            "sgd_1KiB": sgd_1KiB,
            "sgd_1KiB_handle": sgd_1KiB_handle,
            "momentum_list_1000x4KiB": momentum_list_1000x4KiB,
            "rows_pull": rows_pull,
            "rows_sgd": rows_sgd,
            "rows_sgd_handle": rows_sgd_handle,
            "rows_sgd_4": rows_sgd_4,
            "rows_adam": rows_adam,
            "rows_pull_adagrad": rows_pull_adagrad,
            "encode_64MiB": encode_64MiB,
        }
    )
