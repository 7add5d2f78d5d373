"""Optimizers in Python, as users write them."""

import numpy as np

from kvstore.optimizer import Optimizer


class Plain(Optimizer):
    """w -= lr*(g + wd*w)"""

    def update(self, key, weight, grad, state):
        weight -= self.get_lr(key) * (grad + self.get_wd(key) * weight)


class Momentum(Optimizer):
    def __init__(self, momentum=0.5, **common):
        super().__init__(**common)
        self.momentum = momentum

    def create_state(self, key, weight):
        return {"m": np.zeros_like(weight), "none": None, "two": (np.zeros(1), np.zeros(1))}

    def update(self, key, weight, grad, state):
        m = state["m"]
        m *= self.momentum
        m -= self.get_lr(key) * grad
        weight += m
