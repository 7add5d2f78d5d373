"""The optimizer as a file of training states has it: class and schedule, or all of it."""

from typing import Any

from ._optimizer import built_in, identity, registered
from .errors import InvalidArgumentError
from .lr_scheduler import _pack
from .optimizer import Optimizer


def describe(optimizer: Optimizer, dump: bool) -> dict[str, Any]:
    """What a file says of its optimizer."""
    schedule = _pack(optimizer.lr_scheduler)
    klass = type(optimizer)
    return {
        "class": klass._KIND or identity(klass),
        "schedule": schedule and {"class": schedule["class"], "state": schedule["state"]},
        "dump": optimizer._pack() if dump else None,
    }


def optimizer_of(about: dict[str, Any], before: Optimizer | None) -> Optimizer:
    """The optimizer that goes on with a file: its own, or the one that is there before."""
    klass = _class_of(about.get("class"), before)
    if about.get("dump") is not None:
        return klass._unpack(about["dump"])
    if before is None:
        raise InvalidArgumentError(
            f"it holds no optimizer: call set_optimizer with a {klass.__name__} first"
        )
    if type(before) is not klass:
        raise InvalidArgumentError(
            f"it is of the optimizer {klass.__name__}, the store's is a {type(before).__name__}"
        )
    return before


def _class_of(name: Any, before: Optimizer | None) -> type[Optimizer]:
    """The class that a file names. It is never imported because a file says so."""
    if isinstance(name, str):
        if name in built_in:
            return built_in[name]
        known = [*registered.values(), *([] if before is None else [type(before)])]
        for klass in reversed(known):
            if klass._KIND is None and identity(klass) == name:
                return klass
    raise InvalidArgumentError(
        f"it is of the optimizer {name!r}, which is neither built in nor registered nor set"
    )


def position(packed: Any, optimizer: Optimizer) -> tuple[Any, ...] | None:
    """Where the optimizer's schedule goes on; None if the file's was another or one in Python."""
    schedule: Any = optimizer.lr_scheduler
    own = _pack(schedule)
    if packed is None or own is None:
        return None
    if not isinstance(packed, dict):
        raise InvalidArgumentError(f"{packed!r} describes no schedule")
    if packed.get("class") != own["class"]:
        return None
    checked: tuple[Any, ...] = schedule._checked(packed.get("state"))
    return checked
