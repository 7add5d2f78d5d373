"""What every worker of a test does with a dist store, and the same with a local one.

As a program, under `kvrun`: writes its results to FOLDER/RANK.npz.
"""

import os
import sys

import numpy as np

import kvstore

ROUNDS = 3
# One that is smaller than any slice, and one that is cut into slices for several servers.
SHAPES = {"small": (3, 5), "large": (2, 400_001)}
COMMANDS = ((0, "first"), (7, "the second, größer"))


def numbers(seed, shape):
    """Whole numbers as floats: their sums are exact in any order."""
    return np.random.default_rng(seed).integers(-1000, 1000, shape).astype("float32")


def gradient(key, rank, step):
    return numbers([len(key), rank, step], SHAPES[key])


def controller(head, body):
    print("got", head, body, flush=True)


def with_cluster(**options):
    """A worker's part; what it has pulled, by name."""
    keys, found = list(SHAPES), {}
    with kvstore.create("dist_sync", **options) as kv:
        rank = kv.rank
        place = options.get("rank", os.environ.get("KVSTORE_RANK"))
        number = options.get("num_workers", os.environ.get("KVSTORE_NUM_WORKERS"))
        assert (kv.type, kv.rank, kv.num_workers) == ("dist_sync", int(place), int(number))
        kv.init(keys, [gradient(key, rank, 100) for key in keys])  # only rank 0's count

        def pull(name):
            outs = [np.empty(SHAPES[key], "float32") for key in keys]
            kv.pull(keys, out=outs)
            found.update({f"{name} {key}": out for key, out in zip(keys, outs, strict=True)})

        pull("init")
        for step in range(ROUNDS):
            kv.push(keys, [gradient(key, rank, step) for key in keys])
            pull(f"push {step}")
        for key in keys:
            parts = [gradient(key, rank, 200), gradient(key, rank, 201)]
            out = np.empty(SHAPES[key], "float32")
            kv.pushpull(key, parts, out=out)
            found[f"pushpull {key}"] = out
        out = np.empty(7, "float32")
        kv.broadcast("late", np.full(7, rank + 1, "float32"), out=out)
        found["broadcast"] = out
        kv.barrier()
        if rank == 0:
            for head, body in COMMANDS:
                kv.send_command_to_servers(head, body)
        kv.barrier()
    return found


def alone(num_workers):
    """The same with a local store that gets the values of all workers in one list."""
    keys, found = list(SHAPES), {}

    def of_all(key, *steps):
        return [gradient(key, rank, step) for rank in range(num_workers) for step in steps]

    with kvstore.create("local") as kv:
        kv.init(keys, [gradient(key, 0, 100) for key in keys])

        def pull(name):
            found.update({f"{name} {key}": kv.pull(key).asnumpy() for key in keys})

        pull("init")
        for step in range(ROUNDS):
            kv.push(keys, [of_all(key, step) for key in keys])
            pull(f"push {step}")
        for key in keys:
            out = np.empty(SHAPES[key], "float32")
            kv.pushpull(key, of_all(key, 200, 201), out=out)
            found[f"pushpull {key}"] = out
        found["broadcast"] = np.ones(7, "float32")
    return found


if __name__ == "__main__":
    np.savez(f"{sys.argv[1]}/{os.environ['KVSTORE_RANK']}.npz", **with_cluster())
