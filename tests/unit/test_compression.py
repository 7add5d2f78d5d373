"""kvstore.compression: codes, residuals and errors of encode and decode, and the parameters."""

import doctest
import threading

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import kvstore
from kvstore import _core, compression

TWO, ONE = {"type": "2bit", "threshold": 0.5}, {"type": "1bit", "threshold": 0.5}
BIG = 3 * 131072 + 77  # elements: several chunks for the team, and an odd end


def wide(dtype):
    return np.float64 if dtype == np.float64 else np.float32


def slow(gradient, residual, params):
    """Codes, new residual and decoded values, element by element and bit by bit."""
    real = residual.dtype.type
    t, two = real(params["threshold"]), params["type"] == "2bit"
    left, values, bits = [], [], ""
    with np.errstate(all="ignore"):
        for g, r in zip(gradient.ravel(), residual.ravel(), strict=True):
            s = r + real(g)
            if two:
                code, v = ("11", t) if s >= t else ("10", -t) if s <= -t else ("00", real(0))
            else:
                code, v = ("1", real(1)) if s > t else ("0", real(-1))
            left.append(s - v if v else s)
            values.append(v)
            bits += code
    bits += "0" * (-len(bits) % 32)
    codes = np.array([int(bits[i : i + 8], 2) for i in range(0, len(bits), 8)], np.uint8)
    shape = gradient.shape
    return codes, np.array(left, real).reshape(shape), np.array(values, real).reshape(shape)


def same(a, b):
    nan = np.isnan(a)
    return (
        a.dtype == b.dtype
        and np.array_equal(nan, np.isnan(b))
        and np.where(nan, 0, a).tobytes() == np.where(nan, 0, b).tobytes()
    )


def random(shape, dtype=np.float32, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(dtype)


# --------------------------------------------------------------------------------- values


@st.composite
def cases(draw):
    dtype = np.dtype(draw(st.sampled_from(["float64", "float32", "float16"])))
    shape = tuple(draw(st.lists(st.integers(0, 9), max_size=3)))
    t = draw(st.sampled_from([0.5, 0.1, 2.0, 1e-3]))
    special = [t, -t, 0.0, -0.0, np.inf, -np.inf, np.nan, 1e-45, 6e4, -6e4]
    number = st.sampled_from(special) | st.floats(-3, 3)
    count = int(np.prod(shape))
    gradient = np.array(draw(st.lists(number, min_size=count, max_size=count)), dtype)
    residual = np.array(draw(st.lists(number, min_size=count, max_size=count)), wide(dtype))
    params = {"type": draw(st.sampled_from(["2bit", "1bit"])), "threshold": t}
    return gradient.reshape(shape), residual.reshape(shape), params


@settings(max_examples=300, deadline=None)
@given(cases())
def test_codes_residual_and_decoded_values_are_those_of_the_slow_model(case):
    gradient, residual, params = case
    before = gradient.copy()
    due_codes, due_residual, due_values = slow(gradient, residual, params)
    codes = compression.encode(gradient, residual, params)
    assert codes.dtype == np.uint8 and np.array_equal(codes, due_codes)
    assert same(residual, due_residual) and same(gradient, before)
    decoded = compression.decode(codes, gradient.shape, params, residual.dtype)
    assert decoded.shape == gradient.shape and same(decoded, due_values)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.lists(st.integers(-64, 64), min_size=7, max_size=7), min_size=1, max_size=8),
    st.sampled_from(["2bit", "1bit"]),
    st.sampled_from(["float64", "float32", "float16"]),
)
def test_nothing_is_lost_what_was_not_sent_is_in_the_residual(steps, kind, dtype):
    gradients = np.array(steps, dtype) / 16
    residual = np.zeros(7, wide(gradients.dtype))
    params = {"type": kind, "threshold": 0.75}
    sent = np.zeros(7)
    for gradient in gradients:
        codes = compression.encode(gradient, residual, params)
        sent += compression.decode(codes, 7, params, residual.dtype)
    assert np.array_equal(sent + residual, gradients.astype(float).sum(axis=0))


