"""Chunks out of the files that hold their pieces: read, decoded, and held against their digest."""

from __future__ import annotations

import mmap
from collections.abc import Sequence
from typing import TYPE_CHECKING

from asyncckpt.errors import CorruptCheckpointError
from asyncckpt.format.digests import digest
from asyncckpt.format.manifest import PartRecord
from asyncckpt.format.pieces import RAW, Piece
from asyncckpt.storage.base import ReadableFile

if TYPE_CHECKING:  # it loads numpy and zstd, which what is raw does not need
    from asyncckpt.codec import Coder


class Bench:
    """What one thread needs to decode: a coder, and memory of some chunks that is used again."""

    def __init__(self) -> None:
        self._coder: Coder | None = None
        self._held: dict[str, mmap.mmap] = {}

    @property
    def coder(self) -> Coder:
        if self._coder is None:
            from asyncckpt.codec import Coder

            self._coder = Coder()
        return self._coder

    def buffer(self, name: str, size: int) -> memoryview:
        """The first `size` bytes of the memory under this name, which grows to the most that was asked for."""
        held = self._held.get(name)
        if held is None or len(held) < size:
            held = self._held[name] = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        return memoryview(held)[:size]


class PieceReader:
    """The chunks of `part`, whose `data_files` are open as `files`."""

    def __init__(self, part: PartRecord, files: Sequence[ReadableFile]) -> None:
        self._part, self._files = part, files

    def read_into(self, index: int, target: memoryview, bench: Bench) -> None:
        """Fill `target`, which is as long as chunk `index`. Memory is that of `target` three times at most.

        Raises:
            CorruptCheckpointError: its bytes are not there, or not what was committed; `target` holds anything then.
        """
        pieces = self._part.pieces(index)
        base: memoryview | None = None
        for i, piece in enumerate(pieces):
            out = target if i == len(pieces) - 1 else bench.buffer(f"base {i % 2}", len(target))
            if piece.codec == RAW:
                self._fetch(index, piece, out)
            else:
                stored = bench.buffer("stored", piece.stored)
                self._fetch(index, piece, stored)
                self._decode(index, piece, stored, out, base, bench.coder)
            base = out
        if digest(target) != pieces[-1].digest:
            raise self._corrupt(index, pieces[-1], "is not what was committed")

    def _fetch(self, index: int, piece: Piece, buffer: memoryview) -> None:
        if self._files[piece.file].read_into(piece.offset, buffer) != len(buffer):
            raise self._corrupt(index, piece, "is cut off by its end")

    def _decode(
        self, index: int, piece: Piece, stored: memoryview, out: memoryview, base: memoryview | None, coder: Coder
    ) -> None:
        try:
            coder.decode(piece.codec, stored, out, base)
        except CorruptCheckpointError as error:
            raise self._corrupt(index, piece, f"can't be decoded: {error}") from error

    def _corrupt(self, index: int, piece: Piece, why: str) -> CorruptCheckpointError:
        file = self._part.data_files[piece.file]
        return CorruptCheckpointError(f"chunk {index} of {file} {why}", chunk=index)
