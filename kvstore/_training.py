"""What the calls of ``kvstore.KVStore`` on optimizers and their states do; the C type calls them.

A built-in optimizer goes into the core. One in Python becomes an updater, and how far it has come
is kept here, with the updater: the optimizer itself never changes.
"""

import math
import sys
import threading
from collections.abc import Iterator
from typing import Any

import numpy as np

from . import _declared, _dist_states, _saved, _states, compression, state_file
from ._core import KVStore, RowSparse
from ._optimizer import (
    _ALIASES,
    BuiltIn,
    Push,
    push_under_way,
)
from .errors import ArrayTypeError, InvalidArgumentError
from .optimizer import Optimizer

# ------------------------------------------------------------------- optimizers in Python


class _Progress:
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
        slots = dict(_arrays(key, self.states.get(key), "state"))
        if key in self.masters:
            slots["master"] = self.masters[key]
        return slots


_SAVED = "bool int8 uint8 int16 uint16 int32 uint32 int64 uint64 float16 float32 float64".split()


def _arrays(key: Any, state: Any, name: str) -> Iterator[tuple[str, Any]]:
    if isinstance(state, np.ndarray):
        if state.dtype.name not in _SAVED:
            raise ArrayTypeError(
                f"the state of key {key!r} is of {state.dtype}, which a file cannot hold; "
                "float32 can be saved"
            )
        yield name, state
    elif isinstance(state, (list, tuple)):
        for i, part in enumerate(state):
            yield from _arrays(key, part, f"{name}.{i}")
    elif isinstance(state, dict):
        for label, part in state.items():
            if not isinstance(label, str) or "/" in label:
                raise ArrayTypeError(f"the state of key {key!r} has a part {label!r}: not a name")
            yield from _arrays(key, part, f"{name}.{label}")
    elif state is not None:
        raise ArrayTypeError(
            f"the state of key {key!r} holds a {type(state).__name__}; what can be saved is None, "
            "NumPy arrays, and lists, tuples and dicts of them"
        )


def _check_slots(key: Any, slots: dict[str, Any], like: dict[str, Any]) -> None:
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


class _Run:
    """The updater that an optimizer in Python is for a store."""

    def __init__(self, optimizer: Optimizer, progress: _Progress) -> None:
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
        rate = optimizer._numbers["learning_rate"]
        if optimizer.lr_scheduler is not None:
            rate = optimizer.lr_scheduler(progress.num_update)
            if not (isinstance(rate, (int, float)) and math.isfinite(rate)):
                raise InvalidArgumentError(
                    f"the schedule gave {rate!r} as the learning rate of update "
                    f"{progress.num_update}, which is no finite number"
                )
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

    def _fill(self, key: Any) -> None:
        """What a file had for the key becomes its state."""
        loaded = self.progress.loaded.pop(key)
        like = self.progress.slots(key)
        try:
            _check_slots(key, loaded, like)
        except InvalidArgumentError:
            self.progress.loaded[key] = loaded
            raise
        for name, array in like.items():
            array[...] = loaded[name]


# ---------------------------------------------------------------------------------- setting


def _owner(kv: KVStore) -> tuple[Optimizer | None, _Progress | None]:
    owner = kv._optimizer_owner()
    return (owner.optimizer, owner.progress) if isinstance(owner, _Run) else (owner, None)


def _set(kv: KVStore, optimizer: Optimizer, progress: _Progress | None = None) -> None:
    place = kv._place()  # in a cluster: the servers have the optimizer before the store has it
    number = 0 if place is None else _declared.declare(*place, optimizer)
    if isinstance(optimizer, BuiltIn):
        kv._optimizer_set(
            optimizer,
            *optimizer._for_core(),
            optimizer.lr_scheduler,
            optimizer._multipliers(),
            optimizer.begin_num_update,
            number,
        )
        return
    run = _Run(optimizer, progress or _Progress(optimizer.begin_num_update))
    kv._updater_set(run, run)


def set_optimizer(kv: KVStore, optimizer: Any) -> None:
    if not isinstance(optimizer, Optimizer):
        raise ArrayTypeError(
            "set_optimizer takes an object of a class of kvstore.optimizer, such as "
            f"kvstore.optimizer.SGD(learning_rate=0.1), not {optimizer!r}"
        )
    name = type(optimizer).__name__
    if "_numbers" not in vars(optimizer):
        raise InvalidArgumentError(f"the __init__ of {name} does not call super().__init__()")
    if not isinstance(optimizer, BuiltIn) and not hasattr(type(optimizer), "update"):
        raise InvalidArgumentError(f"{name} has no update")
    before, progress = _owner(kv)
    _set(kv, optimizer, progress if type(before) is type(optimizer) else None)