@pytest.mark.parametrize("params", (TWO, ONE), ids=lambda p: p["type"])
@pytest.mark.parametrize("dtype", ("float64", "float32", "float16"))
def test_a_large_array_gives_what_its_parts_give(params, dtype):
    gradient, residual = random(BIG, dtype), random(BIG, wide(np.dtype(dtype)), 1)
    parts, due_codes, due_values = residual.copy(), [], []
    for at in range(0, BIG, 8000):
        part = gradient[at : at + 8000]
        due_codes.append(compression.encode(part, parts[at : at + 8000], params))
        due_values.append(compression.decode(due_codes[-1], part.shape, params, dtype))
    codes = compression.encode(gradient, residual, params)
    assert same(residual, parts)
    assert np.array_equal(codes, np.concatenate(due_codes))
    decoded = compression.decode(codes, gradient.shape, params, dtype)
    assert same(decoded, np.concatenate(due_values))


def test_the_threshold_is_rounded_to_float32_except_for_float64():
    params = {"type": "2bit", "threshold": 0.1}
    rounded = float(np.float32(0.1))
    for dtype, due in (("float64", 0.1), ("float32", rounded), ("float16", np.float16(0.1))):
        codes = compression.encode(np.ones(1, dtype), np.zeros(1, wide(np.dtype(dtype))), params)
        assert compression.decode(codes, (), params, dtype) == due
    # The float64 is below the rounded threshold, its float32 is on it.
    at = np.array([0.1])
    assert compression.encode(at, np.zeros(1), params)[0] == 0b11000000
    assert compression.encode(at.astype("f4"), np.zeros(1, "f4"), params)[0] == 0b11000000


def test_bfloat16_gradients_have_a_float32_residual():
    ml_dtypes = pytest.importorskip("ml_dtypes", reason="NumPy has bfloat16 only with ml_dtypes")
    gradient, residual = random(1000).astype(ml_dtypes.bfloat16), np.zeros(1000, np.float32)
    due_codes, due_residual, due_values = slow(gradient.astype(np.float32), residual, TWO)
    codes = compression.encode(gradient, residual, TWO)
    assert np.array_equal(codes, due_codes) and same(residual, due_residual)
    decoded = compression.decode(codes, 1000, TWO, "bfloat16")
    assert decoded.dtype == ml_dtypes.bfloat16
    assert same(decoded.astype(np.float32), due_values)


def test_bfloat16_works_without_ml_dtypes_in_an_ndarray():
    gradient, residual = kvstore.array(random(50), "bfloat16"), np.zeros(50, np.float32)
    codes = compression.encode(gradient, residual, TWO)
    narrow = (random(50).view(np.uint32) + 0x7FFF + (random(50).view(np.uint32) >> 16 & 1)) >> 16
    due = slow((narrow << 16).view(np.float32), np.zeros(50, np.float32), TWO)
    assert np.array_equal(codes, due[0]) and same(residual, due[1])


