"""RowSparse from and to the sparse arrays of SciPy and PyTorch."""

from importlib import import_module
from typing import Any

import numpy as np

from ._core import RowSparse
from .errors import ArrayTypeError, InvalidArgumentError, NotBuiltError


def _package(module: str, name: str, install: str) -> Any:
    try:
        return import_module(module)
    except ImportError as error:
        raise NotBuiltError(f"this needs {name}: pip install {install}") from error


def from_scipy(matrix: Any) -> RowSparse:
    sparse = _package("scipy.sparse", "SciPy", "scipy")
    if not sparse.issparse(matrix):
        raise ArrayTypeError(
            f"from_scipy takes a sparse matrix or array of SciPy, not {type(matrix).__name__}"
        )
    if matrix.ndim != 2:
        raise InvalidArgumentError(f"from_scipy takes two dimensions, not {matrix.ndim}")
    rows = matrix.tocsr()
    ids = np.flatnonzero(np.diff(rows.indptr))
    return RowSparse(rows[ids].toarray(), ids, matrix.shape)


def toscipy(array: RowSparse) -> Any:
    sparse = _package("scipy.sparse", "SciPy", "scipy")
    if array.ndim != 2:
        raise InvalidArgumentError(f"SciPy's CSR has two dimensions, the array {array.ndim}")
    if str(array.dtype) in ("float16", "bfloat16"):  # it takes them, and then fails at every use
        raise ArrayTypeError(f"SciPy has no sparse arrays of {array.dtype}")
    array = array.copy()  # between two reads of the original a pull could replace its rows
    ids, data = array.indices, array.data
    at, columns = np.nonzero(data)
    ends = np.zeros(array.shape[0] + 1, np.int64)
    np.add.at(ends, ids[at] + 1, 1)
    return sparse.csr_array((data[at, columns], columns, ends.cumsum()), array.shape)


def from_torch(tensor: Any) -> RowSparse:
    torch = _package("torch", "PyTorch", "torch")
    if not isinstance(tensor, torch.Tensor) or tensor.layout != torch.sparse_coo:
        kind = getattr(tensor, "layout", type(tensor).__name__)
        raise ArrayTypeError(f"from_torch takes a tensor of layout torch.sparse_coo, not {kind}")
    if tensor.device.type != "cpu":
        raise ArrayTypeError(
            f"from_torch takes a tensor on the CPU, not on {tensor.device}: pass its .cpu()"
        )
    if tensor.sparse_dim() == 0:
        raise InvalidArgumentError("from_torch takes a tensor with a sparse dimension")
    tensor = tensor.detach().coalesce()
    places, values = tensor.indices(), tensor.values()
    ids, data = places[0], values
    if tensor.sparse_dim() > 1:
        ids, at = places[0].unique(return_inverse=True)
        data = values.new_zeros((len(ids), *tensor.shape[1:]))
        where = (at, *places[1:])
        data[where] = values
    return RowSparse(data, ids, tuple(tensor.shape))


def to_torch(array: RowSparse) -> Any:
    torch = _package("torch", "PyTorch", "torch")
    array = array.copy()
    ids, data = torch.tensor(array.indices), array.data
    if array.dtype == "bfloat16":
        values = torch.tensor(data.view(np.int16)).view(torch.bfloat16)
    else:
        values = torch.tensor(data)
    return torch.sparse_coo_tensor(
        ids[None], values, array.shape, is_coalesced=True, check_invariants=False
    )
