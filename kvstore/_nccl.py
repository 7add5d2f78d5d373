"""A store of kind nccl over several processes, seen from the control plane.

A worker of such a store has `Ranks` where one of a dist store has its data plane. Groups of GPUs
are made in meetings: a barrier in which every worker says what it is at and how many GPUs it
brings. Workers that are at different things hear of it there.
"""

import json
import threading
from typing import Any

from . import _core, _declared, lr_scheduler
from ._optimizer import BuiltIn, kind_of
from .cluster.member import Member, of_this_process
from .errors import ClosedError, DeviceError, InvalidArgumentError, KVStoreError
from .optimizer import Optimizer

DRAIN_S = 5.0  # for sums that a worker which has left took part in
BARRIER = "a barrier"


class Ranks(_core.Ranks):
    """The GPUs of this process among those of its cluster: what a `Member` has as its core."""

    def take_place(
        self, role: str, rank: int, num_workers: int, num_servers: int, **rest: Any
    ) -> "Ranks":
        """Be the data plane of this worker."""
        if num_servers:
            raise InvalidArgumentError(
                f"a store of kind nccl needs no servers, and this cluster has {num_servers}: start "
                "it with none (num_servers=0, kvrun -s 0)"
            )
        self.rank, self.num_workers = rank, num_workers
        self.gone: set[int] = set()
        self.set_place(rank, num_workers)
        return self

    def address(self) -> bytes:
        """NCCL finds its peers by itself."""
        return b""

    def connect(self, peers: list[tuple[int, str, bytes]]) -> None:
        """There is nothing to connect yet."""

    def wait_ready(self, timeout: float) -> None:
        """Nor to wait for."""

    def left(self, rank: int, finished: bool) -> None:
        """A worker makes no more calls: what needs one of it fails, also if it is under way."""
        self.gone.add(rank)
        why = f"worker {rank} has left the cluster, and this call takes all workers"
        self.depart(why)

        def await_sums() -> None:
            try:
                self.drain(DRAIN_S)
            except KVStoreError:
                self.lose(why)

        threading.Thread(target=await_sums, name="kvstore-left", daemon=True).start()

    def close(self) -> None:
        """End the groups: together where all workers do it."""
        self.end(len(self.gone) == self.num_workers - 1)

    def meet(
        self, what: str, devices: int, fits: bool, timeout: float
    ) -> tuple[int, int, bytes] | None:
        """Come together with all workers. None: all have a group that fits; else how many ranks a
        new one has, the first of this worker, and what it is joined with.
        """
        member = of_this_process()
        if member is None:
            raise ClosedError("this store is closed")
        texts = gather(member, what, json.dumps([devices, fits]), timeout)
        told = [json.loads(text) for text in texts]
        if all(fits for _, fits in told):
            return None
        trouble = ident = ""
        if self.rank == 0:
            try:
                ident = _core.nccl_id().hex()
            except KVStoreError as error:
                trouble = str(error)
        trouble, ident = json.loads(
            gather(member, f"{what}: the id", json.dumps([trouble, ident]), timeout)[0]
        )
        if trouble:
            raise DeviceError(f"worker 0: {trouble}")
        numbers = [number for number, _ in told]
        return sum(numbers), sum(numbers[: self.rank]), bytes.fromhex(ident)


def gather(member: Member, what: str, text: str, timeout: float) -> list[str]:
    """The texts of all workers, by rank, who are at the same call as this one."""
    texts = member.barrier(timeout, json.dumps([what, text]), what)
    told = [json.loads(one) if one else [BARRIER, ""] for one in texts]
    for rank, (other, _) in enumerate(told):
        if other != what:
            raise InvalidArgumentError(
                f"workers differ in what they do: worker {member.rank} is at {what}, worker {rank} "
                f"at {other}"
            )
    return [text for _, text in told]


def agree(kv: _core.KVStore, optimizer: Optimizer) -> None:
    """Wait until all workers set an equal optimizer: each updates its own copy of the values."""
    member = of_this_process()
    if member is None or member.store is None or member.store() is not kv:
        return
    if not isinstance(optimizer, BuiltIn):
        raise InvalidArgumentError(
            f"an optimizer in Python such as {type(optimizer).__name__} runs in one process, and "
            "this store is of several: use a built-in one"
        )
    schedule: Any = optimizer.lr_scheduler
    if schedule is None or lr_scheduler._pack(schedule) is not None:
        digest = _declared._digest(_declared._describe(optimizer))
    else:
        digest = _declared._digest(kind_of(type(optimizer)))  # nobody can compare such a schedule
    what = f"set_optimizer of {type(optimizer).__name__} ({digest:016x})"
    gather(member, what, "", member.settings.timeout)
