"""Frames, and the greeting that proves the token to both sides."""

import asyncio
import contextlib
import json
import socket
import struct

import pytest

from kvstore import errors
from kvstore.cluster import control, protocol
from kvstore.cluster.protocol import ProtocolError


def packed(text):
    return struct.pack(">I", len(text)) + text


async def stream_of(data):
    reader = asyncio.StreamReader()
    reader.feed_data(data)
    reader.feed_eof()
    return reader


def read_all(data, limit=protocol.MAX_FRAME):
    async def work():
        reader, frames = await stream_of(data), []
        while (frame := await protocol.read(reader, limit)) is not None:
            frames.append(frame)
        return frames

    return control.run(work())


@contextlib.asynccontextmanager
async def connected():
    """The streams of the two ends of a connection."""
    ends = [await asyncio.open_connection(sock=end) for end in socket.socketpair()]
    try:
        yield ends
    finally:
        for _, writer in ends:
            writer.close()
            await writer.wait_closed()


def greet(node_token, scheduler_token):
    """What each side of a greeting ends with: None or its exception."""

    async def work():
        async with connected() as ((r1, w1), (r2, w2)):
            accepting = protocol.accept(r1, w1, scheduler_token)
            introducing = protocol.introduce(r2, w2, node_token)
            both = asyncio.gather(accepting, introducing, return_exceptions=True)
            return await asyncio.wait_for(both, 30)

    return control.run(work())


# ------------------------------------------------------------------------------------- frames


def test_frames_come_out_as_they_went_in():
    frames = [
        {"type": "a", "text": "ü\0\ud800", "list": [1, None, True]},
        {"type": "b", "n": 2**63},
    ]
    assert read_all(b"".join(map(protocol.encode, frames))) == frames


def test_a_frame_has_a_limit():
    room = protocol.MAX_FRAME - len('{"type":"x","s":""}')
    assert len(protocol.encode({"type": "x", "s": "a" * room})) == protocol.MAX_FRAME + 4
    with pytest.raises(ProtocolError, match="limit is 1048576"):
        protocol.encode({"type": "x", "s": "a" * (room + 1)})


@pytest.mark.parametrize(
    ("data", "kind"),
    [
        (b"GET / HTTP/1.1\r\n\r\n", "garbage"),
        (b"\xff" * 100, "garbage"),
        (packed(b"{" * 4000), "garbage"),
        (packed(b"[" * 200_000), "garbage"),
        (packed(b"\xff\xfe"), "garbage"),
        (packed(b"[]"), "garbage"),
        (packed(b"{}"), "garbage"),
        (packed(b'{"type":1}'), "garbage"),
        (packed(b'{"type":"x","n":' + b"9" * 10_000 + b"}"), "garbage"),
        (packed(b""), "garbage"),
        (b"\0\0", "cut"),
        (b"\0\0\0\5ab", "cut"),
        (b"\0\0\0\5", "cut"),
    ],
)
def test_what_is_no_frame_is_refused(data, kind):
    with pytest.raises(ProtocolError) as info:
        read_all(data)
    assert info.value.kind == kind


def test_a_stranger_cannot_make_the_reader_hold_much():
    head = struct.pack(">I", protocol.MAX_STRANGERS_FRAME + 1)
    with pytest.raises(ProtocolError) as info:
        read_all(head, protocol.MAX_STRANGERS_FRAME)
    assert info.value.kind == "garbage"


def test_fields_are_checked():
    frame = {"type": "x", "n": 1, "s": "a", "b": True, "none": None}
    assert protocol.field(frame, "n", int) == 1
    assert protocol.field(frame, "b", bool) is True
    assert protocol.field_or_none(frame, "none", int) is None
    assert protocol.field_or_none(frame, "absent", int) is None
    for name, kind in (("s", int), ("b", int), ("n", bool), ("none", str), ("absent", str)):
        with pytest.raises(ProtocolError, match=f"no valid '{name}'"):
            protocol.field(frame, name, kind)


@pytest.mark.parametrize("name", errors.__all__)
def test_an_error_travels_with_its_class(name):
    error = protocol.error_from(protocol.error_fields(getattr(errors, name)("what went wrong")))
    assert type(error) is getattr(errors, name)
    assert str(error) == "what went wrong"


def test_an_error_of_no_class_of_ours_becomes_a_kvstore_error():
    error = protocol.error_from(protocol.error_fields(OSError("disk")))
    assert type(error) is errors.KVStoreError
    assert type(protocol.error_from({"type": "e", "error": "os", "message": ""})) is (
        errors.KVStoreError
    )


# ----------------------------------------------------------------------------------- greeting


