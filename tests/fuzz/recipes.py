"""What the fuzzed calls are made of: recipes for arrays, and the mistakes that a call may have."""

import random
from dataclasses import dataclass

import numpy as np
from model import DTYPES

SHAPES = [(), (3,), (2, 3), (0,), (2, 0, 4), (40,), (9000,)]
ROWS = ["rows", "rows", "viewed rows", "borrowed rows", "pool of rows", "pool of rows"]
NO_ARRAYS = {"None": None, "number": 3.0, "text": "abc", "masked": np.ma.ones(3)}


@dataclass(frozen=True)
class Recipe:
    """How to make an array, twice the same."""

    dtype: np.dtype
    shape: tuple
    layout: str = "C"
    seed: int = 0

    def plain(self):
        numbers = random.Random(self.seed)
        size = int(np.prod(self.shape, dtype=int))
        low = 0 if self.dtype.kind == "u" else -100
        some = [numbers.randrange(low, 101) for _ in range(min(size, 50))]
        return np.resize(np.array(some, float).astype(self.dtype), self.shape)

    def rows(self):
        """Some of the rows, zeros among them, and their ids."""
        numbers = random.Random(self.seed)
        count = min(self.shape[0], numbers.choice([0, 1, 2, 5, 40]))
        ids = np.array(sorted(numbers.sample(range(self.shape[0]), count)), np.int64)
        data = self.plain()[ids]
        data[numbers.randrange(9) :: 4] = 0
        return data, ids, self.shape

    def make(self, side):
        if self.layout in ROWS and self.shape and self.dtype in DTYPES:
            return side.pooled(self) if "pool" in self.layout else side.rows(self)
        array = self.plain()
        if self.layout == "Fortran":
            return np.asfortranarray(array)
        if self.layout == "strided":
            return np.stack([array, array], axis=-1)[..., 0]
        if self.layout == "backwards":
            reverse = (slice(None, None, -1),) * array.ndim
            return np.ascontiguousarray(array[reverse])[reverse] if array.ndim else array
        if self.layout == "NDArray":
            return side.ndarray(array)
        if self.layout == "pool":
            return side.pooled(self)
        if self.layout == "read-only":
            array.flags.writeable = False
        if self.layout in NO_ARRAYS:
            return NO_ARRAYS[self.layout]
        if self.layout == "swapped":
            return array.astype(array.dtype.newbyteorder())
        if self.layout.startswith("shared"):
            memory = side.shared.setdefault(self.dtype, np.ones(1 << 15, self.dtype))
            start = int(self.layout.removeprefix("shared"))
            return memory[start : start + array.size].reshape(self.shape)
        return array


def replace_leaf(argument, at, change):
    if argument is None or at >= len(argument):
        return
    if not isinstance(argument[at], list):
        argument[at] = change(argument[at])
    elif argument[at]:
        argument[at][-1] = change(argument[at][-1])


def changed(**fields):
    def fault(machine, data, keys, argument, at):
        def change(recipe):
            if not isinstance(recipe, Recipe):
                return recipe
            return Recipe(**{**recipe.__dict__, **fields})

        replace_leaf(argument, at, change)

    return fault


def other_type(machine, data, keys, argument, at):
    dtype = machine.pick(data, [*DTYPES, np.dtype(np.uint16), np.dtype(complex)])
    changed(dtype=dtype, layout="C")(machine, data, keys, argument, at)


def other_shape(machine, data, keys, argument, at):
    shape = machine.pick(data, [*SHAPES, (3, 1), (6,)])
    changed(shape=shape, layout="C")(machine, data, keys, argument, at)


def unknown_key(machine, data, keys, argument, at):
    keys[at] = machine.pick(data, machine.names)


def strange_key(machine, data, keys, argument, at):
    keys[at] = machine.pick(data, machine.strangers)


def bad_key(machine, data, keys, argument, at):
    keys[at] = machine.pick(data, [True, 1.5, None, b"a", ["a"], 2**64, ""])


def no_array(machine, data, keys, argument, at):
    layout = machine.pick(data, list(NO_ARRAYS))
    changed(layout=layout, shape=(3,))(machine, data, keys, argument, at)


def empty_list(machine, data, keys, argument, at):
    if argument is not None and at < len(argument):
        argument[at] = []


def deep_list(machine, data, keys, argument, at):
    replace_leaf(argument, at, lambda recipe: [[recipe]])


def other_form(machine, data, keys, argument, at):
    changed(layout=machine.pick(data, ["rows", "C"]))(machine, data, keys, argument, at)


def one_more(machine, data, keys, argument, at):
    if argument is not None:
        argument.append(argument[-1])


def one_less(machine, data, keys, argument, at):
    if argument is not None:
        argument.pop()


FAULTY = {
    "nothing": lambda *_: None,
    "bad key": bad_key,
    "no array": no_array,
    "empty list": empty_list,
    "deep list": deep_list,
    "one more": one_more,
    "one less": one_less,
    "strange key": strange_key,
    "unknown key": unknown_key,
    "other type": other_type,
    "other shape": other_shape,
    "other form": other_form,
    "read-only": changed(layout="read-only"),
}
LATE_FAULTS = [
    "other form",
    "strange key",
    "unknown key",
    "other type",
    "other shape",
    "read-only",
    "nothing",
]
FAULTS = [*FAULTY, "nothing", "nothing", "nothing"]
