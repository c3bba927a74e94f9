"""Chunks that are hashed on their way to the arena, while their bytes lie in the caches: the writer hashes the others.

Hashing follows the copy, slice by slice, and reads the arena: a digest is that of the bytes which are written.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import xxhash

from asyncckpt.format.image import Image
from asyncckpt.snapshot.copy import Piece
from asyncckpt.write.messages import Hashed

Tell = Callable[[Hashed], None]


@dataclass(slots=True)
class Chunk:
    """`size` bytes at `start` of the image of `part`: of its `header`, which somebody else copies, then of `pieces`."""

    part: str
    start: int
    size: int
    header: bytes
    pieces: Sequence[Piece]
    memory: memoryview
    tell: Tell

    def copy(self) -> None:
        found = xxhash.xxh3_128(self.header)
        for piece in self.pieces:
            piece.copy()
            found.update(self.memory[piece.offset : piece.offset + piece.size])
        self.tell(Hashed(self.part, self.start, self.size, found.hexdigest()))


def by_chunks(
    pieces: Sequence[Piece],
    part: str,
    image: Image,
    base: int,
    memory: memoryview,
    tell: Tell,
    step: int,
    copy_of: Callable[[Chunk], Callable[[], None]],
) -> Iterator[Piece]:
    """The same pieces, those of a whole chunk in one, which is copied as `copy_of` says.

    They are in order, and of the image at `base` of the arena `memory`, whose chunks have `step` bytes.
    """
    i = 0
    for start in range(0, image.size, step):
        end = min(start + step, image.size)
        first = i
        while i < len(pieces) and pieces[i].offset < base + end:
            i += 1
        these, header = pieces[first:i], image.header[start:end]
        if these and _fill(these, base + start + len(header), base + end):
            chunk = Chunk(part, start, end - start, header, these, memory, tell)
            yield Piece(these[0].offset, base + end - these[0].offset, copy_of(chunk))
        else:
            yield from these


def _fill(pieces: Iterable[Piece], position: int, end: int) -> bool:
    """Whether they hold all bytes from `position` to `end`, and no others."""
    for piece in pieces:
        if piece.offset != position:
            return False
        position += piece.size
    return position == end
