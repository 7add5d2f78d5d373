"""A store that is given CUDA tensors, and a store on the host that is given the same numbers."""

import contextlib

import cuda_tensor as cuda
import ml_dtypes
import numpy as np
from inside import Cluster

import kvstore

FLOATS = [np.dtype(t) for t in ("float64", "float32", "float16", ml_dtypes.bfloat16)]
INTS = [np.dtype(t) for t in ("int8", "uint8", "int32", "int64")]
DTYPES = FLOATS + INTS


def draw(random, shape, dtype="float32"):
    """Numbers as gradients are, or any integers."""
    dtype = np.dtype(dtype)
    if dtype in INTS:
        limits = np.iinfo(dtype)
        return random.integers(limits.min, limits.max, shape, dtype, endpoint=True)
    return np.asarray(random.normal(size=shape), dtype)


def same(a, b):
    """Equal in type, shape and every bit."""
    return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()


@contextlib.contextmanager
def store_of(kind, **options):
    """A store; of a dist kind in a cluster inside this process."""
    if kind.startswith("dist"):
        with Cluster(1, 2, kind=kind) as cluster:
            yield cluster.store()
    else:
        with kvstore.create(kind, **options) as store:
            yield store


class Twin:
    """`kv` gets what `host` gets, its values as CUDA tensors that are spoilt right after each call.

    `places`: where the values of a list come to be, round and round: numbers of devices, "numpy"
    and "ndarray".
    """

    def __init__(self, kv, host, face=cuda.TableTensor):
        self.kv, self.host, self.face = kv, host, face
        self.given = []

    def tensor(self, array, device=0, **options):
        if self.face is cuda.InterfaceTensor or self.face is cuda.ReadyTensor:
            assert np.dtype(array.dtype).kind != "V", "the interface has no name for bfloat16"
        tensor = self.face(array, min(device, cuda.num_devices - 1), **options)
        if self.face is cuda.ReadyTensor:
            cuda.current_stream(tensor.device).synchronize()
        return tensor

    def at(self, array, place):
        if place == "numpy":
            return array.copy()
        if place == "ndarray":
            return kvstore.array(array, dtype=array.dtype)
        return self.tensor(array, place)

    def give(self, value, places):
        """The same nested lists with arrays elsewhere."""
        if isinstance(value, list):
            return [
                self.give(each, [*places[i % len(places) :], *places])
                for i, each in enumerate(value)
            ]
        self.given.append(self.at(value, places[0]))
        return self.given[-1]

    def spoil(self):
        """Writes rubbish into all that was given; works that are put on the stream now."""
        for array in self.given:
            if isinstance(array, cuda.Tensor):
                array.fill_(93)
            elif isinstance(array, np.ndarray):
                array.fill(93)
        self.given.clear()

    def init(self, key, value, places=(0,)):
        self.host.init(key, value)
        self.kv.init(key, self.give(value, places))
        self.spoil()

    def push(self, key, value, places=(0,), **options):
        self.host.push(key, value)
        self.kv.push(key, self.give(value, places), **options)
        self.spoil()

    def pushpull(self, key, value, places=(0,), out_places=(0,)):
        """With outs of the values' shapes, and once more with none, which changes the values."""
        outs, given = self.empty(value), self.give(value, places)
        device_outs = self.give(self.empty(value), out_places)
        self.host.pushpull(key, value, out=outs)
        self.kv.pushpull(key, given, out=device_outs)
        assert all(map(same, flat(device_outs), flat(outs)))
        given, own = self.give(value, places), copied(value)
        self.host.pushpull(key, own)
        self.kv.pushpull(key, given)
        assert all(map(same, flat(given), flat(own)))
        self.spoil()

    def empty(self, value):
        if isinstance(value, list):
            return [self.empty(each) for each in value]
        return np.full_like(value, 55)

    def check(self, *keys):
        """The keys' values are the same bits, wherever they are pulled to."""
        for key in keys or self.host.keys():
            wanted = self.host.pull(key).asnumpy()
            outs = [
                self.tensor(np.full_like(wanted, 66), device) for device in range(cuda.num_devices)
            ]
            outs += [np.full_like(wanted, 66), kvstore.empty(wanted.shape, self.kv.dtype(key))]
            self.kv.pull(key, out=outs)
            for out in outs:
                assert same(values(out), wanted), (key, values(out), wanted)
            assert same(values(self.kv.pull(key)), wanted)


def values(array):
    if isinstance(array, cuda.Tensor):
        return array.numpy()
    return array.asnumpy() if isinstance(array, kvstore.NDArray) else np.asarray(array)


def copied(value):
    return [copied(each) for each in value] if isinstance(value, list) else value.copy()


def flat(value):
    if isinstance(value, list):
        return [one for each in value for one in flat(each)]
    return [values(value)]


@contextlib.contextmanager
def twin(kind="device", face=cuda.TableTensor, **options):
    host_kind = "local" if kind.startswith(("dist", "nccl")) else kind
    with store_of(kind, **options) as kv, kvstore.create(host_kind, **options) as host:
        yield Twin(kv, host, face)
