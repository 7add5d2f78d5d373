"""Ends the processes of a launcher that can no longer do it: one that was killed, or has crashed.

The launcher starts this file as a program, in a session of its own so that nothing meant for the
launcher's terminal or group reaches it, and holds the write end of its standard input. It writes
`+N` when a process group N has been made and `-N` when the group is gone. At the end of the file,
or when the launcher is no longer the parent (a fork of the launcher may keep the pipe open), every
group left is killed, after a grace that the launcher has named: a scheduler beside a worker that
was killed tells the others first. Only the standard library, and none of the package: it is there
in 10 ms.
"""

import contextlib
import os
import select
import signal
import sys
import time

LOOK_S = 0.5  # how often it looks who its parent is
GRACE_LOOK_S = 0.02  # and which groups are left in the grace


def main() -> None:
    """Watch until the launcher is gone, then kill the groups that it has left."""
    launcher, grace = int(sys.argv[1]), float(sys.argv[2])
    groups: set[int] = set()
    rest = b""
    alive = True
    while alive:
        # Looked at before the pipe: what the launcher wrote last is then still read.
        alive = os.getppid() == launcher
        if select.select([0], [], [], LOOK_S if alive else 0)[0]:
            data = os.read(0, 1 << 16)  # all that a pipe holds
            alive = alive and bool(data)
            *lines, rest = (rest + data).split(b"\n")
            for line in lines:
                (groups.add if line[:1] == b"+" else groups.discard)(int(line[1:]))
    deadline = time.monotonic() + grace
    while groups and time.monotonic() < deadline:
        # One that is gone is forgotten soon: its number may come to mean somebody else.
        groups = {group for group in groups if _is_there(group)}
        time.sleep(GRACE_LOOK_S)
    for group in groups:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(group, signal.SIGKILL)


def _is_there(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


if __name__ == "__main__":
    main()
