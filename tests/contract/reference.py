"""Every optimizer as its formula says, in float64 and as plainly as NumPy can say it.

An optimizer is a function of the weight, the gradient, a dict that is its state, and the numbers of
one push; it returns the new weight. The oracle of test_optimizers.py: written from the formulas
alone, so it rounds nowhere and is compared with a tolerance.
"""

from types import SimpleNamespace

import numpy as np


def clipped(x, n):
    return x if n.clip_gradient is None else np.clip(x, -n.clip_gradient, n.clip_gradient)


def scaled(g, n):
    return clipped(n.rescale_grad * g, n)


def decayed(w, g, n):
    return clipped(n.rescale_grad * g + n.wd * w, n)


def slot(state, name, w):
    return state.setdefault(name, np.zeros_like(w))


def test(w, g, s, n):
    s["copy"] = w + n.rescale_grad * g
    return s["copy"].copy()


def sgd(w, g, s, n):
    step = -n.lr * n.wd * w - n.lr * scaled(g, n)
    if n.momentum == 0:
        return w + step
    s["m"] = n.momentum * slot(s, "m", w) + step
    return w + s["m"]


def nag(w, g, s, n):
    x = scaled(g, n)
    if n.momentum == 0:
        return (1 - n.lr * n.wd) * w - n.lr * x
    p = n.momentum * slot(s, "m", w)
    new = w - p + (1 + n.momentum) * (p - n.lr * (x + n.wd * w))
    s["m"] = p - n.lr * (x + n.wd * (w if n.sparse_weight else new))
    return new


def signum(w, g, s, n):
    if n.momentum == 0:
        return (1 - n.lr * n.wd) * w - n.lr * np.sign(g)
    rest = 1 - n.momentum
    s["m"] = n.momentum * slot(s, "m", w) - rest * n.wd * w - rest * scaled(g, n)
    return (1 - n.lr * n.wd_lh) * w + n.lr * np.sign(s["m"])


def moments(x, s, n, w):
    s["m"] = n.beta1 * slot(s, "m", w) + (1 - n.beta1) * x
    s["v"] = n.beta2 * slot(s, "v", w) + (1 - n.beta2) * x * x
    return s["m"], s["v"]


def adam(w, g, s, n):
    m, v = moments(decayed(w, g, n), s, n, w)
    rate = n.lr * np.sqrt(1 - n.beta2**n.t) / (1 - n.beta1**n.t)
    return w - rate * m / (np.sqrt(v) + n.epsilon)


def adamw(w, g, s, n):
    m, v = moments(scaled(g, n), s, n, w)
    rate = n.lr
    if n.correct_bias:
        rate *= np.sqrt(1 - n.beta2**n.t) / (1 - n.beta1**n.t)
    return w - n.eta * (rate * m / (np.sqrt(v) + n.epsilon) + n.wd * w)


def adagrad(w, g, s, n):
    x = scaled(g, n)
    s["h"] = slot(s, "h", w) + x * x
    return w - n.lr * (x / np.sqrt(s["h"] + n.eps) + n.wd * w)


def groupadagrad(w, g, s, n):
    x = scaled(g, n)
    h = s.setdefault("h", np.zeros(w.shape[0]))
    s["h"] = h + (x * x).mean(axis=1)
    return w - n.lr * x / np.sqrt(s["h"] + n.eps)[:, None]


def rmsprop(w, g, s, n):
    x = decayed(w, g, n)
    s["n"] = (1 - n.gamma1) * x * x + n.gamma1 * slot(s, "n", w)
    if n.centered:
        s["g"] = (1 - n.gamma1) * x + n.gamma1 * slot(s, "g", w)
        root = np.sqrt(s["n"] - s["g"] * s["g"] + n.epsilon)
        s["delta"] = n.gamma2 * slot(s, "delta", w) - n.lr * x / root
        w = w + s["delta"]
    else:
        w = w - n.lr * x / np.sqrt(s["n"] + n.epsilon)
    return w if n.clip_weights is None else np.clip(w, -n.clip_weights, n.clip_weights)


def adadelta(w, g, s, n):
    x = scaled(g, n)
    s["acc_g"] = n.rho * slot(s, "acc_g", w) + (1 - n.rho) * x * x
    d = np.sqrt(slot(s, "acc_delta", w) + n.epsilon) / np.sqrt(s["acc_g"] + n.epsilon) * x
    s["acc_delta"] = n.rho * s["acc_delta"] + (1 - n.rho) * d * d
    return w - d - n.wd * w


def ftrl(w, g, s, n):
    x = scaled(g, n)
    before = slot(s, "n", w)
    s["z"] = slot(s, "z", w) + x - (np.sqrt(before + x * x) - np.sqrt(before)) * w / n.lr
    s["n"] = before + x * x
    new = (np.sign(s["z"]) * n.lamda1 - s["z"]) / ((n.beta + np.sqrt(s["n"])) / n.lr + n.wd)
    return np.where(np.abs(s["z"]) > n.lamda1, new, 0)


def adamax(w, g, s, n):
    x = decayed(w, g, n)
    s["m"] = n.beta1 * slot(s, "m", w) + (1 - n.beta1) * x
    s["u"] = np.maximum(n.beta2 * slot(s, "u", w), np.abs(x))
    moved = s["u"] > 0
    return w - n.lr / (1 - n.beta1**n.t) * s["m"] * moved / np.where(moved, s["u"], 1)