def set_optimizer_params(kv: KVStore, **numbers: Any) -> None:
    before, progress = _owner(kv)
    if before is None:
        raise InvalidArgumentError("the store has no optimizer; call set_optimizer first")
    new = before._replace(numbers)
    rates = {_ALIASES.get(name, name) for name in numbers} & {"learning_rate"}
    schedule: Any = new.lr_scheduler
    if rates and schedule is not None and not hasattr(schedule, "base_lr"):
        raise InvalidArgumentError(
            f"the rate comes from a schedule that has no base_lr: {schedule!r}"
        )
    _set(kv, new, progress)
    if rates and schedule is not None:
        schedule.base_lr = new._numbers["learning_rate"]


def optimizer(kv: KVStore) -> Optimizer | None:
    return _owner(kv)[0]


def set_gradient_compression(kv: KVStore, compression_params: Any) -> None:
    kv._compression_set(*compression._parse(compression_params))


# ------------------------------------------------------------------------------------ files


def save_optimizer_states(kv: KVStore, fname: Any, dump_optimizer: bool = False) -> None:
    place = kv._place()
    if place is not None:
        _dist_states.save(kv, *place, fname, dump_optimizer)
        return
    optimizer, progress = _owner(kv)
    if optimizer is None:
        raise InvalidArgumentError("the store has no optimizer, so it has no states to save")
    about = _saved.describe(optimizer, dump_optimizer)
    states = kv._states_export()
    if progress is not None:
        states["num_update"] = progress.num_update
        states["keys"] = [
            (key, count, kv.stype(key) if key in kv else "default", progress.slots(key))
            for key, count in list(progress.counts.items())
        ]
    state_file.write(fname, states, about)


def load_optimizer_states(kv: KVStore, fname: Any) -> None:
    place = kv._place()
    if place is not None:
        _dist_states.load(kv, *place, fname)
        return
    states, about = state_file.read(fname)
    before, progress = _owner(kv)
    with state_file.naming(fname):
        new = _saved.optimizer_of(about, before)
        klass = type(new)
        position = _saved.position(about.get("schedule"), new)
        if issubclass(klass, BuiltIn):
            _load_built_in(kv, states, before, progress, new)
        else:
            loaded = _load_progress(states, progress if type(before) is klass else None, new)
            _load_residuals(kv, states)
            _set(kv, new, loaded)
    if position is not None:
        schedule: Any = new.lr_scheduler
        schedule._position = position


def _load_built_in(
    kv: KVStore,
    states: dict[str, Any],
    before: Optimizer | None,
    progress: _Progress | None,
    new: Optimizer,
) -> None:
    states = _states.with_unpushed(kv, states)
    old = kv._states_export()
    undo_compression = _take_compression(kv, states["compression"], old["compression"])
    try:
        if new is not before:
            _set(kv, new)
        kv._states_import(states)
    except BaseException:
        if undo_compression:
            kv._compression_set("none", 0.0)
        if new is not before:
            if before is None:
                kv._updater_set(None, None)
            else:
                _set(kv, before, progress)
                if isinstance(before, BuiltIn) and type(before) is not type(new):
                    kv._states_import(old)
        raise


def _take_compression(kv: KVStore, wanted: Any, current: Any) -> bool:
    """Whether it was turned on, as it was when the file was written."""
    if wanted is None or (current is not None and current["type"] == wanted["type"]):
        return False
    if current is not None:
        raise InvalidArgumentError(
            f"it was written with {wanted['type']} compression, the store's is {current['type']}"
        )
    kv._compression_set(wanted["type"], wanted["threshold"])
    return True


def _load_residuals(kv: KVStore, states: dict[str, Any]) -> None:
    """All that the core keeps for an optimizer in Python."""
    current = kv._states_export()["compression"]
    undo_compression = _take_compression(kv, states["compression"], current)
    try:
        keys = kv.keys()
        kv._states_import({**states, "keys": [(key, -1, "default", {}) for key in keys]})
    except BaseException:
        if undo_compression:
            kv._compression_set("none", 0.0)
        raise


def _load_progress(
    states: dict[str, Any], before: _Progress | None, optimizer: Optimizer
) -> _Progress:
    progress = _Progress(optimizer.begin_num_update)
    progress.num_update = states["num_update"]
    for key, count, _, slots in states["keys"]:
        if before is not None and key in before.states:
            _check_slots(key, slots, before.slots(key))
        progress.counts[key] = count
        progress.loaded[key] = slots
    return progress
