"""Where the elements lie: strides, buffers, foreign arrays, memory that overlaps."""

import array
import ctypes
import mmap

import numpy as np
import pytest
from helpers import pulled, refused, same
from model import DTYPES

import kvstore


class Foreign:
    """Another library's array, as far as DLPack can tell."""

    def __init__(self, base):
        self.base = base

    def __dlpack_device__(self):
        return self.base.__dlpack_device__()

    def __dlpack__(self, **options):
        return self.base.__dlpack__(**options)


class OldForeign(Foreign):
    """The same of the years before versions."""

    def __dlpack__(self, stream=None):
        return self.base.__dlpack__()


def base(dtype=np.float64):
    return np.arange(120).astype(dtype)


LAYOUTS = {
    "C": lambda a: a.reshape(4, 5, 6),
    "Fortran": lambda a: np.asfortranarray(a.reshape(4, 5, 6)),
    "transposed": lambda a: a.reshape(6, 4, 5).transpose(1, 2, 0),
    "every other": lambda a: np.repeat(a, 2).reshape(4, 5, 12)[:, :, ::2],
    "backwards": lambda a: a[::-1].reshape(4, 5, 6)[::-1, :, ::-1],
    "backwards in the middle": lambda a: a.reshape(4, 5, 6)[:, ::-1],
    "cut out": lambda a: np.pad(a.reshape(4, 5, 6), 1)[1:-1, 1:-1, 1:-1],
    "not aligned": lambda a: np.frombuffer(
        bytearray(b"x" + a.tobytes()), a.dtype, offset=1
    ).reshape(4, 5, 6),
}

every_layout = pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)


@every_layout
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: d.name)
def test_any_layout_goes_in_and_out(kv, layout, dtype):
    value = layout(base(dtype))
    assert value.shape == (4, 5, 6)
    plain = np.ascontiguousarray(value)
    kv.init("w", value)
    assert same(pulled(kv, "w"), plain)
    kv.push("w", [plain, value])
    total = plain + plain
    assert same(pulled(kv, "w"), total)
    out, other = layout(base(dtype)), np.empty((4, 5, 6), dtype)
    kv.pull("w", out=[out, other])
    assert same(np.ascontiguousarray(out), total)
    assert same(other, total)
    kv.pushpull("w", [value, plain.copy()])
    assert same(np.ascontiguousarray(value), total)


@every_layout
def test_an_out_in_any_layout_is_written_nowhere_else(kv, layout):
    out = owner = layout(base(np.int64))
    while isinstance(owner.base, np.ndarray):
        owner = owner.base
    before = owner.copy()
    out[...] = -1
    outside = owner != -1
    kv.init("w", np.full((4, 5, 6), 7))
    kv.pull("w", out=out)
    assert (out == 7).all()
    assert (owner[outside] == before[outside]).all()


def test_an_input_of_stride_zero_works(kv):
    value = np.broadcast_to(np.float32(3), (100, 7))
    kv.init("w", np.broadcast_to(np.arange(7, dtype=np.float32), (100, 7)))
    assert (pulled(kv, "w") == np.arange(7)).all()
    kv.push("w", [value, value])
    assert (pulled(kv, "w") == 6).all()


def test_large_strided_arrays_work(kv):
    value = np.arange(2_000_000, dtype=np.float32).reshape(1000, 2000).T
    out = np.empty((1000, 2000), np.float32).T
    kv.init("w", value)
    kv.pushpull("w", [value, value, value], out=out)
    assert (out == 3 * value).all()


def test_read_only_inputs_work(kv):
    value = np.arange(3.0)
    value.flags.writeable = False
    kv.init("w", value)
    kv.push("w", [value, value])
    assert pulled(kv, "w").tolist() == [0, 2, 4]
    kv.init("b", b"\1\2\3")
    kv.push("b", [b"\1\2\3", bytes(3)])
    assert same(pulled(kv, "b"), np.array([1, 2, 3], np.uint8))


