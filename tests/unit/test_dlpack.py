"""DLPack, both ways: tensors of a library made for these tests, PyTorch's where it is installed,
and NDArrays given to others."""

import gc
import itertools
import shutil
import sys
import sysconfig
import threading
import weakref
from pathlib import Path

import numpy
import pytest

import kvstore
from kvstore import _core

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "c"))
import producer_build

READ_ONLY = 1
CUDA, CUDA_HOST, METAL = (2, 999), (3, 0), (8, 0)  # no machine has so many
WAYS = {
    "table": {},
    "table behind newer ones": {},
    "table too new": {},
    "table of nonsense": {},
    "versioned": {},
    "legacy": {"legacy": True},
    "without keywords": {"keywords": False},
}


@pytest.fixture
def kv():
    """One kind: what an array is does not depend on it."""
    with kvstore.create() as store:
        yield store


@pytest.fixture(scope="module")
def producer(tmp_path_factory):
    compiler = (sysconfig.get_config_var("CC") or "cc").split()[0]
    if shutil.which(compiler) is None:
        pytest.skip(f"the array library of these tests is built with {compiler}, which is missing")
    return producer_build.load(producer_build.build(tmp_path_factory.mktemp("producer")))


@pytest.fixture(params=WAYS)
def make(request, producer):
    """Makes tensors that are given in one of the ways; afterwards each was deleted just once."""
    tables = {
        "table": producer.exchange_api,
        "table behind newer ones": producer.exchange_api_behind_newer,
        "table too new": producer.exchange_api_too_new,
        "table of nonsense": 42,
    }

    class Tensor(producer.Tensor):
        if request.param in tables:
            __dlpack_c_exchange_api__ = tables[request.param]

    if request.param.startswith("table") and not request.param.endswith(("new", "nonsense")):

        def no_method(self, **keywords):
            raise AssertionError("a type with a table is asked through it")

        Tensor.__dlpack__ = no_method

    producer.reset()
    options = WAYS[request.param]
    yield lambda memory, **more: Tensor(memory, **{**options, **more})
    settle(producer)


def settle(producer, expected=None):
    gc.collect()
    kvstore.wait_all()
    given, deleted_once, deleted_more = producer.counts()
    assert (deleted_once, deleted_more) == (given, 0)
    if expected is not None:
        assert given == expected
    producer.reset()


def numbers(count):
    return numpy.arange(count, dtype="float32")


# ------------------------------------------------------------------------------- tensors in


def test_values_and_outs(kv, make):
    a, out = bytearray(numbers(12).tobytes()), bytearray(48)
    kv.init("w", make(a, shape=(3, 4)))
    assert kv.shape("w") == (3, 4) and kv.dtype("w") == "float32"
    kv.push("w", [make(a, shape=(3, 4)), make(a, shape=(3, 4))])
    kv.pull("w", out=make(out, shape=(3, 4)))
    assert numpy.frombuffer(out, "float32").tolist() == (2 * numbers(12)).tolist()


@pytest.mark.parametrize(
    "dtype, code",
    [
        *(("float64", 2), ("float32", 2), ("float16", 2)),
        *(("int8", 0), ("uint8", 1), ("int32", 0), ("int64", 0)),
    ],
)
def test_element_types(kv, make, dtype, code):
    a = numpy.arange(5).astype(dtype)
    kv.init("w", make(bytearray(a.tobytes()), dtype=(code, a.itemsize * 8, 1)))
    assert kv.dtype("w") == dtype and kv.pull("w").asnumpy().tolist() == a.tolist()


def test_bfloat16(kv, make):
    a = numbers(4).view("uint32") >> 16
    memory, out = bytearray(a.astype("uint16").tobytes()), bytearray(8)
    kv.init("w", make(memory, dtype=(4, 16, 1)))
    kv.pull("w", out=make(out, dtype=(4, 16, 1)))
    assert out == memory


