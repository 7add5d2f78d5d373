"""Optimizers in Python that servers import in tests."""

import threading

import numpy as np

import kvstore
from kvstore.optimizer import Optimizer, register

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


@register
class OwnNested(Momentum):
    """Keeps arrays of many types and shapes, all of which decide what comes next."""

    def create_state(self, key, weight):
        shape = (3, *weight.shape)
        more = None, [np.zeros(3), np.zeros((), "int64"), np.zeros(2, "bool")], np.zeros((0, 2))
        return {"m": np.zeros(shape, weight.dtype), "more": more}

    def update(self, key, weight, grad, state):
        _, (sums, count, flags), _ = state["more"]
        sums += self.update_count(key) * self.lr
        count += 1
        np.logical_not(flags, out=flags)
        m = state["m"][int(count) % 3]
        m *= self.momentum
        m -= self.get_lr(key) * (grad + self.get_wd(key) * weight)
        weight += m * (1 + flags[0]) + sums[2].astype(weight.dtype) / 64


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


class Silent(Exception):
    def __str__(self):
        raise ValueError


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
        if grad.flat[0] == 4:
            raise RuntimeError("\ud800")
        if grad.flat[0] == 5:
            raise Silent
        return None


class Waiting(Optimizer):
    def update(self, key, weight, grad, state):
        inside.set()
        assert go_on.wait(60)
        weight -= grad


class RowMomentum(Optimizer):
    """Of a row-sparse value."""

    def create_state(self, key, weight):
        return [np.zeros(weight.shape, weight.dtype)]

    def update(self, key, weight, grad, state):
        state[0][grad.indices] += grad.data
        dense = weight.todense()
        dense[grad.indices] -= self.get_lr(key) * state[0][grad.indices]
        weight[:] = kvstore.RowSparse.from_dense(dense)


class Odd(Momentum):
    """Keeps what a file cannot hold, of a key called so."""

    def create_state(self, key, weight):
        odd = {
            "set": {1},
            "complex": np.ones(2, complex),
            "slash": {"a/b": weight.copy()},
            "number": {3: weight.copy()},
            "twice": {"a.b": weight.copy(), "a": {"b": weight.copy()}},
        }
        return {"m": np.zeros_like(weight), "odd": [odd.get(key)]}

    def update(self, key, weight, grad, state):
        super().update(key, weight, grad, state["m"])


class Shaped(Momentum):
    """Its state has a shape of its own."""

    extent = 3

    def create_state(self, key, weight):
        return np.zeros(self.extent)

    def update(self, key, weight, grad, state):
        state += 1
        weight += state[0]


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
