"""What cannot be done is refused by name, and nothing has changed."""

import re

import cuda_tensor as cuda
import ml_dtypes
import numpy as np
import pytest
from samples import Plain
from twin import same, store_of

import kvstore
from kvstore import optimizer

KINDS = ["device", "local", "dist_sync", "dist_device_sync"]
N = 4
REFUSED_BY_RUNTIME = 1  # cudaErrorInvalidValue


def full(number, device=0, face=cuda.TableTensor, **options):
    return face(np.full(N, number, np.float32), device, **options)


@pytest.fixture(params=KINDS)
def store(request):
    with store_of(request.param) as kv:
        kv.init("w", full(1))
        kv.init("host", np.ones(N, np.float32))
        yield kv


def refused(kv, error, call, *patterns):
    """Raises, tells, changes nothing and goes on working."""
    before = [kv.pull(key).asnumpy() for key in ("w", "host")]
    with pytest.raises(error) as info:
        call()
    assert isinstance(info.value, kvstore.KVStoreError)
    for pattern in patterns:
        assert re.search(pattern, str(info.value)), (pattern, str(info.value))
    del info
    assert all(same(kv.pull(k).asnumpy(), b) for k, b in zip(("w", "host"), before, strict=True))
    kv.push("w", full(5))
    assert kv.pull("w").asnumpy().tolist() == [5] * N
    assert sorted(kv.keys()) == ["host", "w"]


def all_calls(kv, value):
    return (
        lambda: kv.push("w", value),
        lambda: kv.push("host", [np.ones(N, np.float32), value]),
        lambda: kv.push(["host", "w"], [np.ones(N, np.float32), value]),
        lambda: kv.pushpull("w", value, out=full(0)),
        lambda: kv.pull("w", out=value),
        lambda: kv.pull("w", out=[full(0), value]),
    )


@pytest.mark.parametrize("face", cuda.FACES)
def test_a_wrong_shape_or_type(store, face):
    for call in all_calls(store, face(np.zeros(N + 1, np.float32))):
        refused(store, kvstore.InvalidArgumentError, call, r"\(5,\)", r"\(4,\)")
    for call in all_calls(store, face(np.zeros(N, np.float64))):
        refused(store, kvstore.ArrayTypeError, call, "float64", "float32")


def test_a_type_that_no_key_can_have(store):
    value = cuda.TableTensor(np.zeros(N, ml_dtypes.float8_e4m3fn))
    for call in (*all_calls(store, value), lambda: store.init("new", value)):
        refused(store, kvstore.ArrayTypeError, call, "float8_e4m3fn")


@pytest.mark.parametrize("face", [cuda.TableTensor, cuda.MethodTensor, cuda.InterfaceTensor])
def test_a_strided_tensor(store, face):
    value = full(2, face=face, layout="strided")
    for call in (*all_calls(store, value), lambda: store.init("new", value)):
        refused(store, kvstore.InvalidArgumentError, call, "contiguous")
    assert value.exports == 0


@pytest.mark.parametrize("face", [cuda.TableTensor, cuda.MethodTensor, cuda.InterfaceTensor])
def test_an_out_that_is_read_only(store, face):
    value = full(2, face=face, readonly=True)
    for call in all_calls(store, value)[4:]:
        refused(store, kvstore.InvalidArgumentError, call, "read-only")
    refused(store, kvstore.InvalidArgumentError, lambda: store.pushpull("w", value), "read-only")
    store.push("w", value)
    assert store.pull("w").asnumpy().tolist() == [2] * N


class Elsewhere(cuda.MethodTensor):
    """Says that it is on a device which is not there."""

    device = 77

    def used(self):
        return cuda.current_stream(0)


class Lying(cuda.TableTensor):
    device = property(lambda self: 77)


@pytest.mark.parametrize("face", [Elsewhere, Lying])
def test_a_device_that_is_not_there(store, face):
    value = face.over(full(3).storage, (N,), np.float32)
    for call in (*all_calls(store, value), lambda: store.init("new", value)):
        refused(store, kvstore.DeviceError, call, "77", rf"\b{cuda.num_devices}\b")
    assert value.exports == 0


def test_a_tensor_of_rocm(store):
    value = full(3, face=cuda.RocmTensor)
    for call in (*all_calls(store, value), lambda: store.init("new", value)):
        with pytest.raises((kvstore.NotBuiltError, kvstore.DeviceError, kvstore.ArrayTypeError)):
            call()
    assert value.exports == 0 and store.pull("w").asnumpy().tolist() == [1] * N


class Twice(cuda.MethodTensor):
    """Hands the same capsule out again."""

    kept = None

    def __dlpack__(self, **asked):
        self.kept = self.kept or super().__dlpack__(**asked)
        return self.kept


