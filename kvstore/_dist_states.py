"""Training states of dist stores: a worker saves or loads, and the others hear of it.

The states of keys are on the servers, from where the core has them, with how often each key was
pushed. What belongs to the optimizer as a whole, and the position of the schedule, is worker 0's
(with dist_async every worker's own), since that one counts: a worker that saves asks worker 0, one
that loads tells all others. The servers' newest steps would not do: they have neither LARS's rate
of the push before nor how far SGLD has drawn apart from its keys, nor a schedule at all.
"""

import hashlib
import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np

from . import _declared, _packed, _saved, _states, state_file
from ._core import KVStore
from ._optimizer import BuiltIn, built_in, kind_of
from ._python_optimizer import check_importable, check_slots, imported_class
from .errors import ClosedError, InvalidArgumentError, KVStoreError, PeerLostError
from .optimizer import Optimizer

if TYPE_CHECKING:
    from .cluster.member import Member

ASK, SET, TAKE = -3, -4, -5  # the heads of the commands
MAX_BODY = 300_000  # characters of the counts in one command
PATIENCE_S, PAUSE_S = 1.0, 0.02  # another worker may be loading
BETWEEN = "while another worker loaded states: load between two barriers"

Told = dict[str, Any]


def _pack(optimizer: Optimizer) -> Told:
    return {"kind": kind_of(type(optimizer)), **optimizer._pack()}


def _class_of(kind: str) -> type[Optimizer]:
    return imported_class(kind) if ":" in kind else built_in[kind]


def _unpack(packed: Told) -> Optimizer:
    return _class_of(packed["kind"])._unpack(packed)


def _give(kv: KVStore, optimizer: Optimizer, training: int) -> None:
    """Set an optimizer that the servers know, or will know, as that of this training."""
    kv._optimizer_set(
        optimizer,
        *optimizer._for_core(),
        optimizer.lr_scheduler,
        optimizer._multipliers(),
        optimizer.begin_num_update,
        _declared._number(_declared._describe(optimizer), training),
    )


def _same(packed: Told, other: Told) -> bool:
    return _declared._describe(_unpack(packed)) == _declared._describe(_unpack(other))


def _counted(kv: KVStore) -> int:
    return int(kv._states_export(_states.COUNTS)["counted"])


def _differs(kv: KVStore, optimizer: Optimizer) -> bool:
    own = kv._optimizer_owner()
    return own is None or _declared._describe(own) != _declared._describe(optimizer)


@contextmanager
def _having(kv: KVStore, member: "Member", optimizer: Optimizer, training: int) -> Iterator[None]:
    """Meanwhile the store has this optimizer of worker 0's: it may have none, or an older one."""
    before = kv._optimizer_owner()
    if not _differs(kv, optimizer):
        yield
        return
    # One of another class makes the store forget its counts.
    forgets = before is not None and type(before) is not type(optimizer)
    kept = kv._states_export(_states.PUSHED) if forgets else None
    _give(kv, optimizer, training)
    try:
        yield
    finally:
        if before is None:
            kv._updater_set(None, None)
        else:
            _give(kv, before, member.declared.training)
        if kept is not None:
            counts = {key: count for key, count, _, _ in kept["keys"]}
            _states.import_counts(kv, tuple(kept[name] for name in _states.NUMBERS), counts)


# --------------------------------------------------------------------------- what a worker has


def _told_by(kv: KVStore, member: "Member") -> Told:
    """What the worker of this store counts, and its optimizer."""
    optimizer = kv._optimizer_owner()
    if optimizer is None:
        raise InvalidArgumentError("the store has no optimizer, so it has no states to save")
    states = kv._states_export(_states.COUNTS)
    told: Told = {name: states[name] for name in ("counted", "total")}
    whole = [states[name] for name in _states.NUMBERS]
    told |= {"rank": member.rank, "note": member.loads[-1][0] if member.loads else None}
    training = member.declared.training
    return {"optimizer": _pack(optimizer), "training": training, "whole": whole, **told}


