"""All of this process's memory as one buffer: bytes are read where they lie, without a copy and in few calls."""

from __future__ import annotations

import ctypes

FIRST = 4096
"""The address of its first byte."""
SPACE = memoryview((ctypes.c_uint8 * ((1 << 47) - FIRST)).from_address(FIRST)).cast("B")


def at(address: int, size: int) -> memoryview:
    """`size` bytes at `address`, which must be there for as long as this is used."""
    return SPACE[address - FIRST : address - FIRST + size]
