"""What every optimizer has: numbers that were checked, multipliers of keys, a schedule; and the
registry of users' own.

The names, ranges and defaults of the numbers come from the C core, where the arithmetic is. An
object never changes once it is made, so a store, the user and a file may share one; how far the
training has come belongs to the store.
"""

from __future__ import annotations

import difflib
import inspect
import math
import numbers
import operator
import warnings
from collections.abc import Iterable, Mapping
from contextvars import ContextVar
from functools import cache
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, TypedDict, TypeVar

from . import _core
from .errors import ArrayTypeError, InvalidArgumentError
from .lr_scheduler import _pack, _unpack

if TYPE_CHECKING:
    from collections.abc import Callable

    from typing_extensions import Self, Unpack

Key = int | str

FLAGS = ("multi_precision", "lazy_update")
_ALIASES = {"lr": "learning_rate", "param_idx2name": "names"}
_RATE = 0.01  # of users' classes, as MXNet's


class Common(TypedDict, total=False):
    """The keywords of every optimizer."""

    learning_rate: float | None
    lr: float | None
    wd: float
    rescale_grad: float
    clip_gradient: float | None
    lr_scheduler: Callable[[int], float] | None
    begin_num_update: int
    lr_mult: Mapping[Any, float] | None
    wd_mult: Mapping[Any, float] | None
    names: Mapping[Any, str] | None
    param_idx2name: Mapping[Any, str] | None
    multi_precision: bool


COMMON = tuple(Common.__annotations__)
FIXED = (*COMMON, "num_update")


class Push(NamedTuple):
    """The push under way, for the helpers of a user's optimizer."""

    optimizer: Optimizer
    counts: Mapping[Any, int]
    num_update: int
    rate: float


# Which push this thread is in; a user's update may itself push to another key.
push_under_way: ContextVar[Push | None] = ContextVar("push_under_way", default=None)


def nearest(word: str, words: Iterable[str]) -> str:
    near = difflib.get_close_matches(word, list(words), 1, 0.4)
    return f"; did you mean {near[0]!r}?" if near else ""


@cache
def _parameters(name: str | None) -> dict[str, tuple[str, Any]]:
    """Kind and default of the numbers of a built-in class; None: of a user's."""
    built_in = None if name is None else _core.optimizer_classes()[name]
    known = {
        row[0]: (row[1], row[2])
        for row in [*_core.optimizer_common(), *(built_in["params"] if built_in else ())]
    }
    rate = _RATE if built_in is None else built_in["learning_rate"]
    known["learning_rate"] = ("number", rate)
    known["multi_precision"] = ("flag", False)
    known["lazy_update"] = ("flag", True)
    return known


def _as_number(owner: str, name: str, kind: str, value: Any) -> Any:
    """`value` as a plain Python object of the kind; ranges are the core's to check."""
    if kind == "choice":
        if not isinstance(value, str):
            raise InvalidArgumentError(f"{owner}: {name} is a name, not {value!r}")
        return value
    if kind == "optional" and value is None:
        return None
    if type(value).__name__ in ("bool", "bool_"):  # NumPy has one too
        if kind == "flag":
            return bool(value)
    elif kind == "flag":
        if isinstance(value, numbers.Real) and value in (0, 1):
            return bool(value)
    elif isinstance(value, numbers.Integral) and kind == "count":
        return int(value)
    elif isinstance(value, numbers.Real):
        try:
            return float(value)
        except OverflowError:
            return math.inf  # which is out of every range
    what = {"flag": "True or False", "optional": "a number or None", "count": "a whole number"}
    raise InvalidArgumentError(f"{owner}: {name} is {what.get(kind, 'a number')}, not {value!r}")


def _check(kind: str | None, owner: str, checked: dict[str, Any]) -> None:
    try:
        _core.optimizer_check(kind or "test", checked)
    except InvalidArgumentError as error:
        if kind is not None:
            raise
        raise InvalidArgumentError(f"{owner}{str(error).removeprefix('Test')}") from None


def as_key(owner: str, name: str, key: Any) -> Key:
    if isinstance(key, str) and key:
        return str(key)
    try:
        if isinstance(key, bool):
            raise TypeError
        number = operator.index(key)
    except TypeError:
        raise ArrayTypeError(f"{owner}: {name} has keys of the store, not {key!r}") from None
    if not -(2**63) <= number < 2**63:
        raise InvalidArgumentError(f"{owner}: a key has 64 bits, unlike {key!r} in {name}")
    return number