def _command(
    member: "Member", head: int, body: str, timeout_s: float, ranks: list[int]
) -> list[str]:
    """What these workers answer. Of a loss that one of them has heard of before this one, the error
    is the same."""
    try:
        return member.command(head, body, timeout_s, workers=ranks)
    except KVStoreError as error:
        if type(error) is KVStoreError and f"{PeerLostError.__name__}: " in str(error):
            raise PeerLostError(str(error)) from error
        raise


def _ask(member: "Member", timeout_s: float, ranks: list[int], kind: str = "") -> dict[int, Told]:
    """The same of other workers that have an optimizer, by rank; and whether they know a class."""
    answers = [json.loads(text) for text in _command(member, ASK, kind, timeout_s, ranks)]
    return {told["rank"]: told for told in answers if told}


def _worker_0(told: dict[int, Told]) -> Told:
    if 0 not in told:
        raise InvalidArgumentError("worker 0 has no optimizer, so there are no states")
    return told[0]


def _store_of(member: "Member") -> KVStore | None:
    """None when it is closed, or not made yet."""
    store: Any = None if member.store is None else member.store()
    if not isinstance(store, KVStore):
        return None
    try:
        store._place()
    except ClosedError:
        return None
    return store


def _answer_ask(member: "Member", body: str | bytes) -> str:
    kv = _store_of(member)
    if kv is None or kv._optimizer_owner() is None:
        return "null"
    if body:
        _class_of(str(body))
    return json.dumps(_told_by(kv, member), allow_nan=False)


# ---------------------------------------------------------------------------------------- save


def save(kv: KVStore, member: "Member", timeout_s: float, fname: Any, dump_optimizer: bool) -> None:
    first = member.rank == 0
    told = _told_by(kv, member) if first else _worker_0(_ask(member, timeout_s, [0]))
    optimizer = _unpack(told["optimizer"])
    with _having(kv, member, optimizer, told["training"]):
        states = kv._states_export()
    counts = {key: count for key, count, _, _ in states["keys"]}
    if not first:
        told = _worker_0(_ask(member, timeout_s, [0]))  # now that all pushes of here are through
        on_servers = sum(count for key, count in counts.items() if key in kv)
        if not (member.asynchronous or told["total"] == on_servers):
            # What is worker 0's would be further on than what is the servers'.
            raise InvalidArgumentError(
                f"worker 0 has pushed what worker {member.rank}, which saves, has not: save on "
                "worker 0, or between two barriers"
            )
    if not isinstance(optimizer, BuiltIn):
        states["keys"] = [(*entry, _slots_of(slots)[0]) for *entry, slots in states["keys"]]
    states.update(zip(_states.NUMBERS, told["whole"], strict=True))
    states["num_update"] = max(states["num_update"], *counts.values(), 0)
    state_file.write(fname, states, _saved.describe(optimizer, dump_optimizer))


# ---------------------------------------------------------------------- optimizers in Python


def _slots_of(slots: dict[str, Any]) -> tuple[dict[str, Any], bool]:
    """The slots that a file has of one packed, and whether they are more than a file's."""
    return _packed.unpack(slots[_packed.SLOT]) if slots else ({}, False)


def _packed_keys(keys: list[Any]) -> list[Any]:
    return [
        (*entry, {_packed.SLOT: np.frombuffer(_packed.pack(slots, False), np.uint8)})
        for *entry, slots in keys
    ]


def _check_kept(
    kv: KVStore, member: "Member", told: dict[int, Told], klass: type[Optimizer], keys: list[Any]
) -> None:
    """Whether the slots of keys are such as the servers keep for the class, where they do."""
    own, training = kv._optimizer_owner(), member.declared.training
    if member.rank != 0 and 0 in told:
        if told[0]["optimizer"]["kind"] != kind_of(klass):
            return
        own, training = _unpack(told[0]["optimizer"]), told[0]["training"]
    if type(own) is not klass:
        return
    with _having(kv, member, own, training):
        kept = {key: _slots_of(slots) for key, _, _, slots in kv._states_export()["keys"]}
    for key, _, _, slots in keys:
        like, begun = kept.get(key, ({}, False))
        if begun:
            check_slots(key, slots, like)


