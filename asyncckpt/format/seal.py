"""Sealed records: one JSON object whose last member is the SHA-256 of all bytes before it.

    {"format":1, ... ,"sha256":"<64 hex digits>"}\\n

`jq` reads them, and any changed, missing or added byte is found. A seal finds damage, not an attacker.
"""

from __future__ import annotations

import hashlib
from typing import TypeVar

import msgspec

from asyncckpt.errors import CorruptCheckpointError

VERSION = 1
_KEY = b',"sha256":"'
_END = b'"}\n'
_TAIL = len(_KEY) + 64 + len(_END)

T = TypeVar("T")


class _Version(msgspec.Struct):
    format: int


def seal(record: msgspec.Struct) -> bytes:
    """The sealed bytes of `record`, a struct with a member `format`."""
    body = msgspec.json.encode(record)[:-1]
    return b"".join((body, _KEY, hashlib.sha256(body).hexdigest().encode(), _END))


def unseal(data: bytes, record_type: type[T], what: str) -> T:
    """The record in `data`, verified.

    Raises:
        CorruptCheckpointError: the seal is broken, the format is newer than this library, or a member is wrong.
    """
    body, tail = data[:-_TAIL], data[-_TAIL:]
    if tail != b"".join((_KEY, hashlib.sha256(body).hexdigest().encode(), _END)):
        raise CorruptCheckpointError(f"{what}: its seal is broken, so its bytes are not those that were written")
    try:
        version = msgspec.json.decode(body + b"}", type=_Version).format
        if version == VERSION:
            return msgspec.json.decode(body + b"}", type=record_type)
    except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError) as error:
        raise CorruptCheckpointError(f"{what}: not a valid record: {error}") from error
    raise CorruptCheckpointError(
        f"{what}: written in format {version}; this asyncckpt reads format {VERSION}. Upgrade asyncckpt to read it."
    )
