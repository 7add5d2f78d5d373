"""Apache MXNet 1.9.1's KVStore with its optimizers. Every call waits for its result, as the store's
own jobs do."""

import functools

import mxnet as mx
from rows import SHAPE, gradients, in_turn, unsorted_ids
from worker import repeated, serve

KIB, MIB = 1024, 1024 * 1024


def ones(nbytes):
    return mx.nd.ones(nbytes // 4)


def store(value, how):
    kv = mx.kv.create("local")
    kv.set_optimizer(how)
    kv.init("w", value)
    return kv


def momentum():
    return mx.optimizer.SGD(learning_rate=0.01, momentum=0.9)


def pushed(kv, value):
    def call():
        kv.push("w", value)
        mx.nd.waitall()

    return repeated(call), 1


def sgd_momentum_64MiB():
    return pushed(store(ones(64 * MIB), momentum()), ones(64 * MIB))


def sgd_momentum_4x64MiB():
    return pushed(store(ones(64 * MIB), momentum()), [ones(64 * MIB) for _ in range(4)])


def adam_64MiB_pull():
    kv, grad, out = store(ones(64 * MIB), mx.optimizer.Adam()), ones(64 * MIB), ones(64 * MIB)

    def call():
        kv.pushpull("w", grad, out)
        mx.nd.waitall()

    return repeated(call), 1


def adagrad_64MiB():
    return pushed(store(ones(64 * MIB), mx.optimizer.AdaGrad()), ones(64 * MIB))


def sgd_1KiB():
    return pushed(store(ones(KIB), mx.optimizer.SGD()), ones(KIB))


def momentum_list_1000x4KiB():
    kv = mx.kv.create("local")
    kv.set_optimizer(momentum())
    keys = [f"layer{i}.weight" for i in range(1000)]
    grads = [ones(4 * KIB) for _ in keys]
    kv.init(keys, grads)

    def call():
        kv.push(keys, grads)
        mx.nd.waitall()

    return repeated(call), 1000


def table(how):
    return store(mx.nd.ones(SHAPE).tostype("row_sparse"), how)


@functools.cache
def batches():
    return [mx.nd.array(ids, dtype="int64") for ids in unsorted_ids()]


@functools.cache
def row_gradients():
    return [mx.nd.sparse.row_sparse_array((data, ids), shape=SHAPE) for ids, data in gradients()]


def rows_pull():
    kv, out = table(mx.optimizer.SGD()), mx.nd.sparse.zeros("row_sparse", SHAPE)

    def call(ids):
        kv.row_sparse_pull("w", out, row_ids=ids)
        mx.nd.waitall()

    return in_turn(call, batches()), 1


def rows_push(how, grads):
    kv = table(how)

    def call(grad):
        kv.push("w", grad)
        mx.nd.waitall()

    return in_turn(call, grads), 1


def rows_sgd():
    return rows_push(mx.optimizer.SGD(), row_gradients())


def rows_sgd_4():
    grads = row_gradients()
    return rows_push(mx.optimizer.SGD(), [grads[i : i + 4] for i in range(0, len(grads), 4)])


def rows_adam():
    return rows_push(mx.optimizer.Adam(), row_gradients())


def rows_pull_adagrad():
    kv, out = table(mx.optimizer.AdaGrad()), mx.nd.sparse.zeros("row_sparse", SHAPE)

    def call(batch):
        ids, grad = batch
        kv.row_sparse_pull("w", out, row_ids=ids)
        mx.nd.waitall()
        kv.push("w", grad)
        mx.nd.waitall()

    return in_turn(call, list(zip(batches(), row_gradients(), strict=True))), 1


if __name__ == "__main__":
    serve(
        {
            "sgd_momentum_64MiB": sgd_momentum_64MiB,
            "sgd_momentum_4x64MiB": sgd_momentum_4x64MiB,
            "adam_64MiB_pull": adam_64MiB_pull,
            "adagrad_64MiB": adagrad_64MiB,
            "sgd_1KiB": sgd_1KiB,
            "momentum_list_1000x4KiB": momentum_list_1000x4KiB,
            "rows_pull": rows_pull,
            "rows_sgd": rows_sgd,
            "rows_sgd_4": rows_sgd_4,
            "rows_adam": rows_adam,
            "rows_pull_adagrad": rows_pull_adagrad,
        }
    )
