"""An optimizer in Python that servers of other processes import in tests."""

import threading

import numpy as np

from kvstore import RowSparse
from kvstore.optimizer import Optimizer


class Summing(Optimizer):
    """Plain descent."""

    def update(self, key, weight, grad, state):
        if isinstance(weight, RowSparse):
            dense = weight.todense()
            dense[grad.indices] -= self.get_lr(key) * grad.data
            weight[:] = RowSparse.from_dense(dense)
        else:
            weight -= self.get_lr(key) * grad


class Averaging(Optimizer):
    """Descends by the mean of all gradients."""

    def create_state(self, key, weight):
        return {"mean": np.zeros_like(weight), "count": np.zeros((), "int64")}

    def update(self, key, weight, grad, state):
        state["count"] += 1
        state["mean"] += (grad - state["mean"]) / np.float32(state["count"])
        weight -= self.get_lr(key) * state["mean"]


class Packing(Optimizer):
    """Keeps what cannot be looked through."""

    class State(dict):
        def items(self):
            print("it packs", flush=True)
            threading.Event().wait()

    def create_state(self, key, weight):
        return self.State()

    def update(self, key, weight, grad, state):
        weight -= grad


class Endless(Optimizer):
    """Never comes back from its first update."""

    def update(self, key, weight, grad, state):
        print("it waits", flush=True)
        threading.Event().wait()
