"""PyTorch's all-reduce over gloo, in place. A list of keys is copied into buckets and back; with
`--views` the keys are views into the buckets from the start."""

import os
import sys
import tempfile

from cluster import MIB, WORKERS, lead, resnet50, work
from worker import repeated

BUCKET_BYTES = 25 * MIB


def buckets(sizes):
    """The sizes of each bucket's keys: of neighbours, as many as fit."""
    found = [[]]
    for size in sizes:
        if found[-1] and 4 * (sum(found[-1]) + size) > BUCKET_BYTES:
            found.append([])
        found[-1].append(size)
    return found


def worker(rank, meeting, views):
    import torch
    from torch import distributed

    def zeros(size):
        return torch.full((size,), 0.0)  # written to, so that each has memory of its own

    def one(size):
        value = zeros(size)
        return repeated(lambda: distributed.all_reduce(value))

    def many(sizes):
        groups = []
        for group in buckets(sizes):
            bucket = zeros(sum(group))
            keys = [] if views else [zeros(size) for size in group]
            groups.append((bucket, bucket.split(group), keys))

        def call():
            handles = []
            for bucket, _, keys in groups:
                if keys:
                    torch.cat(keys, out=bucket)
                handles.append(distributed.all_reduce(bucket, async_op=True))
            for handle, (_, parts, keys) in zip(handles, groups, strict=True):
                handle.wait()
                if keys:
                    torch._foreach_copy_(keys, parts)

        return repeated(call)

    torch.set_num_threads(1)  # as torchrun does: more get in each other's way
    distributed.init_process_group(
        "gloo", init_method=f"file://{meeting}", rank=rank, world_size=WORKERS
    )
    work(
        {
            "push_pull_64MiB": lambda: one(64 * MIB // 4),
            "resnet50": lambda: many(resnet50()),
            "pushpull_4KiB": lambda: one(1024),
            "list_1000x4KiB": lambda: many([1024] * 1000),
        }
    )
    distributed.destroy_process_group()


if __name__ == "__main__":
    if len(sys.argv) > 2:
        worker(int(sys.argv[1]), sys.argv[2], "--views" in sys.argv)
    else:
        os.environ["GLOO_SOCKET_IFNAME"] = "lo"
        with tempfile.TemporaryDirectory() as folder:
            meeting = f"{folder}/meeting"
            ranks = range(WORKERS)
            lead([([__file__, str(rank), meeting, *sys.argv[1:]], {}) for rank in ranks])