BUFFERS = {
    "array.array d": (lambda: array.array("d", [1, 2, 3]), np.float64),
    "array.array f": (lambda: array.array("f", [1, 2, 3]), np.float32),
    "array.array b": (lambda: array.array("b", [1, 2, 3]), np.int8),
    "array.array B": (lambda: array.array("B", [1, 2, 3]), np.uint8),
    "array.array i": (lambda: array.array("i", [1, 2, 3]), np.int32),
    "array.array q": (lambda: array.array("q", [1, 2, 3]), np.int64),
    "array.array l": (lambda: array.array("l", [1, 2, 3]), np.dtype(ctypes.c_long)),
    "bytearray": (lambda: bytearray([1, 2, 3]), np.uint8),
    "memoryview": (lambda: memoryview(bytearray([1, 2, 3])), np.uint8),
    "memoryview of floats": (lambda: memoryview(array.array("d", [1, 2, 3])), np.float64),
    "memoryview cast": (
        lambda: memoryview(bytearray(np.array([1, 2, 3], "f4").tobytes())).cast("f"),
        np.float32,
    ),
    "memoryview strided": (lambda: memoryview(array.array("i", [1, 0, 2, 0, 3]))[::2], np.int32),
    "memoryview of NumPy": (lambda: memoryview(np.array([1, 2, 3], np.float16)), np.float16),
    "ctypes": (lambda: (ctypes.c_float * 3)(1, 2, 3), np.float32),
    "DLPack": (lambda: Foreign(np.array([1.0, 2.0, 3.0])), np.float64),
    "DLPack strided": (lambda: Foreign(np.arange(1.0, 4.0)[::-1][::-1]), np.float64),
    "DLPack of old": (lambda: OldForeign(np.array([1, 2, 3], np.int32)), np.int32),
}


@pytest.mark.parametrize(("make", "dtype"), BUFFERS.values(), ids=BUFFERS)
def test_whatever_has_a_buffer_or_dlpack_is_an_array(kv, make, dtype):
    kv.init("w", make())
    assert same(pulled(kv, "w"), np.array([1, 2, 3], dtype))
    kv.push("w", [make(), make()])
    out = make()
    kv.pull("w", out=out)
    assert np.array(getattr(out, "base", out)).tolist() == [2, 4, 6]
    kv.pushpull("w", out)
    assert np.array(getattr(out, "base", out)).tolist() == [2, 4, 6]
    kv.pushpull("w", [make(), np.array([1, 1, 1], dtype)], out=[out])
    assert np.array(getattr(out, "base", out)).tolist() == [2, 3, 4]


def test_numpy_subclasses_are_arrays(kv, tmp_path):
    class Mine(np.ndarray):
        pass

    kv.init("w", np.arange(3.0).view(Mine))
    mapped = np.memmap(tmp_path / "map", np.float64, "w+", shape=(3,))
    kv.pull("w", out=mapped)
    assert mapped.tolist() == [0, 1, 2]
    kv.push("w", [mapped, mapped])
    assert pulled(kv, "w").tolist() == [0, 2, 4]


def test_a_buffer_may_be_resized_after_the_call(kv):
    value = bytearray(3)
    kv.init("w", value)
    kv.push("w", [value, value])
    kv.pull("w", out=value)
    value.extend(b"more")
    area = mmap.mmap(-1, 4096)
    kv.init("m", area)
    kv.push("m", area)
    area.close()


def test_foreign_arrays_are_let_go_after_the_call(kv):
    import weakref

    class Watched(np.ndarray):
        pass

    value = np.ones(3).view(Watched)
    gone = weakref.ref(value)
    kv.init("w", value)
    kv.push("w", [value, Foreign(value)])
    kv.pull("w", out=Foreign(value))
    kv.push("w", value[::-1])
    del value
    assert gone() is None


NO_ARRAYS = {
    "None": None,
    "int": 3,
    "float": 3.0,
    "NumPy scalar": np.float64(3),
    "NumPy bool": np.bool_(True),
    "str": "abc",
    "list of numbers": [1.0, 2.0, 3.0],
    "dict": {"a": 1},
    "set": {1.0},
    "class": np.ndarray,
    "object": object(),
    "masked": np.ma.masked_array([1.0, 2.0, 3.0], [0, 1, 0]),
    "masked constant": np.ma.masked,
    "dtype": np.dtype("f4"),
}


