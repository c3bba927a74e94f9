"""A part as it is, in a file of its own."""

from __future__ import annotations

from asyncckpt.errors import StorageError
from asyncckpt.format.digests import digest_of_chunks
from asyncckpt.format.manifest import Chunk, FileRecord, PartRecord
from asyncckpt.format.pieces import RAW
from asyncckpt.write.coding import Trial
from asyncckpt.write.parts import NO_TREE, Place, WrittenPart


class RawPart:
    """The image, as it is, in a file of its own; a `trial` sees its chunks too."""

    def __init__(self, place: Place, trial: Trial | None = None) -> None:
        self._place, self._trial = place, trial
        self._name = place.file
        self._file = place.storage.create(f"{place.folder}/{self._name}", place.size, steady=True)
        self._chunks: dict[int, Chunk] = {}

    def write(self, index: int, data: memoryview, found: str) -> None:
        self._chunks[index] = Chunk(RAW, len(data), found)
        with self._place.meter.writing(len(data)):
            self._file.write_at(index * self._place.chunk_size, data)
        if self._trial is not None:
            self._trial.see(index, data)

    def same(self, index: int, length: int, found: str) -> None:
        raise StorageError(f"chunk {index} of {self._place.part!r} was left out of a save that is stored raw")

    def finish(self) -> WrittenPart:
        place = self._place
        direct = getattr(self._file, "direct", False)
        with place.meter.writing(0):
            self._file.finish()
        chunks = [self._chunks[i] for i in range(len(self._chunks))]
        record = PartRecord(NO_TREE, self._name, place.size, place.chunk_size, chunks)
        known = FileRecord(place.size, digest_of_chunks(chunk.digest for chunk in chunks))
        return WrittenPart(record, {self._name: known}, place.size, direct)

    def abort(self) -> None:
        self._file.abort()
