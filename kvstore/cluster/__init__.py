"""Clusters: the scheduler, a node's place in it, and the processes of one machine.

Nothing is loaded before it is asked for: a store of one process pays nothing for this.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .companions import from_environment
    from .local_cluster import LocalCluster
    from .member import Member
    from .scheduler import Scheduler

_WHERE = {
    "LocalCluster": "local_cluster",
    "Member": "member",
    "Scheduler": "scheduler",
    "from_environment": "companions",
}

__all__ = ["LocalCluster", "Member", "Scheduler", "from_environment"]


def __getattr__(name: str) -> Any:
    if name in _WHERE:
        return getattr(importlib.import_module(f".{_WHERE[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
