"""A key-value store for the parameters of machine learning.

``kv = kvstore.create()`` makes a store; ``kv.init`` gives a key its first value, ``kv.push`` sums
values and updates the key, ``kv.pull`` copies it out.
"""

import importlib
from typing import TYPE_CHECKING, Any

from . import errors
from .errors import (
    ArrayTypeError,
    ClosedError,
    DeviceError,
    InvalidArgumentError,
    KeyNotFoundError,
    KVStoreError,
    NotBuiltError,
    PeerLostError,
    TimeoutError,
)

try:
    from ._core import (
        Handle,
        KVStore,
        NDArray,
        RowSparse,
        array,
        empty,
        full,
        ones,
        wait_all,
        zeros,
    )
except ImportError as error:
    from ._about import why_no_core

    raise ImportError(why_no_core(error), name=error.name, path=error.path) from error

from .base import KVStoreBase, create

if TYPE_CHECKING:
    from . import cluster, compression, lr_scheduler, optimizer
    from .cluster.local_cluster import LocalCluster
    from .server import KVStoreServer, serve

__version__ = "0.1.0"

register = KVStoreBase.register

__all__ = [
    "ArrayTypeError",
    "ClosedError",
    "DeviceError",
    "Handle",
    "InvalidArgumentError",
    "KVStore",
    "KVStoreBase",
    "KVStoreError",
    "KVStoreServer",
    "KeyNotFoundError",
    "LocalCluster",
    "NDArray",
    "NotBuiltError",
    "PeerLostError",
    "RowSparse",
    "TimeoutError",
    "__version__",
    "array",
    "cluster",
    "compression",
    "create",
    "empty",
    "errors",
    "full",
    "lr_scheduler",
    "ones",
    "optimizer",
    "register",
    "serve",
    "wait_all",
    "zeros",
]


def __getattr__(name: str) -> Any:
    # Loaded when asked for: an import costs no more than what is used of it, and
    # `python -m kvstore.server` must find its module not yet imported.
    if name in ("cluster", "compression", "lr_scheduler", "optimizer"):
        return importlib.import_module(f".{name}", __name__)
    if name == "LocalCluster":
        return importlib.import_module(".cluster.local_cluster", __name__).LocalCluster
    if name in ("KVStoreServer", "serve"):
        from . import server

        return getattr(server, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
