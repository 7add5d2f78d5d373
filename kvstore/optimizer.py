"""The optimizers, with the names, keywords and arithmetic of MXNet 1.9.1.

The arithmetic is in the C core; an object here is a name and numbers that were checked. All of them
take the keywords of `Optimizer` too. In the formulas lr and wd are rate and decay of the key, t
counts its pushes, and g is the merged gradient, multiplied by rescale_grad and limited to
±clip_gradient.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ._adaptive import (
    FTML,
    LAMB,
    AdaDelta,
    AdaGrad,
    Adam,
    Adamax,
    AdamW,
    Ftrl,
    GroupAdaGrad,
    Nadam,
    RMSProp,
)
from ._optimizer import BuiltIn, Optimizer, create, register

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from ._optimizer import Common

__all__ = [
    "DCASGD",
    "FTML",
    "LAMB",
    "LARS",
    "LBSGD",
    "NAG",
    "SGD",
    "SGLD",
    "AdaDelta",
    "AdaGrad",
    "Adam",
    "AdamW",
    "Adamax",
    "Ftrl",
    "GroupAdaGrad",
    "Nadam",
    "Optimizer",
    "RMSProp",
    "Signum",
    "Test",
    "create",
    "register",
]


class SGD(BuiltIn):
    """Stochastic gradient descent, with momentum or without.

    ``m = momentum*m - lr*(g + wd*w); w += m``

    Herbert Robbins, Sutton Monro: "A Stochastic Approximation Method", 1951. Momentum: Boris
    Polyak: "Some methods of speeding up the convergence of iteration methods", 1964.

    Parameters
    ----------
    momentum : float, default 0
        What is kept of the step before.
    lazy_update : bool, default True
        A row-sparse gradient touches only the rows that it has; else the others decay and move on.

    Examples
    --------
    >>> with kvstore.create() as kv:
    ...     kv.set_optimizer(kvstore.optimizer.SGD(learning_rate=0.5, momentum=0.9))
    ...     kv.init('w', np.ones(2, 'float32'))
    ...     kv.push('w', np.ones(2, 'float32'))
    ...     print(kv.pull('w').asnumpy())
    [0.5 0.5]
    """

    def __init__(
        self,
        *,
        momentum: float = 0.0,
        lazy_update: bool = True,
        **common: Unpack[Common],
    ) -> None:
        self._set_up({"momentum": momentum, "lazy_update": lazy_update}, common)


class NAG(BuiltIn):
    """Nesterov's accelerated gradient.

    ``p = momentum*m; w' = w - p + (1+momentum)*(p - lr*(g + wd*w)); m = p - lr*(g + wd*w')``

    Yurii Nesterov: "A method of solving a convex programming problem with convergence rate
    O(1/k²)", 1983; in this form Ilya Sutskever and others: "On the importance of initialization and
    momentum in deep learning", 2013.

    Parameters
    ----------
    momentum : float, default 0
        What is kept of the step before.

    Examples
    --------
    >>> with kvstore.create() as kv:
    ...     kv.set_optimizer(kvstore.optimizer.NAG(learning_rate=0.5, momentum=0.9))
    ...     kv.init('w', np.ones(2, 'float32'))
    ...     kv.push('w', np.ones(2, 'float32'))
    ...     print(kv.pull('w').asnumpy())
    [0.05000001 0.05000001]
    """

    def __init__(self, *, momentum: float = 0.0, **common: Unpack[Common]) -> None:
        self._set_up({"momentum": momentum}, common)


class Signum(BuiltIn):
    """Steps of equal size in the direction of the momentum's sign; SignSGD if ``momentum`` is 0.

    ``m = momentum*m - (1-momentum)*(g + wd*w); w = (1 - lr*wd_lh)*w + lr*sign(m)``

    Jeremy Bernstein, Yu-Xiang Wang, Kamyar Azizzadenesheli, Anima Anandkumar: "signSGD: Compressed
    Optimisation for Non-Convex Problems", 2018.

    Parameters
    ----------
    momentum : float, default 0.9
        What is kept of the mean gradient. With 0 the step is ``w = (1 - lr*wd)*w - lr*sign(g)``,
        and rescale_grad, clip_gradient and wd_lh do nothing.
    wd_lh : float, default 0
        Decay of the weight itself, beside that of the gradient.

    Examples
    --------
    >>> with kvstore.create() as kv:
    ...     kv.set_optimizer(kvstore.optimizer.Signum(learning_rate=0.5))
    ...     kv.init('w', np.ones(2, 'float32'))
    ...     kv.push('w', np.ones(2, 'float32'))
    ...     print(kv.pull('w').asnumpy())
    [0.5 0.5]
    """

    def __init__(
        self,
        *,
        momentum: float = 0.9,
        wd_lh: float = 0.0,
        **common: Unpack[Common],
    ) -> None:
        self._set_up({"momentum": momentum, "wd_lh": wd_lh}, common)


class LARS(BuiltIn):
    """SGD with a rate of its own for each layer.

    ``rate = lr*eta*norm(w) / (norm(g) + wd*norm(w) + eps)``, or lr if a norm is zero, and
    then as `SGD`. The gradient is limited after its norm has been taken. A key whose name ends in
    ``gamma``, ``beta`` or ``bias`` takes lr itself.

    Yang You, Igor Gitman, Boris Ginsburg: "Large Batch Training of Convolutional Networks", 2017.

    Parameters
    ----------
    momentum : float, default 0
        What is kept of the step before.
    lazy_update : bool, default True
        A row-sparse gradient touches only the rows that it has.
    eta : float, default 0.001
        How far a layer moves in relation to its norm.
    eps : float, default 0
        Keeps the denominator away from zero.
    momentum_correction : bool, default True
        Multiplies the momentum by the rate of this push over that of the push before.

    Examples
    --------
    >>> with kvstore.create() as kv:
    ...     kv.set_optimizer(kvstore.optimizer.LARS(learning_rate=0.5, eta=1.0))
    ...     kv.init('w', np.ones(2, 'float32'))
    ...     kv.push('w', np.ones(2, 'float32'))
    ...     print(kv.pull('w').asnumpy())
    [0.5 0.5]
    """

    _DECAYED = ("_weight",)
    _PLAIN_RATE = ("gamma", "beta", "bias")

    def __init__(
        self,
        *,
        momentum: float = 0.0,
        lazy_update: bool = True,
        eta: float = 0.001,
        eps: float = 0.0,
        momentum_correction: bool = True,
        **common: Unpack[Common],
    ) -> None:
        own = {
            "momentum": momentum,
            "lazy_update": lazy_update,
            "eta": eta,
            "eps": eps,
            "momentum_correction": momentum_correction,
        }
        self._set_up(own, common)


class LBSGD(BuiltIn):
    """SGD for large batches: gathers gradients, and warms the rate up.

    Every batch_scale-th push of a key is an `SGD` step with the mean of the gradients since the
    last one and the rate ``lr*mult``; other pushes change nothing. With x the share of the warm-up
    that is over, ``mult = 1 + (batch_scale-1)*x``, afterwards ``batch_scale``.

    Priya Goyal and others: "Accurate, Large Minibatch SGD: Training ImageNet in 1 Hour", 2017.

    Parameters
    ----------
    momentum : float, default 0
        What is kept of the step before.
    warmup_strategy : 'linear', 'power2', 'sqrt' or 'lars'
        The curve of the warm-up: x, its square or its root. With ``'lars'`` mult is
        ``sqrt(sum w² / (sum g² + wd*sum w²))``, limited to [0.01, 100].
    warmup_epochs : int, default 5
        How long the warm-up is.
    batch_scale : int, default 1
        How many pushes make a step.
    updates_per_epoch : int, default 32
        How many pushes of a key make an epoch.
    begin_epoch : int, default 0
        The epoch that training goes on from.
    num_epochs : int, default 60
        Not used.

    Examples
    --------
    >>> with kvstore.create() as kv:
    ...     kv.set_optimizer(kvstore.optimizer.LBSGD(learning_rate=0.5))
    ...     kv.init('w', np.ones(2, 'float32'))
    ...     kv.push('w', np.ones(2, 'float32'))
    ...     print(kv.pull('w').asnumpy())
    [0.5 0.5]
    """

    def __init__(
        self,
        *,
        momentum: float = 0.0,
        warmup_strategy: str = "linear",
        warmup_epochs: int = 5,
        batch_scale: int = 1,
        updates_per_epoch: int = 32,
        begin_epoch: int = 0,
        num_epochs: int = 60,
        **common: Unpack[Common],
    ) -> None:
        own = {
            "momentum": momentum,
            "warmup_strategy": warmup_strategy,
            "warmup_epochs": warmup_epochs,
            "batch_scale": batch_scale,
            "updates_per_epoch": updates_per_epoch,
            "begin_epoch": begin_epoch,
            "num_epochs": num_epochs,
        }
        self._set_up(own, common)


class DCASGD(BuiltIn):
    """Asynchronous SGD that makes up for the delay of the gradients.

    ``d = -lr*(g + wd*w + lamda*g²*(w - p)); p = w; w += d``, with momentum
    ``m = momentum*m + d; w += m``; p is the weight after the push before

    Shuxin Zheng and others: "Asynchronous Stochastic Gradient Descent with Delay Compensation",
    2017.

    Parameters
    ----------
    momentum : float, default 0
        What is kept of the step before.
    lamda : float, default 0.04
        How much of the delay is made up for.

    Examples
    --------
    >>> with kvstore.create() as kv:
    ...     kv.set_optimizer(kvstore.optimizer.DCASGD(learning_rate=0.5))
    ...     kv.init('w', np.ones(2, 'float32'))
    ...     kv.push('w', np.ones(2, 'float32'))
    ...     print(kv.pull('w').asnumpy())
    [0.5 0.5]
    """

    def __init__(
        self,
        *,
        momentum: float = 0.0,
        lamda: float = 0.04,
        **common: Unpack[Common],
    ) -> None:
        self._set_up({"momentum": momentum, "lamda": lamda}, common)


class SGLD(BuiltIn):
    """Stochastic gradient Langevin dynamics: draws weights from their posterior.

    ``w += -lr/2*(g + wd*w) + normal(0, sqrt(lr))``

    The generator begins with the same numbers in every store and is part of the saved states.

    Max Welling, Yee Whye Teh: "Bayesian Learning via Stochastic Gradient Langevin Dynamics", 2011.

    Examples
    --------
    >>> with kvstore.create() as kv:
    ...     kv.set_optimizer(kvstore.optimizer.SGLD(learning_rate=0.01))
    ...     kv.init('w', np.ones(2, 'float32'))
    ...     kv.push('w', np.ones(2, 'float32'))
    ...     print(abs(kv.pull('w').asnumpy() - 1) < 1)
    [ True  True]
    """

    def __init__(self, **common: Unpack[Common]) -> None:
        self._set_up({}, common)


class Test(BuiltIn):
    """Adds the gradient, for tests: ``w += rescale_grad*g; copy = w``. No rate, no decay, no limit.

    Examples
    --------
    >>> with kvstore.create() as kv:
    ...     kv.set_optimizer(kvstore.optimizer.Test(rescale_grad=2.0))
    ...     kv.init('w', np.ones(2, 'float32'))
    ...     kv.push('w', np.ones(2, 'float32'))
    ...     print(kv.pull('w').asnumpy())
    [3. 3.]
    """

    def __init__(self, **common: Unpack[Common]) -> None:
        self._set_up({}, common)
