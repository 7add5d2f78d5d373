"""The file of training states: safetensors, written whole or not at all, read without trust.

Tensors are named ``<key>/<slot>``; a slot has no slash, so the last one divides. Compression
residuals are slots ``residual.<position>``. Everything else is JSON in the metadata entry
``kvstore``, where the keys stand with their type, so that 3 and '3' stay apart.
"""

import errno
import json
import os
import re
import secrets
import stat
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib import import_module
from typing import Any, NoReturn

import numpy as np

from .errors import ArrayTypeError, InvalidArgumentError, NotBuiltError

_VERSION = 1
_ENTRY = "kvstore"
_NUMBERS = ("num_update", "nadam_product", "last_rate", "seed", "draws")
_RESIDUAL = re.compile(r"residual\.(0|[1-9][0-9]{0,4})", re.ASCII)


def _package() -> Any:
    try:
        return import_module("safetensors.numpy")
    except ImportError as error:
        raise NotBuiltError(
            "state files need the safetensors package: pip install 'mlkvstore[state]'"
        ) from error


def _path(fname: Any) -> str:
    """The file itself, where `fname` is a link to it."""
    try:
        return os.path.realpath(os.fsdecode(fname))
    except TypeError:
        raise ArrayTypeError(f"fname is a path, not {fname!r}") from None
    except ValueError as error:
        raise InvalidArgumentError(f"fname={fname!r}: {error}") from None


# ------------------------------------------------------------------------------------ writing