@pytest.mark.parametrize("value", NO_ARRAYS.values(), ids=NO_ARRAYS)
def test_what_is_no_array_is_refused(kv, value):
    kv.init(["u", "w"], [np.zeros(3), np.zeros(3)])
    with refused(kv, kvstore.ArrayTypeError, "'w'"):
        kv.push("w", value)
    with refused(kv, kvstore.ArrayTypeError, "'w'"):
        kv.push("w", [np.ones(3), value] if not isinstance(value, list) else value)
    with refused(kv, kvstore.ArrayTypeError, "'w'"):
        kv.push(["u", "w"], [np.ones(3), value])
    with refused(kv, kvstore.ArrayTypeError, "'w'"):
        kv.pushpull("w", value)
    single = value[0] if isinstance(value, list) else value
    with refused(kv, kvstore.ArrayTypeError, "'v'"):
        kv.init("v", single)
    with refused(kv, kvstore.ArrayTypeError, "'v'"):
        kv.broadcast("v", single, np.zeros(3))
    if value is not None:
        with refused(kv, kvstore.ArrayTypeError, "'w'"):
            kv.pull("w", out=value)
        with refused(kv, kvstore.ArrayTypeError, "'w'"):
            kv.pushpull("w", np.ones(3), out=value)
    assert "v" not in kv


def test_a_masked_array_is_refused_by_name(kv):
    kv.init("w", np.zeros(3))
    with refused(kv, kvstore.ArrayTypeError, "mask"):
        kv.push("w", np.ma.ones(3))


def test_an_error_of_a_foreign_array_becomes_an_array_type_error_with_its_cause(kv):
    class Broken(Foreign):
        def __dlpack__(self, **options):
            raise ZeroDivisionError("broken")

    kv.init("w", np.zeros(3))
    with refused(kv, kvstore.ArrayTypeError, "'w'"):
        kv.push("w", Broken(np.ones(3)))
    with pytest.raises(kvstore.ArrayTypeError) as info:
        kv.push("w", Broken(np.ones(3)))
    cause = info.value.__cause__ or info.value.__context__
    assert isinstance(cause, ZeroDivisionError)


def test_what_dlpack_gives_must_be_a_capsule(kv):
    class Liar(Foreign):
        def __dlpack__(self, **options):
            return 7

    kv.init("w", np.zeros(3))
    with refused(kv, kvstore.ArrayTypeError, "'w'"):
        kv.push("w", Liar(np.ones(3)))


# ------------------------------------------------------------------------------- shapes and outs


@pytest.mark.parametrize("shape", [(3, 2), (6,), (2, 3, 1), (1, 2, 3), (), (2, 4), (0, 3), (2,)])
def test_another_shape_is_refused_and_both_are_shown(kv, shape):
    kv.init(["u", "w"], [np.zeros(1), np.zeros((2, 3))])
    shown = r"\(2, 3\)", r"\(" + ", ".join(map(str, shape)) + r",?\)", "'w'"
    bad = np.ones(shape)
    out = np.ones((2, 3))
    for call in (
        lambda: kv.push("w", bad),
        lambda: kv.push("w", [np.ones((2, 3)), bad]),
        lambda: kv.push(["u", "w"], [np.ones(1), bad]),
        lambda: kv.pull("w", out=bad),
        lambda: kv.pull(["u", "w"], out=[np.ones(1), [out, bad]]),
        lambda: kv.pushpull("w", bad, out=out),
        lambda: kv.pushpull("w", np.ones((2, 3)), out=bad),
        lambda: kv.push("w", kvstore.array(bad)),
        lambda: kv.push("w", bad, async_op=True),
    ):
        with refused(kv, kvstore.InvalidArgumentError, *shown):
            call()
    assert (out == 1).all()
    assert (bad == 1).all()


def locked(values):
    values.flags.writeable = False
    return values


OLD_NUMPY = np.lib.NumpyVersion(np.__version__) < "2.1.0"
UNEXPORTED = pytest.mark.skipif(OLD_NUMPY, reason="this NumPy exports no read-only array by DLPack")


@pytest.mark.parametrize("dlpack", [False, pytest.param(True, marks=UNEXPORTED)])
def test_a_read_only_out_is_refused(kv, dlpack):
    out = locked(np.ones(3))
    if dlpack:
        out = Foreign(out)
    kv.init("w", np.zeros(3))
    with refused(kv, kvstore.InvalidArgumentError, "'w'", "read-?only|writ"):
        kv.pull("w", out=out)
    with refused(kv, kvstore.InvalidArgumentError, "'w'", "read-?only|writ"):
        kv.pushpull("w", np.ones(3), out=[np.ones(3), out])
    with refused(kv, kvstore.InvalidArgumentError, "'w'", "read-?only|writ"):
        kv.pushpull("w", out)
    with refused(kv, kvstore.InvalidArgumentError, "'v'", "read-?only|writ"):
        kv.broadcast("v", np.ones(3), out)
    assert "v" not in kv


