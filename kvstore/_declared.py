"""Optimizers of dist stores: worker 0 declares one to the servers, other workers agree with it.

A declaration is what `Optimizer._pack` gives, made equal for equal optimizers: JSON with sorted
keys and multipliers, and the schedule as it was built, since only its owner knows how far it has
come. Its number is a digest of it: servers know optimizers by that, and pushes name them so.

Worker 0 numbers its calls. A call of another worker may be early or late: it agrees with the first
equal declaration from the one on that it has agreed with before, and waits while there is none.
Only a first call is refused before the deadline: later, worker 0 may have calls of its own between.
"""

import hashlib
import itertools
import json
import time
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from . import lr_scheduler
from ._optimizer import built_in
from .errors import (
    InvalidArgumentError,
    KVStoreError,
    NotBuiltError,
    PeerLostError,
    TimeoutError,
)
from .optimizer import Optimizer

if TYPE_CHECKING:
    from .cluster.member import Member

DECLARE, AGREE = -1, -2  # the heads of the commands
KEPT = 1024  # calls of worker 0 that a server remembers
FIRST_PAUSE_S, LAST_PAUSE_S = 0.01, 0.5
ANSWER_S = 5.0  # for the answer of a server that is asked in the last moment
SHOWN = 60  # characters of a value in a message; as JSON twelve times as many may have to travel

Declaration = dict[str, Any]


class Declared:
    """What a node remembers of declarations."""

    def __init__(self) -> None:
        self.calls = itertools.count(1)  # of worker 0: the numbers of its calls to come
        self.agreed = 0  # of another worker: the last call of worker 0 that it has agreed with
        # Of a server: the last calls of worker 0, (call, number), and what the newest declared.
        self.known: deque[tuple[int, int]] = deque(maxlen=KEPT)
        self.newest: Declaration = {}


def _plain(value: Any) -> Any:
    """As JSON holds it; whole floats as integers, so that 1 and 1.0 declare the same."""
    if isinstance(value, dict):
        return {name: _plain(part) for name, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(part) for part in value]
    if isinstance(value, float) and value.is_integer() and abs(value) < 2**53:
        return int(value)
    return value


def _describe(optimizer: Optimizer) -> Declaration:
    declaration = {"kind": optimizer._KIND, **optimizer._pack()}
    for name in ("lr_mult", "wd_mult", "names"):
        declaration[name].sort(key=lambda entry: (isinstance(entry[0], str), entry[0]))
    schedule: Any = optimizer.lr_scheduler
    if schedule is not None:
        declaration["schedule"] = lr_scheduler._pack(type(schedule)(**schedule._arguments))
    described: Declaration = _plain(declaration)
    return described


def _text(value: Any) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)


