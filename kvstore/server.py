"""Being a server or the scheduler of a cluster: ``serve``, and MXNet's name for it.

``python -m kvstore.server`` is ``serve()`` from a shell.
"""

import os
import sys
from collections.abc import Callable
from typing import Any, NoReturn

from .base import KVStoreBase
from .errors import ArrayTypeError, InvalidArgumentError, KVStoreError, NotBuiltError

__all__ = ["KVStoreServer", "serve"]

ROLES = ("worker", "server", "scheduler")


def serve(controller: Callable[[int, Any], object] | None = None) -> NoReturn:
    """Be the server or scheduler that the environment names (``DMLC_ROLE``).

    ``controller(head, body)`` runs for each command that a worker sends.
    """
    if controller is not None and not callable(controller):
        raise ArrayTypeError(f"controller is a function of (head, body), not {controller!r}")
    role = os.environ.get("DMLC_ROLE", "")
    if not role:
        raise InvalidArgumentError(
            "there is no role to serve in: set DMLC_ROLE to server or scheduler"
        )
    if role not in ROLES:
        raise InvalidArgumentError(f"DMLC_ROLE={role!r}: a role is one of {', '.join(ROLES)}")
    if role == "worker":
        raise InvalidArgumentError(
            "DMLC_ROLE=worker: a worker does not serve, it calls kvstore.create('dist')"
        )
    raise NotBuiltError(
        f"DMLC_ROLE={role}: this version has no dist stores, so there is nothing to be a {role} of"
    )


class KVStoreServer:
    """MXNet's name for ``serve``: ``KVStoreServer(kv).run()``."""

    def __init__(self, kvstore: Any) -> None:
        if not isinstance(kvstore, KVStoreBase):
            raise ArrayTypeError(f"KVStoreServer takes a store, not a {type(kvstore).__name__}")
        self.kvstore: Any = kvstore

    def run(self) -> NoReturn:
        """Serve until the cluster ends."""
        kind = self.kvstore.type
        if not kind.startswith("dist"):
            raise InvalidArgumentError(
                f"a store of kind {kind!r} has no server: it keeps its values in this process"
            )
        serve()


if __name__ == "__main__":
    try:
        serve()
    except KVStoreError as error:
        sys.exit(f"kvstore.server: {error}")
