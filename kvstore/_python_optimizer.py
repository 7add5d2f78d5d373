"""Optimizers in Python: how one is applied to a key, in a local store and on a server.

A local store has a `Run` as its updater. On a server a user's class is imported by its path, if the
server was started with permission for that, and run on the rounds that the core hands to the thread
that serves.
"""

import importlib
import math
import sys
import threading
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from . import _packed
from ._core import RowSparse
from ._optimizer import Optimizer, Push, kind_of, push_under_way
from .errors import ArrayTypeError, InvalidArgumentError

if TYPE_CHECKING:
    from .cluster.entry import Core, Update

MOST = 1024  # optimizers that a server remembers


class Progress:
    """How far an optimizer in Python has come with one store."""

    def __init__(self, begin_num_update: int) -> None:
        self.lock = threading.Lock()
        self.num_update = begin_num_update
        self.counts: dict[Any, int] = {}
        self.states: dict[Any, Any] = {}
        self.masters: dict[Any, Any] = {}  # float32 copies of 16-bit weights
        self.loaded: dict[Any, dict[str, Any]] = {}  # from a file, until the key's next push

    def count(self, key: Any, begin_num_update: int) -> None:
        with self.lock:
            self.counts[key] = self.counts.get(key, begin_num_update) + 1
            self.num_update = max(self.num_update, self.counts[key])

    def slots(self, key: Any) -> dict[str, Any]:
        """The state as the arrays that it is made of."""
        if key in self.loaded:
            return self.loaded[key]
        slots: dict[str, Any] = {}
        for name, array in _arrays(key, self.states.get(key), "state"):
            if name in slots:
                raise ArrayTypeError(f"the state of key {key!r} has two parts {name!r}")
            slots[name] = array
        if key in self.masters:
            slots["master"] = self.masters[key]
        return slots


def _arrays(key: Any, state: Any, name: str) -> Iterator[tuple[str, Any]]:
    if isinstance(state, np.ndarray):
        if state.dtype.name not in _packed.TYPES:
            raise ArrayTypeError(
                f"{name!r} of the state of key {key!r} is of {state.dtype}, which a file cannot "
                "hold; float32 can be saved"
            )
        yield name, state
    elif isinstance(state, (list, tuple)):
        for i, part in enumerate(state):
            yield from _arrays(key, part, f"{name}.{i}")
    elif isinstance(state, dict):
        for label, part in state.items():
            if not isinstance(label, str) or "/" in label:
                raise ArrayTypeError(
                    f"{name!r} of the state of key {key!r} has a part {label!r}: not a name"
                )
            yield from _arrays(key, part, f"{name}.{label}")
    elif state is not None:
        raise ArrayTypeError(
            f"the state of key {key!r} holds a {type(state).__name__} as {name!r}; what can be "
            "saved is None, NumPy arrays, and lists, tuples and dicts of them"
        )


def check_slots(key: Any, slots: dict[str, Any], like: dict[str, Any]) -> None:
    if slots.keys() != like.keys():
        raise InvalidArgumentError(
            f"the state of key {key!r} consists of {', '.join(like) or 'nothing'}, "
            f"that of the file of {', '.join(slots) or 'nothing'}"
        )
    for name, array in slots.items():
        kept = like[name]
        if (array.shape, array.dtype) != (kept.shape, kept.dtype):
            raise InvalidArgumentError(
                f"state {name!r} of key {key!r} is {kept.dtype} {kept.shape}, "
                f"that of the file {array.dtype} {array.shape}"
            )


def _as_numpy(array: Any) -> Any:
    if isinstance(array, (np.ndarray, RowSparse)):
        return array
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(array, torch.Tensor):
        if array.dtype != torch.bfloat16:
            return array.numpy()
        from ml_dtypes import bfloat16

        return array.view(torch.int16).numpy().view(bfloat16)
    raise ArrayTypeError(f"an optimizer in Python cannot update a {type(array).__name__}")


