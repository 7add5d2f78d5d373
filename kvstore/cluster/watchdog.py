"""Ends the processes of a launcher that can no longer do it: one that was killed, or has crashed.

The launcher starts this file as a program, in a session of its own so that nothing meant for the
launcher's terminal or group reaches it, and holds the write end of its standard input. It writes
`+N` when a process group N has been made and `-N` when the group is gone. At the end of the file,
or when the launcher is no longer the parent (a fork of the launcher may keep the pipe open), every
group left is killed. Only the standard library, and none of the package: it is there in 10 ms.
"""

import contextlib
import os
import select
import signal
import sys

LOOK_S = 0.5  # how often it looks who its parent is


def main() -> None:
    """Watch until the launcher is gone, then kill the groups that it has left."""
    launcher = int(sys.argv[1])
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
    for group in groups:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(group, signal.SIGKILL)


if __name__ == "__main__":
    main()
