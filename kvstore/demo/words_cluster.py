"""The word vectors once more, over processes: the tables lie on servers, cut by rows.

Each worker pulls the rows that its share of a batch needs, and pushes their gradients; the servers
sum those of all workers and take AdaGrad's step with the sum. No process has a whole table while it
trains.
"""

from __future__ import annotations

from typing import NamedTuple

from kvstore.demo.cluster import Processes, Wire, counted
from kvstore.demo.words import Step, Text, Training

KIND = "dist_sync"


class Epoch(NamedTuple):
    """An epoch of one worker."""

    steps: list[Step]
    wire: Wire


# In a worker process: its one training.
_here: list[Training] = []


def _begin(text: Text, seed: int) -> None:
    _here.append(Training(text, seed, KIND))


def _epoch() -> Epoch:
    before = counted()
    steps = list(_here[0].epoch())
    return Epoch(steps, Wire(*(now - then for now, then in zip(counted(), before, strict=True))))


def _end() -> None:
    _here.pop().__exit__()


class Cluster(Processes):
    """The cluster, seen from the process that has started it."""

    def __init__(self, text: Text, workers: int = 4, seed: int = 0) -> None:
        super().__init__(workers, _begin, _end, text, seed)

    def epoch(self) -> list[Epoch]:
        """One of each worker."""
        return self.cluster.run(_epoch)
