"""Schedules: what the learning rate is after so many updates.

Keywords and values are those of MXNet 1.9.1. A schedule keeps its position in one tuple that is
replaced at the end of a call: two threads that ask at once both compute from a whole position.
"""

import abc
import itertools
import math
import numbers
import operator
from typing import Any, ClassVar

from .errors import InvalidArgumentError

__all__ = [
    "CosineScheduler",
    "FactorScheduler",
    "LRScheduler",
    "MultiFactorScheduler",
    "PolyScheduler",
]

_MODES = ("linear", "constant")


def _real(owner: str, name: str, value: Any, low: float = -math.inf, high: float = math.inf) -> Any:
    """`value`, a finite number from `low` to `high`."""
    if not isinstance(value, numbers.Real) or isinstance(value, bool):
        raise InvalidArgumentError(f"{owner}: {name} is a number, not {value!r}")
    number = int(value) if isinstance(value, numbers.Integral) else float(value)
    if not (math.isfinite(number) and low <= number <= high):
        bounds = [f"at least {low:g}"] * (low > -math.inf) + [f"at most {high:g}"] * (
            high < math.inf
        )
        raise InvalidArgumentError(
            f"{owner}: {name} is {' and '.join(bounds) or 'finite'}, not {value!r}"
        )
    return number


def _count(owner: str, name: str, value: Any, low: int) -> int:
    try:
        number = operator.index(value)
    except TypeError:
        number = low - 1
    if isinstance(value, bool) or not low <= number < 2**63:
        raise InvalidArgumentError(
            f"{owner}: {name} is a whole number of at least {low}, not {value!r}"
        )
    return number


