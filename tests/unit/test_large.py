"""Values of more than 2**31 elements. Run by `python tests/run.py large` only."""

import numpy as np
import pytest

pytestmark = pytest.mark.large

COUNT = 2**31 + 4099
# Places where a count of 32 bits, signed or not, would go wrong, and the ends.
MARKS = [0, 1, 4098, 2**30, 2**31 - 1, 2**31, 2**31 + 1, COUNT - 4099, COUNT - 1]


def assert_filled(array, number, marks):
    for start in range(0, array.size, 2**28):
        part = array[start : start + 2**28]
        wrong = np.flatnonzero(part != number) + start
        assert set(wrong.tolist()) <= set(marks), wrong[:10]
    assert [int(array[m]) for m in marks] == list(marks.values())


def test_a_value_beyond_2_to_the_31_elements_is_summed_and_copied_whole(kv):
    one, two = np.full(COUNT, 250, np.uint8), np.full(COUNT, 10, np.uint8)
    for i, mark in enumerate(MARKS):
        one[mark] = i
    kv.init("w", one)
    assert kv.shape("w") == (COUNT,)
    out = np.zeros(COUNT, np.uint8)
    kv.pull("w", out=out)
    assert_filled(out, 250, {mark: i for i, mark in enumerate(MARKS)})
    kv.pushpull("w", [one, two], out=out)
    del one, two
    assert_filled(out, 4, {mark: i + 10 for i, mark in enumerate(MARKS)})


def test_a_strided_value_beyond_2_to_the_31_bytes_is_copied_whole(kv):
    # Every other element: the last one lies 2**31 bytes and more from the first.
    memory = np.zeros(COUNT, np.uint8)
    for i, mark in enumerate(MARKS):
        memory[mark - mark % 2] = i + 1
    kv.init("w", memory[::2])
    out = np.zeros((COUNT + 1) // 2, np.uint8)
    kv.pull("w", out=out)
    assert np.array_equal(out, memory[::2])
    for mark in out.nonzero()[0]:
        assert 2 * mark in MARKS or 2 * mark + 1 in MARKS


def test_a_large_value_of_two_dimensions_keeps_its_shape(kv):
    rows = COUNT // 4099
    value = np.zeros((rows, 4099), np.int8)
    value[-1] = np.arange(4099) % 50
    kv.init("w", value)
    kv.push("w", [value, value])
    out = np.ones((rows, 4099), np.int8)
    kv.pull("w", out=out)
    assert out[-1].tolist() == [2 * (i % 50) for i in range(4099)]
    assert not out[:-1].any()
    assert kv.pull("w").shape == (rows, 4099)