FORMS = {
    "shape only": ({"shape": (2, 6)}, lambda a: a.reshape(2, 6)),
    "strides of what is contiguous": (
        {"shape": (3, 4), "strides": (4, 1)},
        lambda a: a.reshape(3, 4),
    ),
    "any stride where one row is": (
        {"shape": (1, 12, 1), "strides": (7, 1, -3)},
        lambda a: a.reshape(1, 12, 1),
    ),
    "transposed": ({"shape": (4, 3), "strides": (1, 4)}, lambda a: a.reshape(3, 4).T),
    "every second": ({"shape": (6,), "strides": (2,)}, lambda a: a[::2]),
    "backwards": ({"shape": (6,), "strides": (-2,), "byte_offset": 44}, lambda a: a[::-2]),
    "offset": ({"shape": (2, 3), "byte_offset": 20}, lambda a: a[5:11].reshape(2, 3)),
    "no dimensions": ({"shape": (), "byte_offset": 8}, lambda a: a[2:3].reshape(())),
    "no elements": ({"shape": (3, 0)}, lambda a: a[:0].reshape(3, 0)),
    "no elements, no memory": ({"shape": (0,), "null": True}, lambda a: a[:0]),
    "32 dimensions": ({"shape": (1,) * 31 + (12,)}, lambda a: a.reshape((1,) * 31 + (12,))),
}


@pytest.mark.parametrize("form", FORMS)
def test_forms_of_memory(kv, make, form):
    options, view = FORMS[form]
    kv.init("w", make(bytearray(numbers(12).tobytes()), **options))
    expected = view(numbers(12))
    got = bytearray(max(1, expected.nbytes))
    kv.pull("w", out=make(got, shape=expected.shape))
    assert got[: expected.nbytes] == expected.tobytes()

    memory, other = bytearray(numbers(12).tobytes()), numbers(12)
    kv.push("w", make(got, shape=expected.shape))
    view(other)[...] = view(numbers(12))
    kv.pull("w", out=make(memory, **options))
    assert memory == other.tobytes()


def test_unaligned_memory(kv, make):
    memory = bytearray(b"x" + numbers(12).tobytes())
    kv.init("w", make(memory, shape=(3, 4), byte_offset=1))
    assert kv.pull("w").asnumpy().tolist() == numbers(12).reshape(3, 4).tolist()
    out = bytearray(49)
    kv.pull("w", out=make(out, shape=(3, 4), byte_offset=1))
    assert out[1:] == memory[1:]


def test_an_out_that_covers_itself_is_refused(kv, make):
    kv.init("w", numpy.zeros((2, 3), "float32"))
    memory = bytearray(64)
    kv.push("w", make(memory, shape=(2, 3), strides=(0, 1)))
    for strides in [(0, 1), (1, 1)]:
        with pytest.raises(kvstore.InvalidArgumentError):
            kv.pull("w", out=make(memory, shape=(2, 3), strides=strides))


def test_a_failing_call_lets_go(kv, make, producer):
    kv.init("w", numpy.zeros(3, "float32"))
    for wrong in [{"shape": (2,)}, {"dtype": (0, 32, 1), "shape": (3,)}]:
        with pytest.raises(kvstore.KVStoreError):
            kv.push("w", make(bytearray(64), **wrong))
        with pytest.raises(kvstore.KVStoreError):
            kv.pull("w", out=[make(bytearray(12)), make(bytearray(64), **wrong)])
    with pytest.raises(kvstore.KeyNotFoundError):
        kv.push("unknown", make(bytearray(64)))
    settle(producer, 7)


def test_an_asynchronous_call_holds_until_it_is_done(kv, make, producer):
    kv.init("w", numpy.zeros(3, "float32"))
    memory = bytearray(numbers(3).tobytes())
    handles = [kv.push("w", make(memory), async_op=True) for _ in range(10)]
    for handle in handles:
        handle.wait()
    assert kv.pull("w").asnumpy().tolist() == [0, 1, 2]
    del handle, handles
    settle(producer, 10)


