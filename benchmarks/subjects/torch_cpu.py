"""PyTorch on the CPU: eager, and with torch.compile (`--compiled`), which needs a C++ compiler."""

import sys

import torch
from worker import repeated, serve

MIB = 1024 * 1024


def ones(nbytes, dtype):
    return torch.ones(nbytes // dtype.itemsize, dtype=dtype)


def add(out, a, b, c, d):
    out.copy_(a + b + c + d)


def add_two(stored, out, a, b, c, d):
    total = a + b + c + d
    stored.copy_(total)
    out.copy_(total)


def add_half(out, a, b, c, d):
    out.copy_((a.float() + b.float() + c.float() + d.float()).half())


def job(function, nbytes, dtype, num_arrays, compiled):
    def make():
        arrays = [ones(nbytes, dtype) for _ in range(num_arrays)]
        ready = torch.compile(function) if compiled else function
        return repeated(lambda: ready(*arrays)), 1

    return make


def jobs(compiled):
    table = {
        "sum_4x64MiB": job(add, 64 * MIB, torch.float32, 5, compiled),
        "sum_4x64MiB_2dst": job(add_two, 64 * MIB, torch.float32, 6, compiled),
        # Eager float16 is summed as users write it; compiled, the sum stays in float32.
        "sum_fp16_4x32MiB": job(
            add_half if compiled else add, 32 * MIB, torch.float16, 5, compiled
        ),
    }
    if not compiled:
        copy = job(torch.Tensor.copy_, 64 * MIB, torch.float32, 2, False)
        table.update(push_64MiB=copy, pull_64MiB=copy)
    return table


if __name__ == "__main__":
    serve(jobs("--compiled" in sys.argv))