@pytest.mark.parametrize("token", ["secret", "", "ü" * 500, "\udcff"])
def test_two_sides_with_one_token_agree(token):
    assert greet(token, token) == [None, None]


@pytest.mark.parametrize(("node", "scheduler"), [("a", "b"), ("", "b"), ("a", "")])
def test_another_token_is_refused_on_both_sides(node, scheduler):
    accepted, introduced = greet(node, scheduler)
    assert isinstance(accepted, ProtocolError) and accepted.kind == "token"
    assert isinstance(introduced, errors.InvalidArgumentError)
    assert "KVSTORE_TOKEN" in str(introduced)


def test_a_scheduler_that_does_not_know_the_token_is_found_out():
    async def impostor(reader, writer):
        await protocol.read(reader)
        protocol.write(writer, {"type": "challenge", "nonce": "0" * 64, **protocol._versions()})
        proof = await protocol.read(reader)
        protocol.write(writer, {"type": "welcome", "proof": proof["proof"]})

    async def work():
        async with connected() as ((r1, w1), (r2, w2)):
            acting = asyncio.ensure_future(impostor(r1, w1))
            with pytest.raises(errors.InvalidArgumentError, match="another token"):
                await protocol.introduce(r2, w2, "secret")
            await acting

    control.run(work())


def test_a_recorded_greeting_is_worth_nothing():
    async def record():
        async with connected() as ((r1, w1), (r2, w2)):
            sent = []
            original = w2.write
            w2.write = lambda data: (sent.append(data), original(data))
            await asyncio.gather(
                protocol.accept(r1, w1, "secret"), protocol.introduce(r2, w2, "secret")
            )
            return b"".join(sent)

    async def replay(data):
        async with connected() as ((r1, w1), (_, w2)):
            w2.write(data)
            await protocol.accept(r1, w1, "secret")

    with pytest.raises(ProtocolError) as info:
        control.run(replay(control.run(record())))
    assert info.value.kind == "token"


def test_the_token_never_travels():
    async def work():
        seen = []
        async with connected() as ((r1, w1), (r2, w2)):
            for writer in (w1, w2):
                original = writer.write
                writer.write = lambda data, o=original: (seen.append(data), o(data))
            await asyncio.gather(
                protocol.accept(r1, w1, "secret"), protocol.introduce(r2, w2, "secret")
            )
        return b"".join(seen)

    sent = control.run(work())
    assert b"welcome" in sent and b"secret" not in sent


@pytest.mark.parametrize("changed", [{"protocol": 2}, {"package": "9.9"}, {"package": None}])
def test_another_version_is_named_at_the_node_and_at_the_scheduler(changed, monkeypatch):
    async def work():
        async with connected() as ((r1, w1), (r2, w2)):
            old = await asyncio.gather(other_node(r2, w2), protocol.accept(r1, w1, "s"), **both)
        async with connected() as ((r1, w1), (r2, w2)):
            new = await asyncio.gather(
                other_scheduler(r1, w1), protocol.introduce(r2, w2, "s"), **both
            )
        return old[1], new[1]

    async def other_node(reader, writer):
        versions = {**protocol._versions(), **changed}
        protocol.write(writer, {"type": "hello", "nonce": "0" * 64, **versions})

    async def other_scheduler(reader, writer):
        versions = {**protocol._versions(), **changed}
        protocol.write(writer, {"type": "challenge", "nonce": "0" * 64, **versions})

    both = {"return_exceptions": True}
    at_scheduler, at_node = control.run(work())
    assert isinstance(at_scheduler, ProtocolError) and at_scheduler.kind == "version"
    assert isinstance(at_node, errors.InvalidArgumentError)
    own, other = protocol._versions(), {**protocol._versions(), **changed}
    for text in (str(at_scheduler), str(at_node)):
        for versions in (own, other):
            assert f"kvstore {versions['package']} (protocol {versions['protocol']})" in text


def test_a_frame_out_of_order_ends_the_greeting():
    async def work():
        async with connected() as ((r1, w1), (_, w2)):
            w2.write(packed(json.dumps({"type": "join"}).encode()))
            await protocol.accept(r1, w1, "s")

    with pytest.raises(ProtocolError, match="'join' where 'hello' is due"):
        control.run(work())


def test_what_a_node_does_not_read_is_not_kept_without_end():
    async def work():
        async with connected() as ((_, w1), _):
            frame = {"type": "x", "s": "a" * 1_000_000}
            for _ in range(100):
                protocol.write(w1, frame)
            return w1.transport.is_closing(), w1.transport.get_write_buffer_size()

    closing, size = control.run(work())
    assert closing and size < 2 * protocol.MAX_UNSENT
