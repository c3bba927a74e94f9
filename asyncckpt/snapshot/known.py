"""Chunks that need not be copied: they are what was committed last, by the digest of their bytes where these lie now.

The digest alone decides. A fused optimizer, `.data` or another process may have written there without any counter or
flag telling: then the digest is another one, and the chunk is copied like all others.
"""

from __future__ import annotations

import bisect
from collections.abc import Callable
from functools import partial

import numpy as np
import xxhash

from asyncckpt.snapshot.copy import address_of
from asyncckpt.snapshot.hashed import Chunk
from asyncckpt.snapshot.memory import at
from asyncckpt.snapshot.plan import PartPlan, Source
from asyncckpt.write.messages import Hashed, Known

CopyOf = Callable[[Chunk], Callable[[], None]]
Segment = tuple[Source, int, int]
"""What has the bytes, where in it they begin, and how many they are."""


class Comparison:
    """Compares the chunks of one part with what is `known`, which may become another."""

    def __init__(self, known: Known) -> None:
        self.known = known

    def renew(self, other: Comparison) -> bool:
        """Compare with what `other` does from now on, if that is known of the very same chunks."""
        old, new = self.known, other.known
        if (old.size, old.chunk_size, _marks(old)) != (new.size, new.chunk_size, _marks(new)):
            return False
        self.known = new
        return True

    def copies(self, plan: PartPlan, step: int) -> CopyOf:
        """For each chunk of the part, of `step` bytes, what copies it; where it can be compared where it lies, only if
        it has changed."""
        known, entries = self.known, plan.image.entries
        marks = _marks(known)
        if (plan.image.size, step) != (known.size, known.chunk_size) or len(marks) != -(-known.size // step):
            return lambda chunk: chunk.copy
        order = sorted((i for i in range(len(entries)) if entries[i].nbytes), key=lambda i: entries[i].offset)
        begins = [entries[i].offset for i in order]

        def copy_of(chunk: Chunk) -> Callable[[], None]:
            if not marks[chunk.start // step]:
                return chunk.copy
            segments: list[Segment] = []
            position, end = chunk.start + len(chunk.header), chunk.start + chunk.size
            for at_entry in range(bisect.bisect_right(begins, position) - 1, len(order)):
                entry, source = entries[order[at_entry]], plan.sources[order[at_entry]]
                if entry.offset >= end:
                    break
                if not _lies_as_stored(source):
                    return chunk.copy
                until = min(end, entry.offset + entry.nbytes)
                segments.append((source, position - entry.offset, until - position))
                position = until
            return partial(self._copy_changed, chunk, segments)

        return copy_of

    def _copy_changed(self, chunk: Chunk, segments: list[Segment]) -> None:
        notes = chunk.home.notes.hashed
        found = xxhash.xxh3_128(chunk.header)
        for source, start, size in segments:
            found.update(at(address_of(source.data) + start, size))
        if self.known.has(chunk.start // self.known.chunk_size, found.digest()):
            notes.append(Hashed(chunk.home.part, chunk.start, chunk.size, found.hexdigest(), same=True))
        else:
            chunk.copy()


def _marks(known: Known) -> bytes:
    """For each chunk a byte: whether its digest is known."""
    return np.frombuffer(known.digests, np.uint8).reshape(-1, len(known.NOTHING)).any(axis=1).tobytes()


def _lies_as_stored(source: Source) -> bool:
    return source.contiguous and source.cast is None and source.data.device.type == "cpu"
