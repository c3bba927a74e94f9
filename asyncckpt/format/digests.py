"""The digest that finds damage in bytes: xxh3_128, as 32 hex digits."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import xxhash


def digest(data: Any) -> str:
    """xxh3_128 of a buffer, 32 hex digits. Releases the GIL on large buffers."""
    return str(xxhash.xxh3_128_hexdigest(data))


def digest_of_chunks(digests: Iterable[str]) -> str:
    """The digest of a file: that of its chunks' digests, in order, as one ASCII text."""
    return digest("".join(digests).encode())
