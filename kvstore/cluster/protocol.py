"""What goes over a control connection: frames of JSON, and the exchange that opens one.

A frame is a length of 4 bytes, big-endian, and as many bytes of JSON, one object with a "type".
Until both sides have proved that they know the cluster's token, frames are short and the time is
bounded. The node proves itself first, so a stranger gets nothing that he could try tokens on:

    node       hello      versions, nonce
    scheduler  challenge  versions, nonce
    node       proof      HMAC-SHA256 over role, versions and both nonces
    scheduler  welcome    the same under its own role
"""

import asyncio
import hmac
import json
import secrets
import socket
import struct
from typing import Any, TypeAlias, TypeVar

from .. import errors

Frame: TypeAlias = dict[str, Any]

VERSION = 1
MAX_FRAME = 1 << 20
MAX_STRANGERS_FRAME = 1 << 12
HANDSHAKE_S = 10.0
NONCE_BYTES = 32

# A dead host is noticed by TCP after about 15 s; a busy or stopped process is not dead.
KEEPALIVE_IDLE_S = 5
KEEPALIVE_INTERVAL_S = 3
KEEPALIVE_PROBES = 3
USER_TIMEOUT_MS = 15_000
# What may wait to be sent to a node that does not read.
MAX_UNSENT = 16 << 20

_LENGTH = struct.Struct(">I")
_Type = TypeVar("_Type")


class ProtocolError(Exception):
    """The other side sent what it must not; `kind` groups such troubles for the log."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind


def encode(frame: Frame) -> bytes:
    """The bytes of a frame; ProtocolError if they are too many."""
    text = json.dumps(frame, separators=(",", ":"), allow_nan=False).encode()
    if len(text) > MAX_FRAME:
        raise ProtocolError("long", f"a frame of {len(text)} bytes; the limit is {MAX_FRAME}")
    return _LENGTH.pack(len(text)) + text


def decode(text: bytes) -> Frame:
    """The frame of the bytes behind a length; ProtocolError if they are none."""
    try:
        frame = json.loads(text)
    except (ValueError, RecursionError):
        raise ProtocolError("garbage", "it sent bytes that are no frame of kvstore") from None
    if not isinstance(frame, dict) or not isinstance(frame.get("type"), str):
        raise ProtocolError("garbage", "it sent JSON that is no frame of kvstore")
    return frame


def field(frame: Frame, name: str, kind: type[_Type]) -> _Type:
    """A field of a frame, of that type; ProtocolError if it is missing or another."""
    value = frame.get(name)
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise ProtocolError("fields", f"its frame {frame['type'][:40]!r} has no valid {name!r}")
    return value


def field_or_none(frame: Frame, name: str, kind: type[_Type]) -> _Type | None:
    """The same of a field that may be null or missing."""
    return None if frame.get(name) is None else field(frame, name, kind)


async def read(reader: asyncio.StreamReader, limit: int = MAX_FRAME) -> Frame | None:
    """The next frame; None if the connection ended between two frames."""
    try:
        head = await reader.readexactly(_LENGTH.size)
        (length,) = _LENGTH.unpack(head)
        if length > limit:
            raise ProtocolError("garbage", "it sent bytes that are no frame of kvstore")
        return decode(await reader.readexactly(length))
    except asyncio.IncompleteReadError as error:
        if error.partial or error.expected != _LENGTH.size:
            raise ProtocolError("cut", "it ended in the middle of a frame") from None
        return None


def write(writer: asyncio.StreamWriter, frame: Frame) -> None:
    """Put a frame on its way. A connection whose other side reads nothing for long is cut."""
    transport = writer.transport
    if transport.is_closing():
        return
    writer.write(encode(frame))
    if transport.get_write_buffer_size() > MAX_UNSENT:
        transport.abort()


def set_liveness(connection: socket.socket) -> None:
    """Let TCP find a host that is dead; without delay for small frames."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    options = (
        ("TCP_NODELAY", 1),
        ("TCP_KEEPIDLE", KEEPALIVE_IDLE_S),
        ("TCP_KEEPINTVL", KEEPALIVE_INTERVAL_S),
        ("TCP_KEEPCNT", KEEPALIVE_PROBES),
        ("TCP_USER_TIMEOUT", USER_TIMEOUT_MS),
    )
    for name, value in options:
        option = getattr(socket, name, None)  # not every system has all
        if option is not None:
            connection.setsockopt(socket.IPPROTO_TCP, option, value)


