"""The file of training states: its layout, that it is written whole, and that it is not trusted."""

import json
import os
import random
import stat
import sys

import numpy as np
import pytest
from helpers import same

import kvstore
from kvstore import state_file

numpy_io = pytest.importorskip("safetensors.numpy", reason="mlkvstore[state] is not installed")

ONES = np.ones(2, np.float32)
STATES = {
    "num_update": 7,
    "nadam_product": 0.125,
    "last_rate": None,
    "seed": 2**64 - 1,
    "draws": 3,
    "keys": [("w", 7, "default", {"m": np.arange(3, dtype=np.float32)})],
    "residuals": [],
    "compression": None,
}


def refused(match):
    return pytest.raises(kvstore.InvalidArgumentError, match=match)


def about(data):
    length = int.from_bytes(data[:8], "little")
    return json.loads(json.loads(data[8 : 8 + length])["__metadata__"]["kvstore"])


@pytest.fixture
def path(tmp_path):
    return tmp_path / "file.safetensors"


# ---------------------------------------------------------------------------------- layout


def test_tensors_and_metadata_lie_as_the_interface_says(path):
    residual = np.ones((2, 1), np.float32)
    states = {
        **STATES,
        "keys": [(3, 5, "row_sparse", {"m": ONES, "v": ONES}), (-1, 0, "default", {})],
        "residuals": [(3, 0, residual), (9, 12, residual)],
        "compression": {"type": "2bit", "threshold": 0.5},
    }
    state_file.write(path, states, {"class": "adam"})
    assert numpy_io.load_file(path).keys() == {"3/m", "3/v", "3/residual.0", "9/residual.12"}
    assert about(path.read_bytes()) == {
        "version": 1,
        "key_type": "int",
        "keys": [[3, 5, "row_sparse"], [-1, 0, "default"], [9, None, "default"]],
        "compression": {"type": "2bit", "threshold": 0.5},
        "optimizer": {"class": "adam"},
        "num_update": 7,
        "nadam_product": 0.125,
        "last_rate": None,
        "seed": 2**64 - 1,
        "draws": 3,
    }


def test_what_was_written_is_read(path):
    keys = ["w", "w/m", "/", "a/residual.0", "__metadata__", "3", "ключ 🗝", " ", "w\n\"\\'", "\0"]
    arrays = [
        np.array(3, np.float32),
        np.zeros((0, 2), np.float32),
        np.array([[np.nan, -0.0, np.inf]]),
        np.arange(6, dtype=np.float32).reshape(1, 2, 3).T,
    ]
    states = {
        **STATES,
        "last_rate": 0.1 + 0.2,
        "keys": [
            (key, i, "default", {"m": arrays[i % 4], "a.b": ONES}) for i, key in enumerate(keys)
        ],
        "residuals": [(key, i, arrays[i % 4]) for i, key in enumerate(keys)],
        "compression": {"type": "1bit", "threshold": 1.0},
    }
    state_file.write(path, states, {"class": "sgd", "dump": None})
    found, described = state_file.read(path)
    assert described == {"class": "sgd", "dump": None}
    for name in found.keys() - {"keys", "residuals"}:
        assert found[name] == states[name]
    assert [entry[:3] for entry in found["keys"]] == [entry[:3] for entry in states["keys"]]
    for (*_, given), (*_, taken) in zip(states["keys"], found["keys"], strict=True):
        assert given.keys() == taken.keys()
        assert all(same(given[slot], taken[slot]) for slot in given)
    assert [entry[:2] for entry in found["residuals"]] == [
        entry[:2] for entry in states["residuals"]
    ]
    assert all(
        same(a[2], b[2]) for a, b in zip(states["residuals"], found["residuals"], strict=True)
    )


def test_no_keys_are_a_file_too(path):
    state_file.write(path, {**STATES, "keys": []}, {"class": "sgd"})
    assert state_file.read(path)[0]["keys"] == []


# --------------------------------------------------------------------------------- writing


