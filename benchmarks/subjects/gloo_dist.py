"""PyTorch's all-reduce over gloo. Arrays are reduced in place, and keys are views into the buckets
that are reduced, so that nothing is copied together."""

import os
import sys
import tempfile

from cluster import MIB, WORKERS, lead, resnet50, work
from worker import repeated

BUCKET_BYTES = 25 * MIB


def buckets(sizes):
    """Elements of each bucket: of neighbouring keys, as many as fit."""
    found = [0]
    for size in sizes:
        if found[-1] > 0 and 4 * (found[-1] + size) > BUCKET_BYTES:
            found.append(0)
        found[-1] += size
    return found


def reduced(sizes):
    import torch
    from torch import distributed

    # Written to, so that each has memory of its own; sums of zeros stay numbers.
    tensors = [torch.full((size,), 0.0) for size in sizes]

    def call():
        for handle in [distributed.all_reduce(tensor, async_op=True) for tensor in tensors]:
            handle.wait()

    return repeated(call)


def worker(rank, meeting):
    from torch import distributed

    distributed.init_process_group(
        "gloo", init_method=f"file://{meeting}", rank=rank, world_size=WORKERS
    )
    work(
        {
            "push_pull_64MiB": lambda: reduced([64 * MIB // 4]),
            "resnet50": lambda: reduced(buckets(resnet50())),
            "pushpull_4KiB": lambda: reduced([1024]),
            "list_1000x4KiB": lambda: reduced([1000 * 1024]),
        }
    )
    distributed.destroy_process_group()


if __name__ == "__main__":
    if len(sys.argv) > 1:
        worker(int(sys.argv[1]), sys.argv[2])
    else:
        os.environ["GLOO_SOCKET_IFNAME"] = "lo"
        with tempfile.TemporaryDirectory() as folder:
            lead([([__file__, str(rank), f"{folder}/meeting"], {}) for rank in range(WORKERS)])
