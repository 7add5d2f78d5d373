"""Optimizers in Python that servers import in tests."""

import threading

import numpy as np

import kvstore
from kvstore.optimizer import Optimizer

go_on = threading.Event()  # what Waiting waits for
inside = threading.Event()  # set by Waiting
seen = []  # by Curious


class Momentum(Optimizer):
    def __init__(self, *, momentum=0.5, **common):
        super().__init__(**common)
        self.momentum = momentum

    def create_state(self, key, weight):
        return np.zeros_like(weight)

    def update(self, key, weight, grad, state):
        state *= self.momentum
        state -= self.get_lr(key) * (grad + self.get_wd(key) * weight)
        weight += state


class Rows(Optimizer):
    """Of row-sparse gradients, and values."""

    def update(self, key, weight, grad, state):
        if isinstance(weight, kvstore.RowSparse):
            dense = weight.todense()
            dense[grad.indices] -= self.get_lr(key) * grad.data
            weight[:] = kvstore.RowSparse.from_dense(dense)
        else:
            weight[grad.indices] -= self.get_lr(key) * grad.data


class Curious(Optimizer):
    """Tells what it is told."""

    def update(self, key, weight, grad, state):
        told = self.update_count(key), self.num_update, self.lr, self.get_lr(key), self.get_wd(key)
        seen.append((key, weight.shape, weight.dtype.name, *told))
        weight -= grad


class Failing(Optimizer):
    """Does what an update must not where the gradient says so."""

    def update(self, key, weight, grad, state):
        weight += grad
        if grad.flat[0] == 1:
            raise RuntimeError("one is too few")
        if grad.flat[0] == 2:
            return weight
        if grad.flat[0] == 3:
            weight.shape = (-1, 1)
        return None


class Waiting(Optimizer):
    def update(self, key, weight, grad, state):
        inside.set()
        assert go_on.wait(60)
        weight -= grad


class NoUpdate(Optimizer):
    pass


class Strict(Optimizer):
    def __init__(self, *, options=None, **common):
        super().__init__(**common)
        self.options = options

    def update(self, key, weight, grad, state):
        weight -= grad


no_class = Momentum(lr=1)


def inner():
    class Inner(Strict):
        pass

    return Inner()