def _number(declaration: Declaration) -> int:
    digest = hashlib.blake2b(_text(declaration).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") or 1


def _difference(own: Declaration, other: Declaration) -> str:
    """The first thing that two declarations say differently."""

    def shown(value: Any) -> str:
        text = repr(value)
        return text if len(text) <= SHOWN else f"{text[: SHOWN - 3]}..."

    if own["kind"] != other["kind"]:
        names = [built_in[declaration["kind"]].__name__ for declaration in (own, other)]
        return f"it is of the class {names[0]}, that of worker 0 of {names[1]}"
    numbers = {**other["numbers"], **own["numbers"]}
    pairs: list[tuple[str, Any, Any]]
    pairs = [(n, own["numbers"].get(n), other["numbers"].get(n)) for n in numbers]
    pairs += [(n, own[n], other[n]) for n in ("lr_mult", "wd_mult", "names")]
    mine, its = (p["schedule"] and lr_scheduler._unpack(p["schedule"]) for p in (own, other))
    pairs += [("schedule", mine, its)]
    pairs += [("begin_num_update", own["begin"], other["begin"])]
    for name, mine, its in pairs:
        if mine != its:
            return f"its {name} is {shown(mine)}, that of worker 0 {shown(its)}"
    return "they are described differently"


# -------------------------------------------------------------------------------- on a worker


def declare(member: "Member", timeout_s: float, optimizer: Optimizer) -> int:
    """Make an optimizer known to all servers; returns its number there.

    Worker 0 gives it to them; another worker waits until worker 0 has done so with an equal one.
    """
    name = type(optimizer).__name__
    if optimizer._KIND is None:
        raise NotBuiltError(
            f"{name} is an optimizer in Python, which is not built for dist stores yet; use one of "
            "the classes of kvstore.optimizer, or a local store"
        )
    schedule = optimizer.lr_scheduler
    if schedule is not None and lr_scheduler._pack(schedule) is None:
        raise InvalidArgumentError(
            f"{name}: in a dist store the schedule must be a built-in one of "
            f"kvstore.lr_scheduler, not {schedule!r}"
        )
    declaration = _describe(optimizer)
    if member.rank != 0:
        _agree(member, timeout_s, declaration)
        return _number(declaration)
    body = _text({"call": next(member.declared.calls), "optimizer": declaration})
    try:
        member.command(DECLARE, body, timeout_s)
    except KVStoreError as error:
        raise type(error)(f"not all servers have taken the optimizer {name}: {error}") from error
    return _number(declaration)


def _agree(member: "Member", timeout_s: float, declaration: Declaration) -> None:
    deadline, pause, since = time.monotonic() + timeout_s, FIRST_PAUSE_S, member.declared.agreed
    body = _text({"since": since, "optimizer": declaration})
    while True:
        left = deadline - time.monotonic()
        answers = [json.loads(text) for text in member.command(AGREE, body, max(left, ANSWER_S))]
        if all(answer["call"] for answer in answers):
            member.declared.agreed = min(answer["call"] for answer in answers)
            return
        left = deadline - time.monotonic()
        differs = [answer["differs"] for answer in answers if answer["differs"]]
        alone = any(answer["left"] for answer in answers)  # worker 0 sets none any more
        # While worker 0's call is under way, some servers have heard of it and others have not.
        if differs and (left <= 0 or alone or (len(differs) == len(answers) and since == 0)):
            waited = f" (it waited {timeout_s:g} s for worker 0 to set it)" if left <= 0 else ""
            raise InvalidArgumentError(
                f"the optimizer of worker {member.rank} is not the one that worker 0 has set: "
                f"{differs[0]}{waited}"
            )
        if alone:
            raise PeerLostError(
                f"worker 0 has left the cluster, and worker {member.rank} sets an optimizer that "
                "worker 0 has not set"
            )
        if left <= 0:
            raise TimeoutError(
                f"worker {member.rank} waited {timeout_s:g} s; missing: worker 0, which has not "
                "called set_optimizer (the limit is KVSTORE_TIMEOUT or the option timeout)"
            )
        time.sleep(min(pause, left))
        pause = min(2 * pause, LAST_PAUSE_S)


# -------------------------------------------------------------------------------- on a server


def _read(body: str | bytes, place: str) -> tuple[int, Declaration, Optimizer]:
    """A body's number, its declaration and the optimizer of that; InvalidArgumentError for any
    other than `_text` has made."""
    try:
        given = json.loads(body)
        number, declaration = given[place], given["optimizer"]
        klass = built_in[declaration["kind"]]
        whole = set(given) == {place, "optimizer"} and type(number) is int and number >= 0
        optimizer = klass._unpack(declaration)
        whole = whole and _text(_describe(optimizer)) == _text(declaration)
    except InvalidArgumentError:
        raise
    except Exception as error:  # of whatever somebody has sent
        raise InvalidArgumentError(
            f"this declares no optimizer: {type(error).__name__}: {str(error)[:SHOWN]}"
        ) from None
    if not whole:
        raise InvalidArgumentError("this declares no optimizer: it is not as this version does it")
    return number, declaration, optimizer


def _take_declaration(member: "Member", body: str | bytes) -> str:
    call, declaration, optimizer = _read(body, "call")
    number = _number(declaration)
    assert member.core is not None
    member.core.add_optimizer(number, *optimizer._for_core(), optimizer.begin_num_update)
    member.declared.known.append((call, number))
    member.declared.newest = declaration
    return ""


def _answer_agreement(member: "Member", body: str | bytes) -> str:
    since, declaration, _ = _read(body, "since")
    number = _number(declaration)
    declared = member.declared
    call = next((call for call, one in declared.known if call >= since and one == number), 0)
    differs = _difference(declaration, declared.newest) if declared.known and not call else ""
    return _text({"call": call, "differs": differs, "left": 0 in member.departed})


# What servers run: functions of (member, body) that give the answer.
COMMANDS: dict[int, Callable[["Member", str | bytes], str]] = {
    DECLARE: _take_declaration,
    AGREE: _answer_agreement,
}