def nadam(w, g, s, n):
    def q(t):
        return n.beta1 * (1 - 0.5 * 0.96 ** (t * n.schedule_decay))

    x = decayed(w, g, n)
    n.whole["P"] = product = n.whole.get("P", 1.0) * q(n.t)
    m, v = moments(x, s, n, w)
    step = (1 - q(n.t)) * x / (1 - product) + q(n.t + 1) * m / (1 - product * q(n.t + 1))
    return w - n.lr * step / (np.sqrt(v / (1 - n.beta2**n.t)) + n.epsilon)


def ftml(w, g, s, n):
    x = decayed(w, g, n)
    s["v"] = n.beta2 * slot(s, "v", w) + (1 - n.beta2) * x * x
    e = (1 - n.beta1**n.t) / n.lr * (np.sqrt(s["v"] / (1 - n.beta2**n.t)) + n.epsilon)
    s["z"] = n.beta1 * slot(s, "z", w) + (1 - n.beta1) * x - (e - n.beta1 * slot(s, "d", w)) * w
    s["d"] = e
    return -s["z"] / e


def norm(x):
    return float(np.sqrt((x * x).sum()))


def lamb(w, g, s, n):
    m, v = moments(scaled(g, n), s, n, w)
    if n.bias_correction:
        m, v = m / (1 - n.beta1**n.t), v / (1 - n.beta2**n.t)
    u = m / (np.sqrt(v) + n.epsilon) + n.wd * w
    r1, r2 = norm(w), norm(u)
    if n.lower_bound is not None:
        r1 = max(r1, n.lower_bound)
    if n.upper_bound is not None:
        r1 = min(r1, n.upper_bound)
    ratio = r1 / r2 if r1 > 0 and r2 > 0 else 1.0
    return w - n.lr * ratio * u


def lars(w, g, s, n):
    norms = n.norms  # of the whole value, also where only some rows are touched
    rate = n.lr
    if min(norms) > 0:
        rate *= n.eta * norms[0] / (norms[1] * n.rescale_grad + n.wd * norms[0] + n.eps)
    before = n.whole.get("rate")
    n.whole["rate"] = n.lr
    momentum = n.momentum
    if n.momentum_correction and before is not None:
        momentum *= n.lr / before
    step = -rate * n.wd * w - rate * scaled(g, n)
    if n.momentum == 0:
        return w + step
    s["m"] = momentum * slot(s, "m", w) + step
    return w + s["m"]


def lbsgd(w, g, s, n):
    s["sum"] = slot(s, "sum", w) + g
    if n.t % n.batch_scale:
        return w
    g = s["sum"] / n.batch_scale
    s["sum"] = np.zeros_like(w)
    warmup = n.warmup_epochs * n.updates_per_epoch
    x = n.t / warmup if warmup else 1.0
    shape = {"linear": x, "power2": x * x, "sqrt": x**0.5}[n.warmup_strategy]
    grown = 1 if warmup <= 1 else 1 + (n.batch_scale - 1) * shape
    mult = n.batch_scale if n.t >= warmup else grown
    return sgd(w, g, s, SimpleNamespace(**{**vars(n), "lr": n.lr * mult}))


def dcasgd(w, g, s, n):
    x = scaled(g, n)
    d = -n.lr * (x + n.wd * w + n.lamda * x * x * (w - s.get("p", w)))
    s["p"] = w.copy()
    if n.momentum == 0:
        return w + d
    s["m"] = n.momentum * slot(s, "m", w) + d
    return w + s["m"]


# Those that touch only the rows of a row-sparse gradient.
LAZY = {"sgd", "adam", "adagrad", "groupadagrad", "lbsgd", "lars"}


class Reference:
    """One key's weight under one optimizer; `whole` is what all keys share."""

    def __init__(self, name, numbers, weight, whole, sparse_weight=False):
        self.update = globals()[name]
        self.numbers = dict(numbers)
        self.weight = weight.astype(np.float64)
        self.state, self.whole, self.t = {}, whole, 0
        self.sparse_weight, self.waiting = sparse_weight, set()
        self.lazy = name in LAZY or (name == "ftrl" and sparse_weight)

    def due_rows(self, rows):
        """LBSGD steps on every row that a push since its last step had."""
        self.waiting |= set(rows)
        scale = self.numbers.get("batch_scale", 1)
        if scale == 1 or self.t % scale:
            return rows
        rows, self.waiting = sorted(self.waiting), set()
        return rows

    def push(self, gradient, rows=None):
        """`rows`: those that a row-sparse gradient has; `gradient` is dense in any case."""
        self.t += 1
        numbers = {"wd": 0.0, "rescale_grad": 1.0, "clip_gradient": None, **self.numbers}
        n = SimpleNamespace(
            **numbers,
            lr=self.numbers["learning_rate"],
            t=self.t,
            whole=self.whole,
            sparse_weight=self.sparse_weight,
        )
        g = gradient.astype(np.float64)
        n.norms = norm(self.weight), norm(g)
        with np.errstate(divide="ignore", invalid="ignore"):
            if rows is None or not self.lazy:
                self.weight = self.update(self.weight, g, self.state, n)
                return
            rows = self.due_rows(rows)
            part = {name: values[rows] for name, values in self.state.items()}
            self.weight[rows] = self.update(self.weight[rows], g[rows], part, n)
            for name, values in part.items():
                shape = (self.weight.shape[0], *values.shape[1:])
                self.state.setdefault(name, np.zeros(shape))[rows] = values
