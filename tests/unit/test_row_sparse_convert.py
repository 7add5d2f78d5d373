"""RowSparse from and to dense arrays and the sparse arrays of SciPy and PyTorch."""

import builtins
import sys

import ml_dtypes
import numpy as np
import pytest
from helpers import assert_clean, has_rows, run_script, same, sparse

import kvstore
from kvstore import RowSparse

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
DTYPES = ["float64", "float32", "float16", "bfloat16", "int8", "uint8", "int32", "int64"]
SHAPES = [(9,), (9, 3), (9, 2, 2), (9, 0), (9, 0, 3)]
SHAPE = (6, 2)
BAD, TYPE = kvstore.InvalidArgumentError, kvstore.ArrayTypeError


def numpy_dtype(name):
    return BFLOAT16 if name == "bfloat16" else np.dtype(name)


def numbers(shape, dtype):
    """No row of it is zero."""
    count = np.arange(np.prod(shape, dtype=int)).reshape(shape)
    return (count % 100 + 1).astype(numpy_dtype(dtype))


def dense(data, indices, shape):
    whole = np.zeros(shape, np.asarray(data).dtype)
    whole[indices] = data
    return whole


def ones(*ids):
    return sparse(dict.fromkeys(ids, 1))


# ----------------------------------------------------------------------------- made of others


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_from_dense_keeps_the_rows_with_a_non_zero(shape, dtype):
    whole = dense(numbers((2, *shape[1:]), dtype), [3, 7], shape)
    x = RowSparse.from_dense(whole)
    assert x.indices.tolist() == ([3, 7] if 0 not in shape else [])
    assert same(x.asnumpy(), whole)
    assert same(RowSparse.from_dense(kvstore.array(whole)).asnumpy(), whole)
    assert same(RowSparse.from_dense(np.asfortranarray(whole)[::-1]).asnumpy(), whole[::-1])


def test_a_nan_is_not_zero_and_minus_zero_is():
    x = RowSparse.from_dense(np.array([[0, np.nan], [-0.0, 0], [0, -np.inf], [0, 5e-324]]))
    assert x.indices.tolist() == [0, 2, 3]


def test_from_dense_of_a_row_sparse_array_is_a_copy():
    x = sparse({1: 0, 2: 3})
    y = RowSparse.from_dense(x)
    assert has_rows(y, {1: 0, 2: 3}) and not np.shares_memory(x.data, y.data)


def test_a_dense_ndarray_is_made_of_one():
    a = kvstore.array(sparse({1: 2}))
    assert isinstance(a, kvstore.NDArray)
    assert same(a, dense(np.full((1, 2), 2.0), [1], SHAPE))
    assert kvstore.array(sparse({1: 2}), "int8").asnumpy()[1].tolist() == [2, 2]


def test_zeros_have_no_rows():
    x = RowSparse.zeros((3, 2))
    assert (x.dtype, x.num_rows, x.nbytes, x.size) == (np.float32, 0, 0, 6)
    assert same(x.asnumpy(), np.zeros((3, 2), np.float32))
    assert RowSparse.zeros(3, dtype="int64").shape == (3,)
    assert RowSparse.zeros([3, 2], None).dtype == np.float32
    assert RowSparse.zeros((2**50, 2**10)).size == 2**60
    assert RowSparse.zeros((10**12, 0)).asnumpy().shape == (10**12, 0)


def test_a_copy_is_of_its_own():
    x = ones(0, 3)
    y = x.copy()
    y.data[:] = 5
    assert has_rows(x, {0: 1, 3: 1}) and has_rows(y, {0: 5, 3: 5})
    assert RowSparse.zeros((3, 2)).copy().num_rows == 0


def test_a_dense_array_too_large_for_memory_is_an_error():
    with pytest.raises(MemoryError):
        RowSparse.zeros((2**50, 2**8)).asnumpy()


def test_the_array_protocols_keywords():
    x = sparse({1: 2.5})
    assert same(x.__array__(), x.asnumpy())
    assert same(np.array(x, "float32"), x.asnumpy().astype("float32"))
    assert same(x.__array__("int8", True), x.asnumpy().astype("int8"))
    assert same(np.asarray(sparse({1: 2}, dtype=BFLOAT16), "float32")[1], np.full(2, 2, "float32"))
    for dtype in (None, "float64", "int8"):
        with pytest.raises(ValueError, match="copy"):
            x.__array__(dtype, copy=False)
    with pytest.raises(TypeError):
        x.__array__("no type")
    assert np.sum(x) == 5 and np.add(x, 1)[0].tolist() == [1, 1]