def test_the_file_has_the_permissions_of_any_new_file(path):
    path.touch()
    normal = path.stat().st_mode
    path.unlink()
    state_file.write(path, STATES, {})
    assert path.stat().st_mode == normal
    assert stat.S_IMODE(normal) != 0o600 or os.umask(0o077) == 0o077


def test_a_link_stays_a_link(tmp_path, path):
    link = tmp_path / "link"
    link.symlink_to(path)
    state_file.write(link, STATES, {})
    assert link.is_symlink() and not path.is_symlink()
    assert state_file.read(path)[0]["num_update"] == 7


@pytest.mark.parametrize("kind", [str, os.fsencode, lambda p: p], ids=["str", "bytes", "path"])
def test_every_kind_of_path_is_taken(path, kind):
    state_file.write(kind(path), STATES, {})
    assert state_file.read(kind(path))[0]["num_update"] == 7


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_failed_write_leaves_the_old_file_and_nothing_else(path, monkeypatch, call):
    state_file.write(path, STATES, {})
    before = path.read_bytes()

    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, call, fail)
    with pytest.raises(OSError, match="No space left") as caught:
        state_file.write(path, {**STATES, "num_update": 8}, {})
    assert type(caught.value) is OSError
    monkeypatch.undo()
    assert path.read_bytes() == before
    assert os.listdir(path.parent) == [path.name]


def test_what_is_no_json_is_refused_before_anything_is_written(path):
    for wrong in ({"a": ONES}, {"a": float("nan")}, {"a": {1, 2}}):
        with refused("cannot be written as JSON"):
            state_file.write(path, STATES, wrong)
    assert os.listdir(path.parent) == []


def test_errors_of_the_file_system_are_plain(tmp_path):
    for wrong, error in (
        (tmp_path / "no" / "file", FileNotFoundError),
        (tmp_path, IsADirectoryError),
    ):
        for call in (lambda p: state_file.write(p, STATES, {}), state_file.read):
            with pytest.raises(error) as caught:
                call(wrong)
            assert not isinstance(caught.value, kvstore.KVStoreError)
    assert os.listdir(tmp_path) == []


def test_what_is_no_path():
    for call in (lambda p: state_file.write(p, STATES, {}), state_file.read):
        with pytest.raises(kvstore.ArrayTypeError, match="fname is a path, not 3"):
            call(3)
        with refused("null"):
            call("a\0b")


def test_without_the_package_the_error_names_it(path, monkeypatch):
    monkeypatch.setitem(sys.modules, "safetensors.numpy", None)
    for call in (lambda p: state_file.write(p, STATES, {}), state_file.read):
        with pytest.raises(kvstore.NotBuiltError, match=r"pip install 'mlkvstore\[state\]'"):
            call(path)


# --------------------------------------------------------------------------------- reading


