"""States of training on their way into a store: of known keys at once, of others at their init."""

from collections.abc import Mapping
from typing import Any

from ._core import KVStore
from .errors import InvalidArgumentError

ALL, COUNTS, CHECK, PUSHED = 0, 1, 2, 3  # kv_states_share_t
NUMBERS = ("num_update", "nadam_product", "last_rate", "seed", "draws")

# What is known of a key: its count, -1 if it was not pushed, and its state by the names of a file;
# None: another worker sees to that.
_Entry = tuple[int, dict[str, Any] | None]
_Pending = dict[Any, tuple[type, _Entry]]  # with the class of the optimizer that they are of


def with_unpushed(kv: KVStore, states: dict[str, Any], shaped: bool = True) -> dict[str, Any]:
    """The states, checked for the store's keys, with those that the file has not: they had not been
    pushed. `shaped`: a state has its key's shape."""
    listed = {entry[0] for entry in states["keys"]}
    keys = kv.keys()
    unpushed: list[Any] = [(key, -1, "default", {}) for key in keys if key not in listed]
    states = {**states, "keys": [*states["keys"], *unpushed]}
    if keys and listed and type(keys[0]) is not type(next(iter(listed))):
        raise InvalidArgumentError(
            f"its keys are {type(next(iter(listed))).__name__}, those of the store "
            f"{type(keys[0]).__name__}"
        )
    for key, _, _, slots in states["keys"]:
        shape = kv.shape(key) if shaped and slots and key in kv else None
        for slot, array in slots.items():
            if shape is not None and array.shape not in (shape, shape[:1]):
                raise InvalidArgumentError(
                    f"state {slot!r} of key {key!r} ({array.shape}) has another shape than the key "
                    f"({shape})"
                )
    return states


def import_states(kv: KVStore, states: dict[str, Any]) -> None:
    """Give the store everything that ``kv._states_export()`` once said; all of it or nothing."""
    entries = _entries(states)
    known = [(key, *entry) for key, entry in entries.items() if key in kv]
    kv._states_put(_whole(states), known)
    given = {key for key, _, _ in known}
    _keep(kv, {key: entry for key, entry in entries.items() if key not in given})


def check_states(kv: KVStore, states: dict[str, Any]) -> None:
    """Raise what `import_states` would."""
    known = [(key, *entry) for key, entry in _entries(states).items() if key in kv]
    kv._states_put(_whole(states), known, CHECK)


def import_counts(
    kv: KVStore, whole: tuple[Any, ...], counts: dict[Any, int], counted: int = 0
) -> None:
    """Give a dist store what it counts itself; another worker gives the servers the rest.

    It must not have counted since its ``counted`` was this, unless that is 0.
    """
    known: list[Any] = [(key, count, {}) for key, count in counts.items() if key in kv]
    kv._states_put(whole, known, COUNTS, counted)
    given = {key for key, _, _ in known}
    _keep(kv, {key: (count, None) for key, count in counts.items() if key not in given})


def _entries(states: dict[str, Any]) -> dict[Any, tuple[int, dict[str, Any]]]:
    entries = {key: (count, dict(slots)) for key, count, _, slots in states["keys"]}
    for key, position, residual in states["residuals"]:
        entries.setdefault(key, (-1, {}))[1][f"residual.{position}"] = residual
    return entries


def _whole(states: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(states[name] for name in NUMBERS)


def _keep(kv: KVStore, entries: Mapping[Any, _Entry]) -> None:
    """Until the init of their keys."""
    kind = type(kv._optimizer_owner())
    pending: _Pending = {key: (kind, entry) for key, entry in entries.items()}
    kv._states_later(pending)
    arrive(kv, pending, [key for key in entries if key in kv])


def arrive(kv: KVStore, pending: _Pending, keys: list[Any]) -> None:
    """Give keys that were just initialised what has waited for them."""
    # Another thread may be here with other keys: each takes out its own.
    here = {key: pending.pop(key) for key in keys if key in pending}
    if not here:
        return
    entries = {key: _of_use(kv, waiting) for key, waiting in here.items()}
    whole = [(key, n, slots) for key, (n, slots) in entries.items() if slots is not None]
    counts: list[Any] = [(key, n, {}) for key, (n, slots) in entries.items() if slots is None]
    try:
        if whole:
            kv._states_put(None, whole)
        if counts:
            kv._states_put(None, counts, COUNTS)
    except BaseException:
        pending.update(here)
        raise


def _of_use(kv: KVStore, waiting: tuple[type, _Entry]) -> _Entry:
    """What the store can do with: the state of another optimizer went with that optimizer."""
    kind, (count, slots) = waiting
    if kind is type(kv._optimizer_owner()):
        return count, slots
    return -1, slots and {
        name: array for name, array in slots.items() if name.startswith("residual.")
    }


def add_pending(kv: KVStore, states: dict[str, Any], pending: _Pending) -> None:
    """Add what still waits for the init of its key to what ``kv._states_export()`` says."""
    for key, waiting in list(pending.items()):
        if key in kv:
            continue  # it arrives just now
        count, slots = _of_use(kv, waiting)
        if slots is None:
            continue
        own = {name: a for name, a in slots.items() if not name.startswith("residual.")}
        if count >= 0:
            states["keys"].append((key, count, "default", own))
        for name in slots.keys() - own.keys() if states["compression"] else ():
            states["residuals"].append((key, int(name.partition(".")[2]), slots[name]))
