"""What is an array: NumPy's in all their forms, the buffer protocol, and what is refused, how."""

import array
import contextlib
import ctypes
import gc
import itertools
import mmap
import re
import subprocess
import sys
from decimal import Decimal

import numpy
import pytest

import kvstore
from kvstore import _core

DTYPES = ("float64", "float32", "float16", "int8", "uint8", "int32", "int64")


@pytest.fixture
def kv():
    """One kind: what an array is does not depend on it."""
    with kvstore.create() as store:
        yield store


def stored(value):
    """A store's own copy of the value, as a NumPy array."""
    with kvstore.create() as kv:
        kv.init("w", value)
        return kv.pull("w").asnumpy()


def exact(expected, actual):
    return (
        expected.shape == actual.shape
        and expected.dtype == actual.dtype
        and expected.tobytes() == actual.tobytes()
    )


# --------------------------------------------------------------------------------- NumPy


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(), (1,), (5,), (3, 4), (0,), (2, 0, 3), (1,) * 20])
def test_numpy_arrays_are_stored_exactly(dtype, shape):
    a = numpy.random.default_rng(1).integers(0, 100, shape).astype(dtype)
    assert exact(a, stored(a))


@pytest.mark.parametrize("code", ["b", "B", "i", "l", "q", "e", "f", "d"])
def test_every_c_type_of_a_width_is_the_same_element_type(code):
    a = numpy.arange(5).astype(code)
    got = stored(a)
    assert got.dtype == a.dtype and got.tolist() == a.tolist()


def test_bfloat16_of_ml_dtypes():
    ml_dtypes = pytest.importorskip("ml_dtypes", reason="ml_dtypes is not installed")
    a = numpy.array([1.0, -2.5, 3e38], ml_dtypes.bfloat16)
    assert exact(a, stored(a))
    assert exact(a[::-1].copy(), stored(a[::-1]))


def strided(dtype="float32"):
    base = numpy.arange(2 * 3 * 8 * 6).astype(dtype).reshape(2, 3, 8, 6)
    unaligned = numpy.frombuffer(b"x" + base.tobytes(), dtype, offset=1).reshape(base.shape)
    yield "transposed", base.T
    yield "every second", base[:, :, ::2, 1::2]
    yield "backwards", base[::-1, :, ::-1]
    yield "broadcast", numpy.broadcast_to(base[0, 0], (4, 8, 6))
    yield "one row", base[1, 2, 3]
    yield "one column", base[1, 2, :, 3]
    yield "Fortran's order", numpy.asfortranarray(base)
    yield "unaligned", unaligned
    yield "unaligned and transposed", unaligned.T
    yield "unaligned, no dimensions", unaligned[0, 0, 0, 0:1].reshape(())
    yield "no elements", base[:, 1:1]


@pytest.mark.parametrize("dtype", ["float64", "float32", "float16", "int8"])
@pytest.mark.parametrize("form", [name for name, _ in strided()])
def test_strided_and_unaligned_values(dtype, form):
    a = dict(strided(dtype))[form]
    assert exact(numpy.ascontiguousarray(a).reshape(a.shape), stored(a))


def root(a):
    """The array that owns the memory."""
    return root(a.base) if isinstance(a.base, numpy.ndarray) else a


@pytest.mark.parametrize("form", ["transposed", "every second", "backwards", "one column"])
def test_strided_outs_and_nothing_beside_them(kv, form):
    a, b = dict(strided())[form], dict(strided())[form]
    b[...] = a * 2 + 1
    kv.init("w", b)
    kv.pull("w", out=a)
    assert exact(root(b), root(a))


def test_unaligned_outs(kv):
    memory = bytearray(1 + 6 * 4)
    out = numpy.frombuffer(memory, "float32", offset=1).reshape(2, 3)
    assert not out.flags.aligned
    kv.init("w", numpy.arange(6, dtype="float32").reshape(2, 3))
    kv.pull("w", out=out)
    assert out.tolist() == [[0, 1, 2], [3, 4, 5]] and memory[0] == 0


def test_readonly_arrays_are_values_but_no_outs(kv):
    a = numpy.ones(3)
    a.flags.writeable = False
    kv.init("w", a)
    kv.push("w", a)
    with pytest.raises(kvstore.InvalidArgumentError, match="read-only"):
        kv.pull("w", out=a)
    with pytest.raises(kvstore.InvalidArgumentError, match="read-only"):
        kv.pull("w", out=numpy.broadcast_to(numpy.ones(1), 3))


def test_subclasses_of_ndarray(tmp_path):
    class Mine(numpy.ndarray):
        pass

    a = numpy.arange(6.0).reshape(2, 3)
    mapped = numpy.memmap(tmp_path / "m", "float64", "w+", shape=(2, 3))
    mapped[:] = a
    for value in (a.view(Mine), a.view(numpy.matrix), mapped, a.view(numpy.recarray)):
        assert exact(a, stored(value))