# -------------------------------------------------------------------------------- the opening


def _versions() -> Frame:
    from .. import __version__

    return {"protocol": VERSION, "package": __version__}


def _same_versions(frame: Frame) -> bool:
    return all(frame.get(name) == value for name, value in _versions().items())


def _tell_versions(frame: Frame) -> str:
    return f"kvstore {str(frame.get('package'))[:40]} (protocol {str(frame.get('protocol'))[:40]})"


def _proof(token: str, role: str, node_nonce: str, scheduler_nonce: str) -> str:
    versions = _versions()
    parts = ("kvstore", role, versions["protocol"], versions["package"], node_nonce)
    message = json.dumps([*parts, scheduler_nonce])
    return hmac.new(token.encode("utf-8", "surrogatepass"), message.encode(), "sha256").hexdigest()


def _agrees(proof: str, wanted: str) -> bool:
    return hmac.compare_digest(proof.encode("utf-8", "replace"), wanted.encode())


def _nonce(frame: Frame) -> str:
    nonce = field(frame, "nonce", str)
    if len(nonce) != 2 * NONCE_BYTES:
        raise ProtocolError("fields", "its nonce has a wrong length")
    return nonce


async def _expect(reader: asyncio.StreamReader, kind: str) -> Frame:
    frame = await read(reader, MAX_STRANGERS_FRAME)
    if frame is None:
        raise ProtocolError("closed", "it closed the connection before it had said who it is")
    if frame["type"] != kind:
        raise ProtocolError("order", f"it sent {frame['type'][:40]!r} where {kind!r} is due")
    return frame


async def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, token: str) -> None:
    """The scheduler's side: returns when the other side has proved that it knows the token."""
    hello = await _expect(reader, "hello")
    node_nonce, own_nonce = _nonce(hello), secrets.token_hex(NONCE_BYTES)
    write(writer, {"type": "challenge", "nonce": own_nonce, **_versions()})
    if not _same_versions(hello):
        raise ProtocolError(
            "version", f"it is {_tell_versions(hello)}, this is {_tell_versions(_versions())}"
        )
    proof = field(await _expect(reader, "proof"), "proof", str)
    if not _agrees(proof, _proof(token, "node", node_nonce, own_nonce)):
        write(writer, {"type": "wrong_token"})
        raise ProtocolError("token", "it does not know the token of this cluster")
    write(writer, {"type": "welcome", "proof": _proof(token, "scheduler", node_nonce, own_nonce)})


async def introduce(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, token: str) -> None:
    """The node's side. InvalidArgumentError where trying again cannot help."""
    own_nonce = secrets.token_hex(NONCE_BYTES)
    write(writer, {"type": "hello", "nonce": own_nonce, **_versions()})
    challenge = await _expect(reader, "challenge")
    if not _same_versions(challenge):
        raise errors.InvalidArgumentError(
            f"the scheduler is {_tell_versions(challenge)}, this node is "
            f"{_tell_versions(_versions())}: all nodes of a cluster run one version"
        )
    nonce = _nonce(challenge)
    write(writer, {"type": "proof", "proof": _proof(token, "node", own_nonce, nonce)})
    answer = await read(reader, MAX_STRANGERS_FRAME)
    if answer is None:
        raise ProtocolError("closed", "it closed the connection in the middle of the greeting")
    proof = answer.get("proof")
    known = isinstance(proof, str) and _agrees(proof, _proof(token, "scheduler", own_nonce, nonce))
    if answer["type"] != "welcome" or not known:
        raise errors.InvalidArgumentError(
            "the scheduler has another token than this node: KVSTORE_TOKEN (or the option token) "
            "must be the same everywhere in a cluster"
        )


# ------------------------------------------------------------------------------------- errors


def error_fields(error: Exception) -> Frame:
    """How an exception travels: the name of its class here, and its sentence."""
    name = type(error).__name__
    return {
        "error": name if name in errors.__all__ else "KVStoreError",
        "message": str(error),
    }


def error_from(frame: Frame) -> errors.KVStoreError:
    """The exception of such fields."""
    name = field(frame, "error", str)
    found = getattr(errors, name, None) if name in errors.__all__ else None
    make: type[errors.KVStoreError] = found or errors.KVStoreError
    return make(field(frame, "message", str))
