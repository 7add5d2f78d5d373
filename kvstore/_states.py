"""States of training on their way into a store: of known keys at once, of others at their init."""

from typing import Any

from ._core import KVStore

# What is known of a key: its count, -1 if it was not pushed, and its state by the names of a file.
_Entry = tuple[int, dict[str, Any]]
_Pending = dict[Any, tuple[type, _Entry]]  # with the class of the optimizer that they are of


def import_states(kv: KVStore, states: dict[str, Any]) -> None:
    """Give the store everything that ``kv._states_export()`` once said; all of it or nothing."""
    entries: dict[Any, _Entry] = {
        key: (count, dict(slots)) for key, count, _, slots in states["keys"]
    }
    for key, position, residual in states["residuals"]:
        entries.setdefault(key, (-1, {}))[1][f"residual.{position}"] = residual
    numbers = ("num_update", "nadam_product", "last_rate", "seed", "draws")
    whole = tuple(states[name] for name in numbers)
    known = [(key, *entry) for key, entry in entries.items() if key in kv]
    kv._states_put(whole, known)
    kind, given = type(kv._optimizer_owner()), {key for key, _, _ in known}
    pending = {key: (kind, entry) for key, entry in entries.items() if key not in given}
    kv._states_later(pending)
    arrive(kv, pending, [key for key in entries if key in pending and key in kv])


def arrive(kv: KVStore, pending: _Pending, keys: list[Any]) -> None:
    """Give keys that were just initialised what has waited for them."""
    # Another thread may be here with other keys: each takes out its own.
    here = {key: pending.pop(key) for key in keys if key in pending}
    if not here:
        return
    try:
        kv._states_put(None, [(key, *_of_use(kv, waiting)) for key, waiting in here.items()])
    except BaseException:
        pending.update(here)
        raise


def _of_use(kv: KVStore, waiting: tuple[type, _Entry]) -> _Entry:
    """What the store can do with: the state of another optimizer went with that optimizer."""
    kind, (count, slots) = waiting
    if kind is type(kv._optimizer_owner()):
        return count, slots
    return -1, {name: array for name, array in slots.items() if name.startswith("residual.")}


def add_pending(kv: KVStore, states: dict[str, Any], pending: _Pending) -> None:
    """Add what still waits for the init of its key to what ``kv._states_export()`` says."""
    for key, waiting in list(pending.items()):
        if key in kv:
            continue  # it arrives just now
        count, slots = _of_use(kv, waiting)
        own = {name: a for name, a in slots.items() if not name.startswith("residual.")}
        if count >= 0:
            states["keys"].append((key, count, "default", own))
        for name in slots.keys() - own.keys() if states["compression"] else ():
            states["residuals"].append((key, int(name.partition(".")[2]), slots[name]))
