"""What an optimizer in Python keeps with a key, as bytes between workers and servers.

A head in JSON, behind its length in 8 bytes, lists name, type and shape of each array and says
whether the state has begun, or came from a file and waits for the key's next push; the arrays
follow, each at a multiple of 8 bytes.
"""

import json
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from .errors import InvalidArgumentError

SLOT = "packed"  # its name in the core

# What a file can hold.
TYPES = "bool int8 uint8 int16 uint16 int32 uint32 int64 uint64 float16 float32 float64".split()


def pack(slots: Mapping[str, Any], begun: bool) -> bytes:
    arrays = {
        name: np.asarray(array, array.dtype.newbyteorder("<"), order="C")
        for name, array in slots.items()
    }
    listed = [[name, array.dtype.name, array.shape] for name, array in arrays.items()]
    head = json.dumps({"begun": begun, "arrays": listed}).encode()
    parts: list[Any] = [len(head).to_bytes(8, "little"), head, bytes(-len(head) % 8)]
    for array in arrays.values():
        parts += [array.reshape(-1).view(np.uint8), bytes(-array.nbytes % 8)]
    return b"".join(parts)


def unpack(data: Any) -> tuple[dict[str, Any], bool]:
    """The slots, over the memory of a uint8 array, and whether the state has begun."""
    try:
        begin = 8 + int.from_bytes(data[:8].tobytes(), "little")
        head = json.loads(data[8:begin].tobytes())
        slots, at = {}, begin + -begin % 8
        for name, kind, shape in head["arrays"]:
            dtype = np.dtype(TYPES[TYPES.index(kind)]).newbyteorder("<")
            if not all(type(extent) is int and extent >= 0 for extent in shape):
                raise ValueError(f"{shape} is no shape")
            size = math.prod(shape) * dtype.itemsize
            slots[name] = data[at : at + size].view(dtype).reshape(shape)
            at += size + -size % 8
        begun = head["begun"]
        if at != len(data) or type(begun) is not bool:
            raise ValueError("it has another length")
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise InvalidArgumentError(f"not a packed state: {error!r}") from error
    return slots, begun
