"""The store itself: workers and servers that kvrun starts, NumPy arrays in and out.

With --optimizer the servers update the values by SGD with momentum; without it they become the sum.
"""

import sys

import numpy as np
from cluster import MIB, SERVERS, WORKERS, lead, resnet50, work
from worker import repeated

import kvstore

WORKER, OPTIMIZER = "--worker", "--optimizer"


def play():
    with kvstore.create("dist_sync") as kv:
        if OPTIMIZER in sys.argv:
            kv.set_optimizer(kvstore.optimizer.SGD(learning_rate=1e-6, momentum=0.9))

        def arrays(name, sizes):
            keys = [f"{name}_{number}" for number in range(len(sizes))]
            values, outs = ([np.ones(size, "float32") for size in sizes] for _ in range(2))
            kv.init(keys, values)
            return keys, values, outs

        def push_pull(name, sizes):
            keys, values, outs = arrays(name, sizes)

            def call():
                kv.push(keys, values)
                kv.pull(keys, outs)

            return repeated(call)

        def pushpull_4KiB():
            (key,), (value,), (out,) = arrays("small", [1024])

            def run(times):
                for _ in range(times):
                    kv.pushpull(key, value, out)

            return run

        work(
            {
                "push_pull_64MiB": lambda: push_pull("large", [64 * MIB // 4]),
                "resnet50": lambda: push_pull("resnet50", resnet50()),
                "pushpull_4KiB": pushpull_4KiB,
                "list_1000x4KiB": lambda: push_pull("list", [1024] * 1000),
            }
        )


if __name__ == "__main__":
    if WORKER in sys.argv:
        play()
    else:
        counts = ["-n", str(WORKERS), "-s", str(SERVERS)]
        command = [sys.executable, __file__, WORKER, *sys.argv[1:]]
        lead([(["-m", "kvstore.launch", *counts, *command], {})])
