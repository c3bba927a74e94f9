"""What was committed last of a part: what the next save shares, hangs on as a difference, or need not be told again."""

from __future__ import annotations

import logging
from collections.abc import Mapping

from asyncckpt.errors import CorruptCheckpointError, StorageError
from asyncckpt.format import names
from asyncckpt.format.manifest import FileRecord, PartRecord
from asyncckpt.format.pieces import Piece
from asyncckpt.read.pieces import Bench, PieceReader
from asyncckpt.storage.base import ReadableFile, Storage
from asyncckpt.storage.local import LocalStorage
from asyncckpt.write.messages import Known

log = logging.getLogger("asyncckpt")

SHARED_BY = 50
"""Checkpoints that share a file of unchanged chunks before these are written anew: one damaged inode can't take all."""


class BaseGone(Exception):
    """A file that was to be shared is not there any more, or can't be: write the save anew, without a base."""


class Base:
    """A coded part: the folder where it was committed, its record, and what the manifest says of its files.

    They are open until `close`, so that in a directory they can be read though somebody deletes them.
    """

    def __init__(self, storage: Storage, folder: str, record: PartRecord, files: Mapping[str, FileRecord]) -> None:
        self.folder, self.record, self.files = folder, record, files
        self._uses = {file.name: file.uses + 1 for file in record.files}
        self._open: list[ReadableFile] = []
        self._reader: PieceReader | None = None
        self._told = False
        try:
            for file in record.files:
                self._open.append(storage.open(f"{folder}/{file.name}"))
            self._reader = PieceReader(record, self._open)
        except (FileNotFoundError, StorageError) as error:
            self._do_without(error)
        lasting = self._reader is not None and isinstance(storage, LocalStorage)
        self.known = self._known() if lasting else None
        """What need not come again: it can be shared, and read in any case."""

    def fits(self, size: int, chunk_size: int) -> bool:
        """Whether chunks of such an image may hang on those of this one."""
        return (self.record.size, self.record.chunk_size) == (size, chunk_size)

    @property
    def live_size(self) -> int:
        """Bytes of the file for what had changed then: about as many as there will be again."""
        attempt = self.folder.rpartition("/")[2]
        return sum(file.size for name, file in self.files.items() if name.endswith(f".{attempt}{names.CODED}"))

    def pieces(self, index: int) -> list[tuple[str, Piece]]:
        """Those of a chunk, each with the name of its file."""
        return [(self.record.files[piece.file].name, piece) for piece in self.record.pieces(index)]

    def uses(self, name: str) -> int:
        """Checkpoints that held this file, this one included."""
        return self._uses.get(name, 0)

    def shareable(self, name: str) -> bool:
        return name.endswith(names.STILL) and self.uses(name) < SHARED_BY

    def read(self, index: int, length: int, bench: Bench) -> memoryview | None:
        """A chunk, in memory of `bench`. None where it can't be read: it is done without, and the log says so, once."""
        if self._reader is None:
            return None
        target = bench.buffer("base", length)
        try:
            self._reader.read_into(index, target, bench)
        except (CorruptCheckpointError, StorageError) as error:
            self._do_without(error)
            return None
        return target

    def close(self) -> None:
        """Nobody may be reading any more."""
        files, self._open, self._reader = self._open, [], None
        for file in files:
            file.close()

    def _known(self) -> Known | None:
        shareable = [self.shareable(file.name) for file in self.record.files]
        if not any(shareable):
            return None
        found = (
            bytes.fromhex(pieces[-1].digest) if all(shareable[piece.file] for piece in pieces) else Known.NOTHING
            for pieces in self.record.coded
        )
        return Known(self.record.size, self.record.chunk_size, b"".join(found))

    def _do_without(self, error: Exception) -> None:
        if not self._told:
            log.warning("the last save, %s, can't be read, and is done without: %s", self.folder, error)
        self._told = True
