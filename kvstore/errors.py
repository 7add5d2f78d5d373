"""The exceptions of the package: each is a KVStoreError and the built-in a Python user would catch.

The C core takes its classes from here, so nothing in this file may import the core.
"""

import builtins

__all__ = [
    "ArrayTypeError",
    "ClosedError",
    "DeviceError",
    "InvalidArgumentError",
    "KVStoreError",
    "KeyNotFoundError",
    "NotBuiltError",
    "PeerLostError",
    "TimeoutError",
]


class KVStoreError(Exception):
    """Anything that a store, its arrays or its cluster report."""


class KeyNotFoundError(KVStoreError, KeyError):
    """A key that was not initialised."""

    __str__ = Exception.__str__  # KeyError's would put the sentence in quotes.


class InvalidArgumentError(KVStoreError, ValueError):
    """A shape, length, number, name or option that does not fit; a second ``init`` of a key."""


class ArrayTypeError(KVStoreError, TypeError):
    """Not an array, or an element type, byte order or key type that does not fit."""


class TimeoutError(KVStoreError, builtins.TimeoutError):
    """A deadline has passed."""


class PeerLostError(KVStoreError, ConnectionError):
    """A node of the cluster is gone."""


class NotBuiltError(KVStoreError, ImportError):
    """A kind, a device or a library that this build or this machine lacks."""


class DeviceError(KVStoreError, RuntimeError):
    """No such device, a device that failed, or one that is out of memory."""


class ClosedError(KVStoreError, RuntimeError):
    """A store that was closed, or one that belongs to the parent of a forked process."""
