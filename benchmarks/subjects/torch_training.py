"""PyTorch's optimizers on the CPU, in the form that is fastest there: fused for large parameters,
foreach for many small ones, coalesced sparse gradients for rows."""

import functools

import torch
from rows import SHAPE, gradients, in_turn, unsorted_ids
from worker import repeated, serve

KIB, MIB = 1024, 1024 * 1024


def ones(nbytes):
    return torch.ones(nbytes // 4)


def parameter(nbytes):
    made = torch.nn.Parameter(ones(nbytes))
    made.grad = ones(nbytes)
    return made


def sgd_momentum_64MiB():
    optimizer = torch.optim.SGD([parameter(64 * MIB)], lr=0.01, momentum=0.9, fused=True)
    return repeated(optimizer.step), 1


def sgd_momentum_4x64MiB():
    weight, grads = parameter(64 * MIB), [ones(64 * MIB) for _ in range(4)]
    optimizer = torch.optim.SGD([weight], lr=0.01, momentum=0.9, fused=True)

    def call():
        torch.add(grads[0], grads[1], out=weight.grad)
        weight.grad.add_(grads[2]).add_(grads[3])
        optimizer.step()

    return repeated(call), 1


def adam_64MiB_pull():
    weight, out = parameter(64 * MIB), ones(64 * MIB)
    optimizer = torch.optim.Adam([weight], fused=True)

    def call():
        optimizer.step()
        out.copy_(weight.detach())

    return repeated(call), 1


def adagrad_64MiB():
    return repeated(torch.optim.Adagrad([parameter(64 * MIB)], lr=0.01, fused=True).step), 1


def momentum_list_1000x4KiB():
    weights = [parameter(4 * KIB) for _ in range(1000)]
    optimizer = torch.optim.SGD(weights, lr=0.01, momentum=0.9, foreach=True)
    return repeated(optimizer.step), 1000


def table():
    return torch.nn.Parameter(torch.ones(SHAPE))


@functools.cache
def batches():
    return [torch.from_numpy(ids) for ids in unsorted_ids()]


@functools.cache
def row_gradients():
    return [
        torch.sparse_coo_tensor(
            torch.from_numpy(ids)[None],
            torch.from_numpy(data),
            SHAPE,
            is_coalesced=True,
            check_invariants=False,
        )
        for ids, data in gradients()
    ]


def rows_pull():
    weight = table().detach()
    return in_turn(lambda ids: torch.index_select(weight, 0, torch.unique(ids)), batches()), 1


def rows_step(make):
    weight = table()
    optimizer = make([weight])

    def call(grad):
        weight.grad = grad
        optimizer.step()

    return in_turn(call, row_gradients()), 1


def rows_sgd():
    return rows_step(lambda weights: torch.optim.SGD(weights, lr=0.01))


def rows_sgd_4():
    """Put one after the other, not summed: half the time of ``a + b + c + d``."""
    weight, sets = table(), row_gradients()
    optimizer = torch.optim.SGD([weight], lr=0.01)

    def call(four):
        ids = torch.cat([grad.indices() for grad in four], dim=1)
        data = torch.cat([grad.values() for grad in four])
        weight.grad = torch.sparse_coo_tensor(ids, data, SHAPE, check_invariants=False)
        optimizer.step()

    return in_turn(call, [sets[i : i + 4] for i in range(0, len(sets), 4)]), 1


def rows_adam():
    return rows_step(torch.optim.SparseAdam)


def rows_pull_adagrad():
    weight = table()
    optimizer = torch.optim.Adagrad([weight], lr=0.01)

    def call(batch):
        ids, grad = batch
        torch.index_select(weight.detach(), 0, torch.unique(ids))
        weight.grad = grad
        optimizer.step()

    return in_turn(call, list(zip(batches(), row_gradients(), strict=True))), 1


if __name__ == "__main__":
    serve(
        {
            "sgd_momentum_64MiB": sgd_momentum_64MiB,
            "sgd_momentum_4x64MiB": sgd_momentum_4x64MiB,
            "adam_64MiB_pull": adam_64MiB_pull,
            "adagrad_64MiB": adagrad_64MiB,
            "momentum_list_1000x4KiB": momentum_list_1000x4KiB,
            "rows_pull": rows_pull,
            "rows_sgd": rows_sgd,
            "rows_sgd_4": rows_sgd_4,
            "rows_adam": rows_adam,
            "rows_pull_adagrad": rows_pull_adagrad,
        }
    )
