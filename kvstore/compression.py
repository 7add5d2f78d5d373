"""Gradient compression: the codecs of ``set_gradient_compression`` as functions.

A gradient is sent as one or two bits an element. What the code leaves out is not lost: it stays in
a residual, an array of the sender's, and is added to the next gradient (error feedback).

``'2bit'`` sends ``threshold``, ``-threshold`` or 0, whichever the sum of residual and gradient has
reached, as the scheme of that name in the documentation of Apache MXNet does. ``'1bit'`` sends 1
where the sum is above the threshold and -1 elsewhere, after F. Seide, H. Fu, J. Droppo, G. Li and
D. Yu, "1-Bit Stochastic Gradient Descent and its Application to Data-Parallel Distributed Training
of Speech DNNs", Interspeech 2014.
"""

import difflib
from collections.abc import Mapping
from numbers import Real
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from . import _core
from .errors import ArrayTypeError, InvalidArgumentError

if TYPE_CHECKING:
    from ._core import _Array, _DType, _Shape

__all__ = ["decode", "encode"]

_TYPES = ("none", "2bit", "1bit")
_KEYS = ("type", "threshold")
_THRESHOLD = 0.5


def encode(
    gradient: "_Array", residual: "_Array", params: Mapping[str, Any]
) -> npt.NDArray[np.uint8]:
    """Compress a gradient; what the codes leave out stays in ``residual``.

    Parameters
    ----------
    gradient : array
        Of type float64, float32, float16 or bfloat16; any shape. Not changed. A CUDA array is
        copied to the host.
    residual : array
        Of the gradient's shape, float32 (for a float64 gradient float64), writable, in host memory;
        it starts as zeros and is updated in place. It shares no memory with the gradient.
    params : dict
        ``type``: ``'2bit'`` or ``'1bit'``; ``threshold``: a number, 0.5 if it is not given. It is
        rounded to float32, except for a float64 gradient.

    Returns
    -------
    numpy.ndarray
        One-dimensional, uint8. Four (1bit: eight) elements a byte in the order of the flattened
        gradient, the first in the highest bits; filled up with zeros to a multiple of 4 bytes.

    Raises
    ------
    InvalidArgumentError
        For unknown parameters, a threshold out of range, shapes that differ, a residual that is
        read-only or shares memory with the gradient. Nothing has been changed.
    ArrayTypeError
        For element types that do not fit, or what is no array.

    Notes
    -----
    With ``s = residual + gradient``, '2bit' has the code 11 and leaves ``s - threshold`` if ``s >=
    threshold``, 10 and ``s + threshold`` if ``s <= -threshold``, else 00 and ``s``; '1bit' has 1
    and ``s - 1`` if ``s > threshold``, else 0 and ``s + 1``. An infinity stays in the residual and
    is sent at every step; a NaN stays too, as code 0.

    Examples
    --------
    >>> import numpy as np
    >>> gradient = np.array([0.75, -0.625, 0.25, 0.0], 'float32')
    >>> residual = np.zeros(4, 'float32')
    >>> codes = kvstore.compression.encode(gradient, residual, {'type': '2bit'})
    >>> codes
    array([224,   0,   0,   0], dtype=uint8)
    >>> kvstore.compression.decode(codes, 4, {'type': '2bit'})
    array([ 0.5, -0.5,  0. ,  0. ], dtype=float32)
    >>> residual
    array([ 0.25 , -0.125,  0.25 ,  0.   ], dtype=float32)
    """
    return _core.compression_encode(gradient, residual, *_parse_coding(params))


def decode(
    codes: "_Array", shape: "_Shape", params: Mapping[str, Any], dtype: "_DType" = "float32"
) -> np.ndarray[Any, Any]:
    """Make an array of codes again.

    Parameters
    ----------
    codes : array
        What `encode` returned: one-dimensional, uint8.
    shape : int or tuple of int
        The gradient's.
    params : dict
        As given to `encode`.
    dtype : dtype-like, optional
        float64, float32, float16 or bfloat16. Only for float64 is the threshold not rounded to
        float32.

    Returns
    -------
    numpy.ndarray
        A new array; a bfloat16 one needs the package ml_dtypes.

    Raises
    ------
    InvalidArgumentError
        For unknown parameters, a threshold out of range, or codes that are too few or too many.
    ArrayTypeError
        For codes that are not uint8, or an element type that does not fit.

    Examples
    --------
    >>> import numpy as np
    >>> codes = np.array([0b11100000, 0, 0, 0], 'uint8')
    >>> kvstore.compression.decode(codes, (2, 2), {'type': '2bit', 'threshold': 2.0})
    array([[ 2., -2.],
           [ 0.,  0.]], dtype=float32)
    """
    return _core.compression_decode(codes, shape, dtype, *_parse_coding(params))


def _parse(params: Mapping[str, Any]) -> tuple[str, float]:
    """Type and threshold of compression parameters, checked; ``('none', 0.0)`` for none."""
    if not isinstance(params, Mapping):
        raise ArrayTypeError(
            f"compression parameters are a dict such as {{'type': '2bit', 'threshold': 0.5}}, "
            f"not {type(params).__name__}"
        )
    for key in params:
        if key not in _KEYS:
            raise InvalidArgumentError(
                f"there is no compression parameter {key!r}{_nearest(key, _KEYS)} "
                f"(parameters: {', '.join(_KEYS)})"
            )
    if "type" not in params:
        raise InvalidArgumentError(
            f"compression parameters must have a type (types: {', '.join(_TYPES)})"
        )
    kind = params["type"]
    if not isinstance(kind, str):
        raise ArrayTypeError(f"the type of a compression is a str, not {type(kind).__name__}")
    if kind not in _TYPES:
        raise InvalidArgumentError(
            f"there is no compression of type {kind!r}{_nearest(kind, _TYPES)} "
            f"(types: {', '.join(_TYPES)})"
        )
    threshold = _number(params.get("threshold", _THRESHOLD))
    if kind == "none":
        return "none", 0.0
    _core.compression_check(kind, threshold)
    return str(kind), threshold


def _parse_coding(params: Mapping[str, Any]) -> tuple[str, float]:
    kind, threshold = _parse(params)
    if kind == "none":
        raise InvalidArgumentError("compression of type 'none' has no codes: give 2bit or 1bit")
    return kind, threshold


def _number(threshold: Any) -> float:
    if isinstance(threshold, bool) or not isinstance(threshold, Real):
        raise ArrayTypeError(
            f"the threshold of a compression is a number, not {threshold!r:.100} "
            f"of type {type(threshold).__name__}"
        )
    try:
        return float(threshold)
    except OverflowError as error:
        raise InvalidArgumentError(
            "the threshold of a compression must be finite, and is too large for a float"
        ) from error


def _nearest(name: Any, known: tuple[str, ...]) -> str:
    near = difflib.get_close_matches(name.lower(), known, 1, 0.5) if isinstance(name, str) else []
    return f"; did you mean {near[0]!r}?" if near else ""
