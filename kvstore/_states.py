"""States of training on their way into a store: of known keys at once, of others at their init."""

from typing import Any

from ._core import KVStore

_Entries = dict[Any, tuple[int, dict[str, Any]]]


def import_states(kv: KVStore, states: dict[str, Any]) -> None:
    """Give the store everything that ``kv._states_export()`` once said; all of it or nothing."""
    entries: _Entries = {key: (count, dict(slots)) for key, count, _, slots in states["keys"]}
    for key, position, residual in states["residuals"]:
        entries.setdefault(key, (-1, {}))[1][f"residual.{position}"] = residual
    numbers = ("num_update", "nadam_product", "last_rate", "seed", "draws")
    whole = tuple(states[name] for name in numbers)
    known = [(key, count, slots) for key, (count, slots) in entries.items() if key in kv]
    kv._states_put(whole, known)
    kv._states_later({key: entry for key, entry in entries.items() if key not in kv})


def arrive(kv: KVStore, pending: _Entries, key: Any) -> None:
    """Give keys that were just initialised what has waited for them."""
    keys = list(key) if isinstance(key, list | tuple) else [key]
    here = [k for k in keys if k in pending]
    kv._states_put(None, [(k, *pending[k]) for k in here])
    kv._states_later({k: entry for k, entry in pending.items() if k not in here})


def add_pending(states: dict[str, Any], pending: _Entries) -> None:
    """Add what still waits for the init of its key to what ``kv._states_export()`` says."""
    for key, (count, slots) in pending.items():
        own = {name: a for name, a in slots.items() if not name.startswith("residual.")}
        if count >= 0:
            states["keys"].append((key, count, "default", own))
        for name in slots.keys() - own.keys():
            states["residuals"].append((key, int(name.partition(".")[2]), slots[name]))
