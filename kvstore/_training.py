"""What the calls of ``kvstore.KVStore`` on optimizers and their states do; the C type calls them.

A built-in optimizer goes into the core, and in a dist store so does one in Python, whose class runs
on servers. In a local store that one becomes an updater, and how far it has come is kept with it:
the optimizer itself never changes.
"""

from typing import Any

from . import _declared, _dist_states, _saved, _states, compression, state_file
from ._core import KVStore
from ._optimizer import _ALIASES, BuiltIn
from ._python_optimizer import Progress, Run, check_slots
from .errors import ArrayTypeError, InvalidArgumentError
from .optimizer import Optimizer

# ---------------------------------------------------------------------------------- setting


def _owner(kv: KVStore) -> tuple[Optimizer | None, Progress | None]:
    owner = kv._optimizer_owner()
    return (owner.optimizer, owner.progress) if isinstance(owner, Run) else (owner, None)


def _set(kv: KVStore, optimizer: Optimizer, progress: Progress | None = None) -> None:
    place = kv._place()  # in a cluster: the servers have the optimizer before the store has it
    number = 0 if place is None else _declared.declare(*place, optimizer)
    if place is not None or isinstance(optimizer, BuiltIn):
        kv._optimizer_set(
            optimizer,
            *optimizer._for_core(),
            optimizer.lr_scheduler,
            optimizer._multipliers(),
            optimizer.begin_num_update,
            number,
        )
        return
    run = Run(optimizer, progress or Progress(optimizer.begin_num_update))
    kv._updater_set(run, run)


def _agree(kv: KVStore, optimizer: Optimizer) -> None:
    """Where each worker updates values of its own, all set the same optimizer."""
    if kv.type == "nccl" and kv.num_workers > 1:
        from . import _nccl

        _nccl.agree(kv, optimizer)


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
    _agree(kv, optimizer)
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
    _agree(kv, new)
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
    progress: Progress | None,
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
    states: dict[str, Any], before: Progress | None, optimizer: Optimizer
) -> Progress:
    progress = Progress(optimizer.begin_num_update)
    progress.num_update = states["num_update"]
    for key, count, _, slots in states["keys"]:
        if before is not None and key in before.states:
            check_slots(key, slots, before.slots(key))
        progress.counts[key] = count
        progress.loaded[key] = slots
    return progress