# ---------------------------------------------------------------------------------------- load


def load(kv: KVStore, member: "Member", timeout_s: float, fname: Any) -> None:
    states, about = state_file.read(fname)
    # Residuals belong to the workers: those of another store's values mean nothing to these.
    states |= {"residuals": [], "compression": None}
    dump = about.get("dump") is not None
    others = [rank for rank in range(member.num_workers) if rank != member.rank]
    with state_file.naming(fname):
        told = _ask(member, timeout_s, others) if others else {}
        # A file without an optimizer goes on with worker 0's, whatever this worker has.
        before, training = kv._optimizer_owner(), member.declared.training
        if not dump and member.rank != 0:
            before, training = _unpack(_worker_0(told)["optimizer"]), told[0]["training"]
        new = _saved.optimizer_of(about, before)
        position = _saved.position(about.get("schedule"), new)
        if isinstance(new, BuiltIn):
            states = _states.with_unpushed(kv, states)
        else:
            check_importable(type(new))
            if told:
                _ask(member, timeout_s, list(told), kind_of(type(new)))
            _check_kept(kv, member, told, type(new), states["keys"])
            states = {**states, "keys": _packed_keys(states["keys"])}
            states = _states.with_unpushed(kv, states, shaped=False)
        with _having(kv, member, new, training):
            _states.check_states(kv, states)
    loaded: Told = {
        "kind": kind_of(type(new)),
        "optimizer": _pack(new) if dump else None,
        "schedule": about.get("schedule"),
        "whole": [states[name] for name in _states.NUMBERS],
        "note": _note(states, about),
    }
    if 0 in told and not member.asynchronous:
        told = _when_even(kv, member, timeout_s, told, states, loaded)
        if not told:
            if _differs(kv, new) and dump:
                _declared.declare(member, timeout_s, new)
                _give(kv, new, member.declared.training)
            return
    # Nothing has changed up to here.
    counted = {rank: one["counted"] for rank, one in told.items()}
    if dump:
        if member.rank != 0:
            counted[0] = _set_by_worker_0(member, timeout_s, new, counted.get(0))
        _declared.declare(member, timeout_s, new)
        training = member.declared.training
    if _differs(kv, new):
        member.declared.training = training
        _give(kv, new, training)
    note = loaded["note"], _counted(kv)
    member.loads.append(note)
    try:
        _states.import_states(kv, states)
    except BaseException:
        member.loads.remove(note)
        raise
    _place_schedule(kv._optimizer_owner(), position)
    loaded |= {"from": member.rank, "training": training}
    _tell(member, timeout_s, counted, loaded, states["keys"])


def _note(states: dict[str, Any], about: dict[str, Any]) -> str:
    """What tells a file from others."""
    digest = hashlib.blake2b(digest_size=16)
    digest.update(repr((about, [states[name] for name in _states.NUMBERS])).encode())
    for key, count, _, slots in states["keys"]:
        digest.update(repr((key, count)).encode())
        for slot in sorted(slots):
            digest.update(slot.encode() + slots[slot].tobytes())
    return digest.hexdigest()


def _when_even(
    kv: KVStore,
    member: "Member",
    timeout_s: float,
    told: dict[int, Told],
    states: dict[str, Any],
    loaded: Told,
) -> dict[int, Told]:
    """What the others say when servers have all that worker 0 has pushed: else its next pushes
    would be counted as if they came before the load.

    Nothing if the servers have just got the same file by another worker: all workers may load, and
    the first may go on while the last is still here.
    """
    wanted = {key: count for key, count, _, _ in states["keys"] if count >= 0}
    others = list(told)
    until = time.monotonic() + PATIENCE_S
    while True:
        with _having(kv, member, _unpack(told[0]["optimizer"]), told[0]["training"]):
            keys = kv._states_export(_states.PUSHED)["keys"]
        told = _ask(member, timeout_s, others)  # now that all pushes of here are through
        first = _worker_0(told)
        on_servers = {key: count for key, count, _, _ in keys}
        is_set = loaded["optimizer"] is None or _same(loaded["optimizer"], first["optimizer"])
        if first["note"] == loaded["note"] and on_servers == wanted and is_set:
            return {}
        if first["total"] == sum(on_servers.values()):
            return told
        if time.monotonic() > until:
            raise InvalidArgumentError(
                f"worker 0 has pushed what worker {member.rank}, which loads, has not: load "
                "between two barriers"
            )
        time.sleep(PAUSE_S)