def test_a_capsule_that_is_used_already(store):
    value = full(3, face=Twice)
    store.push("w", value)
    refused(store, kvstore.ArrayTypeError, lambda: store.push("w", value), "capsule")
    value.kept = None


class Failing(cuda.MethodTensor):
    def __dlpack__(self, **asked):
        raise ZeroDivisionError("mine")


def test_a_producer_that_raises(store):
    value = full(3, face=Failing)
    for call in all_calls(store, value):
        with pytest.raises(kvstore.ArrayTypeError, match="ZeroDivisionError") as info:
            call()
        assert isinstance(info.value.__cause__, ZeroDivisionError)


@pytest.mark.parametrize("face", [cuda.TableTensor, cuda.InterfaceTensor])
def test_outs_and_values_that_overlap(store, face):
    whole = face(np.zeros(N + 2, np.float32))

    def part(start):
        return face.over(whole.storage, (N,), np.float32, byte_offset=4 * start)

    for call in (
        lambda: store.pull("w", out=[part(0), part(2)]),
        lambda: store.pull("w", out=[part(1), part(1)]),
        lambda: store.pushpull("w", part(0), out=part(1)),
        lambda: store.pushpull("w", [full(1), part(2)], out=[full(0), part(0)]),
    ):
        refused(store, kvstore.InvalidArgumentError, call, "overlap")
    value = part(1)
    store.pushpull("w", value, out=value)


def test_an_unknown_key_and_a_closed_store():
    kv = kvstore.create("device")
    with pytest.raises(kvstore.KeyNotFoundError, match="'no'"):
        kv.push("no", full(1))
    with pytest.raises(kvstore.KeyNotFoundError, match="'no'"):
        kv.pull("no", out=full(1))
    kv.init("w", full(1))
    kv.close()
    for call in (lambda: kv.push("w", full(1)), lambda: kv.pull("w", out=full(1))):
        with pytest.raises(kvstore.ClosedError):
            call()


def test_an_optimizer_in_python_is_for_host_memory(store):
    if store.type == "device":
        store.set_optimizer(Plain(learning_rate=0.1))
        with pytest.raises(kvstore.ArrayTypeError, match="optimizer in Python"):
            store.push("w", full(1))
        store.set_updater(None)
        assert store.pull("w").asnumpy().tolist() == [1] * N


@pytest.mark.emulated
def test_a_pull_that_has_run_out_of_time_writes_nothing_afterwards():
    with kvstore.create("device", timeout=1e-6) as kv:
        kv.init("w", full(5))
        cuda.current_stream().busy(5000)
        kv.push("w", full(6))
        out = np.zeros(N, np.float32)
        with pytest.raises(kvstore.TimeoutError, match=r"'w'.*device 0"):
            kv.pull("w", out=out)
        cuda.emu.run_all()
        there = full(0)
        kv.pull("w", out=there)
        assert there.numpy().tolist() == [6] * N and not out.any()


# ----------------------------------------------------------------------------------- out of memory


def prepare(kv):
    kv.set_optimizer(optimizer.SGD(learning_rate=1.0, momentum=0.5))
    kv.init("w", full(0))


def run_calls(kv, where):
    """One of each kind of call on a new store: the names of those that failed, with the errors."""
    calls = {
        "init": lambda: kv.init("w", where["a"]),
        "push": lambda: kv.push("w", where["a"]),
        "two": lambda: kv.push("w", [where["a"], where["b"]]),
        "mixed": lambda: kv.push("w", [where["a"], np.ones(N, np.float32)]),
        "out": lambda: kv.pull("w", out=where["c"]),
        "host": lambda: kv.pull("w", out=np.zeros(N, np.float32)),
        "pushpull": lambda: kv.pushpull("w", where["b"], out=where["c"]),
        "optimizer": lambda: kv.set_optimizer(optimizer.SGD(learning_rate=1.0, momentum=0.5)),
        "step": lambda: kv.push("w", where["a"]),
        "coded": lambda: (
            kv.set_gradient_compression({"type": "2bit", "threshold": 0.5}),
            kv.push("w", [where["a"], where["b"]]),
        ),
    }
    failed = {}
    for name, call in calls.items():
        try:
            call()
        except (kvstore.DeviceError, MemoryError) as error:
            failed[name] = str(error)
            if name == "init":
                assert "w" not in kv
            call()  # once more, and it works
    return failed


def end_of(kv):
    got = kv.pull("w").asnumpy()
    kv.close()
    kvstore.wait_all()
    return got