class LRScheduler(abc.ABC):
    """The base of the schedules; ``schedule(num_update)`` gives the rate.

    ``num_update`` is the largest number of pushes of any key. Up to ``warmup_steps`` the rate goes
    from ``warmup_begin_lr`` to ``base_lr`` (``warmup_mode`` ``'linear'``) or stays at
    ``warmup_begin_lr`` (``'constant'``).

    A schedule of your own is a function, or a class derived from this one:

    >>> class Halving(kvstore.lr_scheduler.LRScheduler):
    ...     def __call__(self, num_update):
    ...         return self.base_lr * 0.5**num_update
    >>> Halving(base_lr=0.8)(2)
    0.2
    """

    _arguments: dict[str, Any]
    _position: tuple[Any, ...]  # base_lr, and what else the class keeps
    _KEPT: ClassVar[tuple[str, ...]] = ()  # the names of what else

    def __init__(
        self,
        base_lr: float = 0.01,
        warmup_steps: int = 0,
        warmup_begin_lr: float = 0,
        warmup_mode: str = "linear",
    ) -> None:
        self._begin({}, base_lr, warmup_steps, warmup_begin_lr, warmup_mode)

    def _begin(
        self,
        own: dict[str, Any],
        base_lr: float,
        warmup_steps: int,
        warmup_begin_lr: float,
        warmup_mode: str,
    ) -> None:
        name = type(self).__name__
        base_lr = _real(name, "base_lr", base_lr)
        if warmup_mode not in _MODES:
            raise InvalidArgumentError(
                f"{name}: warmup_mode is 'linear' or 'constant', not {warmup_mode!r}"
            )
        self.__dict__["_arguments"] = {
            **own,
            "base_lr": base_lr,
            "warmup_steps": _count(name, "warmup_steps", warmup_steps, 0),
            "warmup_begin_lr": _real(name, "warmup_begin_lr", warmup_begin_lr, high=base_lr),
            "warmup_mode": warmup_mode,
        }
        self._position = (base_lr, *([0] * len(self._KEPT)))

    @abc.abstractmethod
    def __call__(self, num_update: int) -> float:
        """The rate when a key has been pushed ``num_update`` times."""

    def _warmup(self, num_update: int) -> float:
        begin: float = self.warmup_begin_lr
        if self.warmup_mode == "constant":
            return begin
        rise: float = self._arguments["base_lr"] - begin
        return begin + rise * float(num_update) / float(self.warmup_steps)

    @property
    def base_lr(self) -> float:
        """The rate that the schedule goes on from; it may be set."""
        rate: float = self._position[0]
        return rate

    @base_lr.setter
    def base_lr(self, rate: float) -> None:
        rate = _real(type(self).__name__, "base_lr", rate)
        self._position = (rate, *self._position[1:])

    def state_dict(self) -> dict[str, Any]:
        """Where the schedule stands: numbers that ``load_state_dict`` of an equal one takes.

        >>> schedule = kvstore.lr_scheduler.FactorScheduler(step=2, factor=0.5, base_lr=0.8)
        >>> schedule(5)
        0.2
        >>> schedule.state_dict()
        {'base_lr': 0.2, 'count': 4}
        """
        return dict(zip(("base_lr", *self._KEPT), self._position, strict=True))

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from where the schedule stood that ``state_dict`` was asked of.

        >>> schedule = kvstore.lr_scheduler.FactorScheduler(step=2, factor=0.5, base_lr=0.8)
        >>> schedule.load_state_dict({'base_lr': 0.2, 'count': 4})
        >>> schedule(6), schedule(7)
        (0.2, 0.1)
        """
        self._position = self._checked(state)

    def _checked(self, state: Any) -> tuple[Any, ...]:
        name = type(self).__name__
        names = ("base_lr", *self._KEPT)
        if not isinstance(state, dict) or state.keys() != set(names):
            raise InvalidArgumentError(f"the state of a {name} has {', '.join(names)}: {state!r}")
        return (
            _real(name, "base_lr", state["base_lr"]),
            *(_count(name, kept, state[kept], 0) for kept in self._KEPT),
        )

    def __getattr__(self, name: str) -> Any:
        try:
            return self.__dict__["_arguments"][name]
        except KeyError:
            raise AttributeError(f"{type(self).__name__!r} has no attribute {name!r}") from None

    def __setattr__(self, name: str, value: Any) -> None:
        if name != "base_lr" and name in self.__dict__.get("_arguments", ()):
            raise AttributeError(f"{name} of a {type(self).__name__} is fixed; base_lr may be set")
        object.__setattr__(self, name, value)

    def __eq__(self, other: object) -> bool:
        return (
            type(self) is type(other)
            and isinstance(other, LRScheduler)
            and self.__dict__ == other.__dict__
        )

    __hash__ = None  # type: ignore[assignment] # it has a position

    def __repr__(self) -> str:
        shown = {**self._arguments, "base_lr": self.base_lr}
        if not shown["warmup_steps"]:
            shown = {k: v for k, v in shown.items() if not k.startswith("warmup_")}
        return f"{type(self).__name__}({', '.join(f'{k}={v!r}' for k, v in shown.items())})"


class FactorScheduler(LRScheduler):
    """Multiplies the rate by ``factor`` after every ``step`` updates, down to ``stop_factor_lr``.

    The steps are counted from update 0, also with a warm-up. A smaller ``num_update`` asked later
    does not raise the rate again.

    >>> schedule = kvstore.lr_scheduler.FactorScheduler(step=2, factor=0.5, base_lr=0.8)
    >>> [schedule(n) for n in (1, 2, 3, 4, 5)]
    [0.8, 0.8, 0.4, 0.4, 0.2]
    """

    _KEPT = ("count",)

    def __init__(
        self,
        step: int,
        factor: float = 1,
        stop_factor_lr: float = 1e-8,
        base_lr: float = 0.01,
        warmup_steps: int = 0,
        warmup_begin_lr: float = 0,
        warmup_mode: str = "linear",
    ) -> None:
        name = type(self).__name__
        own = {
            "step": _count(name, "step", step, 1),
            "factor": _real(name, "factor", factor, 0, 1),
            "stop_factor_lr": _real(name, "stop_factor_lr", stop_factor_lr),
        }
        self._begin(own, base_lr, warmup_steps, warmup_begin_lr, warmup_mode)

    def __call__(self, num_update: int) -> float:
        if num_update < self.warmup_steps:
            return self._warmup(num_update)
        step, factor, stop = self.step, self.factor, self.stop_factor_lr
        rate, count = self._position
        while num_update > count + step:
            count += step
            before, rate = rate, max(rate * factor, stop)
            if rate == before:  # and so it stays
                count += (num_update - 1 - count) // step * step
        self._position = (rate, count)
        return float(rate)


class MultiFactorScheduler(LRScheduler):
    """Multiplies the rate by ``factor`` after each of the updates that ``step`` lists.

    They are counted from update 0, also with a warm-up. A smaller ``num_update`` asked later does
    not raise the rate again.

    >>> schedule = kvstore.lr_scheduler.MultiFactorScheduler([2, 4], factor=0.5, base_lr=0.8)
    >>> [schedule(n) for n in (1, 2, 3, 4, 5)]
    [0.8, 0.8, 0.4, 0.4, 0.2]
    """

    _KEPT = ("cur_step_ind",)

    def __init__(
        self,
        step: list[int],
        factor: float = 1,
        base_lr: float = 0.01,
        warmup_steps: int = 0,
        warmup_begin_lr: float = 0,
        warmup_mode: str = "linear",
    ) -> None:
        name = type(self).__name__
        if not isinstance(step, (list, tuple)) or not step:
            raise InvalidArgumentError(f"{name}: step is a list of whole numbers, not {step!r}")
        steps = tuple(_count(name, "each step", s, 1) for s in step)
        if any(b <= a for a, b in itertools.pairwise(steps)):
            raise InvalidArgumentError(f"{name}: the steps increase, unlike {step!r}")
        own = {"step": steps, "factor": _real(name, "factor", factor, 0, 1)}
        self._begin(own, base_lr, warmup_steps, warmup_begin_lr, warmup_mode)

    def __call__(self, num_update: int) -> float:
        if num_update < self.warmup_steps:
            return self._warmup(num_update)
        rate, at = self._position
        while at < len(self.step) and num_update > self.step[at]:
            at += 1
            rate *= self.factor
        self._position = (rate, at)
        return float(rate)


class _Falling(LRScheduler):
    """From the rate it was built with down to ``final_lr``, along a curve."""

    def _start(self, own: dict[str, Any], *common: Any) -> None:
        name = type(self).__name__
        own["max_update"] = _count(name, "max_update", own["max_update"], 1)
        own["final_lr"] = _real(name, "final_lr", own["final_lr"])
        self._begin(own, *common)
        if self.warmup_steps >= self.max_update:
            raise InvalidArgumentError(
                f"{name}: max_update is more than warmup_steps: "
                f"{self.max_update} against {self.warmup_steps}"
            )

    @abc.abstractmethod
    def _fall(self, done: float) -> float:
        """How much of the way down is still ahead, 1 to 0, when `done` of the updates are over."""

    def __call__(self, num_update: int) -> float:
        if num_update < self.warmup_steps:
            return self._warmup(num_update)
        if num_update <= self.max_update:
            top, final = self._arguments["base_lr"], self.final_lr
            done = (num_update - self.warmup_steps) / (self.max_update - self.warmup_steps)
            self._position = (final + (top - final) * self._fall(done),)
        return self.base_lr


class PolyScheduler(_Falling):
    """``final_lr + (base_lr - final_lr) * (1 - n/N)**pwr`` until ``max_update``, then what it was.

    n and N are counted from the end of the warm-up. The curve keeps the ``base_lr`` that it was
    built with.

    >>> schedule = kvstore.lr_scheduler.PolyScheduler(max_update=4, base_lr=0.8, pwr=1)
    >>> [schedule(n) for n in (0, 1, 2, 4, 9)]
    [0.8, 0.6000000000000001, 0.4, 0.0, 0.0]
    """

    def __init__(
        self,
        max_update: int,
        base_lr: float = 0.01,
        pwr: float = 2,
        final_lr: float = 0,
        warmup_steps: int = 0,
        warmup_begin_lr: float = 0,
        warmup_mode: str = "linear",
    ) -> None:
        own = {
            "max_update": max_update,
            "pwr": _real(type(self).__name__, "pwr", pwr, 0),
            "final_lr": final_lr,
        }
        self._start(own, base_lr, warmup_steps, warmup_begin_lr, warmup_mode)

    def _fall(self, done: float) -> float:
        left: float = (1 - done) ** self.pwr
        return left


class CosineScheduler(_Falling):
    """``final_lr + (base_lr - final_lr) * (1 + cos(pi * n/N)) / 2`` until ``max_update``, then what
    it was.

    n and N are counted from the end of the warm-up. The curve keeps the ``base_lr`` that it was
    built with. Ilya Loshchilov, Frank Hutter: "SGDR: Stochastic Gradient Descent with Warm
    Restarts", 2017.

    >>> schedule = kvstore.lr_scheduler.CosineScheduler(max_update=4, base_lr=0.8)
    >>> [round(schedule(n), 3) for n in (0, 1, 2, 4, 9)]
    [0.8, 0.683, 0.4, 0.0, 0.0]
    """

    def __init__(
        self,
        max_update: int,
        base_lr: float = 0.01,
        final_lr: float = 0,
        warmup_steps: int = 0,
        warmup_begin_lr: float = 0,
        warmup_mode: str = "linear",
    ) -> None:
        own = {"max_update": max_update, "final_lr": final_lr}
        self._start(own, base_lr, warmup_steps, warmup_begin_lr, warmup_mode)

    def _fall(self, done: float) -> float:
        return (1 + math.cos(math.pi * done)) / 2


_BUILT_IN = {
    klass.__name__: klass
    for klass in (FactorScheduler, MultiFactorScheduler, PolyScheduler, CosineScheduler)
}


def _pack(schedule: Any) -> dict[str, Any] | None:
    """A built-in schedule as JSON holds it; None for any other."""
    if type(schedule) not in _BUILT_IN.values():
        return None
    return {
        "class": type(schedule).__name__,
        "arguments": schedule._arguments,
        "state": schedule.state_dict(),
    }


def _unpack(packed: Any) -> LRScheduler:
    """The schedule that `_pack` has described; InvalidArgumentError for anything else."""
    try:
        klass = _BUILT_IN[packed["class"]]
        schedule: LRScheduler = klass(**packed["arguments"])
        state = packed["state"]
    except (KeyError, TypeError) as error:
        raise InvalidArgumentError(f"{packed!r} describes no schedule") from error
    schedule.load_state_dict(state)
    return schedule
