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


class FormError(ValueError, TypeError):
    """What is wrong with the form of the arguments: lists that do not match, and what is no array.

    Of several such mistakes any may be reported, so the store's error is one of the two.
    """


def plain_key(key):
    if isinstance(key, str):
        if not key:
            raise ValueError("empty key")
        return str(key)
    if isinstance(key, (bool, np.bool_)):
        raise TypeError("bool as a key")
    number = operator.index(key)
    if not -(2**63) <= number < 2**63:
        raise ValueError("a key beyond 64 bits")
    return number


def forms(key, value):
    """[[array, …], …], for each key, of the key and value (or out) arguments."""
    if not isinstance(key, (list, tuple)):
        key, value = [key], [value]
    elif not isinstance(value, (list, tuple)):
        raise FormError("a list of keys needs a list of values")
    if len(key) != len(value):
        raise FormError(f"{len(key)} keys, {len(value)} values")
    entries = [list(v) if isinstance(v, (list, tuple)) else [v] for v in value]
    for arrays in entries:
        if not arrays:
            raise FormError("an empty list of values")
        for array in arrays:
            if not isinstance(array, np.ndarray) or isinstance(array, np.ma.MaskedArray):
                raise FormError("no array, or a list too deep")
    return entries


def lists(key, *arguments):
    """[(key, [array, …]), …] for each argument; the keys are looked at last."""
    entries = [forms(key, argument) for argument in arguments]
    keys = [plain_key(k) for k in (key if isinstance(key, (list, tuple)) else [key])]
    return [list(zip(keys, e, strict=True)) for e in entries or [[[] for _ in keys]]]


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

    def check_arrays(self, values, out_items):
        outs = out_items
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
        values, outs = self.groups(values), self.groups(out_items)
        for key, others in ((k, o) for k in outs for o in values if o != k):
            if any(np.shares_memory(a, b) for a in outs[key] for b in values[others]):
                raise ValueError("an out is a value of another key")

    def groups(self, items):
        grouped = {}
        for key, arrays in items:
            grouped.setdefault(key, []).extend(arrays)
        return grouped

    def init(self, key, value):
        self.check_open()
        if any(len(arrays) != 1 for arrays in forms(key, value)):
            raise FormError("one value a key")
        (items,) = lists(key, value)
        self.check(items, known=False)
        if len(self.groups(items)) < len(items) or any(k in self.stored for k, _ in items):
            raise ValueError("second init")
        if any(a.dtype not in DTYPES or not a.dtype.isnative for _, (a,) in items):
            raise TypeError("element type")
        for k, (a,) in items:
            self.key_type = type(k)
            self.stored[k] = a.copy(order="C")

    def push(self, key, value):
        self.check_open()
        (items,) = lists(key, value)
        self.check(items)
        self.check_arrays(items, [])
        self.apply(items)

    def apply(self, items, outs=()):
        """Key by key: update, then deliver to the key's outs."""
        updated, outs = [], self.groups(outs)
        for key, values in self.groups(items).items():
            received = total(values)
            if self.updater is None:
                self.stored[key] = received
            else:
                try:
                    self.updater(key, received, self.stored[key])
                except Exception as error:
                    error.updated_keys = updated
                    raise
            updated.append(key)
            self.deliver([(key, outs.get(key, []))])

    def pull(self, key, out=None):
        self.check_open()
        (items,) = lists(key) if out is None else lists(key, out)
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
        values, outs = lists(key, value, value if out is None else out)
        self.check(values)
        self.check_arrays(values, outs)
        self.apply(values, outs)

    def broadcast(self, key, value, out):
        self.check_open()
        if any(len(arrays) != 1 for arrays in forms(key, value)):
            raise FormError("one value a key")
        values, outs = lists(key, value, out)
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
