"""The store as plainly as it can be said: a dict of NumPy arrays.

The oracle of the fuzz tests and of the recorded runs. It knows NumPy's arrays and `Rows`, which
stand for RowSparse, runs every call at once and copies everything. What is wrong with a call is
raised as the built-in exception that the store's own is also an instance of.
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


class Rows:
    """A row-sparse array: the rows `data` at the places `indices`, which increase."""

    def __init__(self, data, indices, shape):
        self.data, self.indices = np.array(data), np.array(indices, np.int64)
        self.shape, self.dtype, self.ndim = tuple(shape), self.data.dtype, len(shape)
        assert self.data.shape == (self.indices.size, *self.shape[1:])

    @classmethod
    def zeros(cls, shape, dtype):
        return cls(np.zeros((0, *shape[1:]), dtype), [], shape)

    @classmethod
    def from_dense(cls, array):
        ids = np.flatnonzero((array != 0).any(axis=tuple(range(1, array.ndim))))
        return cls(array[ids], ids, array.shape)

    def __array__(self, dtype=None, copy=None):
        dense = np.zeros(self.shape, self.dtype)
        dense[self.indices] = self.data
        return dense if dtype is None else dense.astype(dtype)

    def __setitem__(self, whole, value):
        rows = value if isinstance(value, Rows) else Rows.from_dense(value)
        self.data, self.indices = rows.data.copy(), rows.indices.copy()

    def copy(self, order="C"):
        return Rows(self.data, self.indices, self.shape)

    def picked(self, ids):
        """The rows `ids`, zeros where there is none."""
        places = {row: place for place, row in enumerate(self.indices.tolist())}
        result = Rows(np.zeros((len(ids), *self.shape[1:]), self.dtype), ids, self.shape)
        for at, row in enumerate(ids.tolist()):
            if row in places:
                result.data[at] = self.data[places[row]]
        return result


def total_rows(values):
    """The union of the rows, each the total of those that are there."""
    shape, none = values[0].shape, values[0].data[:0]
    ids = np.unique(np.concatenate([v.indices for v in values]))
    found = [[] for _ in ids]
    for value in values:
        for at, place in enumerate(np.searchsorted(ids, value.indices)):
            found[place].append(value.data[at : at + 1])
    return Rows(np.concatenate([none, *map(total, found)]), ids, shape)


def total(values):
    """values[0] + values[1] + …, left to right; 16-bit floats in float32, rounded once."""
    if isinstance(values[0], Rows):
        return total_rows(values)
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
            if not isinstance(array, (np.ndarray, Rows)) or isinstance(array, np.ma.MaskedArray):
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
    if has_twice([id(out) for out in outs if isinstance(out, Rows)]):
        return True
    for out in (out for out in outs if not isinstance(out, Rows)):
        addresses = np.array(out.__array_interface__["data"][0]).reshape((1,) * out.ndim)
        for axis, (extent, stride) in enumerate(zip(out.shape, out.strides, strict=True)):
            steps = (np.arange(extent) * stride).reshape((-1,) + (1,) * (out.ndim - axis - 1))
            addresses = addresses + steps
        written.append((addresses.reshape(-1, 1) + np.arange(out.itemsize)).ravel())
    everything = np.concatenate(written) if written else np.empty(0)
    return np.unique(everything).size < everything.size


def has_twice(items):
    return len(set(items)) < len(items)


def share_memory(a, b):
    if isinstance(a, Rows) or isinstance(b, Rows):
        return a is b
    return np.shares_memory(a, b)


def same_array(a, b):
    return a is b or (
        a.__array_interface__["data"][0] == b.__array_interface__["data"][0]
        and a.shape == b.shape
        and a.strides == b.strides
    )


# ----------------------------------------------------------------------------------------- row ids


def is_list(value):
    return isinstance(value, (list, tuple))


def plain_ids(ids):
    """Sorted, each once."""
    if is_list(ids):
        ids = np.array(ids) if len(ids) else np.empty(0, np.int64)
    if not isinstance(ids, np.ndarray) or ids.dtype.kind not in "iu":
        raise TypeError("row ids are integers")
    if ids.dtype == np.uint64 and (ids >= 2**63).any():
        raise ValueError("a row id beyond 64 bits")
    return np.unique(ids.astype(np.int64))


def spread_ids(row_ids, counts, listed):
    """One array of ids for each out; counts[i] outs belong to key i."""

    def one_for_all(ids):
        return not is_list(ids) or not ids or isinstance(ids[0], (int, float))

    if one_for_all(row_ids):
        ids = plain_ids(row_ids) if sum(counts) else None
        return [[ids] * count for count in counts]
    entries = row_ids if listed else [row_ids]
    if len(entries) != len(counts):
        raise ValueError("as many row_ids as keys")
    spread = []
    for ids, count in zip(entries, counts, strict=True):
        if one_for_all(ids):
            spread.append([plain_ids(ids)] * count)
        elif len(ids) != count:
            raise ValueError("as many row_ids as outs")
        else:
            spread.append([plain_ids(i) for i in ids])
    return spread


# ------------------------------------------------------------------------------------------- calls


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

    def check_forms(self, values):
        """Dense values go into dense keys, row-sparse ones into any; of a key all are alike."""
        for key, arrays in self.groups(values).items():
            sparse = [isinstance(a, Rows) for a in arrays]
            if len(set(sparse)) > 1 or (isinstance(self.stored[key], Rows) and not all(sparse)):
                raise TypeError(f"form of {key!r}")

    def check_arrays(self, values, out_items):
        outs = out_items
        self.check_forms(values)
        arrays = [(k, a) for k, v in [*values, *outs] for a in v]
        for key, array in arrays:
            if array.dtype != self.stored[key].dtype:
                raise TypeError(f"element type of {key!r}")
        for key, array in arrays:
            if array.shape != self.stored[key].shape:
                raise ValueError(f"shape of {key!r}")
        outs = [a for _, v in outs for a in v]
        if not all(isinstance(a, Rows) or a.flags.writeable for a in outs) or overlapping(outs):
            raise ValueError("outs")
        for out in outs:
            for _, value in ((k, a) for k, v in values for a in v):
                if share_memory(out, value) and not same_array(out, value):
                    raise ValueError("an out overlaps a value")
        values, outs = self.groups(values), self.groups(out_items)
        for key, others in ((k, o) for k in outs for o in values if o != k):
            if any(share_memory(a, b) for a in outs[key] for b in values[others]):
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
                sparse = isinstance(self.stored[key], Rows)
                self.stored[key] = received if sparse else np.asarray(received)
            else:
                try:
                    self.updater(key, received, self.stored[key])
                except Exception as error:
                    error.updated_keys = updated
                    raise
            updated.append(key)
            self.deliver([(key, outs.get(key, []))])

    def pull(self, key, out=None, ignore_sparse=True):
        self.check_open()
        (items,) = lists(key) if out is None else lists(key, out)
        if ignore_sparse:
            items = [(k, [a for a in arrays if not isinstance(a, Rows)]) for k, arrays in items]
        self.check(items)
        if out is None:
            result = [self.stored[k].copy() for k, _ in items]
            return result if isinstance(key, (list, tuple)) else result[0]
        self.check_arrays([], items)
        self.deliver(items)
        return None

    def deliver(self, items):
        for key, outs in items:
            stored = self.stored[key]
            for out in outs:
                dense = isinstance(stored, Rows) and not isinstance(out, Rows)
                out[...] = np.asarray(stored) if dense else stored

    def row_sparse_pull(self, key, out=None, row_ids=None):
        self.check_open()
        if row_ids is None:
            raise ValueError("no row_ids")
        if out is None:
            (items,) = lists(key)
            self.check(items)
            if any(self.stored[k].ndim == 0 for k, _ in items):
                raise ValueError("no rows")
            out = [Rows.zeros(self.stored[k].shape, self.stored[k].dtype) for k, _ in items]
            self.row_sparse_pull(key, out if is_list(key) else out[0], row_ids)
            return out if is_list(key) else out[0]
        (items,) = lists(key, out)
        ids = spread_ids(row_ids, [len(outs) for _, outs in items], is_list(key))
        self.check(items)
        if not all(isinstance(a, Rows) for _, outs in items for a in outs):
            raise TypeError("a dense out")
        self.check_arrays([], items)
        pulls = [
            (self.stored[k], a, i)
            for (k, outs), ids in zip(items, ids, strict=True)
            for a, i in zip(outs, ids, strict=True)
        ]
        if any(((i < 0) | (i >= stored.shape[0])).any() for stored, _, i in pulls):
            raise ValueError("row ids")
        for stored, a, i in pulls:
            a[:] = stored.picked(i) if isinstance(stored, Rows) else Rows(stored[i], i, a.shape)
        return None

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
