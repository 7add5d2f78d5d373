"""A small network learns scikit-learn's digits images, data-parallel over threads, in three ways.

A worker is a thread with its own copy of the weights and its own shard of every batch. One step:

    gradients  every worker computes the gradients of its shard, all at the same time
    push       the store sums the workers' gradients and changes its weights
    pull       the new weights go from the store into every worker's copy

The gradients are scaled by the whole batch, so their sum over the workers is the gradient of the
batch: up to rounding, the result does not depend on the number of workers. (In two bits it does:
every worker rounds on its own, and keeps what it has not sent yet for the next step.)

The three ways differ in what the store is told before the first step, and in nothing else.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from time import perf_counter
from typing import Any, NamedTuple

import numpy as np
from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]

import kvstore

Array = np.ndarray[Any, np.dtype[Any]]
Weights = dict[str, Array]

PIXELS, HIDDEN, CLASSES = 64, 128, 10
BATCH = 128
KEYS = ["w1", "b1", "w2", "b2"]


class Images(NamedTuple):
    train: Array  # [n, 64] float32, 0 to 1
    train_labels: Array
    test: Array
    test_labels: Array


def load_images() -> Images:
    """scikit-learn's 1,797 images; every fifth is kept for the test."""
    # Here, because the processes of cluster.py get the images and need not import scikit-learn.
    from sklearn.datasets import load_digits  # type: ignore[import-untyped]

    pixels, labels = load_digits(return_X_y=True)
    pixels = (pixels / 16).astype(np.float32)
    test = np.arange(len(labels)) % 5 == 4
    return Images(pixels[~test], labels[~test], pixels[test], labels[test])


def first_weights(rng: np.random.Generator) -> Weights:
    def dense(rows: int, columns: int) -> Array:
        return rng.normal(0, np.sqrt(2 / rows), (rows, columns)).astype(np.float32)

    return {
        "w1": dense(PIXELS, HIDDEN),
        "b1": np.zeros(HIDDEN, np.float32),
        "w2": dense(HIDDEN, CLASSES),
        "b2": np.zeros(CLASSES, np.float32),
    }


def forward(weights: Weights, images: Array) -> tuple[Array, Array]:
    hidden = np.maximum(images @ weights["w1"] + weights["b1"], 0)
    return hidden, hidden @ weights["w2"] + weights["b2"]


def gradients(
    weights: Weights, images: Array, labels: Array, batch: int = BATCH
) -> tuple[float, Weights]:
    """This shard's part of the batch's mean loss, and of its gradients."""
    hidden, scores = forward(weights, images)
    rows = np.arange(len(labels))
    scores -= scores.max(axis=1, keepdims=True)
    log_chances = scores - np.log(np.exp(scores).sum(axis=1, keepdims=True))
    loss = -float(log_chances[rows, labels].sum()) / batch

    d_scores = np.exp(log_chances)
    d_scores[rows, labels] -= 1
    d_scores /= batch
    d_hidden = (d_scores @ weights["w2"].T) * (hidden > 0)
    return loss, {
        "w1": images.T @ d_hidden,
        "b1": d_hidden.sum(axis=0),
        "w2": hidden.T @ d_scores,
        "b2": d_scores.sum(axis=0),
    }


def accuracy(weights: Weights, images: Array, labels: Array) -> float:
    _, scores = forward(weights, images)
    return float((scores.argmax(axis=1) == labels).mean())


class Momentum:
    """The updater: the store calls it with the summed gradient and its own weights."""

    def __init__(self, learning_rate: float = 0.1, momentum: float = 0.9) -> None:
        self.learning_rate = learning_rate
        self.momentum = momentum
        self.velocity: Weights = {}
        self.seconds = 0.0

    def __call__(self, key: str, gradient: Array, weight: Array) -> None:
        start = perf_counter()
        if key not in self.velocity:
            self.velocity[key] = np.zeros_like(weight)
        velocity = self.velocity[key]
        velocity *= self.momentum
        velocity -= self.learning_rate * gradient
        weight += velocity
        self.seconds += perf_counter() - start


