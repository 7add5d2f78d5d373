"""What users' optimizers keep, packed for its way between workers and servers: what comes out is
what went in, or an error."""

import json
import random
import sys

import numpy as np
import pytest
from helpers import same

import kvstore
from kvstore import _packed
from kvstore._python_optimizer import imported_class

SLOTS = {
    **{f"state.{name}": np.arange(7).astype(name) for name in _packed.TYPES},
    "state.point": np.array(2.5),
    "state.empty": np.zeros((0, 3), "float32"),
    "state.strided": np.arange(24.0).reshape(4, 6)[::2, ::-3],
    "state.fortran": np.asfortranarray(np.arange(6, dtype="int16").reshape(2, 3)),
    "state.swapped": np.arange(5).astype(">f4"),
    "state.größer \ud800": np.ones(1, bool),
}


def packed(slots, begun=True):
    return np.frombuffer(_packed.pack(slots, begun), np.uint8)


@pytest.mark.parametrize("begun", [False, True])
@pytest.mark.parametrize("slots", [SLOTS, {}], ids=["all", "none"])
def test_everything_comes_back(slots, begun):
    found, told = _packed.unpack(packed(slots, begun))
    assert told is begun
    assert list(found) == list(slots)
    for name, array in slots.items():
        assert found[name].shape == array.shape
        assert found[name].dtype == array.dtype.newbyteorder("<")
        assert same(found[name], np.ascontiguousarray(array, array.dtype.newbyteorder("<"))) or (
            array.ndim == 0 and found[name] == array
        )


def made(head, tail=b""):
    text = head if isinstance(head, bytes) else json.dumps(head).encode()
    data = len(text).to_bytes(8, "little") + text + bytes(-len(text) % 8) + tail
    return np.frombuffer(data, np.uint8)


@pytest.mark.parametrize(
    "data",
    [
        np.zeros(0, np.uint8),
        np.full(30, 255, np.uint8),
        packed(SLOTS)[:-1],
        np.append(packed(SLOTS), np.zeros(8, np.uint8)),
        made(b"\xff"),
        made(b"[" * 100_000),
        made([]),
        made({"begun": True}),
        made({"arrays": []}),
        made({"begun": 1, "arrays": []}),
        made({"begun": True, "arrays": [["a", "float32"]]}),
        made({"begun": True, "arrays": [["a", "object", [1]]]}, bytes(8)),
        made({"begun": True, "arrays": [["a", "complex128", [1]]]}, bytes(16)),
        made({"begun": True, "arrays": [["a", "float64", [-1]]]}, bytes(8)),
        made({"begun": True, "arrays": [["a", "float64", [1.0]]]}, bytes(8)),
        made({"begun": True, "arrays": [["a", "float64", 1]]}, bytes(8)),
        made({"begun": True, "arrays": [["a", "float64", [2**70]]]}, bytes(8)),
        made({"begun": True, "arrays": [[["a"], "float64", [1]]]}, bytes(8)),
    ],
    ids=range(18),
)
def test_what_is_none_is_refused(data):
    with pytest.raises(kvstore.InvalidArgumentError, match="not a packed state"):
        _packed.unpack(data)


def test_bytes_that_were_changed_are_arrays_or_refused():
    data, rng = packed(SLOTS), random.Random(1)
    for _ in range(3000):
        changed = data[: rng.choice([len(data), rng.randrange(len(data))])].copy()
        for _ in range(rng.randrange(4)):
            changed[rng.randrange(min(len(changed), 700)) if len(changed) else 0 :][:1] = (
                rng.randrange(256)
            )
        try:
            found, begun = _packed.unpack(changed)
        except kvstore.InvalidArgumentError:
            continue
        assert type(begun) is bool
        assert all(array.dtype.name in _packed.TYPES for array in found.values())


def test_a_class_that_another_process_names_is_never_imported():
    assert imported_class("own_here:Own") is Own
    for path in ("antigravity:Own", "own_here:None_", "own_here:Own.update", "json:loads", "json:"):
        with pytest.raises(kvstore.InvalidArgumentError, match=r"import \w+ first|is no class of"):
            imported_class(path)


@pytest.fixture(autouse=True)
def own_here(monkeypatch):
    module = type("module", (), {"Own": Own})
    monkeypatch.setitem(sys.modules, "own_here", module)
    monkeypatch.delitem(sys.modules, "antigravity", raising=False)


class Own(kvstore.optimizer.Optimizer):
    def update(self, key, weight, grad, state):
        weight -= grad


Own.__module__ = "own_here"
