"""Row sets for the jobs on a table: the same ones for every subject.

They take turns, as the batches of training do: together their rows do not fit the caches.
"""

import functools

import numpy as np

SHAPE = (1_000_000, 64)
IDS = 10_000
SETS = 32


@functools.cache
def unsorted_ids():
    """Of each set, the different row ids in the order in which a batch brings them."""
    generator = np.random.default_rng(1)
    return [generator.choice(SHAPE[0], IDS, replace=False) for _ in range(SETS)]


@functools.cache
def gradients():
    """Of each set, its sorted ids and the rows' gradient."""
    generator = np.random.default_rng(2)
    size = (IDS, SHAPE[1])
    return [(np.sort(ids), generator.random(size, np.float32)) for ids in unsorted_ids()]


def in_turn(call, items):
    """A job's loop that hands the items to the call, one each time."""
    count = 0

    def run(times):
        nonlocal count
        for _ in range(times):
            call(items[count % len(items)])
            count += 1

    return run