@pytest.mark.emulated
@pytest.mark.parametrize("kind", ["device", "local"])
def test_without_memory_each_call_fails_by_name_and_works_the_next_time(kind):
    """Every allocation fails once: whatever has failed is done again, and the end is the same."""
    where = {"a": full(1), "b": full(2, cuda.other_device), "c": full(0, cuda.other_device)}
    kv = kvstore.create(kind)
    assert run_calls(kv, where) == {}
    wanted, failures = end_of(kv), 0
    for n in range(1, 100):
        kv = kvstore.create(kind)
        before = cuda.emu.counter("cudaMallocFromPoolAsync") + cuda.emu.counter("cudaHostAlloc")
        cuda.emu.fail_alloc(n, 2)  # the second is the one after the pool was trimmed
        failed = run_calls(kv, where)
        now = cuda.emu.counter("cudaMallocFromPoolAsync") + cuda.emu.counter("cudaHostAlloc")
        cuda.emu.fail_alloc(0, 0)
        assert same(end_of(kv), wanted), (n, failed)
        failures += len(failed)
        for text in failed.values():
            assert "memory" in text or "alloc" in text, text
        if now - before < n:
            break
    else:
        raise AssertionError("each of a hundred allocations was needed")
    assert failures > 0 or kind == "local"


# By how many calls the failure moves on each time.
CALLS = {
    "cudaStreamWaitEvent": 1,
    "cudaEventRecord": 1,
    "cudaEventCreateWithFlags": 1,
    "cudaMallocFromPoolAsync": 1,
    "cudaMemcpyAsync": 1,
    "cudaMemcpyPeerAsync": 1,
    "cudaMemsetAsync": 1,
    "cudaLaunchKernel": 1,
    "cudaFreeAsync": 1,
    "cudaHostAlloc": 1,
    "cudaPointerGetAttributes": 1,
    "cudaEventQuery": 5,
    "cudaSetDevice": 11,
    "cudaGetDevice": 11,
}
NEVER = 1 << 60


def calls_of(kv):
    """Each with what the key is when it is done. The tensors are nobody else's."""
    there = cuda.other_device
    first, host = [full(1)], np.full(N, 2, np.float32)
    values = [[full(1), full(2, there)], [full(2, there), host], [full(2, there) for _ in range(3)]]
    outs = [full(0, there), full(0, there)]
    return (
        (lambda: kv.init("w", first.pop()), 1),
        (lambda: kv.push("w", values.pop(0)), 3),
        (lambda: kv.push("w", values.pop(0)), 4),
        (lambda: kv.pull("w", out=outs.pop()), 4),
        (lambda: kv.pull("w", out=np.zeros(N, np.float32)), 4),
        (lambda: kv.pushpull("w", values.pop(0), out=outs.pop()), 6),
    )


class Failure:
    """The n-th of these calls of the runtime, in what is done with it, fails."""

    def __init__(self, name, n):
        self.name, self.left = name, n

    def during(self, call):
        """The error's sentence, "" without one, and whether the failure was in this."""
        before, told = cuda.emu.counter(self.name), ""
        if self.left > 0:
            cuda.emu.fail_call(self.name, self.left, REFUSED_BY_RUNTIME)
        try:
            call()
        except (kvstore.DeviceError, kvstore.KeyNotFoundError, MemoryError) as error:
            told = str(error)
        cuda.emu.fail_call(self.name, NEVER, REFUSED_BY_RUNTIME)
        armed, self.left = self.left > 0, self.left - (cuda.emu.counter(self.name) - before)
        return told, armed and self.left <= 0


@pytest.mark.emulated
@pytest.mark.parametrize("name", CALLS)
def test_each_call_of_the_runtime_may_fail_once(name):
    """Nothing crashes or hangs; a call that fails has changed nothing or done its work, and what
    it was given may be freed."""
    for n in range(1, 1000, CALLS[name]):
        kv = kvstore.create("device")
        failure, value = Failure(name, n), None
        for call, due in calls_of(kv):
            told, here = failure.during(call)
            del call
            rubbish = [full(1000, d) for d in range(cuda.num_devices) for _ in range(3)]
            assert here or not told or value is None, told
            if told and "w" in kv:
                got = kv.pull("w").asnumpy().tolist()
                assert got in ([value] * N, [due] * N), (n, got, told)
                value = got[0]
            elif not told:
                value = due
            assert all((tensor.numpy() == 1000).all() for tensor in rubbish), (n, told)
            del rubbish
        if value is not None:
            assert kv.pull("w").asnumpy().tolist() == [value] * N
        failure.during(kv.close)
        kvstore.wait_all()
        if failure.left > 0:
            break
    else:
        raise AssertionError(f"{name} was called a thousand times")
