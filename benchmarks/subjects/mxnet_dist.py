"""Apache MXNet 1.9.1's dist_sync: scheduler, servers and workers as its own launcher starts them.
Every call waits for its result, as the store's own calls do. With --optimizer the servers update
the values by SGD with momentum, with --rows by AdaGrad."""

import os
import socket
import sys

from cluster import MIB, SERVERS, WORKERS, lead, resnet50, work
from rows import SHAPE, gradients, in_turn
from worker import repeated


def commands():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    common = {
        "DMLC_PS_ROOT_URI": "127.0.0.1",
        "DMLC_PS_ROOT_PORT": str(port),
        "DMLC_NODE_HOST": "127.0.0.1",
        "DMLC_NUM_WORKER": str(WORKERS),
        "DMLC_NUM_SERVER": str(SERVERS),
    }
    roles = ["scheduler", *["server"] * SERVERS, *["worker"] * WORKERS]
    return [([__file__, *sys.argv[1:]], {**common, "DMLC_ROLE": role}) for role in roles]


def play():
    import mxnet as mx  # does not return in a server or scheduler

    kv = mx.kv.create("dist_sync")
    if "--optimizer" in sys.argv:
        kv.set_optimizer(mx.optimizer.SGD(learning_rate=1e-6, momentum=0.9))
    if "--rows" in sys.argv:
        kv.set_optimizer(mx.optimizer.AdaGrad(learning_rate=0.01))

    def arrays(name, sizes):
        keys = [f"{name}_{number}" for number in range(len(sizes))]
        values, outs = ([mx.nd.ones(size) for size in sizes] for _ in range(2))
        kv.init(keys, values)
        return keys, values, outs

    def push_pull(name, sizes):
        keys, values, outs = arrays(name, sizes)

        def call():
            kv.push(keys, values)
            kv.pull(keys, outs)
            mx.nd.waitall()

        return repeated(call)

    def pushpull_4KiB():
        keys, values, outs = arrays("small", [1024])

        def call():
            kv.pushpull(keys[0], values[0], outs[0])
            outs[0].wait_to_read()

        return repeated(call)

    def rows_adagrad():
        kv.init("table", mx.nd.ones(SHAPE).tostype("row_sparse"))
        out, sparse = mx.nd.sparse.zeros("row_sparse", SHAPE), mx.nd.sparse.row_sparse_array
        batches = [
            (mx.nd.array(ids, dtype="int64"), sparse((data, ids), shape=SHAPE))
            for ids, data in gradients()
        ]

        def call(batch):
            ids, gradient = batch
            kv.push("table", gradient)
            kv.row_sparse_pull("table", out, row_ids=ids)
            mx.nd.waitall()

        return in_turn(call, batches[kv.rank :] + batches[: kv.rank])

    work(
        {
            "push_pull_64MiB": lambda: push_pull("large", [64 * MIB // 4]),
            "resnet50": lambda: push_pull("resnet50", resnet50()),
            "rows_adagrad": rows_adagrad,
            "pushpull_4KiB": pushpull_4KiB,
            "list_1000x4KiB": lambda: push_pull("list", [1024] * 1000),
        }
    )


if __name__ == "__main__":
    if "DMLC_ROLE" in os.environ:
        play()
    else:
        lead(commands())
