"""How a node reaches its scheduler, what it tells of its machine, and what it opens there."""

import asyncio
import ctypes.util
import fcntl
import importlib.util
import os
import socket
import struct
import sys
import time
from collections.abc import Callable
from typing import Any, Protocol

from .. import _core
from ..errors import InvalidArgumentError, NotBuiltError, TimeoutError
from . import control, protocol
from .settings import Settings

Streams = tuple[asyncio.StreamReader, asyncio.StreamWriter]

RETRY_FIRST_S = 0.05
RETRY_MOST_S = 1.0
FIRST_REPORTS_S = (5, 15, 30)
REPORT_EVERY_S = 30


async def connect(settings: Settings, deadline: float) -> Streams:
    """A connection over which both sides have proved that they know the token.

    Tries again until the deadline while there is no scheduler, or no such host: nodes may start
    before either. TimeoutError then says what the last try met.
    """
    begin, pause, reports = time.monotonic(), RETRY_FIRST_S, list(FIRST_REPORTS_S)
    trouble = "no answer"
    while (left := deadline - time.monotonic()) > 0:
        try:
            return await asyncio.wait_for(_greet(settings), min(left, protocol.HANDSHAKE_S))
        except asyncio.TimeoutError:
            trouble = "no answer"
        except protocol.ProtocolError as error:
            if error.kind not in ("closed", "cut"):
                raise InvalidArgumentError(
                    f"what answers at {settings.address} is no scheduler of kvstore: {error} "
                    "(set by KVSTORE_SCHEDULER, DMLC_PS_ROOT_URI or the option scheduler)"
                ) from None
            trouble = str(error)
        except (OSError, UnicodeError) as error:
            trouble = getattr(error, "strerror", None) or str(error)
        passed = time.monotonic() - begin
        if passed >= reports[0]:
            at = reports.pop(0)
            reports = reports or [at + REPORT_EVERY_S]
            print(
                f"kvstore: no scheduler at {settings.address} yet: {trouble} ({at} s)",
                file=sys.stderr,
                flush=True,
            )
        await asyncio.sleep(min(pause, max(deadline - time.monotonic(), 0)))
        pause = min(2 * pause, RETRY_MOST_S)
    raise TimeoutError(
        f"a {settings.role} found no scheduler at {settings.address} in {settings.timeout:g} s: "
        f"{trouble} (the address is set by KVSTORE_SCHEDULER, DMLC_PS_ROOT_URI or the option "
        "scheduler, the limit by KVSTORE_TIMEOUT or the option timeout)"
    )


async def _greet(settings: Settings) -> Streams:
    found = await control.in_thread(
        socket.getaddrinfo, settings.host, settings.port, 0, socket.SOCK_STREAM
    )
    # IPv4 first: the data plane takes IPv6 only if every node has come by it.
    found.sort(key=lambda one: one[0] != socket.AF_INET)
    connection = await _first(found)
    reader, writer = await asyncio.open_connection(sock=connection)
    try:
        await protocol.introduce(reader, writer, settings.token)
    except BaseException:
        writer.transport.abort()
        raise
    return reader, writer


async def _first(found: list[Any]) -> socket.socket:
    """A connection to the first address that takes one."""
    trouble: OSError = OSError("it has no address")
    for family, kind, number, _, where in found:
        connection = socket.socket(family, kind, number)
        try:
            connection.setblocking(False)
            await asyncio.get_running_loop().sock_connect(connection, where)
            if connection.getsockname() == connection.getpeername():
                # Trying a free local port long enough, a socket at last connects to itself.
                raise ConnectionRefusedError(None, "nobody listens there")
            protocol.set_liveness(connection)
        except BaseException as error:
            connection.close()
            if not isinstance(error, OSError):
                raise
            trouble = error
            continue
        return connection
    # `sock_connect` puts its own words before those of the system.
    if trouble.errno:
        raise OSError(trouble.errno, os.strerror(trouble.errno))
    raise trouble


def socket_of(writer: asyncio.StreamWriter) -> socket.socket:
    """The socket below a stream, which a forked child closes without telling the loop."""
    found: socket.socket = writer.get_extra_info("socket")._sock
    return found