def write(fname: Any, states: dict[str, Any], optimizer: dict[str, Any]) -> None:
    """Write what ``kv._states_export()`` gave, and a description of the optimizer."""
    path, package = _path(fname), _package()
    tensors = {
        f"{key}/{name}": a for key, _, _, slots in states["keys"] for name, a in slots.items()
    }
    keys = [[key, count, stype] for key, count, stype, _ in states["keys"]]
    listed = {key for key, _, _ in keys}
    for key, position, array in states["residuals"]:
        tensors[f"{key}/residual.{position}"] = array
        if key not in listed:
            keys.append([key, None, "default"])
            listed.add(key)
    about = {
        "version": _VERSION,
        "key_type": type(keys[0][0]).__name__ if keys else None,
        "keys": keys,
        "compression": states["compression"],
        "optimizer": optimizer,
        **{name: states[name] for name in _NUMBERS},
    }
    try:
        text = json.dumps(about, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise InvalidArgumentError(f"the optimizer cannot be written as JSON: {error}") from error
    # The package writes memory as it lies, whatever the strides.
    tensors = {name: np.asarray(array, order="C") for name, array in tensors.items()}
    _write_whole(path, package.save(tensors, {_ENTRY: text}))


def _write_whole(path: str, data: bytes) -> None:
    """Under another name first, so that `path` is always the old file or the new one."""
    if os.path.isdir(path):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), path)
    if os.path.exists(path) and not os.path.isfile(path):
        # The name would no longer stand for the device, or the pipe, that it stands for.
        raise OSError(errno.EINVAL, "not a regular file", path)
    folder = os.path.dirname(path)
    temporary = os.path.join(folder, f".kvstore-{secrets.token_hex(8)}.tmp")
    handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
    try:
        with open(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(handle)
        os.replace(temporary, path)
    except BaseException:
        with suppress(OSError):
            os.unlink(temporary)
        raise
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


# ------------------------------------------------------------------------------------ reading


@contextmanager
def naming(fname: Any) -> Iterator[None]:
    """What is wrong inside is wrong with the file."""
    try:
        yield
    except InvalidArgumentError as error:
        raise InvalidArgumentError(f"{os.fsdecode(fname)}: {error}") from error


def read(fname: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """What was given to `write`; InvalidArgumentError names the file and what is wrong with it."""
    path, package = _path(fname), _package()
    data = _read_whole(path)
    with naming(fname):
        try:
            tensors = package.load(data)
            length = int.from_bytes(data[:8], "little")
            about = json.loads(json.loads(data[8 : 8 + length])["__metadata__"][_ENTRY])
        except (KeyError, TypeError) as error:
            raise InvalidArgumentError(f"not a file of training states: {error!r}") from error
        except (ValueError, RecursionError, import_module("safetensors").SafetensorError) as error:
            raise InvalidArgumentError(f"not a file of training states: {error}") from error
        return _states(about, tensors)


def _read_whole(path: str) -> bytes:
    """Into memory: a mapped file that somebody cuts short would kill the process."""
    handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    with open(handle, "rb") as file:
        if not stat.S_ISREG(os.fstat(handle).st_mode):
            raise InvalidArgumentError(f"{path}: not a regular file")
        return file.read()


def _wrong(what: str, value: Any) -> NoReturn:
    shown = repr(value)
    raise InvalidArgumentError(f"{what}: {shown if len(shown) < 80 else shown[:77] + '...'}")


def _integer(about: dict[str, Any], name: str, bits: int) -> int:
    value = about.get(name)
    if type(value) is not int or not 0 <= value < 2**bits:
        _wrong(f"{name} is no number from 0 to 2^{bits}-1", value)
    return value


def _finite(about: dict[str, Any], name: str) -> float:
    value: Any = about.get(name)
    if type(value) not in (int, float) or not abs(value) <= sys.float_info.max:
        _wrong(f"{name} is no finite number", value)
    return float(value)


def _states(about: Any, tensors: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    if not isinstance(about, dict):
        _wrong("its metadata is no dict", about)
    if about.get("version") != _VERSION:
        _wrong(f"this package reads version {_VERSION}, not", about.get("version"))
    optimizer = about.get("optimizer")
    if not isinstance(optimizer, dict):
        _wrong("its optimizer is no dict", optimizer)
    counts = _keys(about)
    slots: dict[Any, dict[str, Any]] = {key: {} for key in counts}
    residuals = []
    by_text = {str(key): key for key in counts}
    for name, array in tensors.items():
        text, slash, slot = name.rpartition("/")
        if not slash or text not in by_text:
            _wrong("a tensor of none of its keys", name)
        key = by_text[text]
        if matched := _RESIDUAL.fullmatch(slot):
            residuals.append((key, int(matched[1]), array))
        elif counts[key][0] is None:
            _wrong("a state of a key without a count", name)
        else:
            slots[key][slot] = array
    states = {
        "num_update": _integer(about, "num_update", 63),
        "nadam_product": _finite(about, "nadam_product"),
        "last_rate": None if about.get("last_rate") is None else _finite(about, "last_rate"),
        "seed": _integer(about, "seed", 64),
        "draws": _integer(about, "draws", 64),
        "keys": [
            (key, count, stype, slots[key])
            for key, (count, stype) in counts.items()
            if count is not None
        ],
        "residuals": sorted(residuals, key=lambda entry: entry[1]),
        "compression": _compression(about.get("compression"), residuals),
    }
    return states, optimizer


def _keys(about: dict[str, Any]) -> dict[Any, tuple[int | None, str]]:
    """key → (count, form); the count is None for a key with nothing but residuals."""
    listed, key_type = about.get("keys"), about.get("key_type")
    if not isinstance(listed, list):
        _wrong("its keys are no list", listed)
    counts: dict[Any, tuple[int | None, str]] = {}
    for entry in listed:
        if not isinstance(entry, list) or len(entry) != 3:
            _wrong("a key is not listed with count and form", entry)
        key, count, stype = entry
        good = key_type == "int" and type(key) is int and -(2**63) <= key < 2**63
        if not good and not (key_type == "str" and isinstance(key, str) and key):
            _wrong(f"not a key of the type {key_type!r}", key)
        if key in counts:
            _wrong("a key stands there twice", key)
        if count is not None and not (type(count) is int and 0 <= count < 2**63):
            _wrong(f"not a count of pushes of key {key!r}", count)
        if stype not in ("default", "row_sparse"):
            _wrong(f"not a form of key {key!r}", stype)
        counts[key] = (count, stype)
    return counts


def _compression(given: Any, residuals: list[Any]) -> dict[str, Any] | None:
    if given is None:
        if residuals:
            _wrong("residuals without compression", [key for key, _, _ in residuals])
        return None
    if not isinstance(given, dict) or given.get("type") not in ("1bit", "2bit"):
        _wrong("an unknown compression", given)
    return {"type": given["type"], "threshold": _finite(given, "threshold")}
