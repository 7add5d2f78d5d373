"""A dist store of several workers beside a local one, which gets the values of all workers as one
list: what both hold is the same, bit for bit."""

import contextlib

import numpy as np
from helpers import pulled, same
from inside import Cluster, each

import kvstore


class Beside:
    """Keys of both stores. A gradient is drawn for each worker, and given to both."""

    def __init__(self, cluster, seed=0):
        self.stores, self.local = cluster.all_stores(), kvstore.create("local")
        self.cluster, self.random = cluster, np.random.default_rng(seed)

    def set_optimizer(self, make, ranks=None):
        """`make()` gives an optimizer; a schedule is of one store alone."""
        ranks = range(len(self.stores)) if ranks is None else ranks
        each([self.stores[rank] for rank in ranks], lambda kv: kv.set_optimizer(make()))
        self.local.set_optimizer(make())

    def set_params(self, ranks=None, **numbers):
        ranks = range(len(self.stores)) if ranks is None else ranks
        each([self.stores[rank] for rank in ranks], lambda kv: kv.set_optimizer_params(**numbers))
        self.local.set_optimizer_params(**numbers)

    def init(self, values):
        keys = list(values)
        each(self.stores, lambda kv: kv.init(keys, list(values.values())))
        self.local.init(keys, list(values.values()))

    def delete(self, keys):
        each(self.stores, lambda kv: kv.delete(keys))
        self.local.delete(keys)

    def draw(self, key):
        """A gradient of each worker."""
        shape, dtype = self.local.shape(key), self.local.dtype(key)
        whole = self.random.integers(-64, 64, (len(self.stores), *shape))
        return [np.asarray(part / np.float32(37), dtype) for part in whole]

    def push(self, keys, how="push"):
        """A round of a key, or of a list of keys in one call: by push, pushpull, or a push with a
        handle."""
        listed = isinstance(keys, list)
        drawn = {key: self.draw(key) for key in (keys if listed else [keys])}

        def worker(kv):
            values = [gradients[kv.rank] for gradients in drawn.values()]
            outs = [np.empty_like(value) for value in values]
            value, out = (values, outs) if listed else (values[0], outs[0])
            if how == "pushpull":
                kv.pushpull(keys, value, out=out)
            elif how == "handle":
                kv.push(keys, value, priority=-kv.rank, async_op=True).wait()
            else:
                kv.push(keys, value, priority=kv.rank)
            return outs

        found = each(self.stores, worker)
        for key, values in drawn.items():
            self.local.push(key, values)
        for outs in found if how == "pushpull" else []:
            for key, out in zip(drawn, outs, strict=True):
                self.same(key, out)

    def same(self, key, out):
        expected = pulled(self.local, key)
        if not same(out, expected):
            with np.errstate(all="ignore"):
                worst = np.abs(out.astype("f8") - expected.astype("f8")).max(initial=0)
            raise AssertionError(f"key {key!r} ({out.dtype}, {out.shape}): off by {worst}")

    def check(self, keys=None):
        """All workers hold what the local store holds."""
        for key in keys or self.local.keys():
            for kv in self.stores:
                self.same(key, pulled(kv, key))


@contextlib.contextmanager
def beside(num_workers, num_servers=2, kind="dist_sync", seed=0, **options):
    with Cluster(num_workers, num_servers, kind, **options) as cluster:
        pair = Beside(cluster, seed)
        try:
            yield pair
        finally:
            pair.local.close()