def _read(path: str) -> str:
    try:
        with open(path) as file:
            return file.read().strip()
    except OSError:
        return ""


def _namespace(name: str) -> str:
    try:
        return os.readlink(f"/proc/self/ns/{name}")
    except OSError:
        return ""


def this_host(advertise: str) -> dict[str, Any]:
    """What decides whether two processes may copy from each other's memory, and a name."""
    return {
        "boot_id": _read("/proc/sys/kernel/random/boot_id"),
        "namespaces": f"{_namespace('pid')} {_namespace('user')}",
        "euid": os.geteuid(),
        "hostname": advertise or socket.gethostname(),
    }


SIOCGIFADDR = 0x8915  # of Linux


def interface(bind: str, connection: socket.socket) -> str | None:
    """The network device that has the address `bind`, or that of the connection's near end."""
    near = str(connection.getsockname()[0])
    if bind:
        try:
            near = socket.getaddrinfo(bind, None)[0][4][0]  # type: ignore[assignment]
        except OSError:
            raise InvalidArgumentError(
                f"KVSTORE_BIND={bind!r} is no address of this machine"
            ) from None
    near = near.removeprefix("::ffff:")
    if ":" in near:
        return _interface6(near.partition("%")[0])
    wanted = socket.inet_aton(near)
    if wanted[0] == 127:
        return "lo"
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asking:
        for _, name in socket.if_nameindex():
            request = struct.pack("256s", name.encode()[:15])
            try:
                answer = fcntl.ioctl(asking, SIOCGIFADDR, request)
            except OSError:
                continue  # it has no address
            if answer[20:24] == wanted:
                return name
    return None


def _interface6(near: str) -> str | None:
    wanted = socket.inet_pton(socket.AF_INET6, near).hex()
    for line in _read("/proc/net/if_inet6").splitlines():
        parts = line.split()
        if parts and parts[0] == wanted:
            return parts[-1]
    return None


def ucx_library() -> str | None:
    """The folder of UCX's libraries in the package of the extra `dist`; None: the system's."""
    spec = importlib.util.find_spec("libucx")
    for folder in (spec.submodule_search_locations or []) if spec is not None else []:
        if os.path.isdir(os.path.join(folder, "lib")):
            return os.path.join(folder, "lib")
    return None


def check_ucx() -> None:
    """NotBuiltError, which says what to do, where no data plane can be opened. Loads nothing."""
    if not _core.build_info()["ucx"]:
        raise NotBuiltError(
            "this build of kvstore has no UCX, which carries the values of dist stores: install it "
            "again without KVSTORE_UCX=off, on Linux: pip install --force-reinstall '.[dist]'"
        )
    if ucx_library() is None and ctypes.util.find_library("ucp") is None:
        raise NotBuiltError(
            "UCX, which carries the values of dist stores, is not on this machine: "
            "pip install 'mlkvstore[dist]'"
        )


# A round that an optimizer in Python is to end: the optimizer's number, the key, what was pushed,
# the value, rate, count of the key, count of the store, what is kept with the key, and what a file
# had in place of that. Without a push: what is kept is to be packed.
Update = tuple[int, int | str, Any, Any, float, int, int, Any, Any]


class Core(Protocol):
    """The data plane of a node: `kvstore._core.Node`."""

    def address(self) -> bytes: ...
    def connect(self, peers: list[tuple[int, str, bytes]]) -> None: ...
    def wait_ready(self, timeout: float) -> None: ...
    def wait_alone(self, timeout: float) -> None: ...
    def drain(self, timeout: float) -> None: ...
    def add_optimizer(
        self,
        number: int,
        kind: str,
        numbers: dict[str, Any],
        flags: dict[str, bool],
        begin_num_update: int,
        training: int,
        /,
    ) -> None: ...
    def next_update(self, timeout: float, /) -> Update | None: ...
    def end_update(self, failure: str | None, kept: object, stored: object, /) -> None: ...
    def wake(self) -> None: ...
    def lose(self, why: str) -> None: ...
    def left(self, rank: int, finished: bool, /) -> None: ...
    def close(self) -> None: ...


MakeCore = Callable[..., Core]
