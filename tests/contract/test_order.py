"""Which error is reported when several things are wrong with a call."""

import itertools

import numpy as np
import pytest
from helpers import contents

import kvstore

# In the order in which they are looked for: what is wrong, the class, a word of its message.
FAULTS = {
    "closed": (kvstore.ClosedError, "closed"),
    "form": (kvstore.InvalidArgumentError, r"\b3\b.*\b4\b|\b4\b.*\b3\b"),
    "key type": (kvstore.ArrayTypeError, r"\b77\b"),
    "key known": (kvstore.KeyNotFoundError, "'nokey'"),
    "element type": (kvstore.ArrayTypeError, "float32"),
    "shape": (kvstore.InvalidArgumentError, r"\(5,\)"),
    "writable": (kvstore.InvalidArgumentError, "read-?only|writ"),
}


def spoiled(fault):
    """A key and its array with this fault."""
    array = np.ones(3)
    array.flags.writeable = fault != "writable"
    if fault == "element type":
        array = np.ones(3, np.float32)
    if fault == "shape":
        array = np.ones(5)
    key = {"key type": 77, "key known": "nokey"}.get(fault, "b")
    return key, array


CALLS = {
    "push": lambda kv, keys, arrays: kv.push(keys, arrays),
    "pull": lambda kv, keys, arrays: kv.pull(keys, out=arrays),
    "value of pushpull": lambda kv, keys, arrays: kv.pushpull(keys, arrays),
    "out of pushpull": lambda kv, keys, arrays: kv.pushpull(
        keys, [np.ones(3) for _ in keys], out=arrays
    ),
}


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("swapped", [False, True], ids=["in order", "swapped"])
@pytest.mark.parametrize("faults", [*itertools.combinations(FAULTS, 2)], ids=" before ".join)
def test_the_first_of_the_order_is_reported(kv, call, swapped, faults):
    if call == "push" and "writable" in faults:
        faults = tuple(f for f in faults if f != "writable")
    kv.init(["a", "b"], [np.zeros(3), np.zeros(3)])
    before = contents(kv)
    pairs = [("a", np.ones(3)), *(spoiled(f) for f in faults)]
    pairs += [("a", np.ones(3))] * (3 - len(pairs))
    keys, arrays = map(list, zip(*(reversed(pairs) if swapped else pairs), strict=True))
    if "form" in faults:
        arrays.append(np.ones(3))
    if "closed" in faults:
        kv.close()
    error, word = FAULTS[faults[0]]
    with pytest.raises(error, match=f"(?i){word}"):
        CALLS[call](kv, keys, arrays)
    if "closed" not in faults:
        assert contents(kv) == before


@pytest.mark.parametrize(
    ("key", "value", "error"),
    [
        (77, np.ones(3, np.uint16), "key type"),
        ("a", np.ones(3, np.uint16), "key known"),
        (["new", 77], [np.ones(3), np.ones(3, np.uint16)], "key type"),
        ("new", np.ones(3, np.uint16), "element type"),
    ],
)
def test_init_reports_the_first_of_the_order(kv, key, value, error):
    kv.init("a", np.zeros(3))
    pattern = {"key type": r"\b77\b", "key known": "'a'", "element type": "uint16"}[error]
    with pytest.raises(kvstore.KVStoreError, match=pattern):
        kv.init(key, value)
    assert list(kv.keys()) == ["a"]
