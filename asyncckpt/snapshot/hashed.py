"""Chunks that are hashed on their way to the arena, while their bytes lie in the caches: the writer hashes the others.

Hashing follows the copy, slice by slice, and reads the arena: a digest is that of the bytes which are written.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import xxhash

from asyncckpt.format.image import Image
from asyncckpt.snapshot.copy import Piece
from asyncckpt.write.messages import Hashed


@dataclass
class Notes:
    """What was hashed of the snapshot in an arena, and is not told yet. Each snapshot has a list of its own."""

    hashed: deque[Hashed] = field(default_factory=deque)

    def renew(self) -> deque[Hashed]:
        self.hashed = deque()
        return self.hashed


@dataclass(frozen=True)
class Home:
    """Where the image of a part lies: at `base` of the arena that is `memory`, of which `notes` are kept.

    It does not hold the arena itself: programs hang on their arenas, and would keep them for ever.
    """

    part: str
    image: Image
    base: int
    memory: memoryview
    notes: Notes


@dataclass(slots=True)
class Group:
    """Pieces that begin in one chunk, in order."""

    pieces: Sequence[Piece]


@dataclass(slots=True)
class Chunk(Group):
    """`size` bytes at `start` of an image: of its header, which somebody else copies, then of `pieces`."""

    home: Home
    start: int
    size: int

    @property
    def header(self) -> bytes:
        return self.home.image.header[self.start : self.start + self.size]

    def copy(self) -> None:
        memory, notes = self.home.memory, self.home.notes.hashed
        found = xxhash.xxh3_128(self.header)
        for piece in self.pieces:
            piece.copy()
            found.update(memory[piece.offset : piece.offset + piece.size])
        notes.append(Hashed(self.home.part, self.start, self.size, found.hexdigest()))

    def as_piece(self, copy: Callable[[], None]) -> Piece:
        """All of them in one, which `copy` copies."""
        begin = self.pieces[0].offset
        return Piece(begin, self.home.base + self.start + self.size - begin, copy)


def by_chunks(pieces: Sequence[Piece], home: Home, step: int) -> Iterator[Group]:
    """The same pieces, those of each chunk together, as a `Chunk` where they are all that is in it but for the header.

    They are in order, and of one image, whose chunks have `step` bytes.
    """
    i = 0
    for start in range(0, home.image.size, step):
        end = min(start + step, home.image.size)
        first = i
        while i < len(pieces) and pieces[i].offset < home.base + end:
            i += 1
        these = pieces[first:i]
        begin = max(start, min(len(home.image.header), end))
        if these and _fill(these, home.base + begin, home.base + end):
            yield Chunk(these, home, start, end - start)
        else:
            yield Group(these)


def _fill(pieces: Sequence[Piece], position: int, end: int) -> bool:
    """Whether they hold all bytes from `position` to `end`, and no others."""
    for piece in pieces:
        if piece.offset != position:
            return False
        position += piece.size
    return position == end
