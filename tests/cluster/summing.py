"""An optimizer in Python that servers of other processes import in tests."""

import threading

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


class Endless(Optimizer):
    """Never comes back from its first update."""

    def update(self, key, weight, grad, state):
        print("it waits", flush=True)
        threading.Event().wait()