class Run:
    """The updater that an optimizer in Python is for a store."""

    def __init__(self, optimizer: Optimizer, progress: Progress) -> None:
        self.optimizer = optimizer
        self.progress = progress

    def forget(self, keys: Any) -> None:
        """What a store's delete does to the optimizer: the keys begin anew."""
        progress = self.progress
        for key in keys if isinstance(keys, (list, tuple)) else [keys]:
            for kept in (progress.counts, progress.states, progress.masters, progress.loaded):
                kept.pop(key, None)

    def __call__(self, key: Any, recv: Any, stored: Any) -> None:
        grad, weight = _as_numpy(recv), _as_numpy(stored)
        if weight.dtype.kind in "iub":
            raise ArrayTypeError(
                f"push of key {key!r}, whose element type is {weight.dtype}: "
                f"the optimizer {type(self.optimizer).__name__} updates floating types only"
            )
        narrow = self.optimizer.multi_precision and weight.dtype.itemsize == 2
        if not narrow:
            self._update(key, weight, grad)
            return
        if isinstance(weight, RowSparse):
            raise ArrayTypeError(
                f"push of key {key!r}: multi_precision of an optimizer in Python is for dense keys"
            )
        master = self.progress.masters.get(key)
        if master is None:
            master = self.progress.masters[key] = weight.astype(np.float32)
        if isinstance(grad, RowSparse):
            grad = RowSparse(grad.data.astype(np.float32), grad.indices, grad.shape)
        else:
            grad = grad.astype(np.float32)
        self._update(key, master, grad)
        weight[...] = master

    def _update(self, key: Any, weight: Any, grad: Any) -> None:
        optimizer, progress = self.optimizer, self.progress
        form = (weight.shape, weight.dtype)
        if key not in progress.states:
            progress.states[key] = optimizer.create_state(key, weight)
        if key in progress.loaded:
            self._fill(key)
        progress.count(key, optimizer.begin_num_update)
        rate = self._rate()
        token = push_under_way.set(Push(optimizer, progress.counts, progress.num_update, rate))
        try:
            result = optimizer.update(key, weight, grad, progress.states[key])
        finally:
            push_under_way.reset(token)
        if result is not None or form != (weight.shape, weight.dtype):
            raise InvalidArgumentError(
                f"update of {type(optimizer).__name__} changes the weight of key {key!r} in place, "
                f"keeps its shape and returns nothing, not {result!r}"
            )

    def _rate(self) -> float:
        """The rate before multipliers."""
        optimizer, number = self.optimizer, self.progress.num_update
        rate: float = optimizer._numbers["learning_rate"]
        if optimizer.lr_scheduler is not None:
            rate = optimizer.lr_scheduler(number)
            if not (isinstance(rate, (int, float)) and math.isfinite(rate)):
                raise InvalidArgumentError(
                    f"the schedule gave {rate!r} as the learning rate of update {number}, "
                    "which is no finite number"
                )
        return rate

    def _fill(self, key: Any) -> None:
        """What a file had for the key becomes its state."""
        loaded = self.progress.loaded.pop(key)
        like = self.progress.slots(key)
        try:
            check_slots(key, loaded, like)
        except InvalidArgumentError:
            self.progress.loaded[key] = loaded
            raise
        for name, array in like.items():
            array[...] = loaded[name]


# ---------------------------------------------------------------------------------- on a server


def check_importable(klass: type[Optimizer]) -> None:
    """InvalidArgumentError for a class that no other process can find."""
    where = f"{klass.__name__} is defined in "
    if "<locals>" in klass.__qualname__:
        where += "a function"
    elif klass.__module__ == "__main__":
        where += "a script or notebook"
    else:
        return
    raise InvalidArgumentError(
        f"{where}, where the servers of a dist store cannot import it: put it into a module of its "
        "own, and start them with allow_import= that module"
    )


def import_class(path: str, allowed: tuple[str, ...]) -> type[Optimizer]:
    """The class of an import path, if this server may import it."""
    module, _, name = path.partition(":")
    if not any(module == one or module.startswith(f"{one}.") for one in allowed):
        raise InvalidArgumentError(
            f"this server may not import the optimizer {path}: start it with kvrun --allow-import "
            f"{module}, or allow_import={module!r} of serve, LocalCluster and RayCluster"
        )
    try:
        found: Any = importlib.import_module(module)
        for part in name.split("."):
            found = getattr(found, part)
    except Exception as error:  # whatever the module raises
        raise InvalidArgumentError(
            f"this server cannot import the optimizer {path}: {type(error).__name__}: {error}"
        ) from error
    return _checked(path, found)