def _place_schedule(optimizer: Optimizer | None, position: tuple[Any, ...] | None) -> None:
    schedule: Any = None if optimizer is None else optimizer.lr_scheduler
    if schedule is not None and position is not None:
        schedule._position = position


def _set_by_worker_0(
    member: "Member", timeout_s: float, new: Optimizer, counted: int | None
) -> int:
    """As if worker 0 had called set_optimizer; returns its `counted` then."""
    body = json.dumps({"optimizer": _pack(new), "counted": counted})
    answers = _command(member, SET, body, timeout_s, [0])
    if not answers:
        raise KVStoreError("worker 0, which sets the optimizer, has left the cluster")
    return int(answers[0])


def _tell(
    member: "Member",
    timeout_s: float,
    counted: dict[int, int],
    told: Told,
    keys: list[Any],
) -> None:
    """Tell the other workers how far training has come, in as many pieces as it takes."""
    if not counted:
        return
    told["counted"] = [[rank, number] for rank, number in counted.items()]
    pieces: list[list[list[Any]]] = [[]]
    size = 0
    for entry in ([key, count] for key, count, _, _ in keys):
        size += len(json.dumps(entry))
        if size > MAX_BODY:
            pieces.append([])
            size = 0
        pieces[-1].append(entry)
    for i, piece in enumerate(pieces):
        part = {"counts": piece, "first": i == 0, "last": i == len(pieces) - 1}
        _command(member, TAKE, json.dumps({**told, **part}), timeout_s, list(counted))


# ----------------------------------------------------------------------------- the other workers


def _set_here(member: "Member", body: str | bytes) -> str:
    kv = _store_of(member)
    place = None if kv is None else kv._place()
    if kv is None or place is None:
        raise InvalidArgumentError("its store is closed")
    told = json.loads(body)
    new, counted = _unpack(told["optimizer"]), told["counted"]
    if _differs(kv, new):
        _declared.declare(*place, new)
        if counted not in (None, _counted(kv)):
            raise InvalidArgumentError(f"it has pushed {BETWEEN}")
        _give(kv, new, member.declared.training)
        counted = None
    return str(_counted(kv) if counted is None else counted)


def _take(member: "Member", body: str | bytes) -> str:
    told = json.loads(body)
    if told["first"]:
        member.taking[told["from"]] = {}
    counts = member.taking[told["from"]]
    counts.update(map(tuple, told["counts"]))
    if not told["last"]:
        return ""
    del member.taking[told["from"]]
    kv = _store_of(member)
    own = None if kv is None else kv._optimizer_owner()
    if kv is None or own is None:
        return ""  # it counts nothing
    counted = dict(told["counted"])[member.rank]
    if any(note == told["note"] and before >= counted for note, before in member.loads):
        return ""  # it has loaded the same file by itself since, and may have gone on
    new = None if told["optimizer"] is None else _unpack(told["optimizer"])
    if new is not None and _differs(kv, new):
        member.declared.training = told["training"]
        _give(kv, new, told["training"])
        own, counted = new, _counted(kv)
    if told["kind"] == kind_of(type(own)):
        try:
            _states.import_counts(kv, tuple(told["whole"]), counts, counted)
        except InvalidArgumentError as error:
            if member.rank == 0 or member.asynchronous:
                raise InvalidArgumentError(f"{error} {BETWEEN}") from error
            return ""
        member.loads.append((told["note"], counted))
        _place_schedule(own, _saved.position(told["schedule"], own))
    return ""


# What workers run: functions of (member, body) that give the answer.
COMMANDS: dict[int, Callable[["Member", str | bytes], str]] = {
    ASK: _answer_ask,
    SET: _set_here,
    TAKE: _take,
}
