"""The store itself: workers and servers that kvrun starts, NumPy arrays in and out."""

import argparse
import os
import subprocess
import sys

import numpy as np
from cluster import LIBC, MIB, SERVERS, WORKERS, lead, resnet50, work
from rows import SHAPE, gradients, in_turn
from worker import repeated

import kvstore

CLONE_NEWNET = 0x40000000
# With packets of an Ethernet's size: the loopback's own would not fit through the filter.
SLOW = (
    "ip link set lo up mtu 1500",
    "tc qdisc add dev lo root tbf rate 200mbit burst 256kb latency 50ms",
)


def parse():
    parser = argparse.ArgumentParser()
    parser.add_argument("--worker", action="store_true", help="be one, not the leader")
    parser.add_argument("--workers", type=int, default=WORKERS)
    parser.add_argument("--servers", type=int, default=SERVERS)
    parser.add_argument("--optimizer", action="store_true", help="momentum SGD on the servers")
    parser.add_argument("--rows", action="store_true", help="AdaGrad on the servers")
    parser.add_argument("--compress", action="store_true", help="2-bit pushes")
    parser.add_argument("--slow", action="store_true", help="200 Mbit/s; needs root, ip and tc")
    return parser.parse_args()


def play(options):
    with kvstore.create("dist_sync") as kv:
        if options.optimizer:
            kv.set_optimizer(kvstore.optimizer.SGD(learning_rate=1e-6, momentum=0.9))
        if options.rows:
            kv.set_optimizer(kvstore.optimizer.AdaGrad(learning_rate=0.01))
        if options.compress:
            kv.set_gradient_compression({"type": "2bit", "threshold": 0.5})

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

        def push(name, sizes):
            keys, values, _ = arrays(name, sizes)

            def call():
                kv.push(keys, values)
                kvstore.wait_all()  # until all workers' are there and summed

            return repeated(call)

        def pushpull_4KiB():
            (key,), (value,), (out,) = arrays("small", [1024])

            def run(times):
                for _ in range(times):
                    kv.pushpull(key, value, out)

            return run

        def rows_adagrad():
            kv.init("table", kvstore.RowSparse.from_dense(np.ones(SHAPE, "float32")))
            out = kvstore.RowSparse.zeros(SHAPE)
            batches = [(ids, kvstore.RowSparse(data, ids, SHAPE)) for ids, data in gradients()]

            def call(batch):
                ids, gradient = batch
                kv.push("table", gradient)
                kv.row_sparse_pull("table", out, row_ids=ids)
                kvstore.wait_all()

            return in_turn(call, batches[kv.rank :] + batches[: kv.rank])

        # However many workers there are, together they push as much as two.
        sizes = [max(1, WORKERS * size // kv.num_workers) for size in resnet50()]
        work(
            {
                "push_pull_64MiB": lambda: push_pull("large", [64 * MIB // 4]),
                "resnet50": lambda: push_pull("resnet50", sizes),
                "push_resnet50": lambda: push("pushed", sizes),
                "rows_adagrad": rows_adagrad,
                "pushpull_4KiB": pushpull_4KiB,
                "list_1000x4KiB": lambda: push_pull("list", [1024] * 1000),
            }
        )


def slow_network():
    """A network of this process and those that it starts, which ends with them."""
    if LIBC.unshare(CLONE_NEWNET) != 0:
        raise SystemExit("a network namespace of its own needs root")
    for command in SLOW:
        subprocess.run(command.split(), check=True)
    os.environ["KVSTORE_TRANSPORT_CMA"] = "off"


def main():
    options = parse()
    if options.worker:
        play(options)
        return
    if options.slow:
        slow_network()
    counts = ["-n", str(options.workers), "-s", str(options.servers)]
    command = [sys.executable, __file__, "--worker", *sys.argv[1:]]
    lead([(["-m", "kvstore.launch", *counts, *command], {})], options.workers)


if __name__ == "__main__":
    main()