# --------------------------------------------------------------------------------- other libraries


@pytest.fixture(scope="module")
def scipy_sparse():
    return pytest.importorskip("scipy.sparse", reason="SciPy is not installed")


@pytest.fixture(scope="module")
def torch():
    """Not imported before the first of these tests: with it collecting garbage takes long."""
    return pytest.importorskip("torch", reason="PyTorch is not installed")


@pytest.mark.parametrize("form", ["csr", "csc", "coo", "lil", "dok", "bsr"])
@pytest.mark.parametrize("kind", ["array", "matrix"])
def test_from_scipy(scipy_sparse, form, kind):
    whole = dense(numbers((2, 3), "float32"), [1, 4], (6, 3))
    whole[1, 1] = 0
    x = RowSparse.from_scipy(getattr(scipy_sparse, f"{form}_{kind}")(whole))
    assert x.indices.tolist() == [1, 4] and same(x.asnumpy(), whole)


def test_what_stands_twice_in_a_scipy_matrix_is_summed_and_stored_zeros_are_rows(scipy_sparse):
    matrix = scipy_sparse.coo_array(
        (np.array([1.0, 2.0, 0.0]), ([4, 4, 2], [1, 1, 0])), shape=(6, 2)
    )
    x = RowSparse.from_scipy(matrix)
    assert has_rows(x, {2: 0, 4: [0, 3]})


@pytest.mark.parametrize("dtype", ["float64", "float32", "int8", "uint8", "int32", "int64"])
def test_toscipy(scipy_sparse, dtype):
    x = RowSparse(np.array([[1, 0, 2], [0, 0, 0], [0, 3, 0]], dtype), [0, 2, 5], (6, 3))
    matrix = x.toscipy()
    assert isinstance(matrix, scipy_sparse.csr_array)
    assert (matrix.shape, matrix.nnz, matrix.dtype) == ((6, 3), 3, np.dtype(dtype))
    assert matrix.has_canonical_format and same(matrix.toarray(), x.asnumpy())
    assert RowSparse.from_scipy(matrix).indices.tolist() == [0, 5]
    matrix.data[:] = 9
    assert x.data.max() == 3


def test_what_scipy_has_not_is_refused(scipy_sparse):
    with pytest.raises(BAD, match="two dimensions"):
        RowSparse.zeros((3, 2, 2)).toscipy()
    with pytest.raises(BAD, match="two dimensions"):
        RowSparse.zeros(3).toscipy()
    for dtype in ("float16", "bfloat16"):
        with pytest.raises(TYPE, match=dtype):
            RowSparse(np.ones((1, 2), numpy_dtype(dtype)), [1], (3, 2)).toscipy()
    for wrong in (np.ones((3, 2)), None, [[1]]):
        with pytest.raises(TYPE, match="SciPy"):
            RowSparse.from_scipy(wrong)
    with pytest.raises(TYPE, match="int16"):
        RowSparse.from_scipy(scipy_sparse.csr_array(np.ones((3, 2), np.int16)))
    with pytest.raises(BAD, match="dimension"):
        RowSparse.from_scipy(scipy_sparse.coo_array(np.ones(3)))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(9,), (9, 3), (9, 2, 2)])
def test_to_torch_and_back(torch, dtype, shape):
    x = RowSparse(numbers((2, *shape[1:]), dtype), [3, 7], shape)
    tensor = x.to_torch()
    assert tensor.layout == torch.sparse_coo and tensor.is_coalesced()
    assert (tensor.sparse_dim(), tuple(tensor.shape)) == (1, shape)
    assert tensor.dtype == getattr(torch, dtype)
    assert tensor.to_dense().tolist() == x.asnumpy().tolist()
    back = RowSparse.from_torch(tensor)
    assert same(back.data, x.data) and same(back.indices, x.indices)
    tensor.coalesce().values()[:] = 0
    assert x.data.min() > 0


def test_a_torch_tensor_with_several_sparse_dimensions(torch):
    whole = torch.tensor([[[0, 0], [1, 2]], [[0, 0], [0, 0]], [[3, 0], [0, 4]]])
    for sparse_dim in (1, 2, 3):
        x = RowSparse.from_torch(whole.to_sparse(sparse_dim))
        assert x.indices.tolist() == [0, 2] and same(x.asnumpy(), whole.numpy())


