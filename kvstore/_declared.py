"""Optimizers of dist stores: worker 0 declares one to the servers, other workers agree with it.

A declaration is what `Optimizer._pack` gives, made equal for equal optimizers: JSON with sorted
keys and multipliers, and the schedule as it was built, since only its owner knows how far it has
come. Its number is a digest of it and of how often the class had changed: servers know optimizers
by that, and pushes name them so. What was kept for an earlier training begins anew on servers.

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
from ._optimizer import BuiltIn, built_in, kind_of
from ._python_optimizer import Served, check_importable, import_class
from .errors import (
    InvalidArgumentError,
    KVStoreError,
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
        self.kind: str | None = None  # of worker 0: the class that all servers have, …
        # … and how often it has changed; of another worker: the same when it last agreed.
        self.training = 0
        self.agreed = 0  # of another worker: the last call of worker 0 that it has agreed with
        # Of a server: the last calls of worker 0, (call, digest of what it declared, training), and
        # what the newest declared.
        self.known: deque[tuple[int, int, int]] = deque(maxlen=KEPT)
        self.newest: Declaration = {}
        self.served = Served()


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
    declaration = {"kind": kind_of(type(optimizer)), **optimizer._pack()}
    for name in ("lr_mult", "wd_mult", "names"):
        declaration[name].sort(key=lambda entry: (isinstance(entry[0], str), entry[0]))
    schedule: Any = optimizer.lr_scheduler
    if schedule is not None:
        declaration["schedule"] = lr_scheduler._pack(type(schedule)(**schedule._arguments))
    described: Declaration = _plain(declaration)
    return described


def _title(kind: str) -> str:
    return built_in[kind].__name__ if kind in built_in else kind


def _check_arguments(optimizer: Optimizer) -> None:
    """InvalidArgumentError for an argument of a user's that a server would not get as it is."""
    packed = optimizer._pack()
    for name, value in {**packed["keywords"], **packed["later"]}.items():
        try:
            same = json.loads(_text(value)) == _plain(value)
        except (TypeError, ValueError):
            same = False
        if not same:
            raise InvalidArgumentError(
                f"{type(optimizer).__name__}: its argument {name}={value!r} cannot travel to the "
                "servers; they take numbers, str, bool, None, lists, and dicts whose keys are str"
            )


def _text(value: Any) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)


def _digest(described: Any) -> int:
    digest = hashlib.blake2b(_text(described).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") or 1


def _number(declaration: Declaration, training: int) -> int:
    return _digest([training, declaration])


def _difference(own: Declaration, other: Declaration) -> str:
    """The first thing that two declarations say differently."""

    def shown(value: Any) -> str:
        text = repr(value)
        return text if len(text) <= SHOWN else f"{text[: SHOWN - 3]}..."

    if own["kind"] != other["kind"]:
        names = [_title(declaration["kind"]) for declaration in (own, other)]
        return f"it is of the class {names[0]}, that of worker 0 of {names[1]}"
    numbers = {**other["numbers"], **own["numbers"]}
    pairs: list[tuple[str, Any, Any]]
    pairs = [(n, own["numbers"].get(n), other["numbers"].get(n)) for n in numbers]
    pairs += [(n, own[n], other[n]) for n in ("lr_mult", "wd_mult", "names")]
    for part in ("keywords", "later"):  # of classes in Python
        its, mine = other.get(part, {}), own.get(part, {})
        pairs += [(n, mine.get(n), its.get(n)) for n in {**its, **mine}]
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
    if not isinstance(optimizer, BuiltIn):
        check_importable(type(optimizer))
    schedule = optimizer.lr_scheduler
    if schedule is not None and lr_scheduler._pack(schedule) is None:
        raise InvalidArgumentError(
            f"{name}: in a dist store the schedule must be a built-in one of "
            f"kvstore.lr_scheduler, not {schedule!r}"
        )
    if not isinstance(optimizer, BuiltIn):
        _check_arguments(optimizer)
    declaration = _describe(optimizer)
    if member.rank != 0:
        member.declared.training = _agree(member, timeout_s, declaration)
        return _number(declaration, member.declared.training)
    declared = member.declared
    training = declared.training + (declared.kind != declaration["kind"])
    call = next(declared.calls)
    body = _text({"call": call, "training": training, "optimizer": declaration})
    try:
        member.command(DECLARE, body, timeout_s)
    except KVStoreError as error:
        raise type(error)(f"not all servers have taken the optimizer {name}: {error}") from error
    declared.kind, declared.training = declaration["kind"], training
    return _number(declaration, training)


def _agree(member: "Member", timeout_s: float, declaration: Declaration) -> int:
    """The training that worker 0 has declared an equal optimizer for."""
    deadline, pause, since = time.monotonic() + timeout_s, FIRST_PAUSE_S, member.declared.agreed
    body = _text({"since": since, "optimizer": declaration})
    while True:
        left = deadline - time.monotonic()
        answers = [json.loads(text) for text in member.command(AGREE, body, max(left, ANSWER_S))]
        if all(answer["call"] for answer in answers):
            first = min(answers, key=lambda answer: answer["call"])
            member.declared.agreed = first["call"]
            training: int = first["training"]
            return training
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


def _read(
    member: "Member", body: str | bytes, *counts: str
) -> tuple[list[int], Declaration, Optimizer]:
    """A body's counts, its declaration and the optimizer of that; InvalidArgumentError for any
    other than `_text` has made."""
    try:
        given = json.loads(body)
        numbers, declaration = [given[name] for name in counts], given["optimizer"]
        klass = _class_of(declaration["kind"], member)
        whole = set(given) == {*counts, "optimizer"}
        whole = whole and all(type(number) is int and 0 <= number < 2**63 for number in numbers)
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
    return numbers, declaration, optimizer


def _class_of(kind: str, member: "Member") -> type[Optimizer]:
    if ":" in kind:
        return import_class(kind, member.settings.allow_import)
    return built_in[kind]


def _take_declaration(member: "Member", body: str | bytes) -> str:
    (call, training), declaration, optimizer = _read(member, body, "call", "training")
    number = _number(declaration, training)
    assert member.core is not None
    member.core.add_optimizer(number, *optimizer._for_core(), optimizer.begin_num_update, training)
    if not isinstance(optimizer, BuiltIn):
        member.declared.served.add(number, optimizer, training)
    member.declared.known.append((call, _digest(declaration), training))
    member.declared.newest = declaration
    return ""


def _answer_agreement(member: "Member", body: str | bytes) -> str:
    (since,), declaration, _ = _read(member, body, "since")
    digest, declared = _digest(declaration), member.declared
    equal = (known for known in declared.known if known[0] >= since and known[1] == digest)
    call, _, training = next(equal, (0, 0, 0))
    differs = _difference(declaration, declared.newest) if declared.known and not call else ""
    absent = 0 in member.departed
    return _text({"call": call, "training": training, "differs": differs, "left": absent})


# What servers run: functions of (member, body) that give the answer.
COMMANDS: dict[int, Callable[["Member", str | bytes], str]] = {
    DECLARE: _take_declaration,
    AGREE: _answer_agreement,
}
