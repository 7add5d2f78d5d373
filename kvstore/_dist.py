"""What a dist store of the C core asks of its member of the cluster, and what a server runs for it.

The core calls these by name, with the member that `create` gave it.
"""

import json
from collections.abc import Callable
from typing import Any

from . import _declared, _dist_states
from .cluster.member import Command, Member
from .errors import ArrayTypeError, DeviceError, InvalidArgumentError, PeerLostError

Controller = Callable[[int, Any], object]

ROLES = ("worker", "server", "scheduler")
MASKS = {1: "scheduler", 2: "server", 4: "worker"}  # MXNet's groups of nodes
LOSS_S = 5.0  # of a busy machine; it is a moment else
HEADS = range(-(2**63), 2**63)

# The package's own commands, by the role of who runs them and their negative heads: functions of
# (member, body) that give the answer.
OWN = {"server": _declared.COMMANDS, "worker": _dist_states.COMMANDS}


def barrier(member: Member, timeout_s: float) -> None:
    """Wait for all workers."""
    if any(texts := member.barrier(timeout_s)):
        rank = next(rank for rank, text in enumerate(texts) if text)
        raise InvalidArgumentError(
            f"workers differ in what they do: worker {member.rank} is at a barrier, worker {rank} "
            f"at {json.loads(texts[rank])[0]}"
        )


def command(member: Member, head: int, body: str | bytes, timeout_s: float) -> None:
    """Have every server run its controller with `head` and `body`."""
    if head not in HEADS:
        raise InvalidArgumentError(f"head={head}: a head is an integer of 64 bits")
    member.command(head, body, timeout_s)


def dead_nodes(member: Member, role: str | int, timeout_s: float) -> int:
    """How many nodes of a role (or of MXNet's mask of roles) are dead or silent."""
    if isinstance(role, str):
        roles = [role]
    else:
        roles = [name for mask, name in MASKS.items() if role & mask]
    if not roles or any(name not in ROLES for name in roles):
        raise InvalidArgumentError(
            f"role must be 'worker', 'server' or 'scheduler', or an integer mask; got {role!r}"
        )
    if not timeout_s >= 0:
        raise InvalidArgumentError(f"timeout must be a number of seconds, not {timeout_s}")
    # A scheduler that answers is alive, one that does not is an error of the asking.
    return sum(member.dead_nodes(name, timeout_s) for name in roles)


def set_barrier_before_exit(member: Member, wait: bool) -> None:
    """Whether the worker's close waits for the others'."""
    member.barrier_before_exit = wait


def close(member: Member, timeout_s: float, together: bool | None = None) -> None:
    """Leave the cluster; a worker waits for the others to leave too, unless told otherwise."""
    try:
        # What was pushed may still be on its way, and a session that closes drops it.
        if member.core is not None:
            member.core.drain(timeout_s)
    except PeerLostError:
        # The scheduler will know in a moment. A worker that left before that would be taken for
        # the one that is missing, and if all did, the cluster would have ended well.
        member.await_loss(LOSS_S)
    except DeviceError:  # which the calls have told
        together = False
    except BaseException:  # its time is over, or somebody wants it to end
        together = False
        raise
    finally:
        member.close(timeout_s, together)


def run_command(member: Member, asked: Command, controller: Controller | None) -> None:
    """Run a command of another node's, and tell it how that went."""
    answer = ""
    try:
        if asked.head < 0:
            own = OWN[member.role].get(asked.head)
            if own is None:
                raise InvalidArgumentError(f"there is no command {asked.head} in this version")
            answer = own(member, asked.body)
        elif controller is None:
            raise InvalidArgumentError(
                "it was started without a controller: give one to serve(controller=), "
                "LocalCluster(controller=), RayCluster(controller=) or kvrun --controller"
            )
        else:
            controller(asked.head, asked.body)
    except Exception as error:
        member.done(asked, f"{type(error).__name__}: {error}")
    else:
        member.done(asked, answer=answer)


def check_controller(controller: Controller | None) -> None:
    """ArrayTypeError unless it can be called."""
    if controller is not None and not callable(controller):
        raise ArrayTypeError(f"controller is a function of (head, body), not {controller!r}")
