"""Training states of dist stores: a worker saves or loads, and the others hear of it.

The states of keys are on the servers, from where the core has them, with how often each key was
pushed. What belongs to the optimizer as a whole, and the position of the schedule, is worker 0's
(with dist_async every worker's own), since that one counts: a worker that saves asks worker 0, one
that loads tells all others. The servers' newest steps would not do: they have neither LARS's rate
of the push before nor how far SGLD has drawn apart from its keys, nor a schedule at all.
"""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from . import _declared, _saved, _states, state_file
from ._core import KVStore
from ._optimizer import BuiltIn, built_in
from .errors import ClosedError, InvalidArgumentError, KVStoreError, NotBuiltError
from .optimizer import Optimizer

if TYPE_CHECKING:
    from .cluster.member import Member

ASK, SET, TAKE = -3, -4, -5  # the heads of the commands
MAX_BODY = 300_000  # characters of the counts in one command

Told = dict[str, Any]


def _pack(optimizer: Optimizer) -> Told:
    return {"kind": optimizer._KIND, **optimizer._pack()}


def _unpack(packed: Told) -> Optimizer:
    return built_in[packed["kind"]]._unpack(packed)


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
    _give(kv, optimizer, training)
    try:
        yield
    finally:
        if before is None:
            kv._updater_set(None, None)
        else:
            _give(kv, before, member.declared.training)


# --------------------------------------------------------------------------- what a worker has


def _told_by(kv: KVStore, member: "Member") -> Told:
    """What the worker of this store counts, and its optimizer."""
    optimizer = kv._optimizer_owner()
    if optimizer is None:
        raise InvalidArgumentError("the store has no optimizer, so it has no states to save")
    states = kv._states_export(_states.COUNTS)
    whole = [states[name] for name in _states.NUMBERS]
    training = member.declared.training
    return {"optimizer": _pack(optimizer), "training": training, "whole": whole}


def _ask(kv: KVStore, member: "Member", timeout_s: float) -> Told:
    """The same of worker 0."""
    if member.rank == 0:
        return _told_by(kv, member)
    answers = member.command(ASK, "", timeout_s, workers=[0])
    if not answers:
        raise KVStoreError("worker 0, which counts the pushes, has left the cluster")
    told: Told = json.loads(answers[0])
    if "refused" in told:
        raise InvalidArgumentError(f"worker 0: {told['refused']}")
    return told


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
    try:
        if kv is None:
            raise InvalidArgumentError("its store is closed")
        return json.dumps(_told_by(kv, member), allow_nan=False)
    except InvalidArgumentError as error:
        return json.dumps({"refused": str(error)})


# ---------------------------------------------------------------------------------------- save


def save(kv: KVStore, member: "Member", timeout_s: float, fname: Any, dump_optimizer: bool) -> None:
    told = _ask(kv, member, timeout_s)
    optimizer = _unpack(told["optimizer"])
    with _having(kv, member, optimizer, told["training"]):
        states = kv._states_export()
    states.update(zip(_states.NUMBERS, told["whole"], strict=True))
    counts = (count for _, count, _, _ in states["keys"])
    states["num_update"] = max(states["num_update"], *counts, 0)
    state_file.write(fname, states, _saved.describe(optimizer, dump_optimizer))


# ---------------------------------------------------------------------------------------- load


def load(kv: KVStore, member: "Member", timeout_s: float, fname: Any) -> None:
    states, about = state_file.read(fname)
    # Residuals belong to the workers: those of another store's values mean nothing to these.
    states |= {"residuals": [], "compression": None}
    dump = about.get("dump") is not None
    with state_file.naming(fname):
        # A file without an optimizer goes on with worker 0's, whatever this worker has.
        before, training = kv._optimizer_owner(), member.declared.training
        if not dump and member.rank != 0:
            asked = _ask(kv, member, timeout_s)
            before, training = _unpack(asked["optimizer"]), asked["training"]
        new = _saved.optimizer_of(about, before)
        if not isinstance(new, BuiltIn):
            raise NotBuiltError(
                f"it is of {type(new).__name__}, an optimizer in Python, which is not built for "
                "dist stores yet; load it into a local store"
            )
        position = _saved.position(about.get("schedule"), new)
        states = _states.with_unpushed(kv, states)
        with _having(kv, member, new, training):
            _states.check_states(kv, states)
        # Nothing has changed up to here.
        if dump:
            _set_everywhere(kv, member, timeout_s, new)
        elif _differs(kv, new):
            _give(kv, new, training)
        _states.import_states(kv, states)
    _place_schedule(kv._optimizer_owner(), position)
    _tell(member, timeout_s, states, new, about.get("schedule"), dump)


def _place_schedule(optimizer: Optimizer | None, position: tuple[Any, ...] | None) -> None:
    schedule: Any = None if optimizer is None else optimizer.lr_scheduler
    if schedule is not None and position is not None:
        schedule._position = position


def _set_everywhere(kv: KVStore, member: "Member", timeout_s: float, new: Optimizer) -> None:
    """As if worker 0 had called set_optimizer, and this worker after it."""
    if member.rank != 0:
        body = json.dumps({"optimizer": _pack(new)})
        if not member.command(SET, body, timeout_s, workers=[0]):
            raise KVStoreError("worker 0, which sets the optimizer, has left the cluster")
    _declared.declare(member, timeout_s, new)
    _give(kv, new, member.declared.training)


def _tell(
    member: "Member",
    timeout_s: float,
    states: dict[str, Any],
    new: Optimizer,
    schedule: Any,
    dump: bool,
) -> None:
    """Tell the other workers how far training has come."""
    others = [rank for rank in range(member.num_workers) if rank != member.rank]
    if not others:
        return
    told: Told = {
        "kind": new._KIND,
        "optimizer": _pack(new) if dump else None,
        "training": member.declared.training,
        "schedule": schedule,
        "whole": [states[name] for name in _states.NUMBERS],
    }
    counts: list[list[Any]] = []
    size = 0
    for key, count, _, _ in states["keys"]:
        counts.append([key, count])
        size += len(json.dumps(counts[-1]))
        if size > MAX_BODY:
            member.command(TAKE, json.dumps({**told, "counts": counts}), timeout_s, workers=others)
            counts, size = [], 0
    member.command(TAKE, json.dumps({**told, "counts": counts}), timeout_s, workers=others)


# ----------------------------------------------------------------------------- the other workers


def _set_here(member: "Member", body: str | bytes) -> str:
    kv = _store_of(member)
    place = None if kv is None else kv._place()
    if kv is None or place is None:
        raise InvalidArgumentError("its store is closed")
    new = _unpack(json.loads(body)["optimizer"])
    _declared.declare(*place, new)
    _give(kv, new, member.declared.training)
    return ""


def _take(member: "Member", body: str | bytes) -> str:
    told = json.loads(body)
    kv = _store_of(member)
    own = None if kv is None else kv._optimizer_owner()
    if kv is None or own is None:
        return ""  # it counts nothing
    new = None if told["optimizer"] is None else _unpack(told["optimizer"])
    if new is not None and _differs(kv, new):
        member.declared.training = told["training"]
        _give(kv, new, told["training"])
        own = new
    if told["kind"] == own._KIND:
        _states.import_counts(kv, tuple(told["whole"]), dict(map(tuple, told["counts"])))
        _place_schedule(own, _saved.position(told["schedule"], own))
    return ""


# What workers run: functions of (member, body) that give the answer.
COMMANDS: dict[int, Callable[["Member", str | bytes], str]] = {
    ASK: _answer_ask,
    SET: _set_here,
    TAKE: _take,
}
