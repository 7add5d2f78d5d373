"""An optimizer in Python that servers of other processes import in tests."""

import threading

from kvstore.optimizer import Optimizer


class Summing(Optimizer):
    """Plain descent, in one step that rounds as the built-in one's does for whole numbers."""

    def update(self, key, weight, grad, state):
        weight -= self.get_lr(key) * grad


class Endless(Optimizer):
    """Never comes back from its first update."""

    def update(self, key, weight, grad, state):
        print("it waits", flush=True)
        threading.Event().wait()
