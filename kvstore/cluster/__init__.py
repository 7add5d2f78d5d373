"""Clusters: the scheduler, a node's place in it, and the processes of one machine.

Nothing is loaded before it is asked for: a store of one process pays nothing for this.
"""

import importlib
from typing import Any

_WHERE = {
    "LocalCluster": "local_cluster",
    "Member": "member",
    "RayCluster": "ray_cluster",
    "Scheduler": "scheduler",
}

__all__ = ["LocalCluster", "Member", "RayCluster", "Scheduler"]


def __getattr__(name: str) -> Any:
    if name in _WHERE:
        return getattr(importlib.import_module(f".{_WHERE[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