def _as_dict(owner: str, name: str, given: Any) -> dict[Key, Any]:
    if given is None:
        return {}
    if not isinstance(given, Mapping):
        raise InvalidArgumentError(f"{owner}: {name} is a dict, not {given!r}")
    return {as_key(owner, name, key): value for key, value in given.items()}


def _as_multipliers(owner: str, name: str, given: Any) -> dict[Key, float]:
    factors = _as_dict(owner, name, given)
    for key, value in factors.items():
        factor = _as_number(owner, f"{name}[{key!r}]", "number", value)
        if not math.isfinite(factor):
            raise InvalidArgumentError(f"{owner}: {name}[{key!r}] is finite, not {value!r}")
        factors[key] = factor
    return factors


def _as_names(owner: str, given: Any) -> dict[Key, str]:
    names = _as_dict(owner, "names", given)
    for key, name in names.items():
        if not isinstance(name, str):
            raise InvalidArgumentError(f"{owner}: names[{key!r}] is a str, not {name!r}")
    return names


class Optimizer:
    """The base of all optimizers; derive from it to write one in Python.

    ``create_state(key, weight)`` gives what is to be kept with a key (None, an array, or a list,
    tuple or dict of them); ``update(key, weight, grad, state)`` changes ``weight`` in place. Both
    get NumPy arrays, ``grad`` a ``kvstore.RowSparse`` where the push is one. Inside ``update``,
    ``self.lr`` is the scheduled rate, ``self.get_lr(key)`` and ``self.get_wd(key)`` are rate and
    decay with the key's multipliers, ``self.update_count(key)`` counts the pushes of the key.

    Parameters
    ----------
    learning_rate : float, optional
        The rate, also ``lr``. With a schedule it becomes the schedule's ``base_lr``.
    wd : float, default 0
        Weight decay.
    rescale_grad : float, default 1
        A factor for all gradients.
    clip_gradient : float, optional
        Limits each element of the gradient to ±clip_gradient.
    lr_scheduler : callable, optional
        One of ``kvstore.lr_scheduler``, or a function from the largest number of pushes of any key
        to the rate.
    begin_num_update : int, default 0
        Where the counts of pushes begin.
    lr_mult, wd_mult : dict, optional
        Factors for rate and decay of a key, by the key or by its name.
    names : dict, optional
        Names of keys, also ``param_idx2name``. A key that has a name, or is one, is not decayed
        unless the name ends in ``_weight`` or ``_gamma``; its ``wd_mult`` takes precedence.
    multi_precision : bool, default False
        Updates 16-bit weights through a float32 copy.

    Examples
    --------
    >>> class Momentumless(kvstore.optimizer.Optimizer):
    ...     def update(self, key, weight, grad, state):
    ...         weight -= self.get_lr(key) * (grad + self.get_wd(key) * weight)
    >>> with kvstore.create() as kv:
    ...     kv.set_optimizer(Momentumless(lr=0.5))
    ...     kv.init('w', np.ones(2, 'float32'))
    ...     kv.push('w', np.ones(2, 'float32'))
    ...     print(kv.pull('w').asnumpy())
    [0.5 0.5]
    """

    _KIND: ClassVar[str | None] = None  # the name of a built-in class
    _DECAYED: ClassVar[tuple[str, ...]] = ("_weight", "_gamma")
    _PLAIN_RATE: ClassVar[tuple[str, ...]] = ()  # LARS

    _numbers: dict[str, Any]
    _lr_mult: dict[Key, float]
    _wd_mult: dict[Key, float]
    _names: dict[Key, str]
    _schedule: Callable[[int], float] | None
    _begin: int
    _arguments: tuple[tuple[Any, ...], dict[str, Any], dict[str, Any]]  # the last: set later

    def __new__(cls, *args: Any, **keywords: Any) -> Self:
        new = object.__new__(cls)
        new.__dict__["_arguments"] = (args, keywords, {})
        return new

    def __init__(self, **common: Unpack[Common]) -> None:
        self._set_up({}, common)

    def create_state(self, key: Any, weight: Any) -> Any:
        """What is to be kept with ``key``, whose value is ``weight``: here nothing.

        >>> kvstore.optimizer.Optimizer().create_state('w', np.ones(2)) is None
        True
        """
        return None

    def get_lr(self, key: Any) -> float:
        """The rate of the push under way for ``key``: scheduled, times its ``lr_mult``.

        >>> kvstore.optimizer.Optimizer(lr=0.5).get_lr('w')
        Traceback (most recent call last):
        kvstore.errors.InvalidArgumentError: get_lr is for update, in the thread that runs it
        """
        return self._push("get_lr").rate * self._mult(self._lr_mult, key, 1.0)

    def get_wd(self, key: Any) -> float:
        """The decay for ``key``: ``wd`` times its ``wd_mult``.

        >>> kvstore.optimizer.Optimizer(wd=0.5, wd_mult={'b': 0}).get_wd('b')
        0.0
        """
        wd: float = self._numbers["wd"]
        return wd * self._key_wd_mult(key)

    def update_count(self, key: Any) -> int:
        """How often ``key`` has been pushed, the push under way included.

        >>> kvstore.optimizer.Optimizer().update_count('w')
        Traceback (most recent call last):
        kvstore.errors.InvalidArgumentError: update_count is for update, in the thread that runs it
        """
        return self._push("update_count").counts.get(key, self._begin)

    @property
    def num_update(self) -> int:
        """The largest number of pushes of any key, inside ``update``; else where it begins."""
        push = push_under_way.get()
        return push.num_update if push is not None and push.optimizer is self else self._begin

    @property
    def learning_rate(self) -> float | None:
        """The rate: inside ``update`` as scheduled, else what the schedule goes on from.

        None if the schedule is a function that does not tell.
        """
        push = push_under_way.get()
        if push is not None and push.optimizer is self:
            return push.rate
        if self._schedule is None:
            rate: float = self._numbers["learning_rate"]
            return rate
        return getattr(self._schedule, "base_lr", None)

    lr = learning_rate

    @property
    def lr_scheduler(self) -> Callable[[int], float] | None:
        """The schedule."""
        return self._schedule

    @property
    def begin_num_update(self) -> int:
        """Where the counts of pushes begin."""
        return self._begin

    @property
    def lr_mult(self) -> dict[Key, float]:
        """Factors of the rate, a copy."""
        return dict(self._lr_mult)

    @property
    def wd_mult(self) -> dict[Key, float]:
        """Factors of the decay, a copy."""
        return dict(self._wd_mult)

    @property
    def names(self) -> dict[Key, str]:
        """Names of keys, a copy."""
        return dict(self._names)

    # ------------------------------------------------------------------ making and changing

    def _set_up(self, own: dict[str, Any], common: Common) -> None:
        given: dict[str, Any] = dict(common)
        owner = type(self).__name__
        for alias, name in _ALIASES.items():
            if alias in given:
                if given.get(name) is not None:
                    raise InvalidArgumentError(f"{owner}: {alias} and {name} are the same")
                given[name] = given.pop(alias)
        for name in given:
            if name not in COMMON:
                known = {*COMMON, *own, *inspect.signature(type(self).__init__).parameters}
                near = nearest(name, known - {"self", "common", "kwargs"})
                raise InvalidArgumentError(f"{owner} has no argument {name!r}{near}")
        rate = given.pop("learning_rate", None)
        schedule = given.pop("lr_scheduler", None)
        self._fill({**own, **given, **({} if rate is None else {"learning_rate": rate})}, schedule)
        if rate is not None and schedule is not None:
            if not hasattr(schedule, "base_lr"):
                raise InvalidArgumentError(
                    f"{owner}: a schedule that has no base_lr takes no learning_rate"
                )
            schedule.base_lr = self._numbers["learning_rate"]

    def _fill(self, given: dict[str, Any], schedule: Any) -> None:
        owner = type(self).__name__
        if schedule is not None and not callable(schedule):
            raise InvalidArgumentError(f"{owner}: lr_scheduler is a callable, not {schedule!r}")
        begin = _as_number(owner, "begin_num_update", "count", given.pop("begin_num_update", 0))
        if not (isinstance(begin, int) and 0 <= begin < 2**62):
            raise InvalidArgumentError(
                f"{owner}: begin_num_update is a whole number from 0, not {begin!r}"
            )
        fields: dict[str, Any] = {
            "_lr_mult": _as_multipliers(owner, "lr_mult", given.pop("lr_mult", None)),
            "_wd_mult": _as_multipliers(owner, "wd_mult", given.pop("wd_mult", None)),
            "_names": _as_names(owner, given.pop("names", None)),
            "_schedule": schedule,
            "_begin": begin,
        }
        parameters = _parameters(self._KIND)
        filled = {
            name: _as_number(owner, name, kind, given.pop(name, default))
            for name, (kind, default) in parameters.items()
            if name != "lazy_update" or name in given
        }
        if given:
            raise InvalidArgumentError(f"{owner} has no argument {next(iter(given))!r}")
        checked = {name: value for name, value in filled.items() if name not in FLAGS}
        _check(self._KIND, owner, checked)
        self.__dict__.update(fields, _numbers=filled)

    def _replace(self, changes: Mapping[str, Any]) -> Self:
        """A new object of the same schedule with other numbers."""
        given, changes = changes, {_ALIASES.get(n, n): value for n, value in changes.items()}
        if len(changes) < len(given):
            raise InvalidArgumentError("lr and learning_rate are the same")
        known = {*self._numbers, "lr_mult", "wd_mult"}
        own = {name: value for name, value in changes.items() if name not in known}
        owner = type(self).__name__
        for name in own:
            own_too = self._KIND is None and name not in FIXED and not name.startswith("_")
            if not (own_too and hasattr(self, name)):
                raise InvalidArgumentError(f"{owner} has no number {name!r}{nearest(name, known)}")
        if changes.get("learning_rate", 0) is None:
            raise InvalidArgumentError(f"{owner}: learning_rate is a number, not None")
        kept = {
            **self._numbers,
            "lr_mult": self._lr_mult,
            "wd_mult": self._wd_mult,
            "names": self._names,
            "begin_num_update": self._begin,
        }
        new = object.__new__(type(self))
        args, keywords, later = self._arguments
        new.__dict__.update(self.__dict__, _arguments=(args, keywords, {**later, **own}))
        new._fill({**kept, **{n: v for n, v in changes.items() if n in known}}, self._schedule)
        for name, value in own.items():
            setattr(new, name, value)
        return new

    # -------------------------------------------------------------------------- for the store

    def _push(self, call: str) -> Push:
        push = push_under_way.get()
        if push is None or push.optimizer is not self:
            raise InvalidArgumentError(f"{call} is for update, in the thread that runs it")
        return push

    def _mult(self, factors: dict[Key, float], key: Any, otherwise: float) -> float:
        if key in factors:
            return factors[key]
        return factors.get(self._names.get(key, ""), otherwise)

    def _key_wd_mult(self, key: Any) -> float:
        named = key in self._names or key in self._names.values()
        decayed = not named or self._names.get(key, str(key)).endswith(self._DECAYED)
        return self._mult(self._wd_mult, key, 1.0 if decayed else 0.0)

    def _multipliers(self) -> list[tuple[Any, float, float, bool]]:
        """(key, lr_mult, wd_mult, whether LARS leaves its rate alone) of all keys mentioned."""
        keys = dict.fromkeys([*self._lr_mult, *self._wd_mult, *self._names, *self._names.values()])
        return [
            (
                key,
                self._mult(self._lr_mult, key, 1.0),
                self._key_wd_mult(key),
                self._names.get(key, str(key)).endswith(self._PLAIN_RATE),
            )
            for key in keys
            if key != ""
        ]

    def _for_core(self) -> tuple[str, dict[str, Any], dict[str, bool]]:
        """Kind, numbers and flags; of one in Python the common ones."""
        numbers = {n: v for n, v in self._numbers.items() if n not in FLAGS}
        flags = {n: v for n, v in self._numbers.items() if n in FLAGS}
        return kind_of(type(self)), numbers, flags

    def _pack(self) -> dict[str, Any]:
        """The optimizer as JSON holds it; raises for what cannot be written."""
        owner = type(self).__name__
        schedule = _pack(self._schedule)
        if self._schedule is not None and schedule is None:
            raise InvalidArgumentError(
                f"{owner}: a schedule of your own cannot be written to a file: {self._schedule!r}"
            )
        mappings = ("lr_mult", "wd_mult", "names")
        packed: dict[str, Any] = {
            name: list(map(list, getattr(self, name).items())) for name in mappings
        }
        packed |= {"schedule": schedule, "begin": self._begin, "numbers": self._numbers}
        if self._KIND is None:
            args, keywords, later = self._arguments
            if args:
                raise InvalidArgumentError(f"{owner} was not made with keywords alone: {args!r}")
            left_out = (*mappings, "param_idx2name", "lr_scheduler")
            packed["keywords"] = {n: v for n, v in keywords.items() if n not in left_out}
            packed["later"] = later
        return packed

    @classmethod
    def _unpack(cls, packed: Any) -> Self:
        """The optimizer that `_pack` has described; InvalidArgumentError for anything else."""
        try:
            schedule = None if packed["schedule"] is None else _unpack(packed["schedule"])
            given = {name: dict(packed[name]) for name in ("lr_mult", "wd_mult", "names")}
            given |= {**packed["numbers"], "begin_num_update": packed["begin"]}
            if cls._KIND is None:
                new = cls(**packed["keywords"])._replace(packed["later"])
            else:
                new = cls.__new__(cls)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise InvalidArgumentError(f"this makes no {cls.__name__}: {error!r}") from error
        new._fill(given, schedule)
        return new

    # --------------------------------------------------------------------------- as a value

    def __getattr__(self, name: str) -> Any:
        try:
            return self.__dict__["_numbers"][name]
        except KeyError:
            raise AttributeError(f"{type(self).__name__!r} has no attribute {name!r}") from None

    def __setattr__(self, name: str, value: Any) -> None:
        if self._KIND is not None or name in FIXED:
            raise AttributeError(
                f"{name} of a {type(self).__name__} is fixed; a store that uses it changes it by "
                f"kv.set_optimizer_params({name}=...)"
            )
        object.__setattr__(self, name, value)

    def __eq__(self, other: object) -> bool:
        if self._KIND is None or type(self) is not type(other):
            return self is other
        mine, its = dict(self.__dict__), dict(other.__dict__)
        return {**mine, "_arguments": None} == {**its, "_arguments": None}

    __hash__ = None  # type: ignore[assignment] # its schedule has a position

    def __repr__(self) -> str:
        defaults = _parameters(self._KIND)
        shown = {n: v for n, v in self._numbers.items() if v != defaults[n][1]}
        for name, value, default in (
            ("lr_scheduler", self._schedule, None),
            ("begin_num_update", self._begin, 0),
            ("lr_mult", self._lr_mult, {}),
            ("wd_mult", self._wd_mult, {}),
            ("names", self._names, {}),
        ):
            if value != default:
                shown[name] = value
        return f"{type(self).__name__}({', '.join(f'{n}={v!r}' for n, v in shown.items())})"