@pytest.mark.parametrize("shape", ((), (0,), (3, 0, 2), (1,), (2, 3, 4)))
def test_any_shape_works(shape):
    gradient, residual = np.full(shape, 0.75, np.float32), np.zeros(shape, np.float32)
    codes = compression.encode(gradient, residual, TWO)
    assert codes.shape == (-(-gradient.size // 16) * 4,)
    assert same(residual, np.full(shape, 0.25, np.float32))
    assert same(compression.decode(codes, shape, TWO), np.full(shape, 0.5, np.float32))


def test_strided_arrays_work():
    gradient, residual = random((40, 30))[::3, ::-2], np.zeros((30, 28), np.float32).T[::2, ::2]
    gradient = gradient[:, :15]
    memory = residual.base.copy()
    due_codes, due_residual, _ = slow(gradient, residual, TWO)
    assert np.array_equal(compression.encode(gradient, residual, TWO), due_codes)
    assert same(np.ascontiguousarray(residual), due_residual)
    # The places between its elements are as they were.
    memory.T[::2, ::2] = due_residual
    assert same(residual.base, memory)
    codes = np.repeat(due_codes, 2)[::2]
    assert same(
        compression.decode(codes, gradient.shape, TWO),
        compression.decode(due_codes, gradient.shape, TWO),
    )


def test_gradient_and_residual_may_lie_between_each_other():
    both = random(400)
    gradient, residual = both[::2], both[1::2]
    due_codes, due_residual, _ = slow(gradient.copy(), residual.copy(), ONE)
    assert np.array_equal(compression.encode(gradient, residual, ONE), due_codes)
    assert same(np.ascontiguousarray(residual), due_residual)


def test_ndarrays_work_in_every_place():
    gradient, residual = kvstore.array(random(100)), kvstore.zeros(100)
    due_codes, due_residual, due_values = slow(random(100), np.zeros(100, np.float32), TWO)
    codes = compression.encode(gradient, residual, TWO)
    assert np.array_equal(codes, due_codes) and same(residual.asnumpy(), due_residual)
    assert same(compression.decode(kvstore.array(codes), 100, TWO), due_values)


def test_an_ndarray_is_read_after_what_will_write_it():
    with kvstore.create() as kv:
        kv.init("w", np.zeros(BIG, np.float32))
        gradient, residual = kvstore.zeros(BIG), kvstore.zeros(BIG)
        kv.push("w", kvstore.ones(BIG))
        kv.pull("w", out=gradient)
        codes = compression.encode(gradient, residual, TWO)
        assert compression.decode(codes, BIG, TWO).min() == 0.5
        kv.push("w", residual)
        assert residual.asnumpy().max() == residual.asnumpy().min() == 0.5


def test_buffers_and_dlpack_tensors_work():
    residual = memoryview(np.zeros(16, np.float32))
    codes = compression.encode(memoryview(np.ones(16, np.float32)), residual, TWO)
    assert codes.tobytes() == b"\xff" * 4 and residual.tolist() == [0.5] * 16
    assert compression.decode(codes.tobytes(), 16, TWO).tolist() == [0.5] * 16
    torch = pytest.importorskip("torch", reason="PyTorch is not installed")
    left = torch.zeros(16)
    assert compression.encode(torch.ones(16), left, TWO).tobytes() == b"\xff" * 4
    assert left.tolist() == [0.5] * 16


def test_threads_with_the_same_ndarrays_do_not_block_each_other():
    a, b = kvstore.array(random(BIG)), kvstore.array(random(BIG, seed=1))

    def work(gradient, residual):
        for _ in range(20):
            compression.encode(gradient, residual, TWO)

    threads = [threading.Thread(target=work, args=pair) for pair in ((a, b), (b, a))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()


def test_a_code_without_a_meaning_decodes_to_zero():
    codes = np.array([0b00011011, 0, 0, 0], np.uint8)
    assert compression.decode(codes, 4, TWO).tolist() == [0, 0, -0.5, 0.5]


# --------------------------------------------------------------------------------- errors

GOOD = np.ones(8, np.float32)
READ_ONLY = np.zeros(8, np.float32)
READ_ONLY.flags.writeable = False
SHARED = np.zeros(12, np.float32)

REFUSED = {
    "no array": ([1.0], np.zeros(1, np.float32), kvstore.ArrayTypeError, "not an array"),
    "integers": (np.ones(8, int), np.zeros(8), kvstore.ArrayTypeError, "gradient .*int64"),
    "complex": (np.ones(8, complex), np.zeros(8), kvstore.ArrayTypeError, "complex128"),
    "wide residual": (GOOD, np.zeros(8), kvstore.ArrayTypeError, "float32 .*float32.*float64"),
    "narrow residual": (np.ones(8), GOOD, kvstore.ArrayTypeError, "float64 .*float64.*float32"),
    "half residual": (
        np.ones(8, np.float16),
        np.zeros(8, np.float16),
        kvstore.ArrayTypeError,
        "float32, not float16",
    ),
    "shape": (
        GOOD,
        np.zeros(9, np.float32),
        kvstore.InvalidArgumentError,
        r"\(8,\).*\(9,\)",
    ),
    "dimensions": (
        GOOD,
        np.zeros((8, 1), np.float32),
        kvstore.InvalidArgumentError,
        r"\(8,\).*\(8, 1\)",
    ),
    "read-only": (GOOD, READ_ONLY, kvstore.InvalidArgumentError, "read-only"),
    "the same": (SHARED, SHARED, kvstore.InvalidArgumentError, "share"),
    "overlapping": (SHARED[:8], SHARED[4:], kvstore.InvalidArgumentError, "share"),
    "reversed": (SHARED, SHARED[::-1], kvstore.InvalidArgumentError, "share"),
    "one place": (
        GOOD,
        np.lib.stride_tricks.as_strided(SHARED, (8,), (0,)),
        kvstore.InvalidArgumentError,
        "one place",
    ),
}


@pytest.mark.parametrize("params", (TWO, ONE), ids=lambda p: p["type"])
@pytest.mark.parametrize("name", REFUSED)
def test_encode_refuses(name, params):
    gradient, residual, error, words = REFUSED[name]
    before = residual.copy()
    with pytest.raises(error, match=words):
        compression.encode(gradient, residual, params)
    assert same(residual, before)


def test_an_ndarray_is_no_residual_of_itself_or_its_view():
    array = kvstore.ones(8)
    view = np.asarray(array)
    for gradient, residual in ((array, array), (array, view), (view, array)):
        with pytest.raises(kvstore.InvalidArgumentError, match="share"):
            compression.encode(gradient, residual, TWO)
    assert view.tolist() == [1] * 8


def test_a_row_sparse_gradient_is_refused():
    sparse = kvstore.RowSparse.zeros((4, 2))
    with pytest.raises(kvstore.ArrayTypeError, match="dense"):
        compression.encode(sparse, np.zeros((4, 2), np.float32), TWO)


@pytest.mark.parametrize("params", (TWO, ONE), ids=lambda p: p["type"])
def test_decode_wants_as_many_codes_as_there_are_due(params):
    due = 8 if params["type"] == "2bit" else 4
    for count in (0, due - 1, due + 1, due + 4):
        with pytest.raises(kvstore.InvalidArgumentError, match=rf"\({due},\).*\({count},\)"):
            compression.decode(np.zeros(count, np.uint8), 17, params)
    with pytest.raises(kvstore.InvalidArgumentError, match=r"\(2, \d\)"):
        compression.decode(np.zeros((2, due // 2), np.uint8), 17, params)
    with pytest.raises(kvstore.ArrayTypeError, match="uint8, not int8"):
        compression.decode(np.zeros(due, np.int8), 17, params)
    with pytest.raises(kvstore.ArrayTypeError, match="not an array"):
        compression.decode([0] * due, 17, params)


def test_decode_refuses_shapes_and_types_that_are_none():
    codes = np.zeros(4, np.uint8)
    for shape in (-1, (2, -1), (2**62, 2**62), 2**60):
        with pytest.raises(kvstore.InvalidArgumentError):
            compression.decode(codes, shape, TWO)
    for shape in (1.5, "1", None, (1.0,)):
        with pytest.raises(kvstore.ArrayTypeError):
            compression.decode(codes, shape, TWO)
    for dtype in ("int32", "float128", "complex64", None, 3):
        with pytest.raises(kvstore.ArrayTypeError):
            compression.decode(codes, 1, TWO, dtype)


PARAMS = {
    "no dict": ("2bit", kvstore.ArrayTypeError, "dict.*not str"),
    "nothing": ({}, kvstore.InvalidArgumentError, "must have a type"),
    "no type": ({"threshold": 1.0}, kvstore.InvalidArgumentError, "must have a type"),
    "type no str": ({"type": 2}, kvstore.ArrayTypeError, "str, not int"),
    "unknown type": ({"type": "2bits"}, kvstore.InvalidArgumentError, "did you mean '2bit'"),
    "letter case": ({"type": "2BIT"}, kvstore.InvalidArgumentError, "did you mean '2bit'"),
    "far type": ({"type": "gzip"}, kvstore.InvalidArgumentError, "'gzip' .*none, 2bit, 1bit"),
    "unknown key": (TWO | {"treshold": 1}, kvstore.InvalidArgumentError, "mean 'threshold'"),
    "no key": ({"type": "2bit", 3: 1}, kvstore.InvalidArgumentError, "parameter 3 "),
    "str": ({"type": "2bit", "threshold": "0.5"}, kvstore.ArrayTypeError, "'0.5' of type str"),
    "bool": ({"type": "1bit", "threshold": True}, kvstore.ArrayTypeError, "bool"),
    "None": ({"type": "1bit", "threshold": None}, kvstore.ArrayTypeError, "None"),
    "none, str": ({"type": "none", "threshold": "x"}, kvstore.ArrayTypeError, "'x'"),
    "zero": ({"type": "2bit", "threshold": 0}, kvstore.InvalidArgumentError, "above 0"),
    "tiny": ({"type": "2bit", "threshold": 1e-60}, kvstore.InvalidArgumentError, "1e-60"),
    "negative": ({"type": "1bit", "threshold": -0.5}, kvstore.InvalidArgumentError, "-0.5"),
    "nan": ({"type": "2bit", "threshold": np.nan}, kvstore.InvalidArgumentError, "finite"),
    "inf": ({"type": "1bit", "threshold": np.inf}, kvstore.InvalidArgumentError, "finite"),
    "large": ({"type": "1bit", "threshold": 1e39}, kvstore.InvalidArgumentError, "3.4.*e.38"),
    "huge": ({"type": "2bit", "threshold": 10**400}, kvstore.InvalidArgumentError, "finite"),
}


@pytest.mark.parametrize("name", PARAMS)
def test_parameters_are_checked_everywhere(name):
    params, error, words = PARAMS[name]
    residual = np.zeros(8, np.float32)
    for call in (
        lambda: compression.encode(GOOD, residual, params),
        lambda: compression.decode(np.zeros(4, np.uint8), 8, params),
        lambda: compression._parse(params),
    ):
        with pytest.raises(error, match=words):
            call()
    assert not residual.any()


def test_none_has_no_codes():
    assert compression._parse({"type": "none"}) == ("none", 0.0)
    with pytest.raises(kvstore.InvalidArgumentError, match="none"):
        compression.encode(GOOD, np.zeros(8, np.float32), {"type": "none"})
    with pytest.raises(kvstore.InvalidArgumentError, match="none"):
        compression.decode(np.zeros(4, np.uint8), 8, {"type": "none"})


def test_parameters_have_their_defaults():
    assert compression._parse({"type": "2bit"}) == ("2bit", 0.5)
    assert compression._parse({"type": "1bit"}) == ("1bit", 0.5)
    assert compression._parse({"type": "1bit", "threshold": 0}) == ("1bit", 0.0)
    kind, threshold = compression._parse({"type": "2bit", "threshold": np.float32(2)})
    assert (kind, threshold, type(threshold)) == ("2bit", 2.0, float)


def test_an_allocation_that_fails_changes_nothing():
    gradient, residual = random((9, 8))[::2, ::2], np.zeros((5, 8), np.float32)[:, ::2]
    codes = np.zeros(16, np.uint8)[::2]
    calls = (
        lambda: compression.encode(gradient, residual, TWO),
        lambda: compression.decode(codes, (5, 4), TWO),
    )
    for call in calls:
        failed = 0
        for nth in range(1, 50):
            _core.fault_set("alloc", nth)
            try:
                call()
            except MemoryError:
                failed += 1
                assert not residual.any()
            finally:
                passed = _core.fault_set("alloc", 0)
            if passed < nth:
                break
        assert passed < nth and failed > 0
        assert residual.any() == (call is calls[0])
        residual[:] = 0


def test_the_examples_run():
    failed, tried = doctest.testmod(compression, extraglobs={"kvstore": kvstore})
    assert failed == 0 and tried > 0