def test_a_read_only_buffer_as_out_is_refused(kv):
    kv.init("b", bytes(3))
    with refused(kv, kvstore.InvalidArgumentError, "'b'", "read-?only|writ"):
        kv.pull("b", out=b"abc")
    with refused(kv, kvstore.InvalidArgumentError, "'b'", "read-?only|writ"):
        kv.pull("b", out=memoryview(b"abc"))


OVERLAPS = {
    "the same twice": lambda m: [m[:4], m[:4]],
    "shifted": lambda m: [m[:4], m[2:6]],
    "one element": lambda m: [m[:4], m[3:7]],
    "within strides": lambda m: [m[0:8:2], m[2:10:2]],
    "backwards": lambda m: [m[:4], m[3::-1][:4]],
    "among others": lambda m: [m[20:24], m[:4], m[10:14], m[1:5]],
}


@pytest.mark.parametrize("outs", OVERLAPS.values(), ids=OVERLAPS)
def test_outs_that_overlap_are_refused(kv, outs):
    memory = np.full(40, 9.0)
    outs = outs(memory)
    kv.init([*range(len(outs))], [np.zeros(4)] * len(outs))
    with refused(kv, kvstore.InvalidArgumentError, r"\b0\b", "overlap"):
        kv.pull(0, out=outs)
    with refused(kv, kvstore.InvalidArgumentError, "overlap"):
        kv.pull([*range(len(outs))], out=outs)
    with refused(kv, kvstore.InvalidArgumentError, "overlap"):
        kv.pushpull(0, np.ones(4), out=outs)
    with refused(kv, kvstore.InvalidArgumentError, "overlap"):
        kv.broadcast(99, np.ones(4), outs)
    assert 99 not in kv
    assert (memory == 9).all()


def test_the_same_ndarray_as_two_outs_is_refused(kv):
    kv.init("w", np.zeros(4))
    out = kvstore.ones(4, "float64")
    with refused(kv, kvstore.InvalidArgumentError, "overlap"):
        kv.pull("w", out=[out, out])
    assert out.asnumpy().tolist() == [1, 1, 1, 1]


@pytest.mark.parametrize("strides", [(0,), (4,), (8, 0), (8, 8), (0, 8), (8, 16)], ids=str)
def test_an_out_with_an_element_twice_is_refused(kv, strides):
    shape = (3,) * len(strides)
    memory = np.full(30, 9.0)
    out = np.lib.stride_tricks.as_strided(memory, shape, strides)
    kv.init("w", np.zeros(shape))
    with refused(kv, kvstore.InvalidArgumentError, "'w'"):
        kv.pull("w", out=out)
    assert (memory == 9).all()


def test_outs_side_by_side_and_interleaved_work(kv):
    memory = np.full(40, 9.0)
    kv.init("w", np.arange(4.0))
    kv.pull("w", out=[memory[:4], memory[4:8], memory[10:18:2], memory[11:18:2]])
    assert memory[:8].tolist() == [0, 1, 2, 3] * 2
    assert memory[10:18].tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    assert (memory[18:] == 9).all()


def test_empty_outs_never_overlap(kv):
    memory = np.empty((4, 4))
    kv.init("w", np.empty((0, 4)))
    kv.pull("w", out=[memory[:0], memory[:0]])


def test_an_out_that_overlaps_a_value_without_being_it_is_refused(kv):
    memory = np.arange(40.0)
    before = memory.copy()
    kv.init(["v", "w"], [np.zeros(4), np.zeros(4)])
    for value, out in (
        (memory[:4], memory[1:5]),
        (memory[:4], memory[3::-1]),
        (memory[0:8:2], memory[0:4]),
    ):
        with refused(kv, kvstore.InvalidArgumentError, "'w'", "overlap"):
            kv.pushpull("w", value, out=out)
        with refused(kv, kvstore.InvalidArgumentError, "overlap"):
            kv.pushpull("w", [np.ones(4), value], out=[out])
        with refused(kv, kvstore.InvalidArgumentError, "overlap"):
            kv.pushpull(["v", "w"], [value, np.ones(4)], out=[np.ones(4), out])
        with refused(kv, kvstore.InvalidArgumentError, "overlap"):
            kv.broadcast("new", value, out)
    assert same(memory, before)


def test_values_may_overlap_each_other(kv):
    memory = np.arange(6.0)
    kv.init("w", np.zeros(4))
    kv.push("w", [memory[:4], memory[1:5], memory[2:6]])
    assert pulled(kv, "w").tolist() == [3, 6, 9, 12]
