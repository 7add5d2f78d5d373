"""The optimizers that scale each element by what its gradients have been; see optimizer.py."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ._optimizer import BuiltIn

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from ._optimizer import Common


class FTML(BuiltIn):
    """Follow the moving leader.

    ``g += wd*w`` before the limit; ``v = beta2*v + (1-beta2)*g²``;
    ``e = (1-beta1^t)/lr * (sqrt(v/(1-beta2^t)) + epsilon)``;
    ``z = beta1*z + (1-beta1)*g - (e - beta1*d)*w; d = e; w = -z/d``

    Shuai Zheng, James Kwok: "Follow the Moving Leader in Deep Learning", 2017.

    Parameters
    ----------
    beta1, beta2 : float, default 0.6, 0.999
        What is kept of z and of the squares.
    epsilon : float, default 1e-8
        Keeps the root away from zero.

    Examples
    --------
    >>> with kvstore.create() as kv:
    ...     kv.set_optimizer(kvstore.optimizer.FTML(learning_rate=0.5))
    ...     kv.init('w', np.ones(2, 'float32'))
    ...     kv.push('w', np.ones(2, 'float32'))
    ...     print(kv.pull('w').asnumpy())
    [0.5 0.5]
    """

    def __init__(
        self,
        *,
        beta1: float = 0.6,
        beta2: float = 0.999,
        epsilon: float = 1e-8,
        **common: Unpack[Common],
    ) -> None:
        self._set_up({"beta1": beta1, "beta2": beta2, "epsilon": epsilon}, common)


class LAMB(BuiltIn):
    """Adam with a rate of its own for each layer.

    m and v as `Adam`'s; ``u = m/(1-beta1^t) / (sqrt(v/(1-beta2^t)) + epsilon) + wd*w``;
    ``w -= lr * norm(w)/norm(u) * u``, without the ratio if a norm is zero

    Yang You and others: "Large Batch Optimization for Deep Learning: Training BERT in 76 minutes",
    2019.

    Parameters
    ----------
    beta1, beta2 : float, default 0.9, 0.999
        What is kept of the mean of the gradients and of their squares.
    epsilon : float, default 1e-6
        Keeps the root away from zero.
    lower_bound, upper_bound : float, optional
        Limit norm(w).
    bias_correction : bool, default True
        Divides by ``1-beta1^t`` and ``1-beta2^t``.

    Examples
    --------
    >>> with kvstore.create() as kv:
    ...     kv.set_optimizer(kvstore.optimizer.LAMB(learning_rate=0.5))
    ...     kv.init('w', np.ones(2, 'float32'))
    ...     kv.push('w', np.ones(2, 'float32'))
    ...     print(kv.pull('w').asnumpy())
    [0.5 0.5]
    """

    def __init__(
        self,
        *,
        beta1: float = 0.9,
        beta2: float = 0.999,
        epsilon: float = 1e-6,
        lower_bound: float | None = None,
        upper_bound: float | None = None,
        bias_correction: bool = True,
        **common: Unpack[Common],
    ) -> None:
        own = {
            "beta1": beta1,
            "beta2": beta2,
            "epsilon": epsilon,
            "lower_bound": lower_bound,
            "upper_bound": upper_bound,
            "bias_correction": bias_correction,
        }
        self._set_up(own, common)


class Adam(BuiltIn):
    """Adaptive moments.

    ``g += wd*w`` before the limit; ``m = beta1*m + (1-beta1)*g; v = beta2*v + (1-beta2)*g²``;
    ``w -= lr*sqrt(1-beta2^t)/(1-beta1^t) * m/(sqrt(v) + epsilon)``

    Diederik Kingma, Jimmy Ba: "Adam: A Method for Stochastic Optimization", 2015.

    Parameters
    ----------
    beta1, beta2 : float, default 0.9, 0.999
        What is kept of the mean of the gradients and of their squares.
    epsilon : float, default 1e-8
        Keeps the root away from zero.
    lazy_update : bool, default True
        A row-sparse gradient touches only the rows that it has.

    Examples
    --------
    >>> with kvstore.create() as kv:
    ...     kv.set_optimizer(kvstore.optimizer.Adam(learning_rate=0.5))
    ...     kv.init('w', np.ones(2, 'float32'))
    ...     kv.push('w', np.ones(2, 'float32'))
    ...     print(kv.pull('w').asnumpy())
    [0.4999969 0.4999969]
    """

    def __init__(
        self,
        *,
        beta1: float = 0.9,
        beta2: float = 0.999,
        epsilon: float = 1e-8,
        lazy_update: bool = True,
        **common: Unpack[Common],
    ) -> None:
        own = {
            "beta1": beta1,
            "beta2": beta2,
            "epsilon": epsilon,
            "lazy_update": lazy_update,
        }
        self._set_up(own, common)


class AdamW(BuiltIn):
    """Adam with the decay apart from the gradient.

    m and v as `Adam`'s; ``w -= eta*(a*m/(sqrt(v) + epsilon) + wd*w)`` with
    ``a = lr*sqrt(1-beta2^t)/(1-beta1^t)``. The decay is not multiplied by lr.

    Ilya Loshchilov, Frank Hutter: "Decoupled Weight Decay Regularization", 2019.

    Parameters
    ----------
    beta1, beta2 : float, default 0.9, 0.999
        What is kept of the mean of the gradients and of their squares.
    epsilon : float, default 1e-8
        Keeps the root away from zero.
    eta : float, default 1
        A factor for step and decay.
    correct_bias : bool, default True
        False: ``a = lr``.

    Examples
    --------
    >>> with kvstore.create() as kv:
    ...     kv.set_optimizer(kvstore.optimizer.AdamW(learning_rate=0.5))
    ...     kv.init('w', np.ones(2, 'float32'))
    ...     kv.push('w', np.ones(2, 'float32'))
    ...     print(kv.pull('w').asnumpy())
    [0.4999969 0.4999969]
    """

    def __init__(
        self,
        *,
        beta1: float = 0.9,
        beta2: float = 0.999,
        epsilon: float = 1e-8,
        eta: float = 1.0,
        correct_bias: bool = True,
        **common: Unpack[Common],
    ) -> None:
        own = {
            "beta1": beta1,
            "beta2": beta2,
            "epsilon": epsilon,
            "eta": eta,
            "correct_bias": correct_bias,
        }
        self._set_up(own, common)


class AdaGrad(BuiltIn):
    """A rate for each element that falls with its gradients.

    ``h += g²; w -= lr*(g/sqrt(h + eps) + wd*w)``; a row-sparse gradient touches only its rows

    John Duchi, Elad Hazan, Yoram Singer: "Adaptive Subgradient Methods for Online Learning and
    Stochastic Optimization", 2011.

    Parameters
    ----------
    eps : float, default 1e-7
        Keeps the root away from zero.

    Examples
    --------
    >>> with kvstore.create() as kv:
    ...     kv.set_optimizer(kvstore.optimizer.AdaGrad(learning_rate=0.5))
    ...     kv.init('w', np.ones(2, 'float32'))
    ...     kv.push('w', np.ones(2, 'float32'))
    ...     print(kv.pull('w').asnumpy())
    [0.5 0.5]
    """

    def __init__(self, *, eps: float = 1e-7, **common: Unpack[Common]) -> None:
        self._set_up({"eps": eps}, common)


class GroupAdaGrad(BuiltIn):
    """`AdaGrad` with one number for each row of an array.

    ``h += mean of the row's g²; w -= lr*g/sqrt(h + eps)``; there is no decay, wd must be 0

    After John Duchi, Elad Hazan, Yoram Singer: "Adaptive Subgradient Methods for Online Learning
    and Stochastic Optimization", 2011.

    Parameters
    ----------
    eps : float, default 1e-5
        Keeps the root away from zero.

    Examples
    --------
    >>> with kvstore.create() as kv:
    ...     kv.set_optimizer(kvstore.optimizer.GroupAdaGrad(learning_rate=0.5))
    ...     kv.init('w', np.ones((1, 2), 'float32'))
    ...     kv.push('w', np.ones((1, 2), 'float32'))
    ...     print(kv.pull('w').asnumpy())
    [[0.5000025 0.5000025]]
    """

    def __init__(self, *, eps: float = 1e-5, **common: Unpack[Common]) -> None:
        self._set_up({"eps": eps}, common)


class RMSProp(BuiltIn):
    """Divides by the root of the mean square of the last gradients.

    ``g += wd*w`` before the limit; ``n = gamma1*n + (1-gamma1)*g²; w -= lr*g/sqrt(n + epsilon)``

    ``centered``: ``a = gamma1*a + (1-gamma1)*g``,
    ``delta = gamma2*delta - lr*g/sqrt(n - a² + epsilon); w += delta``

    Tijmen Tieleman, Geoffrey Hinton: "Lecture 6.5 - RMSProp", 2012; centered: Alex Graves:
    "Generating Sequences With Recurrent Neural Networks", 2013.

    Parameters
    ----------
    gamma1 : float, default 0.9
        What is kept of the means.
    gamma2 : float, default 0.9
        What is kept of the step before, if centered.
    epsilon : float, default 1e-8
        Keeps the root away from zero.
    centered : bool, default False
        Divides by the variance instead of the mean square.
    clip_weights : float, optional
        Limits each weight to ±clip_weights.

    Examples
    --------
    >>> with kvstore.create() as kv:
    ...     kv.set_optimizer(kvstore.optimizer.RMSProp(learning_rate=0.5))
    ...     kv.init('w', np.ones(2, 'float32'))
    ...     kv.push('w', np.ones(2, 'float32'))
    ...     print(kv.pull('w').asnumpy())
    [-0.5811385 -0.5811385]
    """

    def __init__(
        self,
        *,
        gamma1: float = 0.9,
        gamma2: float = 0.9,
        epsilon: float = 1e-8,
        centered: bool = False,
        clip_weights: float | None = None,
        **common: Unpack[Common],
    ) -> None:
        own = {
            "gamma1": gamma1,
            "gamma2": gamma2,
            "epsilon": epsilon,
            "centered": centered,
            "clip_weights": clip_weights,
        }
        self._set_up(own, common)


class AdaDelta(BuiltIn):
    """Steps in proportion to the steps before; there is no rate.

    ``a = rho*a + (1-rho)*g²; d = sqrt(b + epsilon)/sqrt(a + epsilon)*g``;
    ``b = rho*b + (1-rho)*d²; w -= d + wd*w``

    Matthew Zeiler: "ADADELTA: An Adaptive Learning Rate Method", 2012.

    Parameters
    ----------
    rho : float, default 0.9
        What is kept of the mean squares.
    epsilon : float, default 1e-5
        Keeps the roots away from zero.

    Examples
    --------
    >>> with kvstore.create() as kv:
    ...     kv.set_optimizer(kvstore.optimizer.AdaDelta())
    ...     kv.init('w', np.ones(2, 'float32'))
    ...     kv.push('w', np.ones(2, 'float32'))
    ...     print(kv.pull('w').asnumpy())
    [0.9900005 0.9900005]
    """

    def __init__(
        self,
        *,
        rho: float = 0.9,
        epsilon: float = 1e-5,
        **common: Unpack[Common],
    ) -> None:
        self._set_up({"rho": rho, "epsilon": epsilon}, common)


class Ftrl(BuiltIn):
    """Follow the regularized leader: weights with a weak gradient become exactly 0.

    ``z += g - (sqrt(n + g²) - sqrt(n))*w/lr; n += g²``; w is 0 where ``|z| <= lamda1``, else
    ``(sign(z)*lamda1 - z) / ((beta + sqrt(n))/lr + wd)``

    H. Brendan McMahan and others: "Ad Click Prediction: a View from the Trenches", 2013.

    Parameters
    ----------
    lamda1 : float, default 0.01
        The strength of the pull to zero.
    beta : float, default 1
        Slows down the first steps.

    Examples
    --------
    >>> with kvstore.create() as kv:
    ...     kv.set_optimizer(kvstore.optimizer.Ftrl(learning_rate=0.5))
    ...     kv.init('w', np.ones(2, 'float32'))
    ...     kv.push('w', np.ones(2, 'float32'))
    ...     print(kv.pull('w').asnumpy())
    [0.2475 0.2475]
    """

    def __init__(
        self,
        *,
        lamda1: float = 0.01,
        beta: float = 1.0,
        **common: Unpack[Common],
    ) -> None:
        self._set_up({"lamda1": lamda1, "beta": beta}, common)


class Adamax(BuiltIn):
    """`Adam` with the largest gradient in place of the mean square.

    ``g += wd*w`` before the limit; ``m = beta1*m + (1-beta1)*g; u = max(beta2*u, |g|)``;
    ``w -= lr/(1-beta1^t) * m/u``; an element that never had a gradient stays

    Diederik Kingma, Jimmy Ba: "Adam: A Method for Stochastic Optimization", 2015, section 7.1.

    Parameters
    ----------
    beta1, beta2 : float, default 0.9, 0.999
        What is kept of the mean of the gradients and of the largest.

    Examples
    --------
    >>> with kvstore.create() as kv:
    ...     kv.set_optimizer(kvstore.optimizer.Adamax(learning_rate=0.5))
    ...     kv.init('w', np.ones(2, 'float32'))
    ...     kv.push('w', np.ones(2, 'float32'))
    ...     print(kv.pull('w').asnumpy())
    [0.5 0.5]
    """

    def __init__(
        self,
        *,
        beta1: float = 0.9,
        beta2: float = 0.999,
        **common: Unpack[Common],
    ) -> None:
        self._set_up({"beta1": beta1, "beta2": beta2}, common)


class Nadam(BuiltIn):
    """`Adam` with Nesterov's momentum.

    m and v as `Adam`'s; ``q(t) = beta1*(1 - 0.5*0.96^(t*schedule_decay)); P *= q(t)``;
    ``s = (1-q(t))*g/(1-P) + q(t+1)*m/(1-P*q(t+1))``;
    ``w -= lr*s / (sqrt(v/(1-beta2^t)) + epsilon)``. P is one number for all keys.

    Timothy Dozat: "Incorporating Nesterov Momentum into Adam", 2016.

    Parameters
    ----------
    beta1, beta2 : float, default 0.9, 0.999
        What is kept of the mean of the gradients and of their squares.
    epsilon : float, default 1e-8
        Keeps the root away from zero.
    schedule_decay : float, default 0.004
        How fast the momentum comes up.

    Examples
    --------
    >>> with kvstore.create() as kv:
    ...     kv.set_optimizer(kvstore.optimizer.Nadam(learning_rate=0.5))
    ...     kv.init('w', np.ones(2, 'float32'))
    ...     kv.push('w', np.ones(2, 'float32'))
    ...     print(kv.pull('w').asnumpy())
    [0.4717741 0.4717741]
    """

    def __init__(
        self,
        *,
        beta1: float = 0.9,
        beta2: float = 0.999,
        epsilon: float = 1e-8,
        schedule_decay: float = 0.004,
        **common: Unpack[Common],
    ) -> None:
        own = {
            "beta1": beta1,
            "beta2": beta2,
            "epsilon": epsilon,
            "schedule_decay": schedule_decay,
        }
        self._set_up(own, common)
