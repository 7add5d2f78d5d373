"""PyTorch's tensors, as it gives them: by its exchange table where it has one."""

import gc

import numpy
import pytest

import kvstore

DTYPES = ("float64", "float32", "float16", "bfloat16", "int8", "uint8", "int32", "int64")


@pytest.fixture
def kv():
    """One kind: what an array is does not depend on it."""
    with kvstore.create() as store:
        yield store


@pytest.fixture(scope="module")
def torch():
    """Not imported before the first of these tests: with it collecting garbage takes long."""
    return pytest.importorskip("torch", reason="PyTorch is not installed")


@pytest.fixture
def numbers(torch):
    return lambda: torch.arange(12, dtype=torch.float32).reshape(3, 4)


@pytest.mark.parametrize("dtype", DTYPES)
def test_element_types(kv, dtype, torch, numbers):
    a = numbers().to(getattr(torch, dtype))
    kv.init("w", a)
    out = torch.zeros_like(a)
    kv.pull("w", out=out)
    assert kv.dtype("w") == dtype and torch.equal(out, a)


FORMS = {
    "transposed": lambda a: a.t(),
    "part": lambda a: a[1:, 1:3],
    "every second": lambda a: a[:, ::2],
    "one column": lambda a: a[:, 1],
    "no dimensions": lambda a: a[1, 1],
    "no elements": lambda a: a[:0],
    "channels last": lambda a: a.reshape(1, 2, 2, 3).permute(0, 3, 1, 2),
}


@pytest.mark.parametrize("form", FORMS)
def test_forms_of_memory(kv, form, torch, numbers):
    base, other = numbers(), numbers()
    a, b = FORMS[form](base), FORMS[form](other)
    kv.init("w", a)
    assert kv.pull("w").asnumpy().tolist() == a.tolist()
    b.mul_(0)
    kv.pull("w", out=b)
    assert torch.equal(a, b) and torch.equal(base, other)


def test_an_expanded_tensor_is_a_value_but_no_out(kv, torch):
    a = torch.ones(1, 4).expand(3, 4)
    kv.init("w", a)
    with pytest.raises(kvstore.InvalidArgumentError):
        kv.pull("w", out=a)


def test_parameters_and_results_of_autograd(kv, torch, numbers):
    parameter = torch.nn.Parameter(numbers())
    kv.init("w", parameter)
    kv.push("w", parameter * 2)
    kv.pull("w", out=parameter)
    assert torch.equal(parameter.data, numbers() * 2) and parameter.requires_grad


def test_negated_views_are_resolved_or_refused(kv, torch, numbers):
    negated = torch.complex(numbers(), numbers() + 1).conj().imag
    assert negated.is_neg()
    kv.init("w", negated)
    assert kv.pull("w").asnumpy().tolist() == (-numbers() - 1).tolist()
    with pytest.raises(kvstore.ArrayTypeError, match="negative bit"):
        kv.pull("w", out=negated)


@pytest.mark.parametrize("dtype", ["bool", "complex64", "int16"])
def test_foreign_element_types_are_named(kv, dtype, torch):
    a = torch.zeros(3, dtype=getattr(torch, dtype))
    with pytest.raises(kvstore.ArrayTypeError, match=dtype):
        kv.init("w", a)
    if a.is_complex():
        with pytest.raises(kvstore.ArrayTypeError, match=dtype):
            kv.init("w", a.conj())


def test_tensors_without_memory_of_their_own_are_refused(kv, torch, numbers):
    fake = pytest.importorskip(
        "torch._subclasses.fake_tensor", reason="this PyTorch has no fake tensors"
    )
    with fake.FakeTensorMode():
        unreal = torch.ones(3)
    for a in (numbers().to_sparse(), numbers().to("meta"), unreal):
        with pytest.raises(kvstore.ArrayTypeError):
            kv.init("w", a)
    seen = []

    def inside(a):
        with pytest.raises(kvstore.ArrayTypeError):
            kv.init("w", a)
        seen.append(a)
        return a

    torch.func.vmap(inside)(numbers())
    assert seen


def test_new_storage_during_an_asynchronous_call(kv, torch, numbers):
    kv.init("w", numpy.zeros((3, 4), "float32"))
    a = numbers()
    handle = kv.push("w", a, async_op=True)
    a.data = torch.zeros(3, 4)
    gc.collect()
    handle.wait()
    assert kv.pull("w").asnumpy().tolist() == numbers().tolist()


def test_torch_shares_an_ndarrays_memory(torch):
    a = kvstore.zeros(3, "bfloat16")
    b = torch.from_dlpack(a)
    assert b.dtype == torch.bfloat16
    b += 2
    del b
    assert torch.from_dlpack(a).tolist() == [2, 2, 2]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_updater_gets_tensors_where_the_pushed_value_is_one(kv, dtype, torch):
    element = getattr(torch, dtype)
    kv.init("w", torch.zeros(3, dtype=element))
    seen = []

    def add(key, recv, stored):
        seen.append((type(recv), type(stored), recv.dtype, stored.dtype))
        stored.add_(recv)

    kv.set_updater(add)
    gradient = torch.ones(3, dtype=element)
    kv.push("w", [gradient, gradient])
    kv.push("w", gradient)
    assert seen == [(torch.Tensor, torch.Tensor, element, element)] * 2
    assert gradient.tolist() == [1, 1, 1]
    out = torch.zeros(3, dtype=element)
    kv.pull("w", out=out)
    assert out.tolist() == [3, 3, 3]
    kv.set_updater(None)


def test_an_updater_gets_what_each_push_is_of(kv, torch):
    kv.init("w", numpy.zeros(2))
    seen = []
    kv.set_updater(lambda key, recv, stored: seen.append((type(recv), type(stored))))
    kv.push("w", numpy.ones(2))
    kv.push("w", torch.ones(2, dtype=torch.float64))
    kv.push("w", kvstore.ones(2, "float64"))
    arrays, tensors = (numpy.ndarray,) * 2, (torch.Tensor,) * 2
    assert seen == [arrays, tensors, arrays]
    kv.set_updater(None)
