"""Being a server or the scheduler of a cluster: ``serve``, and MXNet's name for it.

``python -m kvstore.server`` is ``serve()`` from a shell.
"""

import argparse
import contextlib
import importlib
import os
import resource
import sys
import threading
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from .base import KVStoreBase
from .errors import ArrayTypeError, InvalidArgumentError, KVStoreError

if TYPE_CHECKING:
    from .cluster.entry import MakeCore
    from .cluster.settings import Settings

__all__ = ["KVStoreServer", "serve"]


def serve(
    controller: Callable[[int, Any], object] | None = None,
    allow_import: str | Sequence[str] | None = None,
) -> None:
    """Be the server or scheduler that the environment says, until the cluster ends.

    The role comes from ``KVSTORE_ROLE`` or ``DMLC_ROLE``; ``python -m kvstore`` lists the other
    settings. ``kvrun`` sets them all.

    Parameters
    ----------
    controller
        On a server, called with ``(head, body)`` for each command that a worker sends by
        ``send_command_to_servers``, in the thread that has called ``serve``. The worker's call
        raises what it raises.
    allow_import
        On a server, the module, or modules, that it may import optimizers of users from, with
        those below them; they run in the same thread. By default as ``KVSTORE_ALLOW_IMPORT``
        says, or none: what is imported can do whatever this process can.

    Raises
    ------
    InvalidArgumentError
        A setting is missing or wrong, or disagrees with the rest of the cluster.
    TimeoutError
        A server found no scheduler, or nodes of the cluster were missing.
    PeerLostError
        A node of the cluster was lost.
    """
    from . import _dist
    from .cluster import settings

    _dist.check_controller(controller)
    role = settings.serving_role()
    _serve(settings.read({"role": role, "allow_import": allow_import}), controller)


def _serve(
    settings: "Settings",
    controller: Callable[[int, Any], object] | None,
    make_core: "MakeCore | None" = None,
) -> None:
    from . import _dist
    from .cluster import control
    from .cluster.member import Member
    from .cluster.scheduler import Scheduler

    _end_with_parent()
    if settings.role == "scheduler":
        _allow_many_files()
        control.run(Scheduler(settings).run())
        return
    member = Member.join(settings, make_core=make_core)
    try:
        for command in member.commands():
            _dist.run_command(member, command, controller)
    except BaseException as error:
        member.fail(f"{type(error).__name__}: {error}")
        raise
    member.close()


def _allow_many_files() -> None:
    """Each node is an open file of the scheduler's; the usual limit is 1024."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def _end_with_parent() -> None:
    """End this process when the launcher that holds the other end of a pipe is gone."""
    descriptor = os.environ.get("KVSTORE_PARENT_FD", "")
    if not descriptor.isdigit():
        return

    def watch() -> None:
        with contextlib.suppress(OSError):
            while os.read(int(descriptor), 4096):
                pass
        os._exit(1)

    threading.Thread(target=watch, name="kvstore-parent", daemon=True).start()


class KVStoreServer:
    """MXNet's name for ``serve``: ``KVStoreServer(kv).run()``.

    Parameters
    ----------
    kvstore
        A store of a dist kind, made in a process whose role is server or scheduler.
    """

    def __init__(self, kvstore: Any) -> None:
        if not isinstance(kvstore, KVStoreBase):
            raise ArrayTypeError(f"KVStoreServer takes a store, not a {type(kvstore).__name__}")
        self.kvstore: Any = kvstore

    def run(self) -> None:
        """Serve until the cluster ends."""
        kind = self.kvstore.type
        if not kind.startswith("dist"):
            raise InvalidArgumentError(
                f"a store of kind {kind!r} has no server: it keeps its values in this process"
            )
        serve()


def _controller(text: str) -> Callable[[int, Any], object]:
    """The function that MODULE:FUNC names."""
    module, _, name = text.partition(":")
    if not module or not name:
        raise InvalidArgumentError(f"--controller {text}: it is MODULE:FUNC")
    try:
        found: Any = importlib.import_module(module)
        for part in name.split("."):
            found = getattr(found, part)
    except (ImportError, AttributeError) as error:
        raise InvalidArgumentError(f"--controller {text}: {error}") from error
    if not callable(found):
        raise ArrayTypeError(f"--controller {text}: it is {found!r}, which cannot be called")
    function: Callable[[int, Any], object] = found
    return function


def _main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m kvstore.server",
        description="Be the server or scheduler that the environment says (KVSTORE_ROLE or "
        "DMLC_ROLE) until the cluster ends. `python -m kvstore` lists the settings.",
    )
    parser.add_argument(
        "--controller",
        metavar="MODULE:FUNC",
        help="called with (head, body) for each command that a worker sends to the servers",
    )
    parser.add_argument(
        "--allow-import",
        action="append",
        metavar="MODULE",
        help="where it may import optimizers of users from, with the modules below it",
    )
    options = parser.parse_args()
    try:
        controller = None if options.controller is None else _controller(options.controller)
        serve(controller, options.allow_import)
    except KVStoreError as error:
        sys.exit(f"kvstore.server: {error}")
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    _main()