def test_masked_arrays_are_refused(kv):
    kv.init("w", numpy.ones(3))
    masked = numpy.ma.masked_array([1.0, 2.0, 3.0], mask=[0, 1, 0])
    with pytest.raises(kvstore.ArrayTypeError, match="masked array"):
        kv.push("w", masked)
    with pytest.raises(kvstore.ArrayTypeError, match="masked array"):
        kv.pull("w", out=masked)
    kv.push("w", masked.data)


FOREIGN = [
    *(">f4", ">i8", "bool", "complex64", "uint16", "int16", "uint64", "longdouble"),
    *("U3", "S3", "object", "datetime64[D]", "f4,i4"),
]


@pytest.mark.parametrize("dtype", FOREIGN)
@pytest.mark.parametrize("shape", [(3,), (2, 2)])
def test_foreign_element_types_are_named(kv, dtype, shape):
    if numpy.dtype(dtype) == numpy.float64:
        pytest.skip("long double is double on this machine")
    a = numpy.zeros(shape, dtype)
    name = re.escape(str(a.dtype))
    with pytest.raises(kvstore.ArrayTypeError, match=name):
        kv.init("w", a)
    kv.init("w", numpy.zeros(shape))
    with pytest.raises(kvstore.ArrayTypeError, match=name):
        kv.push("w", a.T)
    with pytest.raises(kvstore.ArrayTypeError, match=name):
        kv.pull("w", out=a)


