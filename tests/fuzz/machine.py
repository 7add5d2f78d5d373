"""Random call sequences, legal and not, on a store and on the model, side by side.

A program: `python machine.py KIND [SECONDS]`, with the engine chosen by KVSTORE_ENGINE. Each call
is drawn as a recipe and made twice from it, in memory of the store's own and of the model's own.
Then either both succeed, with the same contents of every array, or both refuse with the same
built-in class, and nothing has changed. Without SECONDS the sequences are the same at every run.
"""

import itertools
import os
import random
import sys
import time
import warnings
from collections import Counter
from pathlib import Path

import hypothesis
import numpy as np
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

import kvstore

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "contract"))

from helpers import same
from model import DTYPES, Closed, FormError, Model, Rows
from recipes import FAULTS, FAULTY, LATE_FAULTS, NO_ARRAYS, ROWS, SHAPES, Recipe

KINDS = [(dtype, shape) for shape in SHAPES for dtype in DTYPES]
LAYOUTS = ["C", "C", "Fortran", "strided", "backwards", "NDArray", "pool", "pool"]
PULLS = ("pull", "row_sparse_pull")
ENGINES_OWN = (kvstore.NDArray, kvstore.RowSparse)
REFUSALS = (Closed, KeyError, ValueError, TypeError)

counts = Counter()


class Boom(Exception):
    """What a failing updater raises."""


def made(recipe, side):
    """The arguments that a nested list of recipes describes."""
    if isinstance(recipe, list):
        return [made(r, side) for r in recipe]
    return recipe.make(side) if isinstance(recipe, Recipe) else recipe


def leaves(nested):
    if isinstance(nested, list):
        return [leaf for n in nested for leaf in leaves(n)]
    return [nested]


def agree(ours, theirs):
    if isinstance(theirs, Rows):
        return same(ours.indices, theirs.indices) and same(ours.data, theirs.data)
    return same(ours.asnumpy() if isinstance(ours, kvstore.NDArray) else ours, theirs)


class Side:
    """The arrays of one of the two, store or model."""

    def __init__(self):
        self.pool = {}
        self.shared = {}

    def pooled(self, recipe):
        """One of two long-lived arrays of this type, shape and form, shared by calls."""
        place = recipe.dtype, recipe.shape, recipe.seed % 2, recipe.layout in ROWS
        if place not in self.pool:
            rows = recipe.layout in ROWS
            self.pool[place] = self.rows(recipe) if rows else self.ndarray(recipe.plain())
        return self.pool[place]


class Theirs(Side):
    def ndarray(self, array):
        return array

    def rows(self, recipe):
        return Rows(*recipe.rows())


class Ours(Side):
    def __init__(self):
        super().__init__()
        self.views = []
        self.borrowed = []

    def ndarray(self, array):
        return kvstore.array(array)

    def rows(self, recipe):
        data, ids, shape = recipe.rows()
        rows = kvstore.RowSparse(data, ids, shape, copy=recipe.layout != "borrowed rows")
        if recipe.layout == "viewed rows":
            self.views.append(rows.data)
        if recipe.layout == "borrowed rows":
            self.borrowed.append((data, data.copy()))
        return rows

    def check_borrowed(self):
        """Nothing was written into the memory of a RowSparse that was made with copy=False."""
        self.views.clear()
        while self.borrowed:
            assert same(*self.borrowed.pop())


def add_twice(key, recv, stored):
    for _ in range(2):
        stored[...] = np.asarray(stored) + np.asarray(recv)


def fill(key, recv, stored):
    """In the memory that is there."""
    (stored if isinstance(stored, np.ndarray) else stored.data)[...] = sum(recv.shape) % 100


def failing(bad):
    def updater(key, recv, stored):
        stored[...] = np.asarray(recv) if isinstance(stored, np.ndarray) else recv
        if key == bad:
            raise Boom(key)

    return updater