def test_the_memory_is_held_and_not_the_object_alone(kv, make):
    memory = bytearray(numbers(3).tobytes())
    tensor = make(memory)
    before = sys.getrefcount(tensor), sys.getrefcount(memory)
    kv.init("w", tensor)
    kv.pull("w", out=tensor)
    kvstore.wait_all()
    assert (sys.getrefcount(tensor), sys.getrefcount(memory)) == before


def test_readonly_tensors_are_values_but_no_outs(kv, producer):
    memory = bytearray(12)
    kv.init("w", producer.Tensor(memory, readonly=True))
    with pytest.raises(kvstore.InvalidArgumentError, match="read-only"):
        kv.pull("w", out=producer.Tensor(memory, readonly=True))
    settle(producer)


def test_what_the_producer_copied_is_no_out(kv, producer):
    kv.init("w", producer.Tensor(bytearray(12), copied=True))
    with pytest.raises(kvstore.ArrayTypeError, match="copy"):
        kv.pull("w", out=producer.Tensor(bytearray(12), copied=True))
    settle(producer)


def test_device_memory_is_not_read(kv, make):
    kv.init("w", numpy.zeros(3, "float32"))
    for use in (
        lambda: kv.push("w", make(bytearray(12), device=CUDA)),
        lambda: kv.pull("w", out=make(bytearray(12), device=CUDA)),
        lambda: kvstore.array(make(bytearray(12), device=CUDA)),
    ):
        with pytest.raises((kvstore.NotBuiltError, kvstore.DeviceError), match="CUDA"):
            use()
    with pytest.raises(kvstore.NotBuiltError, match="a device that is no CUDA device"):
        kv.push("w", make(bytearray(12), device=METAL))
    kv.push("w", make(bytearray(numbers(3).tobytes()), device=CUDA_HOST))
    assert kv.pull("w").asnumpy().tolist() == [0, 1, 2]


def test_cuda_arrays_without_dlpack_are_recognised(kv):
    class Numba:
        def __init__(self, **interface):
            self.__cuda_array_interface__ = {
                "shape": (3,),
                "typestr": "<f4",
                "data": (4096, False),
                "version": 3,
                **interface,
            }

    kv.init("w", numpy.zeros(3, "float32"))
    with pytest.raises(kvstore.KVStoreError, match=r"CUDA memory|on no CUDA device"):
        kv.push("w", Numba())
    with pytest.raises(kvstore.KVStoreError, match=r"shape|on no CUDA device"):
        kv.push("w", Numba(shape=(2, 2)))
    for broken in [{"shape": None}, {"shape": ("x",)}, {"shape": (1,) * 99}, {"typestr": "|V3"}]:
        with pytest.raises(kvstore.ArrayTypeError):
            kv.push("w", Numba(**broken))


@pytest.mark.parametrize(
    "dtype, name",
    [
        ((6, 8, 1), "bool"),
        ((5, 64, 1), "complex64"),
        ((1, 16, 1), "uint16"),
        ((0, 4, 1), "int4"),
        ((10, 8, 1), "float8_e4m3fn"),
        ((17, 4, 2), "float4_e2m1fn x 2"),
        ((2, 32, 4), "float32 x 4"),
        ((2, 32, 0), "float32 x 0"),
        ((3, 64, 1), "opaque handle"),
        ((77, 8, 1), "DLPack type 77 of 8 bits"),
    ],
)
def test_foreign_element_types_are_named(kv, make, dtype, name):
    with pytest.raises(kvstore.ArrayTypeError, match=name):
        kv.init("w", make(bytearray(64), dtype=dtype, shape=(2,)))


@pytest.mark.parametrize(
    "wrong",
    [
        {"null": True},
        {"no_shape": True},
        {"ndim": -1},
        {"shape": (1,) * 65},
        {"shape": (-1,)},
        {"shape": (2**62, 2)},
        {"shape": (2, 2), "strides": (2**62, 1)},
    ],
    ids=str,
)
def test_malformed_tensors_are_refused(kv, make, wrong):
    with pytest.raises((kvstore.ArrayTypeError, kvstore.InvalidArgumentError)):
        kv.init("w", make(bytearray(16), **wrong))