def imported_class(path: str) -> type[Optimizer]:
    """The class of an import path that another worker has told, if this process has it already."""
    module, _, name = path.partition(":")
    found: Any = sys.modules.get(module)
    for part in name.split("."):
        found = getattr(found, part, None)
    if found is None:
        raise InvalidArgumentError(
            f"the optimizer {path} is not known in this process: import {module} first"
        )
    return _checked(path, found)


def _checked(path: str, found: Any) -> type[Optimizer]:
    own = isinstance(found, type) and issubclass(found, Optimizer) and hasattr(found, "update")
    if not own or kind_of(found) != path:
        raise InvalidArgumentError(
            f"{path} is no class of an optimizer with an update, defined there: it is {found!r}"
        )
    klass: type[Optimizer] = found
    return klass


class _Round(Run):
    """The run of one round, whose rate the worker has sent."""

    def __init__(self, optimizer: Optimizer, progress: Progress, rate: float) -> None:
        super().__init__(optimizer, progress)
        self.rate = rate

    def _rate(self) -> float:
        return self.rate


_Kept = tuple[dict[Any, Any], dict[Any, Any], dict[Any, Any]]  # states, masters, loaded


class Served:
    """The optimizers in Python that a server has been told of, and their rounds."""

    def __init__(self) -> None:
        self._optimizers: dict[int, Optimizer] = {}
        self._training = 0
        self._counts: dict[Any, int] = {}

    def add(self, number: int, optimizer: Optimizer, training: int) -> None:
        """Let rounds name an optimizer by this number."""
        if training != self._training:
            self._training, self._counts = training, {}
        self._optimizers[number] = optimizer
        if len(self._optimizers) > MOST:
            del self._optimizers[next(iter(self._optimizers))]

    def run(self, core: "Core", update: "Update") -> None:
        """Run a round and end it, well or not; what is no Exception is raised."""
        number, key, recv, stored, rate, count, num_update, kept, packed = update
        kept = kept or ({}, {}, {} if packed is None else {key: packed})
        if recv is None:
            _give(core, key, kept)
            return
        optimizer = self._optimizers.get(number)
        if optimizer is None:
            core.end_update(
                f"its optimizer was set {MOST} calls ago, and is forgotten", kept, stored
            )
            return
        failure = None
        try:
            progress = _progress(key, kept)
            self._counts[key] = count - 1
            progress.counts, progress.num_update = self._counts, num_update
            _Round(optimizer, progress, rate)(key, recv, stored)
        except BaseException as error:
            failure = "the optimizer has failed"  # whatever becomes of the next line
            failure = f"the optimizer {type(optimizer).__name__}: {_words(error)}"
            if not isinstance(error, Exception):
                raise
        finally:
            core.end_update(failure, kept, stored)


def _progress(key: Any, kept: _Kept) -> Progress:
    """That of one key, which changes what is kept with it."""
    progress = Progress(0)
    progress.states, progress.masters, progress.loaded = kept
    if isinstance(progress.loaded.get(key), np.ndarray):  # as it came
        progress.loaded[key] = _packed.unpack(progress.loaded[key])[0]
    return progress


def _words(error: BaseException) -> str:
    """What is told of it, in characters that can travel."""
    try:
        text = f"{type(error).__name__}: {error}"
    except Exception as worse:
        text = f"{type(error).__name__}, which tells nothing: {type(worse).__name__}"
    return text.encode(errors="backslashreplace").decode()


def _give(core: "Core", key: Any, kept: _Kept) -> None:
    """Pack what is kept with a key; what is no Exception is raised."""
    failure: str | None = None
    packed: object = None
    try:
        progress = _progress(key, kept)
        begun = key in progress.states and key not in progress.loaded
        packed = _packed.pack(progress.slots(key), begun)
    except BaseException as error:
        failure, packed = _words(error), error
        if not isinstance(error, Exception):
            raise
    finally:
        core.end_update(failure, kept, packed)