class Calls(RuleBasedStateMachine):
    kind = "local"

    @initialize(
        text=st.booleans(),
        kinds=st.lists(st.sampled_from(KINDS), min_size=1, max_size=4),
        sparse=st.lists(st.booleans(), min_size=4, max_size=4),
    )
    def begin(self, text, kinds, sparse):
        self.names = ["a", "b", "c", "ä", "e"] if text else [0, -1, 7, 2**40, 3]
        self.strangers = [5, 6] if text else ["x", "0"]
        self.kv, self.model = kvstore.create(self.kind, timeout=60), Model()
        self.ours, self.theirs = Ours(), Theirs()
        self.pending = []
        for name, (dtype, shape), rows in zip(self.names, kinds, sparse, strict=False):
            self.both("init", name, Recipe(dtype, shape, "rows" if rows else "C", 3))

    # ------------------------------------------------------------------------------- drawing

    def pick(self, data, options):
        return options[data.draw(st.integers(0, len(options) - 1))]

    def described(self, key):
        value = self.model.stored[key]
        return value.dtype, value.shape

    def recipe(self, data, key, rows, out=False):
        dtype, shape = self.described(key)
        layout = self.pick(data, ROWS if rows else LAYOUTS)
        if rows:
            return Recipe(dtype, shape, layout, data.draw(st.integers(0, 9)))
        if out and self.pick(data, range(8)) == 7:
            layout = f"shared{self.pick(data, [0, 10, 12, 9000, 18000])}"
        return Recipe(dtype, shape, layout, data.draw(st.integers(0, 9)))

    def keys(self, data):
        known = list(self.model.stored)
        number = self.pick(data, [1, 1, 1, 2, 3]) if known else 0
        return [self.pick(data, known) for _ in range(number)]

    def entries(self, data, keys, out=False):
        """One recipe, or a list of them, for each key; values of a key are of one form."""
        result, forms = [], {}
        for key in keys:
            number = self.pick(data, [0, 0, 1, 2, 3, 5])
            sparse = isinstance(self.model.stored[key], Rows)
            some = [True] if sparse else [False, False, False, bool(self.model.stored[key].ndim)]
            rows = forms.setdefault(key, self.pick(data, some))
            if out == "rows":
                rows = True
            recipes = []
            for _ in range(max(1, number)):
                if out is True:
                    rows = self.pick(data, [sparse, sparse, not sparse])
                recipes.append(self.recipe(data, key, rows, out))
            result.append(recipes if number else recipes[0])
        return result

    def row_ids(self, data, keys):
        """Ids within the rows of all keys: an array of any integer type, or a list."""
        extents = [self.model.stored[key].shape[:1] or (0,) for key in keys]
        (limit,) = min(extents, default=(0,))
        number = self.pick(data, [0, 1, 3, 8, 50]) if limit else 0
        ids = random.Random(data.draw(st.integers(0, 9))).choices(range(limit), k=number)
        kind = self.pick(data, ["i8", "i8", "i4", "u8", "u2", "u1", "list", "2-D", "strided"])
        if kind == "list":
            return ids
        if kind == "2-D":
            return np.array(ids, np.int64).reshape(-1, 1 if number % 2 else 2)
        if kind == "strided":
            return np.array(ids, np.int32).repeat(2)[::2]
        return np.array(ids, "i8" if limit > 255 else kind)

    def all_row_ids(self, data, keys, outs):
        """One for all outs, one for each key, or one for each out."""
        form = self.pick(data, ["one", "keys", "outs"])
        if form == "one" or not keys:
            return self.row_ids(data, keys)
        result = []
        for key, out in zip(keys, outs, strict=False):
            ids = [self.row_ids(data, [key]) for _ in (out if isinstance(out, list) else [out])]
            result.append(ids if form == "outs" else ids[0])
        return result

    def formed(self, data, keys, *arguments):
        """As one key where there is one, now and then as tuples."""
        if len(keys) == 1 and self.pick(data, [True, False]):
            return [keys[0], *(a[0] for a in arguments)]
        return [keys, *arguments]

    def spoil(self, data, keys, arguments):
        """Puts one fault of form and up to two others into a call."""
        for fault in dict.fromkeys([self.pick(data, FAULTS), self.pick(data, LATE_FAULTS)]):
            if not keys:
                return
            at = self.pick(data, range(len(keys)))
            argument = self.pick(data, arguments) if arguments else None
            FAULTY[fault](self, data, keys, argument, at)

    # ------------------------------------------------------------------------------- calling

    def both(self, method, key, *arguments, later=False, alike=None, **options):
        """Makes the call on both sides and compares. `alike`: options that the model has too."""
        alike = alike or {}
        given = [made(a, self.ours) for a in arguments]
        plain = [made(a, self.theirs) for a in arguments]
        if method in PULLS and all(g is None for g in given):
            given, plain, later = [], [], False  # without outs there is no handle
        # Memory that several calls share must not be touched while one of them is under way.
        layouts = [getattr(recipe, "layout", "") for a in arguments for recipe in leaves(a)]
        later = later and not any(layout.startswith("shared") for layout in layouts)
        expected = result = handle = None
        try:
            answer = getattr(self.model, method)(key, *plain, **alike)
        except (*REFUSALS, Boom) as error:
            expected = error
        if later:
            options["async_op"] = True
        try:
            result = getattr(self.kv, method)(key, *given, **alike, **options)
            if later and (expected is not None or self.model.updater is not None):
                result.wait()
            handle = result if later else None
        except (kvstore.KVStoreError, Boom) as error:
            self.compare_errors(expected, error, method)
        else:
            assert expected is None, f"{method}: the model raised {expected!r}, the store nothing"
            counts[method] += 1
        if method in PULLS and not given and expected is None:
            given, plain = [[result] if answer.__class__ is not list else result], [answer]
        if later or any(isinstance(a, ENGINES_OWN) for g in given for a in leaves(g)):
            self.pending.append((handle, given, plain))
        else:
            self.compare_arrays(given, plain)

    def compare_errors(self, expected, error, method):
        assert expected is not None, f"{method}: the store raised {error!r}, the model nothing"
        if isinstance(expected, Boom):
            assert type(error) is Boom, (expected, error)
            assert list(error.updated_keys) == expected.updated_keys
        elif isinstance(expected, FormError):
            assert isinstance(error, (ValueError, TypeError)), (expected, error)
        else:
            kinds = [kind for kind in REFUSALS if isinstance(expected, kind)]
            kinds = [RuntimeError if kind is Closed else kind for kind in kinds]
            assert isinstance(error, kinds[0]), (expected, error)
            assert isinstance(error, kvstore.KVStoreError), error
        counts["refused"] += 1

    def compare_arrays(self, given, plain):
        for ours, theirs in zip(leaves(given), leaves(plain), strict=True):
            plain = isinstance(theirs, np.ndarray) and not isinstance(theirs, np.ma.MaskedArray)
            if plain or isinstance(theirs, Rows):
                assert agree(ours, theirs), (ours, theirs)

    # --------------------------------------------------------------------------------- rules

    @rule(data=st.data())
    def init(self, data):
        number = self.pick(data, [1, 1, 2, 3, 0])
        fresh = [n for n in self.names if n not in self.model.stored][:number]
        values = []
        for _ in fresh:
            dtype, shape = self.pick(data, DTYPES), self.pick(data, SHAPES)
            layout = self.pick(data, self.pick(data, [LAYOUTS, LAYOUTS, ROWS]))
            values.append(Recipe(dtype, shape, layout, data.draw(st.integers(0, 9))))
        if fresh and self.pick(data, range(5)) == 4:
            self.spoil_init(data, fresh, values)
        key, value = self.formed(data, fresh, values)
        if self.pick(data, range(3)) or not fresh:
            self.both("init", key, value)
        else:
            outs = [v if isinstance(v, list) else [v] for v in values]
            layout = self.pick(data, ["C", "C", "rows"])
            outs = [[Recipe(r.dtype, r.shape, layout, 9) for r in o] or o for o in outs]
            self.both("broadcast", key, value, outs if isinstance(key, list) else outs[0])

    def spoil_init(self, data, keys, values):
        fault = self.pick(data, ["known", "twice", "stranger", "type", "two values", "none"])
        at = self.pick(data, range(len(keys)))
        recipe = values[at]
        if fault == "known" and self.model.stored:
            keys[at] = self.pick(data, list(self.model.stored))
        elif fault == "twice":
            keys.append(keys[at])
            values.append(recipe)
        elif fault == "stranger" and self.model.key_type is not None:
            keys[at] = self.pick(data, self.strangers)
        elif fault == "type":
            values[at] = Recipe(np.dtype(np.uint16), recipe.shape)
        elif fault == "two values":
            values[at] = [recipe, recipe]
        elif fault == "none":
            values[at] = Recipe(recipe.dtype, (3,), self.pick(data, list(NO_ARRAYS)))

    @rule(data=st.data(), later=st.booleans(), spoiled=st.integers(0, 3))
    def push(self, data, later, spoiled):
        keys = self.keys(data)
        values = self.entries(data, keys)
        if spoiled == 3:
            self.spoil(data, keys, [values])
        key, value = self.formed(data, keys, values) if len(keys) == len(values) else (keys, values)
        self.both("push", key, value, later=later, priority=data.draw(st.integers(-3, 3)))

    @rule(data=st.data(), later=st.booleans(), spoiled=st.integers(0, 3))
    def pull(self, data, later, spoiled):
        keys = self.keys(data)
        outs = self.entries(data, keys, out=True)
        if spoiled == 3:
            self.spoil(data, keys, [outs])
        key, out = self.formed(data, keys, outs) if len(keys) == len(outs) else (keys, outs)
        ignore = {"ignore_sparse": self.pick(data, [False, False, True])}
        self.both("pull", key, out, later=later, alike=ignore)

    @rule(data=st.data(), spoiled=st.integers(0, 3))
    def pull_new(self, data, spoiled):
        keys = self.keys(data)
        if spoiled == 3:
            self.spoil(data, keys, [])
        self.both("pull", *self.formed(data, keys))

    @rule(data=st.data(), later=st.booleans(), spoiled=st.integers(0, 5))
    def row_sparse_pull(self, data, later, spoiled):
        keys = self.keys(data)
        outs = (
            [self.entries(data, keys, out="rows")] if self.pick(data, [True, True, False]) else []
        )
        ids = self.all_row_ids(data, keys, *(outs or [keys]))
        if spoiled > 3:
            self.spoil(data, keys, outs)
        if spoiled > 4:
            ids = self.spoil_ids(data, ids)
        single = (
            len(keys) == 1 and all(len(o) == 1 for o in outs) and self.pick(data, [True, False])
        )
        if single and isinstance(ids, list) and len(ids) == 1 and not isinstance(ids[0], int):
            ids = ids[0]
        key, *outs = [keys[0], *(o[0] for o in outs)] if single else [keys, *outs]
        self.both("row_sparse_pull", key, *outs, later=later and outs, alike={"row_ids": ids})

    def spoil_ids(self, data, ids):
        fault = self.pick(data, ["none", "float", "bool", "range", "negative", "more", "fewer"])
        if fault == "none":
            return None
        if fault in ("float", "bool"):
            return np.zeros(3, fault)
        if fault in ("range", "negative"):
            return np.array([0, -1 if fault == "negative" else 2**40])
        if not isinstance(ids, list) or not ids:
            return [[0], [0, 0], [0]]
        return [*ids, ids[0]] if fault == "more" else ids[1:]

    @rule(data=st.data(), later=st.booleans(), spoiled=st.integers(0, 3))
    def pushpull(self, data, later, spoiled):
        keys = self.keys(data)
        arguments = [self.entries(data, keys)]
        if self.pick(data, [True, True, False]):
            arguments.append(self.entries(data, keys, out=True))
        if spoiled == 3:
            self.spoil(data, keys, arguments)
        if all(len(a) == len(keys) for a in arguments):
            keys, *arguments = self.formed(data, keys, *arguments)
        self.both("pushpull", keys, *arguments, later=later)

    @precondition(lambda self: len(self.model.stored) > 1)
    @rule(data=st.data())
    def delete(self, data):
        self.both("delete", self.pick(data, list(self.model.stored)))

    @precondition(lambda self: self.model.stored)
    @rule(data=st.data())
    def delete_any(self, data):
        stranger = self.strangers if self.model.key_type is not None else []
        self.both("delete", self.pick(data, self.names + stranger))

    @rule(data=st.data())
    def set_updater(self, data):
        updater = self.pick(data, [None, add_twice, fill, failing(self.pick(data, self.names))])
        self.kv.set_updater(updater)
        self.model.updater = updater

    @rule()
    def drain(self):
        pending, self.pending = self.pending, []
        for handle, _, _ in reversed(pending):
            if handle is not None:
                handle.wait()
                assert handle.done()
                assert handle.exception() is None
        for place, theirs in self.theirs.pool.items():
            assert agree(self.ours.pool[place], theirs)
        for _, given, plain in pending:
            self.compare_arrays(given, plain)
        self.ours.check_borrowed()

    @rule()
    def wait_all(self):
        kvstore.wait_all()

    @rule()
    def compare_contents(self):
        assert list(self.kv.keys()) == list(self.model.stored)
        for key, value in self.model.stored.items():
            assert key in self.kv
            out = np.empty(self.kv.shape(key), self.kv.dtype(key))
            self.kv.pull(key, out=out)
            assert same(out, value), key
            assert agree(self.kv.pull(key), value), key

    @rule(again=st.integers(0, 5))
    def close(self, again):
        if again < 5:
            return
        self.kv.close()
        self.model.close()
        self.both("push", self.names[0], Recipe(np.dtype("f8"), (3,)))
        self.both("pull", [], [Recipe(np.dtype("f8"), (3,))])
        self.both("row_sparse_pull", self.names[0])
        self.kv, self.model = kvstore.create(self.kind, timeout=60), Model()

    @invariant()
    def keys_agree(self):
        assert list(self.kv.keys()) == list(self.model.stored)

    def teardown(self):
        if hasattr(self, "kv"):
            self.drain()
            self.compare_contents()
            self.kv.close()


