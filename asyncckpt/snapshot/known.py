"""Chunks that need not be copied: they are what was committed last, by the digest of their bytes where these lie now.

The digest alone decides. A fused optimizer, `.data` or another process may have written there without any counter or
flag telling: then the digest is another one, and the chunk is copied like all others.
"""

from __future__ import annotations

import ctypes
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import numpy as np
import xxhash

from asyncckpt.snapshot.arena import Arena
from asyncckpt.snapshot.copy import Piece, address_of
from asyncckpt.snapshot.memory import at
from asyncckpt.snapshot.plan import PartPlan, Source
from asyncckpt.write.messages import Known, Same


@dataclass(slots=True)
class Segment:
    """Bytes `start` to `start + size` of what `source` has, and where in the image they belong."""

    source: int
    start: int
    size: int
    offset: int


@dataclass(slots=True)
class Chunk:
    """Bytes `start` to `end` of the image: of its header, then of tensors that lie in CPU memory as they are stored."""

    index: int
    start: int
    end: int
    segments: list[Segment]


@dataclass
class Comparison:
    """The chunks of one part that are compared, in one arena, with what is `known`, which may become another."""

    part: str
    known: Known
    same: deque[Same]
    """Where those that need not be copied are noted."""

    def renew(self, other: Comparison) -> bool:
        """Compare with what `other` does from now on, if that is known of the very same chunks."""
        old, new = self.known, other.known
        if (old.size, old.chunk_size, _marks(old)) != (new.size, new.chunk_size, _marks(new)):
            return False
        self.known, self.same = new, other.same
        return True

    def piece(self, chunk: Chunk, plan: PartPlan, base: int, arena: Arena) -> Piece:
        """What compares the chunk, and copies it where it has changed."""
        parts = [(plan.sources[s.source], s) for s in chunk.segments]
        header = plan.image.header[chunk.start : chunk.end]
        return base + chunk.start, partial(self._compare, chunk, header, parts, arena.address + base)

    def _compare(self, chunk: Chunk, header: bytes, parts: list[tuple[Source, Segment]], image: int) -> None:
        found = xxhash.xxh3_128(header)
        for source, segment in parts:
            found.update(at(address_of(source.data) + segment.start, segment.size))
        if self.known.has(chunk.index, found.digest()):
            self.same.append(Same(self.part, chunk.index, found.hexdigest()))
            return
        for source, segment in parts:
            ctypes.memmove(image + segment.offset, address_of(source.data) + segment.start, segment.size)


def _marks(known: Known) -> bytes:
    """For each chunk a byte: whether its digest is known."""
    return np.frombuffer(known.digests, np.uint8).reshape(-1, len(known.NOTHING)).any(axis=1).tobytes()


def chunks_of(plan: PartPlan, known: Known) -> Iterator[Chunk]:
    """Those that are known, and that hold nothing but what can be compared where it lies."""
    size, step = plan.image.size, known.chunk_size
    marks = _marks(known)
    if size != known.size or len(marks) != -(-size // step):
        return
    entries = plan.image.entries
    order = sorted((i for i in range(len(entries)) if entries[i].nbytes), key=lambda i: entries[i].offset)
    first = 0
    for index, mark in enumerate(marks):
        start, end = index * step, min((index + 1) * step, size)
        while first < len(order) and entries[order[first]].offset + entries[order[first]].nbytes <= start:
            first += 1
        if not mark:
            continue
        chunk, i = Chunk(index, start, end, []), first
        while i < len(order) and entries[order[i]].offset < end:
            entry = entries[order[i]]
            begin = max(start, entry.offset)
            length = min(end, entry.offset + entry.nbytes) - begin
            chunk.segments.append(Segment(order[i], begin - entry.offset, length, begin))
            i += 1
        if all(_lies_as_stored(plan.sources[segment.source]) for segment in chunk.segments):
            yield chunk


def _lies_as_stored(source: Source) -> bool:
    return source.contiguous and source.cast is None and source.data.device.type == "cpu"