@pytest.mark.filterwarnings("ignore:Sparse:UserWarning")  # torch's own, of its beta state
def test_what_stands_twice_in_a_torch_tensor_is_summed(torch):
    ids, values = [[4, 1, 4]], [[1.0], [2.0], [3.0]]
    tensor = torch.sparse_coo_tensor(ids, values, (6, 1), check_invariants=True)
    assert has_rows(RowSparse.from_torch(tensor), {1: 2, 4: 4})


def test_a_torch_tensor_with_rows_out_of_range_is_refused(torch):
    for ids in ([[6]], [[-1]], [[2, 1]]):
        values = torch.ones((len(ids[0]), 2))
        tensor = torch.sparse_coo_tensor(
            ids, values, SHAPE, is_coalesced=True, check_invariants=False
        )
        with pytest.raises(BAD, match="row id"):
            RowSparse.from_torch(tensor)


def test_the_gradient_of_an_embedding_becomes_rows(torch):
    weight = torch.nn.Embedding(10, 2, sparse=True)
    weight(torch.tensor([[7, 3], [3, 3]])).sum().backward()
    assert has_rows(RowSparse.from_torch(weight.weight.grad), {3: 3, 7: 1})
    tensor = torch.ones((6, 2), requires_grad=True).to_sparse()
    assert RowSparse.from_torch(tensor).num_rows == 6


def test_empty_tensors(torch):
    x = RowSparse.from_torch(RowSparse.zeros((4, 3)).to_torch())
    assert (x.num_rows, x.shape, x.dtype) == (0, (4, 3), np.float32)


@pytest.mark.filterwarnings("ignore:Sparse:UserWarning")  # torch's own, of its beta state
@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta state")
def test_what_torch_has_not_is_refused(torch):
    for wrong in (torch.ones(3), np.ones(3), None, torch.ones((3, 3)).to_sparse_csr()):
        with pytest.raises(TYPE, match="sparse_coo"):
            RowSparse.from_torch(wrong)
    with pytest.raises(TYPE, match="complex64"):
        RowSparse.from_torch(torch.ones(3, dtype=torch.complex64).to_sparse())
    with pytest.raises(BAD, match="dimension"):
        RowSparse.from_torch(torch.tensor(1.0).to_sparse())


def test_tensors_are_data_and_indices(torch):
    data, ids = torch.ones((2, 2)), torch.tensor([0, 3])
    x = RowSparse(data, ids, SHAPE, copy=False)
    data[1] = 7
    assert has_rows(x, {0: 1, 3: 7})
    for kind in (torch.int16, torch.int32, torch.uint8):
        assert has_rows(RowSparse(data, ids.to(kind), SHAPE), {0: 1, 3: 7})
    assert has_rows(RowSparse(torch.ones((2, 2)).t(), ids, SHAPE), {0: 1, 3: 1})
    with pytest.raises(TYPE, match="float32"):
        RowSparse(data, ids.to(torch.float32), SHAPE)


@pytest.mark.parametrize(
    "package, call",
    [
        ("scipy", lambda: RowSparse.from_scipy(None)),
        ("scipy", lambda: RowSparse.zeros((2, 2)).toscipy()),
        ("torch", lambda: RowSparse.from_torch(None)),
        ("torch", lambda: RowSparse.zeros((2, 2)).to_torch()),
    ],
)
def test_without_the_package_the_error_names_it(monkeypatch, package, call):
    real = builtins.__import__

    def missing(name, *args, **options):
        if name.partition(".")[0] == package:
            raise ImportError(name)
        return real(name, *args, **options)

    for name in list(sys.modules):
        if name.partition(".")[0] == package:
            monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.setitem(sys.modules, f"{package}.sparse", None)
    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(kvstore.NotBuiltError, match=f"pip install {package}"):
        call()


def test_bfloat16_without_ml_dtypes():
    assert_clean(
        run_script(
            """
import sys
sys.modules["ml_dtypes"] = None
import numpy as np, kvstore
x = kvstore.RowSparse(kvstore.ones((1, 2), "bfloat16"), [1], (3, 2))
assert x.dtype == "bfloat16" and x.num_rows == 1 and x.indices.tolist() == [1]
assert "indices=[1]" in repr(x) and "ml_dtypes" in repr(x)
for call in (lambda: x.data, x.asnumpy):
    try:
        call()
    except kvstore.NotBuiltError as error:
        assert "ml_dtypes" in str(error)
    else:
        raise AssertionError(call)
assert x.copy().num_rows == 1
"""
        )
    )