# ------------------------------------------------------------------------------------------ faults
# Each takes the machine, the draws, the keys, one argument (None: there is none) and a place.


# Each of these is made more often than so, also where the machine is slow.
CALLS = "init push pull row_sparse_pull pushpull broadcast delete refused".split()
ENOUGH = 5


def main():
    Calls.kind = sys.argv[1]
    seconds = float(sys.argv[2]) if len(sys.argv) > 2 else None
    warnings.simplefilter("ignore")  # of pulls that leave out row-sparse outs
    settings = hypothesis.settings(
        max_examples=150 if seconds is None else 20,
        stateful_step_count=30,
        database=None,
        deadline=None,
        print_blob=False,
        # A shorter sequence is worth its time; to explain it is not.
        phases=[hypothesis.Phase.generate, hypothesis.Phase.shrink],
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    end = time.monotonic() + (seconds or 0)
    # Numbered, so that a failure comes again: the same number makes the same calls.
    for number in itertools.count(int(os.environ.get("KVSTORE_FUZZ_SEED", "0"))):
        hypothesis.seed(number)(Calls)
        try:
            run_state_machine_as_test(Calls, settings=settings)
        except BaseException:
            print(f"KVSTORE_FUZZ_SEED={number}", file=sys.stderr)
            raise
        if time.monotonic() >= end and min(counts[call] for call in CALLS) > ENOUGH:
            break
    live = {name: n for name, n in kvstore._core.counters().items() if n < 0}
    assert not live, live
    print(dict(counts))


if __name__ == "__main__":
    main()
