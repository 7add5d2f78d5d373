"""Compression as MXNet 1.9.1 computes it, bit for bit: the 2-bit codec and a `device` store that
uses it as recorded, the 1-bit codec as computed from the rule of MXNet's later source."""

import json
from pathlib import Path

import numpy as np
import pytest

import kvstore
from kvstore import compression, optimizer

HERE = Path(__file__).parent
CASES = json.loads((HERE / "compress.json").read_text())
CODECS = [
    pytest.param(name, file, case, id=f"{name}-{case['id']}-{case['kind']}-{case['n']}")
    for name, file, cases in (
        ("2bit", "compress_2bit.npz", "two_bit"),
        ("1bit", "compress_1bit_computed.npz", "one_bit_computed"),
    )
    for case in CASES[cases]
]


@pytest.fixture(scope="module")
def arrays():
    loaded = {}
    for file in HERE.glob("compress_*.npz"):
        with np.load(file) as stored:
            loaded[file.name] = dict(stored)
    return loaded


def same(a, b):
    """Equal in type, shape and every bit, but for what a NaN carries."""
    nan = np.isnan(a)
    return (
        a.dtype == b.dtype
        and a.shape == b.shape
        and np.array_equal(nan, np.isnan(b))
        and np.where(nan, 0, a).tobytes() == np.where(nan, 0, b).tobytes()
    )


def test_there_are_recorded_cases():
    assert len(CODECS) == 102 and len(CASES["device_store"]) == 10


@pytest.mark.parametrize("name, file, case", CODECS)
def test_the_codec_gives_the_recorded_bits(arrays, name, file, case):
    recorded = {
        part: arrays[file][f"{case['id']}/{part}"]
        for part in ("grad", "bytes", "residual", "decoded")
    }
    params = {"type": name, "threshold": case["threshold"]}
    residual = np.zeros(case["n"], np.float32)
    for step, gradient in enumerate(recorded["grad"]):
        codes = compression.encode(gradient, residual, params)
        assert codes.dtype == np.uint8
        assert np.array_equal(codes, recorded["bytes"][step])
        assert same(residual, recorded["residual"][step])
        decoded = compression.decode(codes, gradient.shape, params)
        assert same(decoded, recorded["decoded"][step])


@pytest.mark.parametrize("case", CASES["device_store"], ids=lambda case: case["id"])
def test_a_device_store_gives_the_recorded_values(arrays, case):
    w0, grad, pulled = (
        arrays["compress_device.npz"][f"{case['id']}/{part}"] for part in ("w0", "grad", "pulled")
    )
    with kvstore.create("device") as kv:
        kv.set_gradient_compression({"type": "2bit", "threshold": case["threshold"]})
        if case["optimizer"] is not None:
            numbers = dict(case["optimizer"])
            kv.set_optimizer(getattr(optimizer, numbers.pop("optimizer"))(**numbers))
        kv.init("w", w0)
        for step, values in enumerate(grad):
            kv.push("w", list(values))
            out = np.zeros_like(w0)
            kv.pull("w", out=out)
            assert same(out, pulled[step])