def forged(path, tensors=None, **changes):
    """A file that is right but for the changes of its metadata."""
    state_file.write(path, STATES, {"class": "sgd"})
    right = about(path.read_bytes())
    text = json.dumps({**right, **changes})
    tensors = {"w/m": ONES} if tensors is None else tensors
    path.write_bytes(numpy_io.save(tensors, {"kvstore": text}))
    return path


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"version": 2}, "reads version 1, not: 2"),
        ({"version": None}, "version"),
        ({"num_update": -1}, "num_update"),
        ({"num_update": float("nan")}, "num_update"),
        ({"num_update": True}, "num_update"),
        ({"num_update": 2**63}, "num_update"),
        ({"num_update": 1.0}, "num_update"),
        ({"nadam_product": float("inf")}, "nadam_product is no finite number"),
        ({"nadam_product": 10**400}, "nadam_product|convert"),
        ({"nadam_product": "1"}, "nadam_product"),
        ({"last_rate": []}, "last_rate"),
        ({"seed": -1}, "seed"),
        ({"seed": 2**64}, "seed"),
        ({"draws": None}, "draws"),
        ({"optimizer": None}, "its optimizer is no dict"),
        ({"keys": None}, "its keys are no list"),
        ({"keys": [["w", 1]]}, "not listed with count and form"),
        ({"keys": [["w", -1, "default"]]}, "not a count of pushes of key 'w'"),
        ({"keys": [["w", float("nan"), "default"]]}, "not a count"),
        ({"keys": [["w", True, "default"]]}, "not a count"),
        ({"keys": [["w", 1, "csr"]]}, "not a form of key 'w'"),
        ({"keys": [["w", 1, []]]}, "not a form of key 'w'"),
        ({"keys": [["w", 1, "default"]] * 2}, "stands there twice"),
        ({"keys": [["", 1, "default"]]}, "not a key of the type 'str'"),
        ({"keys": [[3, 1, "default"]]}, "not a key of the type 'str': 3"),
        ({"keys": [["3", 1, "default"]], "key_type": "int"}, "not a key of the type 'int': '3'"),
        ({"keys": [[2**63, 1, "default"]], "key_type": "int"}, "not a key of the type 'int'"),
        ({"keys": [[True, 1, "default"]], "key_type": "int"}, "not a key of the type 'int'"),
        ({"keys": [[[], 1, "default"]]}, "not a key"),
        ({"key_type": "float"}, "not a key of the type 'float'"),
        ({"keys": []}, "a tensor of none of its keys: 'w/m'"),
        ({"keys": [["w", None, "default"]]}, "a state of a key without a count: 'w/m'"),
        ({"compression": "2bit"}, "an unknown compression"),
        ({"compression": {"type": "3bit", "threshold": 1}}, "an unknown compression"),
        ({"compression": {"type": "2bit", "threshold": None}}, "threshold is no finite number"),
    ],
)
def test_wrong_metadata_is_told(path, changes, message):
    with refused(message) as caught:
        state_file.read(forged(path, **changes))
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    "tensors, message",
    [
        ({"w": ONES}, "a tensor of none of its keys: 'w'"),
        ({"v/m": ONES}, "a tensor of none of its keys: 'v/m'"),
        ({"w/residual.0": ONES}, "residuals without compression"),
    ],
)
def test_wrong_tensors_are_told(path, tensors, message):
    with refused(message):
        state_file.read(forged(path, tensors))


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"short",
        b"\x80\x04\x95pickle" * 10,
        (2**62).to_bytes(8, "little") + b"{}",
        (2).to_bytes(8, "little") + b"{}",
        (4).to_bytes(8, "little") + b"[{}]",
        numpy_io.save({"w/m": ONES}),
        numpy_io.save({"w/m": ONES}, {"kvstore": "no json"}),
        numpy_io.save({"w/m": ONES}, {"kvstore": "[" * 100_000}),
        numpy_io.save({"w/m": ONES}, {"kvstore": "9" * 5000}),
        numpy_io.save({"w/m": ONES}, {"kvstore": "[]"}),
    ],
    ids=range(11),
)
def test_a_foreign_file_is_told(path, data):
    path.write_bytes(data)
    with refused("not a file of training states|its metadata is no dict") as caught:
        state_file.read(path)
    assert str(path) in str(caught.value)


def test_a_damaged_file_is_read_or_refused(path):
    states = {**STATES, "keys": [*STATES["keys"], ("v", 1, "default", {"m": ONES})]}
    state_file.write(path, states, {"class": "sgd"})
    right = path.read_bytes()
    for length in range(0, len(right), 7):
        path.write_bytes(right[:length])
        with refused("not a file of training states"):
            state_file.read(path)
    chance = random.Random(1)
    for _ in range(500):
        data = bytearray(right)
        for _ in range(chance.randint(1, 4)):
            data[chance.randrange(len(data))] = chance.randrange(256)
        path.write_bytes(data)
        try:
            state_file.read(path)
        except kvstore.InvalidArgumentError as error:
            assert str(path) in str(error)


def test_a_pipe_is_no_file(tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    with refused("not a regular file"):
        state_file.read(pipe)
