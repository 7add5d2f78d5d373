"""The program of every process of a `LocalCluster`: takes requests from a pipe, answers by another.

Requests come by what was standard input, answers go to the descriptor named as the only argument:
one byte of kind, eight of length, then pickles. The pipes come from the process that made the
cluster and from nobody else, which is why pickles may travel there. What functions print goes to
standard output and error, which are pipes to the same process.

A request begins with a pickle of settings, which is good anywhere; the one behind it may need
modules of the user, found by the search path that the settings bring.
"""

import contextlib
import faulthandler
import gc
import importlib
import io
import os
import pickle
import signal
import struct
import sys
import traceback
from collections.abc import Callable
from typing import NoReturn

HEADER = struct.Struct(">cQ")
READY, SERVE, RUN, RESULT, ERROR = b"i", b"s", b"r", b"v", b"e"
CHUNK = 1 << 20

# What starts the program, with the maker's search path in it: the package is found where it was.
BOOT = "import sys; sys.path[:] = {path!r}; from kvstore.cluster import worker_main as m; m.main()"


def dumps(value: object) -> bytes:
    """A pickle by cloudpickle where it is installed, which takes functions of notebook cells."""
    try:
        cloudpickle = importlib.import_module("cloudpickle")
    except ImportError:
        return pickle.dumps(value, pickle.HIGHEST_PROTOCOL)
    made: bytes = cloudpickle.dumps(value, pickle.HIGHEST_PROTOCOL)
    return made


def main() -> NoReturn:
    """Answer requests until there are no more."""
    # Some tools send a Ctrl-C to every process below them; this one's is the maker's business.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    faulthandler.enable()
    answers = int(sys.argv[1])
    os.set_inheritable(answers, False)
    requests = os.dup(0)
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    os.close(null)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            # In UTF-8 whatever the locale is: it is how the maker reads it.
            stream.reconfigure(encoding="utf-8", errors="backslashreplace", line_buffering=True)

    import kvstore  # noqa: F401 - whoever waits for READY hears at once what is wrong with it

    _write(answers, READY, b"")
    while (header := _read(requests, HEADER.size)) is not None:
        kind, length = HEADER.unpack(header)
        payload = _read(requests, length)
        if payload is None:
            break
        file = io.BytesIO(payload)
        del payload
        variables, path = pickle.load(file)
        os.environ.update(variables)
        sys.path[:] = path
        if kind == SERVE:
            _serve(file)
        _run(file, answers)
    sys.exit(0)


def _serve(file: io.BytesIO) -> NoReturn:
    import kvstore

    try:
        kvstore.serve(pickle.load(file))
    except kvstore.KVStoreError as error:
        sys.exit(f"kvstore: {error}")
    sys.exit(0)


def _run(file: io.BytesIO, answers: int) -> None:
    kind, parts = answer_to(file)
    _write(answers, kind, *parts)


def answer_to(file: io.BytesIO) -> tuple[bytes, list[bytes]]:
    """Call the pickled function; what to answer, as kind and pickles."""
    function: Callable[..., object]
    try:
        function, args, kwargs = pickle.load(file)
        file.close()
        kind, parts = RESULT, [dumps(function(*args, **kwargs))]
        del function, args, kwargs
    except BaseException as error:
        kind, parts = ERROR, _described(error)
    _leave_abandoned()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    return kind, parts


def _leave_abandoned() -> None:
    """A store that the function has neither closed nor kept would be in the way of the next."""
    member = sys.modules.get("kvstore.cluster.member")
    if member is not None:
        gc.collect()  # an exception that was caught may have held its frame
        member.leave_abandoned()


def _described(error: BaseException) -> list[bytes]:
    """The traceback without the frame of `answer_to`, and the error itself if it can travel."""
    below = error.__traceback__.tb_next if error.__traceback__ else None
    text = "".join(traceback.format_exception(type(error), error, below or error.__traceback__))
    parts = [pickle.dumps(text)]
    if isinstance(error, Exception):
        with contextlib.suppress(Exception):
            parts.append(dumps(error))
            pickle.loads(parts[1])  # some can be written only
            return parts
    return parts[:1]


def _read(fd: int, length: int) -> bytearray | None:
    """So many bytes, or None at the end of the file."""
    data = bytearray(length)
    view = memoryview(data)
    while view:
        count = os.readv(fd, [view[:CHUNK]])
        if count == 0:
            return None
        view = view[count:]
    return data


def _write(fd: int, kind: bytes, *parts: bytes) -> None:
    for part in (HEADER.pack(kind, sum(map(len, parts))), *parts):
        view = memoryview(part)
        while view:
            view = view[os.write(fd, view[:CHUNK]) :]