@dataclass(frozen=True)
class Way:
    """What makes new weights of the gradients; without an optimizer it is `Momentum`."""

    name: str
    kind: str
    optimizer: kvstore.optimizer.Optimizer | None = None
    compression: dict[str, Any] | None = None


WAYS = (
    Way("momentum, an updater", "local"),
    Way("Adam", "local", kvstore.optimizer.Adam(learning_rate=0.005)),
    Way(
        "SGD, 2-bit gradients",
        "device",  # every position of a value list stands for a device, here a worker
        kvstore.optimizer.SGD(learning_rate=0.5),
        {"type": "2bit", "threshold": 0.005},
    ),
)


@dataclass(frozen=True)
class Step:
    """The loss before a step, and where the step's time went, in seconds."""

    loss: float
    gradients: float
    push: float  # without the updater, which runs inside it
    updater: float
    pull: float

    @property
    def store(self) -> float:
        return self.push + self.pull


class Training:
    """The workers, their weights and the store. Use it in a `with` statement."""

    def __init__(self, images: Images, workers: int = 4, seed: int = 0, way: Way = WAYS[0]) -> None:
        self.images = images
        self.way = way
        self.rng = np.random.default_rng(seed)
        self.updater = Momentum()
        first = first_weights(self.rng)
        self.weights = [{key: first[key].copy() for key in KEYS} for _ in range(workers)]
        with ExitStack() as stack:
            # The workers are the parallelism; BLAS threads on top would only get in their way.
            stack.enter_context(threadpool_limits(limits=1))
            self.threads = stack.enter_context(ThreadPoolExecutor(workers))
            self.kv = stack.enter_context(kvstore.create(way.kind))
            self.kv.init(KEYS, [first[key] for key in KEYS])
            if way.optimizer is None:
                self.kv.set_updater(self.updater)
            else:
                self.kv.set_optimizer(way.optimizer)
            if way.compression is not None:
                self.kv.set_gradient_compression(way.compression)
            self._stack = stack.pop_all()

    def __enter__(self) -> Training:
        return self

    def __exit__(self, *exception: object) -> None:
        self._stack.close()

    @property
    def steps_per_epoch(self) -> int:
        return len(self.images.train_labels) // BATCH

    @property
    def bytes_per_call(self) -> int:
        """What one push reads and one pull writes: every weight, once a worker."""
        return sum(array.nbytes for weights in self.weights for array in weights.values())

    @property
    def gradient_bytes(self) -> int:
        """What the gradients of one worker come to in a step, as the store codes them."""
        arrays = self.weights[0].values()  # as large as the gradients
        if self.way.compression is None:
            return sum(array.nbytes for array in arrays)
        return sum(
            kvstore.compression.encode(array, np.zeros_like(array), self.way.compression).nbytes
            for array in arrays
        )

    def epoch(self) -> Iterator[Step]:
        order = self.rng.permutation(len(self.images.train_labels))
        for i in range(self.steps_per_epoch):
            yield self.step(order[i * BATCH : (i + 1) * BATCH])

    def step(self, batch: Array) -> Step:
        shards = np.array_split(batch, len(self.weights))
        updater_before = self.updater.seconds
        begin = perf_counter()

        results = list(self.threads.map(self._gradients_of_shard, self.weights, shards))
        have_gradients = perf_counter()

        # One list of values a key, one value a worker.
        self.kv.push(KEYS, [[grads[key] for _, grads in results] for key in KEYS])
        pushed = perf_counter()

        self.kv.pull(KEYS, out=[[weights[key] for weights in self.weights] for key in KEYS])
        pulled = perf_counter()

        updater = self.updater.seconds - updater_before
        return Step(
            loss=sum(loss for loss, _ in results),
            gradients=have_gradients - begin,
            push=pushed - have_gradients - updater,
            updater=updater,
            pull=pulled - pushed,
        )

    def _gradients_of_shard(self, weights: Weights, shard: Array) -> tuple[float, Weights]:
        return gradients(weights, self.images.train[shard], self.images.train_labels[shard])

    def test_accuracy(self) -> float:
        return accuracy(self.weights[0], self.images.test, self.images.test_labels)
