"""Random programs: calls of all kinds, from any stream, with nothing in between that waits, end as
the same calls on the host."""

import cuda_tensor as cuda
import numpy as np
import pytest
from twin import FLOATS, draw, same, store_of, values

import kvstore
from kvstore import optimizer

STEPS = 50
SHAPE = (6, 3)
OPTIMIZERS = {
    "none": None,
    "sgd": lambda: optimizer.SGD(learning_rate=0.1, momentum=0.9),
    "adam": lambda: optimizer.Adam(learning_rate=0.1, multi_precision=True),
    "lamb": lambda: optimizer.LAMB(learning_rate=0.1),
    "lbsgd": lambda: optimizer.LBSGD(learning_rate=0.1, momentum=0.9, batch_scale=2),
}
CODECS = [{"type": "2bit", "threshold": 0.5}, {"type": "1bit"}, {"type": "none"}]


class Program:
    """The same on two stores: what `host` gets as NumPy arrays, `kv` gets on any device and stream,
    or in host memory."""

    def __init__(self, kv, host, random):
        self.kv, self.host, self.random = kv, host, random
        self.lanes = [cuda.Stream(d) for d in range(cuda.num_devices) for _ in range(2)]
        self.types, self.outs = {}, []

    def below(self, n):
        return int(self.random.integers(n))

    def place(self, array, lane):
        """The array on the lane's device, or on the host, or of the package."""
        kind = self.below(8)
        if kind == 0:
            return array.copy()
        if kind == 1:
            return kvstore.array(array, dtype=array.dtype)
        return cuda.TableTensor(array, lane.device)

    def value(self, key, count, lane):
        """For the host and for the other."""
        drawn = [draw(self.random, SHAPE, self.types[key]) for _ in range(count)]
        given = [self.place(each, lane) for each in drawn]
        return (drawn[0], given[0]) if count == 1 else (drawn, given)

    def out(self, key, lane):
        array = np.zeros(SHAPE, self.types[key])
        placed = self.place(array, lane)
        self.outs.append((lane, placed, array))
        return array, placed

    def step(self):
        with self.lanes[self.below(len(self.lanes))] as lane:
            lane.busy(self.below(4))
            count = 1 + self.below(3)
            keys = [list(self.types)[self.below(len(self.types))] for _ in range(count)]
            one = keys[0]
            kind = self.below(10)
            if kind < 3:
                here, there = self.value(one, count, lane)
                self.host.push(one, here)
                self.kv.push(one, there)
            elif kind < 5:
                pairs = [self.value(key, 1, lane) for key in keys]
                self.host.push(keys, [here for here, _ in pairs])
                self.kv.push(keys, [there for _, there in pairs])
            elif kind == 5:
                here, there = self.value(one, count, lane)
                outs = self.out(one, lane)
                self.host.pushpull(one, here, out=outs[0])
                self.kv.pushpull(one, there, out=outs[1])
            elif kind < 8:
                keys = list(dict.fromkeys(keys))
                outs = [self.out(key, lane) for key in keys]
                self.host.pull(keys, out=[here for here, _ in outs])
                self.kv.pull(keys, out=[there for _, there in outs])
                there = None
            elif kind == 8:
                rows = np.unique(self.random.integers(0, SHAPE[0], 3))
                data = draw(self.random, (len(rows), *SHAPE[1:]), self.types[one])
                for store in (self.host, self.kv):
                    store.push(one, kvstore.RowSparse(data, rows, SHAPE))
            else:
                for store in (self.host, self.kv):
                    store.delete(one)
                self.init(one, lane)
            if kind < 6:
                self.spoil(there if kind != 3 and kind != 4 else [t for _, t in pairs])

    def spoil(self, given):
        for array in given if isinstance(given, list) else [given]:
            if isinstance(array, (cuda.Tensor, np.ndarray)):
                fill = array.fill_ if isinstance(array, cuda.Tensor) else array.fill
                fill(99)

    def init(self, key, lane):
        here, there = self.value(key, 1, lane)
        self.host.init(key, here)
        self.kv.init(key, there)
        self.spoil(there)

    def check(self):
        for lane, there, here in self.outs:
            with lane:
                assert same(values(there), here)
        for key in self.types:
            assert same(self.kv.pull(key).asnumpy(), self.host.pull(key).asnumpy())


@pytest.mark.parametrize("codec", [False, True], ids=["plain", "coded"])
@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("kind", ["device", "local"])
def test_random_programs_end_as_on_the_host(seed, kind, name, codec):
    random = np.random.default_rng([seed, len(name), codec, kind == "local"])
    with store_of(kind) as kv, store_of("local") as host:
        program = Program(kv, host, random)
        for i, dtype in enumerate(FLOATS):
            program.types[f"w{i}"] = dtype
            program.init(f"w{i}", program.lanes[0])
        if OPTIMIZERS[name] is not None:
            for store in (kv, host):
                store.set_optimizer(OPTIMIZERS[name]())
        for step in range(STEPS):
            if codec and step % 15 == 0:
                params = CODECS[program.below(3)]
                for store in (kv, host):
                    store.set_gradient_compression(params)
            program.step()
        program.check()
