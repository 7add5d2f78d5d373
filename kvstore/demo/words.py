"""Word vectors learned from Python's own language reference, through two row-sparse keys.

Skip-gram with negative sampling (Mikolov et al. 2013, "Distributed Representations of Words and
Phrases and their Compositionality"): a word's input vector is to tell the words around it, whose
output vectors are the rows of a second table. A batch is a run of text and meets few of the words,
so one step moves few rows of the two tables:

    row_sparse_pull  the rows of the batch's words, and of the noise words, come out of the store
    gradients        NumPy, on those rows alone
    push             the gradients of those rows go in; AdaGrad, in the store, changes those rows

The noise words are drawn once a batch and shared by its pairs, which makes a batch two small
matrix products.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]

import kvstore

Array = np.ndarray[Any, np.dtype[Any]]

KEYS = ["input", "output"]
DIMENSION = 48
RUN = 128  # words of text in a batch, before frequent ones are thinned out of it
WINDOW = 5  # how far a pair's words are apart at most
NOISE, NOISE_WORDS = 5, 64  # the weight of noise against a pair, and how many words stand for it
UNTRAINED_LOSS = (1 + NOISE) * float(np.log(2))  # of vectors that tell nothing


class NoTextError(Exception):
    """This Python came without the text."""


class Text(NamedTuple):
    vocabulary: list[str]  # most frequent first
    counts: Array
    words: Array  # the text, as positions in the vocabulary
    paragraphs: Array  # the number of each word's paragraph: no pair reaches beyond it


def language_reference() -> list[str]:
    """The paragraphs of what `help('topics')` shows, each once."""
    try:
        from pydoc_data.topics import topics

        chapters = [str(chapter) for chapter in topics.values()]
    except (ImportError, AttributeError) as error:
        raise NoTextError(
            f"This Python came without the text of its language reference ({error})."
        ) from error
    paragraphs = (part.strip() for chapter in chapters for part in chapter.split("\n\n"))
    return [*dict.fromkeys(part for part in paragraphs if part)]


def load_text(paragraphs: list[str] | None = None, at_least: int = 2) -> Text:
    """The vocabulary is the words that stand in the text `at_least` times."""
    if paragraphs is None:
        paragraphs = language_reference()
    split = [re.findall(r"[a-z_]+", paragraph.lower()) for paragraph in paragraphs]
    counts = Counter(word for words in split for word in words)
    vocabulary = [word for word, count in counts.most_common() if count >= at_least]
    if len(vocabulary) < NOISE_WORDS:
        raise NoTextError(
            f"The text of the language reference that came with this Python has {len(vocabulary)} "
            "words, too few to learn from."
        )
    position = {word: i for i, word in enumerate(vocabulary)}
    words = [
        (position[word], number)
        for number, paragraph in enumerate(split)
        for word in paragraph
        if word in position
    ]
    return Text(vocabulary, np.array([counts[word] for word in vocabulary]), *np.array(words).T)


def pairs(words: Array, paragraphs: Array) -> tuple[Array, Array]:
    """Every word with every other one in its window: both ways."""
    centres, contexts = [], []
    for distance in range(1, WINDOW + 1):
        together = paragraphs[distance:] == paragraphs[:-distance]
        left, right = words[:-distance][together], words[distance:][together]
        centres += [left, right]
        contexts += [right, left]
    return np.concatenate(centres), np.concatenate(contexts)


class Batch(NamedTuple):
    """Which rows a batch needs, and how much each of their products counts in the loss."""

    input_ids: Array  # unique rows of the input table
    output_ids: Array  # unique rows of the output table
    near: Array  # [input, output]: how often the two words stand in one window
    far: Array  # [input, output]: how much the output word counts as noise for the input word


def make_batch(centres: Array, contexts: Array, noise: Array) -> Batch:
    input_ids, row = np.unique(centres, return_inverse=True)
    output_ids, column = np.unique(np.concatenate([contexts, noise]), return_inverse=True)
    shape = len(input_ids), len(output_ids)
    places = row * shape[1] + column[: len(contexts)]
    near = np.bincount(places, minlength=shape[0] * shape[1]).reshape(shape).astype(np.float32)
    drawn = np.bincount(column[len(contexts) :], minlength=shape[1]) * (NOISE / len(noise))
    return Batch(input_ids, output_ids, near, np.outer(near.sum(axis=1), drawn).astype(np.float32))


def gradients(inputs: Array, outputs: Array, batch: Batch) -> tuple[float, Array, Array]:
    """The summed loss of the batch's pairs, and its gradients in the rows of both tables."""
    scores = inputs @ outputs.T
    # -log of the chance of "far"; that of "near" is the score more. Never overflows.
    softplus = np.maximum(scores, 0) + np.log(1 + np.exp(-np.abs(scores)))
    loss = float((batch.near * (softplus - scores) + batch.far * softplus).sum())
    chance_of_near = np.exp(scores - softplus)
    d_scores = chance_of_near * (batch.near + batch.far) - batch.near
    return loss, d_scores @ outputs, d_scores.T @ inputs