class BuiltIn(Optimizer):
    """An optimizer whose arithmetic is in the core."""

    def __init_subclass__(cls) -> None:
        if BuiltIn not in cls.__bases__:
            base = cls.__bases__[0].__name__
            raise InvalidArgumentError(
                f"{cls.__name__} is derived from {base}, whose update is not in Python: "
                "derive from kvstore.optimizer.Optimizer"
            )
        cls._KIND = cls.__name__.lower()
        built_in[cls._KIND] = cls


built_in: dict[str, type[BuiltIn]] = {}
registered: dict[str, type[Optimizer]] = {}

_Class = TypeVar("_Class", bound="type[Optimizer]")


def kind_of(klass: type[Optimizer]) -> str:
    """What a class is in the core and in declarations: its name, or its import path."""
    return klass._KIND or f"{klass.__module__}:{klass.__qualname__}"


def identity(klass: type) -> str:
    return f"{klass.__module__}.{klass.__qualname__}"


def register(klass: _Class) -> _Class:
    """Class decorator: ``create`` and files of states find the class by its name.

    A class that is defined again (a notebook cell run twice) replaces itself; another class of the
    same name replaces it with a warning.

    >>> @kvstore.optimizer.register
    ... class Halve(kvstore.optimizer.Optimizer):
    ...     def update(self, key, weight, grad, state):
    ...         weight *= 0.5
    >>> kvstore.optimizer.create('halve')
    Halve()
    """
    if not (isinstance(klass, type) and issubclass(klass, Optimizer)):
        raise ArrayTypeError(
            f"register takes a class derived from kvstore.optimizer.Optimizer, not {klass!r}"
        )
    name = klass.__name__.lower()
    if name in built_in:
        raise InvalidArgumentError(
            f"{klass.__qualname__} cannot be registered: {name!r} is a built-in optimizer"
        )
    if not hasattr(klass, "update"):
        raise InvalidArgumentError(f"{klass.__qualname__} has no update")
    old = registered.get(name)
    if old is not None and identity(old) != identity(klass):
        warnings.warn(
            f"kvstore.optimizer.create({name!r}) made a {identity(old)} "
            f"and from now on makes a {identity(klass)}",
            stacklevel=2,
        )
    registered[name] = klass
    return klass


def create(name: str, **keywords: Any) -> Optimizer:
    """Make the optimizer ``name``, letter case free.

    >>> kvstore.optimizer.create('sgd', learning_rate=0.1, momentum=0.9)
    SGD(learning_rate=0.1, momentum=0.9)
    >>> kvstore.optimizer.create('adem')
    Traceback (most recent call last):
    kvstore.errors.InvalidArgumentError: no optimizer is called 'adem'; did you mean 'adam'?
    """
    if not isinstance(name, str):
        raise ArrayTypeError(f"create takes the name of an optimizer, not {name!r}")
    known = {**registered, **built_in}
    klass = known.get(name.lower())
    if klass is None:
        raise InvalidArgumentError(
            f"no optimizer is called {name!r}{nearest(name.lower(), sorted(known))}"
        )
    return klass(**keywords)