def test_another_major_version_is_only_deleted(kv, producer):
    class Tensor(producer.Tensor):
        __dlpack_c_exchange_api__ = producer.exchange_api

    for type_ in (Tensor, producer.Tensor):
        with pytest.raises(kvstore.ArrayTypeError, match=r"version 2\.0"):
            kv.init("w", type_(bytearray(16), major=2))
    settle(producer, 2)


def test_a_producers_exception_is_the_cause(kv, make, producer):
    error = BufferError("not this one")
    with pytest.raises(kvstore.ArrayTypeError, match="BufferError") as info:
        kv.init("w", make(bytearray(16), error=error))
    assert info.value.__cause__ is error
    settle(producer, 0)


@pytest.mark.parametrize("type_", [KeyboardInterrupt, SystemExit, MemoryError])
def test_what_is_no_complaint_about_an_array_passes(kv, make, type_):
    with pytest.raises(type_):
        kv.init("w", make(bytearray(16), error=type_()))


def test_an_attribute_that_raises_is_the_cause(kv):
    class Meta(type):
        @property
        def __dlpack_c_exchange_api__(cls):
            raise ZeroDivisionError

    class Property:
        @property
        def __dlpack__(self):
            raise ZeroDivisionError

    for value in (Meta("Odd", (), {})(), Property()):
        with pytest.raises(kvstore.ArrayTypeError) as info:
            kv.init("w", value)
        assert isinstance(info.value.__cause__, ZeroDivisionError)


def test_what_is_no_capsule_is_refused(kv, producer):
    class Odd:
        def __init__(self, answer):
            self.answer = answer

        def __dlpack__(self, **keywords):
            return self.answer

    used = producer.Tensor(bytearray(16)).__dlpack__()
    producer.release_detached(used)
    for answer in (None, 5, producer.exchange_api, used):
        with pytest.raises(kvstore.ArrayTypeError, match="no capsule"):
            kv.init("w", Odd(answer))
    settle(producer, 1)


def test_types_without_a_hash_and_many_types(kv, producer):
    class Unhashable(type):
        __hash__ = None

    for meta in [Unhashable] + [type] * 200:
        table = {"__dlpack_c_exchange_api__": producer.exchange_api}
        type_ = meta("Tensor", (producer.Tensor,), table)
        kv.push("w", type_(bytearray(16))) if "w" in kv else kv.init("w", type_(bytearray(16)))
    alive = weakref.ref(type_)
    del type_
    for _ in range(200):
        kv.push("w", type("Other", (producer.Tensor,), {})(bytearray(16)))
    gc.collect()
    assert alive() is None, "the cache of types keeps all of them"
    settle(producer)


def test_negated_views_are_resolved_or_refused(kv, producer):
    class Lazy(producer.Tensor):
        __dlpack_c_exchange_api__ = producer.exchange_api
        negative = True

        def is_neg(self):
            return self.negative

        def resolve_neg(self):
            resolved = type(self)(bytearray((-numbers(3)).tobytes()))
            resolved.negative = False
            return resolved

    kv.init("w", Lazy(bytearray(numbers(3).tobytes())))
    assert kv.pull("w").asnumpy().tolist() == [0, -1, -2]
    with pytest.raises(kvstore.ArrayTypeError, match="negative bit"):
        kv.pull("w", out=Lazy(bytearray(12)))
    settle(producer, 1)


def test_a_tensor_with_gradient_is_used_as_detached(kv, producer):
    class Leaf(producer.Tensor):
        requires_grad = True

        def __dlpack__(self, **keywords):
            raise BufferError("call detach() first")

        def detach(self):
            return self.plain

    memory = bytearray(numbers(3).tobytes())
    leaf = Leaf(memory)
    leaf.plain = producer.Tensor(memory)
    kv.init("w", leaf)
    kv.push("w", numpy.ones(3, "float32"))
    kv.pull("w", out=leaf)
    assert numpy.frombuffer(memory, "float32").tolist() == [1, 1, 1]
    leaf.plain = object()
    with pytest.raises(kvstore.ArrayTypeError) as info:
        kv.push("w", leaf)
    assert "detach() first" in str(info.value.__cause__)
    del info
    settle(producer, 2)