@dataclass(frozen=True)
class Step:
    """One batch: its loss, summed over its pairs, and what went through the store."""

    loss: float
    pairs: int
    pulled: int  # bytes, row ids included
    pushed: int


def size(rows: kvstore.RowSparse) -> int:
    return int(rows.data.nbytes + rows.indices.nbytes)


class Training:
    """The two tables in a store, and one worker. Use it in a `with` statement.

    In a store with several workers each has a share of every batch's pairs, and the same seed: then
    all of them are at the same batch.
    """

    def __init__(self, text: Text, seed: int = 0, kind: str = "local") -> None:
        self.text = text
        self.rng = np.random.default_rng(seed)
        self.shape = len(text.vocabulary), DIMENSION
        self.rows = {key: kvstore.RowSparse.zeros(self.shape) for key in KEYS}
        # The paper's two rules: frequent words are thinned out, and noise is less steep than text.
        frequency = text.counts / text.counts.sum()
        self._keep = np.sqrt(1e-3 / frequency)
        noise = np.cumsum(text.counts**0.75)
        self._noise = noise / noise[-1]
        first = self.rng.uniform(-0.5 / DIMENSION, 0.5 / DIMENSION, self.shape).astype(np.float32)
        every_row = np.arange(self.shape[0])
        with ExitStack() as stack:
            # The products are small: a second thread of BLAS would cost more than it does.
            stack.enter_context(threadpool_limits(limits=1))
            self.kv = stack.enter_context(kvstore.create(kind))
            for key, table in zip(KEYS, (first, np.zeros_like(first)), strict=True):
                self.kv.init(key, kvstore.RowSparse(table, every_row, self.shape))
            self.kv.set_optimizer(kvstore.optimizer.AdaGrad(learning_rate=0.1))
            self._stack = stack.pop_all()

    def __enter__(self) -> Training:
        return self

    def __exit__(self, *exception: object) -> None:
        self._stack.close()

    @property
    def dense_bytes(self) -> int:
        """What a step would move if it pulled both tables whole, and pushed them whole."""
        return 2 * sum(self.pull(key).nbytes for key in KEYS)

    def epoch(self) -> Iterator[Step]:
        keep = self.rng.random(len(self.text.words)) < self._keep[self.text.words]
        words, paragraphs = self.text.words[keep], self.text.paragraphs[keep]
        for start in RUN * self.rng.permutation(-(-len(words) // RUN)):
            run = slice(start, start + RUN)
            centres, contexts = pairs(words[run], paragraphs[run])
            if len(centres):
                noise = np.searchsorted(self._noise, self.rng.random(NOISE_WORDS))
                share = slice(self.kv.rank, None, self.kv.num_workers)
                yield self.step(make_batch(centres[share], contexts[share], noise))

    def step(self, batch: Batch) -> Step:
        ids = {"input": batch.input_ids, "output": batch.output_ids}
        for key in KEYS:
            self.kv.row_sparse_pull(key, out=self.rows[key], row_ids=ids[key])
        inputs, outputs = (self.rows[key].data for key in KEYS)
        loss, d_inputs, d_outputs = gradients(inputs, outputs, batch)
        pushed = 0
        for key, gradient in zip(KEYS, (d_inputs, d_outputs), strict=True):
            value = kvstore.RowSparse(gradient, ids[key], self.shape)
            self.kv.push(key, value)
            pushed += size(value)
        pulled = sum(size(rows) for rows in self.rows.values())
        return Step(loss, int(batch.near.sum()), pulled, pushed)

    def pull(self, key: str) -> Array:
        """A whole table."""
        table = np.empty(self.shape, np.float32)
        self.kv.pull(key, out=table)
        return table

    def neighbours(self, word: str, number: int = 6, at_least: int = 10) -> list[str]:
        """The words whose vectors point most nearly the same way (cosine); rare ones left out."""
        table = self.pull("input")
        table /= np.linalg.norm(table, axis=1, keepdims=True)
        here = self.text.vocabulary.index(word)
        cosines = table @ table[here]
        cosines[self.text.counts < at_least] = -2
        cosines[here] = -2
        return [self.text.vocabulary[i] for i in np.argsort(-cosines)[:number]]