@pytest.mark.parametrize("known", [True, False])
def test_foreign_types_of_ml_dtypes_are_no_bfloat16(known):
    """In a process of its own: what bfloat16 is, is learnt from the first array of it."""
    pytest.importorskip("ml_dtypes", reason="ml_dtypes is not installed")
    code = f"""
import kvstore, ml_dtypes, numpy
kv = kvstore.create()
if {known}:
    kv.init("known", numpy.zeros(3, ml_dtypes.bfloat16))
for name in ("float8_e4m3fn", "int4"):
    try:
        kv.init(name, numpy.zeros(3, getattr(ml_dtypes, name)))
    except kvstore.ArrayTypeError as error:
        assert name in str(error)
        continue
    raise SystemExit(f"{{name}} was taken for {{kv.dtype(name)}}")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


def test_a_type_without_a_number_is_no_bfloat16(kv):
    if not hasattr(numpy.dtypes, "StringDType"):
        pytest.skip("this NumPy has no StringDType")
    with pytest.raises(kvstore.ArrayTypeError, match="StringDType"):
        kv.init("w", numpy.array(["a", "b"], numpy.dtypes.StringDType()))


@pytest.mark.filterwarnings("ignore:Setting the shape:DeprecationWarning")
@pytest.mark.parametrize("step", [1, 2])
def test_an_array_reshaped_during_the_call_keeps_its_form(step):
    second = numpy.arange(6.0 * step)[::step]
    expected = second.copy()

    def update(key, recv, stored):
        if key == "a":
            second.shape = (2, 3)
        stored[:] = recv

    with kvstore.create() as kv:
        kv.init(["a", "b"], [numpy.zeros(1), numpy.zeros(6)])
        kv.set_updater(update)
        kv.push(["a", "b"], [numpy.ones(1), second])
        assert exact(expected, kv.pull("b").asnumpy())


# ----------------------------------------------------------------------- buffer protocol


@pytest.mark.parametrize("code", ["b", "B", "i", "l", "q", "f", "d"])
def test_array_array(kv, code):
    a = array.array(code, [1, 2, 3])
    kv.init("w", a)
    assert kv.pull("w").asnumpy().tolist() == [1, 2, 3]
    assert kv.pull("w").asnumpy().dtype == numpy.asarray(a).dtype
    out = array.array(code, [0, 0, 0])
    kv.pull("w", out=out)
    assert out == a


@pytest.mark.parametrize(
    "type_", [ctypes.c_byte, ctypes.c_ubyte, ctypes.c_int, ctypes.c_long, ctypes.c_float]
)
def test_ctypes_arrays(kv, type_):
    a = (type_ * 3 * 2)((1, 2, 3), (4, 5, 6))
    kv.init("w", a)
    assert kv.pull("w").asnumpy().tolist() == [[1, 2, 3], [4, 5, 6]]
    out = (type_ * 3 * 2)()
    kv.pull("w", out=out)
    assert bytes(out) == bytes(a)


def test_bytes_are_readonly_uint8(kv):
    kv.init("w", b"abc")
    assert kv.pull("w").asnumpy().tolist() == [97, 98, 99]
    with pytest.raises(kvstore.InvalidArgumentError, match="read-only"):
        kv.pull("w", out=b"xyz")
    out = bytearray(3)
    kv.pull("w", out=out)
    assert out == b"abc"
    with mmap.mmap(-1, 3) as memory:
        kv.pull("w", out=memory)
        assert memory[:] == b"abc"


def test_memoryviews_with_strides(kv):
    a = numpy.arange(12.0).reshape(3, 4)
    kv.init("w", memoryview(a)[::-2])
    assert exact(a[::-2].copy(), kv.pull("w").asnumpy())
    out = numpy.zeros((3, 4))
    kv.pull("w", out=memoryview(out)[::2])
    assert out.tolist() == [a[2].tolist(), [0] * 4, a[0].tolist()]


def test_a_buffer_is_let_go_after_the_call(kv):
    a = bytearray(3)
    kv.init("w", a)
    kv.pull("w", out=a)
    with pytest.raises(kvstore.InvalidArgumentError):
        kv.push("w", bytearray(4))
    a.append(1)  # BufferError while somebody holds the memory
    assert len(a) == 4


@pytest.mark.parametrize("code", ["h", "H", "I", "L", "Q"])
def test_foreign_formats_are_named(kv, code):
    with pytest.raises(kvstore.ArrayTypeError, match=f"type {code},"):
        kv.init("w", array.array(code, [1]))


def test_foreign_byte_order_is_no_native_array(kv):
    little = sys.byteorder == "little"
    other = ctypes.c_float.__ctype_be__ if little else ctypes.c_float.__ctype_le__
    with pytest.raises(kvstore.ArrayTypeError, match=">f" if little else "<f"):
        kv.init("w", (other * 2)())


# -------------------------------------------------------------------------------- refusals

NO_ARRAYS = [
    (None, "None is not an array"),
    (1, "'int' is not an array: numpy.asarray"),
    (1.5, "'float' is not an array: numpy.asarray"),
    (True, "'bool' is not an array: numpy.asarray"),
    (1j, "'complex' is not an array: numpy.asarray"),
    (numpy.float32(1), "numpy.float32 is a scalar"),
    (numpy.int64(1), "numpy.int64 is a scalar"),
    (numpy.bool_(1), "is a scalar"),
    ("text", "'str' is not an array"),
    (Decimal(1), "Decimal' is not an array"),
    ({1.0}, "'set' is not an array"),
    ({"w": 1.0}, "'dict' is not an array"),
    (object(), "'object' is not an array"),
    (numpy.ndarray, "'type' is not an array"),
    (kvstore.NDArray, "'type' is not an array"),
    (range(3), "'range' is not an array"),
]


@pytest.mark.parametrize("value, words", NO_ARRAYS, ids=[repr(v)[:20] for v, _ in NO_ARRAYS])
def test_what_is_no_array_is_refused(kv, value, words):
    with pytest.raises(kvstore.ArrayTypeError, match=words):
        kv.init("w", value)
    kv.init("w", numpy.zeros(3))
    for given in (value, [value], [numpy.ones(3), value]):
        with pytest.raises(kvstore.ArrayTypeError, match=words):
            kv.push("w", given)
        if given is not None:  # which asks for new arrays
            with pytest.raises(kvstore.ArrayTypeError, match=words):
                kv.pull("w", out=given)
    assert kv.pull("w").asnumpy().tolist() == [0, 0, 0]


# ------------------------------------------------------------------------------ references


SUBJECTS = {
    "contiguous": lambda a: a,
    "strided": lambda a: a.T,
    "another byte order": lambda a: a.astype(">f8"),
    "unaligned": lambda a: numpy.frombuffer(b"x" + a.tobytes(), offset=1),
    "buffer": lambda a: array.array("d", a.ravel()),
    "bytes": lambda a: a.tobytes(),
    "memoryview": memoryview,
    "masked": numpy.ma.asarray,
    "scalar": lambda a: a[1, 1],
    "object": lambda a: object(),
    "NDArray": lambda a: kvstore.ones(3),
}


def subject(name):
    return SUBJECTS[name](numpy.arange(12.0).reshape(3, 4))


@pytest.mark.parametrize("name", SUBJECTS)
def test_no_reference_is_lost_or_kept(kv, name):
    value = subject(name)
    kv.init("right", numpy.zeros(3))
    kv.init("wrong", numpy.zeros(4, "int8"))

    def use():
        for key in ("right", "wrong", "unknown"):
            for call in (kv.push, kv.pull):
                with contextlib.suppress(kvstore.KVStoreError):
                    call(key, value)
        kvstore.wait_all()
        gc.collect()

    use()
    before = sys.getrefcount(value)
    for _ in range(10):
        use()
    assert sys.getrefcount(value) == before


@pytest.mark.parametrize("name", SUBJECTS)
def test_every_allocation_may_fail(name):
    value = subject(name)

    def use():
        try:
            with kvstore.create() as kv:
                kv.init("w", value)
        except kvstore.ArrayTypeError:
            pass

    use()
    for nth in itertools.count(1):
        assert nth < 100
        _core.fault_set("alloc", nth)
        try:
            use()
        except MemoryError:
            continue
        finally:
            _core.fault_set("alloc", 0)
        break
    use()
