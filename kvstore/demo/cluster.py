"""The digits network once more, data-parallel over processes: a scheduler, servers and workers.

A worker is a process with its own copy of the weights and its own shard of every batch. One step is
one `pushpull` of all gradients: the servers hold the weights, and the optimizer. In a synchronous
store they wait for the gradients of all workers and take one step with the sum; in an asynchronous
one they take a step with each that comes, and nobody waits for anybody.

The sums are taken in the order of the ranks, as those of the threads in digits.py are: with as many
workers the synchronous training ends with the same bits as that by threads.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from time import perf_counter
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]

import kvstore
from kvstore.cluster import member
from kvstore.demo import digits
from kvstore.demo.digits import (
    BATCH,
    KEYS,
    Array,
    Images,
    Step,
    Way,
    Weights,
    accuracy,
    first_weights,
    gradients,
)

if TYPE_CHECKING:
    from typing_extensions import Self

SAME = digits.WAYS[1]  # what the first way does, by threads
WAYS = (
    Way("Adam, processes", "dist_sync", SAME.optimizer),
    Way(
        "processes, 2-bit",
        "dist_sync",
        SAME.optimizer,
        {"type": "2bit", "threshold": 0.005},
    ),
    Way(
        "processes, async",
        "dist_async",
        # One step for each worker's part of a batch, where the others take one for all of it.
        kvstore.optimizer.Adam(learning_rate=0.002),
    ),
)
SERVERS = 2
TIMEOUT_S = 60.0


class Wire(NamedTuple):
    """What a worker has given to the transport and got from it, since the training began."""

    sent: int  # in bytes
    received: int


def counted() -> Wire:
    """What this process has given to the transport and got from it so far."""
    here = member.of_this_process()
    assert here is not None and isinstance(here.core, kvstore._core.Node)
    counters = here.core.counters()
    return Wire(counters["bytes_sent"], counters["bytes_received"])


class Worker:
    """What a worker process keeps between the runs of the cluster: its store and its weights."""

    def __init__(self, images: Images, seed: int, way: Way) -> None:
        # The processes are the parallelism; BLAS threads on top would only get in their way.
        threadpool_limits(limits=1)
        self.images = images
        self.rng = np.random.default_rng(seed)  # the same in all workers
        self.weights = first_weights(self.rng)
        self.kv = kvstore.create(way.kind)
        self.kv.init(KEYS, [self.weights[key] for key in KEYS])
        self.kv.set_optimizer(way.optimizer)
        if way.compression is not None:
            self.kv.set_gradient_compression(way.compression)
        self.at_first = counted()

    def epoch(self) -> list[Step]:
        """The losses are this shard's part."""
        order = self.rng.permutation(len(self.images.train_labels))
        starts = range(0, len(order) - BATCH + 1, BATCH)
        return [self.step(order[start : start + BATCH]) for start in starts]

    def step(self, batch: Array) -> Step:
        shard = np.array_split(batch, self.kv.num_workers)[self.kv.rank]
        begin = perf_counter()

        loss, grads = gradients(
            self.weights, self.images.train[shard], self.images.train_labels[shard]
        )
        have_gradients = perf_counter()

        self.kv.pushpull(
            KEYS, [grads[key] for key in KEYS], out=[self.weights[key] for key in KEYS]
        )
        return Step(
            loss=loss,
            gradients=have_gradients - begin,
            push=perf_counter() - have_gradients,
            updater=0.0,
            pull=0.0,
        )

    def wire(self) -> Wire:
        both = zip(counted(), self.at_first, strict=True)
        return Wire(*(after - before for after, before in both))


# In a worker process: its one worker.
_here: list[Worker] = []


def _begin(images: Images, seed: int, way: Way) -> None:
    _here.append(Worker(images, seed, way))


def _epoch() -> list[Step]:
    return _here[0].epoch()


def _weights() -> Weights:
    return _here[0].weights


def _wire() -> Wire:
    return _here[0].wire()


def _end() -> None:
    _here.pop().kv.close()


class Processes:
    """A cluster whose workers keep something between its runs. Use it in a `with` statement.

    `begin(*arguments)` makes that in each worker, and `end()` ends it.
    """

    def __init__(
        self, workers: int, begin: Callable[..., None], end: Callable[[], None], *arguments: object
    ) -> None:
        self.cluster = kvstore.LocalCluster(workers, SERVERS, timeout=TIMEOUT_S)
        self._end = end
        try:
            self.cluster.run(begin, *arguments)
        except BaseException:
            self.cluster.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        try:
            if kind is None:
                self.cluster.run(self._end)
        finally:
            self.cluster.__exit__(kind, *rest)


class Training(Processes):
    """The cluster, seen from the process that has started it."""

    def __init__(self, images: Images, workers: int = 4, seed: int = 0, way: Way = WAYS[0]) -> None:
        self.images = images
        super().__init__(workers, _begin, _end, images, seed, way)

    def epoch(self) -> list[Step]:
        """The steps; their times are the mean of the workers'."""
        return [_together(steps) for steps in zip(*self.cluster.run(_epoch), strict=True)]

    def test_accuracy(self) -> float:
        return accuracy(self.weights()[0], self.images.test, self.images.test_labels)

    def weights(self) -> list[Weights]:
        """Those of each worker."""
        return self.cluster.run(_weights)

    def wire(self) -> list[Wire]:
        """What went over the wire at each worker."""
        return self.cluster.run(_wire)


def _together(steps: Sequence[Step]) -> Step:
    return Step(
        loss=sum(step.loss for step in steps),
        gradients=float(np.mean([step.gradients for step in steps])),
        push=float(np.mean([step.push for step in steps])),
        updater=0.0,
        pull=0.0,
    )