@pytest.mark.parametrize("options", [{}, {"shape": (2,), "strides": (2,)}, {"dtype": (6, 8, 1)}])
def test_every_allocation_may_fail(make, options):
    def use():
        try:
            with kvstore.create() as kv:
                kv.init("w", make(bytearray(16), **options))
        except kvstore.ArrayTypeError:
            assert "dtype" in options

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


# ------------------------------------------------------------------------------ NDArrays out

CODES = {"float64": (2, 64, 1), "float16": (2, 16, 1), "bfloat16": (4, 16, 1), "int8": (0, 8, 1)}


@pytest.mark.parametrize("dtype", CODES)
@pytest.mark.parametrize("shape", [(), (3,), (2, 3, 4), (2, 0, 3)])
@pytest.mark.parametrize("new", [True, False])
def test_what_an_ndarray_gives(producer, dtype, shape, new):
    a = kvstore.zeros(shape, dtype)
    capsule = a.__dlpack__(max_version=(1, 0)) if new else a.__dlpack__()
    inside = producer.inspect(capsule)
    expected = numpy.zeros(shape)
    strides = tuple(numpy.cumprod([1, *[max(n, 1) for n in shape[:0:-1]]])[::-1]) if shape else ()
    assert inside["shape"] == shape and inside["strides"] == strides
    assert inside["dtype"] == CODES[dtype] and inside["device"] == (1, 0) == a.__dlpack_device__()
    assert inside["byte_offset"] == 0 and not inside["flags"] & READ_ONLY
    assert (inside["version"] is not None) == new
    assert not new or inside["version"][0] == 1
    assert (inside["data"] == 0) == (expected.size == 0)


def test_numpy_shares_an_ndarrays_memory():
    a = kvstore.zeros((2, 3))
    b = numpy.from_dlpack(a)
    numpy.asarray(a)[1, 2] = 5
    assert b.tolist() == [[0, 0, 0], [0, 0, 5]]
    del a
    gc.collect()
    assert b[1, 2] == 5


@pytest.mark.parametrize("new", [True, False])
def test_an_ndarray_lives_until_the_consumer_lets_go(producer, new):
    a = kvstore.ones(3)
    alive = weakref.ref(a)
    capsule = a.__dlpack__(max_version=(1, 0)) if new else a.__dlpack__()
    del a
    gc.collect()
    assert alive() is not None
    producer.release_detached(capsule)
    kvstore.wait_all()
    assert alive() is None


@pytest.mark.parametrize("new", [True, False])
def test_a_capsule_that_nobody_takes_frees_its_tensor(new):
    a = kvstore.ones(3)
    alive = weakref.ref(a)
    capsule = a.__dlpack__(max_version=(1, 0)) if new else a.__dlpack__()
    del a, capsule
    kvstore.wait_all()
    assert alive() is None


def test_consumers_let_go_in_many_threads(producer):
    a = kvstore.ones(3)

    def work():
        for i in range(500):
            version = (1, 0) if i % 2 else None
            producer.release_detached(a.__dlpack__(max_version=version))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    kvstore.wait_all()
    assert sys.getrefcount(a) == 2


def test_every_allocation_of_an_export_may_fail():
    a = kvstore.ones(3)
    a.__dlpack__()
    for nth in itertools.count(1):
        assert nth < 20
        _core.fault_set("alloc", nth)
        try:
            a.__dlpack__()
        except MemoryError:
            continue
        finally:
            _core.fault_set("alloc", 0)
        break
    kvstore.wait_all()
    assert sys.getrefcount(a) == 2
