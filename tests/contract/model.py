"""The store as plainly as it can be said: a dict of NumPy arrays.

The oracle of the fuzz tests and of the recorded runs. It knows dense NumPy values only, runs every
call at once and copies everything. What is wrong with a call is raised as the built-in exception
that the store's own is also an instance of.
"""

import operator

import ml_dtypes
import numpy as np

DTYPES = [
    np.dtype(t)
    for t in (
        np.float64,
        np.float32,
        np.float16,
        ml_dtypes.bfloat16,
        np.int8,
        np.uint8,
        np.int32,
        np.int64,
    )
]

HALF = {np.dtype(np.float16), np.dtype(ml_dtypes.bfloat16)}


class Closed(RuntimeError):
    pass


def total(values):
    """values[0] + values[1] + …, left to right; 16-bit floats in float32, rounded once."""
    dtype = values[0].dtype
    with np.errstate(over="ignore", invalid="ignore"):
        result = values[0].astype(np.float32 if dtype in HALF else dtype)
        for value in values[1:]:
            result = np.add(result, value, dtype=result.dtype, casting="unsafe")
        return np.asarray(result).astype(dtype)


def plain_key(key):
    if isinstance(key, str):
        if not key:
            raise ValueError("empty key")
        return str(key)
    if isinstance(key, (bool, np.bool_)):
        raise TypeError("bool as a key")
    return operator.index(key)


def check_array(value):
    if not isinstance(value, np.ndarray) or isinstance(value, np.ma.MaskedArray):
        raise TypeError("no array")
    return value


def lists(key, value):
    """[(key, [array, …]), …] of the key and value (or out) arguments; value None: no arrays."""
    if not isinstance(key, (list, tuple)):
        key = [key]
        value = None if value is None else [value]
    elif value is not None and not isinstance(value, (list, tuple)):
        raise TypeError("a list of keys needs a list of values")
    if value is None:
        return [(plain_key(k), []) for k in key]
    if len(key) != len(value):
        raise ValueError(f"{len(key)} keys, {len(value)} values")
    items = []
    for k, v in zip(key, value, strict=True):
        arrays = list(v) if isinstance(v, (list, tuple)) else [v]
        if not arrays or any(isinstance(a, (list, tuple)) for a in arrays):
            raise ValueError(f"nesting of the values of {k!r}")
        items.append((k, [check_array(a) for a in arrays]))
    return [(plain_key(k), arrays) for k, arrays in items]


def overlapping(outs):
    """Whether two of the arrays share a byte, or one has an element twice."""
    written = []
    for out in outs:
        addresses = np.array(out.__array_interface__["data"][0]).reshape((1,) * out.ndim)
        for axis, (extent, stride) in enumerate(zip(out.shape, out.strides, strict=True)):
            steps = (np.arange(extent) * stride).reshape((-1,) + (1,) * (out.ndim - axis - 1))
            addresses = addresses + steps
        written.append((addresses.reshape(-1, 1) + np.arange(out.itemsize)).ravel())
    everything = np.concatenate(written) if written else np.empty(0)
    return np.unique(everything).size < everything.size


def same_array(a, b):
    return (
        a.__array_interface__["data"][0] == b.__array_interface__["data"][0]
        and a.shape == b.shape
        and a.strides == b.strides
    )


class Model:
    def __init__(self):
        self.stored = {}
        self.key_type = None
        self.updater = None
        self.closed = False

    def check_open(self):
        if self.closed:
            raise Closed("closed")

    def check(self, items, known=True):
        key_type = self.key_type
        for key, _ in items:
            key_type = key_type or type(key)
            if type(key) is not key_type:
                raise TypeError(f"key type of {key!r}")
        if known:
            for key, _ in items:
                if key not in self.stored:
                    raise KeyError(key)

    def check_arrays(self, values, outs):
        arrays = [(k, a) for k, v in [*values, *outs] for a in v]
        for key, array in arrays:
            if array.dtype != self.stored[key].dtype:
                raise TypeError(f"element type of {key!r}")
        for key, array in arrays:
            if array.shape != self.stored[key].shape:
                raise ValueError(f"shape of {key!r}")
        outs = [a for _, v in outs for a in v]
        if not all(a.flags.writeable for a in outs) or overlapping(outs):
            raise ValueError("outs")
        for out in outs:
            for _, value in ((k, a) for k, v in values for a in v):
                if np.shares_memory(out, value) and not same_array(out, value):
                    raise ValueError("an out overlaps a value")

    def groups(self, items):
        grouped = {}
        for key, arrays in items:
            grouped.setdefault(key, []).extend(arrays)
        return grouped

    def init(self, key, value):
        self.check_open()
        items = lists(key, value)
        self.check(items, known=False)
        if any(len(arrays) != 1 for _, arrays in items):
            raise ValueError("one value a key")
        if len(self.groups(items)) < len(items) or any(k in self.stored for k, _ in items):
            raise ValueError("second init")
        if any(a.dtype not in DTYPES or not a.dtype.isnative for _, (a,) in items):
            raise TypeError("element type")
        for k, (a,) in items:
            self.key_type = type(k)
            self.stored[k] = a.copy(order="C")

    def push(self, key, value):
        self.check_open()
        items = lists(key, value)
        self.check(items)
        self.check_arrays(items, [])
        self.apply(items)

    def apply(self, items):
        updated = []
        for key, values in self.groups(items).items():
            received = total(values)
            if self.updater is None:
                self.stored[key] = received
                continue
            try:
                self.updater(key, received, self.stored[key])
            except Exception as error:
                error.updated_keys = updated
                raise
            updated.append(key)

    def pull(self, key, out=None):
        self.check_open()
        items = lists(key, out)
        self.check(items)
        if out is None:
            result = [self.stored[k].copy() for k, _ in items]
            return result if isinstance(key, (list, tuple)) else result[0]
        self.check_arrays([], items)
        self.deliver(items)
        return None

    def deliver(self, items):
        for key, outs in items:
            for out in outs:
                out[...] = self.stored[key]

    def pushpull(self, key, value, out=None):
        self.check_open()
        values = lists(key, value)
        outs = values if out is None else lists(key, out)
        self.check(values)
        self.check_arrays(values, outs)
        self.apply(values)
        self.deliver(outs)

    def broadcast(self, key, value, out):
        self.check_open()
        outs = lists(key, out)
        values = lists(key, value)
        before, key_type = dict(self.stored), self.key_type
        try:
            self.init(key, value)
            self.check_arrays(values, outs)
        except Exception:
            self.stored, self.key_type = before, key_type
            raise
        self.deliver(outs)

    def delete(self, key):
        self.check_open()
        key = plain_key(key)
        self.check([(key, [])])
        del self.stored[key]

    def close(self):
        self.closed = True
        self.stored.clear()
