"""Chunks of an image that are not stored raw, in order, in one file: where their pieces lie, and how they are coded.

A chunk is a list of pieces: the first stands for itself, each further one is the difference of the chunk from what the
pieces before it give. Pieces may lie in files that other checkpoints share.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import msgspec

from asyncckpt.format import names
from asyncckpt.format.digests import digest_of_chunks

RAW, ZSTD, DELTA = "raw", "zstd", "delta"
PAGE = 4096
"""Pieces start at multiples of this."""

MAX_CHAIN = 64
"""The most differences that a chunk may hang on."""
MAX_FILES = 4096
MAX_CHUNK = 64 << 20
"""Decoded bytes of a chunk: with a page or more for each piece, this bounds what a small file can claim to hold."""


class Piece(msgspec.Struct, frozen=True, array_like=True):
    """Bytes `offset` to `offset + stored` of the file with the index `file`; the digest is that of the chunk decoded
    up to here."""

    codec: str
    stored: int
    digest: str
    file: int
    offset: int


class Shared(msgspec.Struct, frozen=True, array_like=True):
    """A file of pieces, and how many checkpoints held it before this one."""

    name: str
    uses: int = 0


Pieces = Sequence[Piece]
"""Of one chunk, the one that stands for itself first."""


class Impossible(ValueError):
    """A table that can't be true, and why."""


def check(
    part: str, rank: int | None, lengths: Sequence[int], files: Sequence[Shared], table: Sequence[Pieces]
) -> None:
    """Hold the pieces of a part, or of the share of one of several ranks, against each other.

    `lengths` are the decoded sizes of its chunks.

    Raises:
        Impossible: no such checkpoint was ever written.
    """
    if len(table) != len(lengths):
        raise Impossible("its chunk table does not cover its image")
    known = {file.name for file in files}
    if len(known) != len(files) or len(files) > MAX_FILES:
        raise Impossible("its files are too many, or named twice")
    for file in files:
        if names.coded_of(file.name) != (part, rank) or file.uses < 0:
            raise Impossible(f"one of its files bears the name {file.name!r}")
    for index, (length, pieces) in enumerate(zip(lengths, table, strict=True)):
        _check_chunk(index, length, len(files), pieces)


def _check_chunk(index: int, length: int, files: int, pieces: Pieces) -> None:
    if not 1 <= len(pieces) <= MAX_CHAIN + 1:
        raise Impossible(f"chunk {index} has {len(pieces)} pieces")
    for i, piece in enumerate(pieces):
        if piece.codec not in ((DELTA,) if i else (RAW, ZSTD)):
            raise Impossible(f"chunk {index} has the codec {piece.codec!r}, which this asyncckpt does not know there")
        fits = piece.stored == length if piece.codec == RAW else 0 < piece.stored <= length
        if not fits or not 0 <= piece.file < files or piece.offset < 0 or piece.offset % PAGE:
            raise Impossible(f"chunk {index} has a piece of an impossible size or place")


def digests_of_files(files: Sequence[Shared], table: Sequence[Pieces], sizes: Mapping[str, int]) -> dict[str, str]:
    """By name, the digest of what this checkpoint has in each file: that of its pieces' digests, by their offset.

    Raises:
        Impossible: pieces that overlap, or reach out of their file.
    """
    held: list[list[Piece]] = [[] for _ in files]
    for pieces in table:
        for piece in pieces:
            held[piece.file].append(piece)
    found = {}
    for file, inside in zip(files, held, strict=True):
        inside.sort(key=lambda piece: piece.offset)
        end = 0
        for piece in inside:
            if piece.offset < end:
                raise Impossible(f"two pieces lie at the same place of {file.name}")
            end = piece.offset + piece.stored
        if not inside or end > sizes[file.name]:
            raise Impossible(f"{file.name} is used by nothing, or shorter than what is in it")
        found[file.name] = digest_of_chunks(piece.digest for piece in inside)
    return found
