"""A part by chunks: those that have not changed are shared with earlier checkpoints, the others may be coded."""

from __future__ import annotations

import threading
from collections.abc import Mapping

import msgspec

from asyncckpt.errors import StorageError
from asyncckpt.format import names
from asyncckpt.format.digests import digest
from asyncckpt.format.image import Entry
from asyncckpt.format.manifest import FileRecord, PartRecord
from asyncckpt.format.pieces import DELTA, PAGE, RAW, Piece, Shared, digests_of_files
from asyncckpt.read.pieces import Bench
from asyncckpt.storage.base import WritableFile
from asyncckpt.write.bases import Base, BaseGone
from asyncckpt.write.coding import Coding, encode, layout_of
from asyncckpt.write.parts import NO_TREE, Place, WrittenPart


class CodedPart:
    """Chunks one by one, coded or `plain`, in a file for those that have changed, and one for those that have not.

    A chunk that is what it was in the base, by its digest, is not written where it lies in a file of unchanged ones:
    that is shared. Where it lies elsewhere, it is written to such a file, once. A chunk that has changed may be coded
    as the difference from what it was; then the files of the base are shared, too.
    """

    def __init__(
        self,
        place: Place,
        coding: Coding,
        entries: Mapping[str, Entry],
        base: Base | None,
        origin: Base | None,
        plain: bool,
    ) -> None:
        """`entries` are what the image holds, after its header, if it is to be coded; from `origin` comes what is the
        `same`.
        """
        self._place, self._coding = place, coding
        self._layout = None if plain else layout_of(place, entries)
        self._base = base if base is not None and base.fits(place.size, place.chunk_size) else None
        self._origin = origin
        self._live = _Growing(place, names.CODED, place.size if self._base is None else self._base.live_size)
        self._still = _Growing(place, names.STILL, 0)
        self._pieces: dict[int, list[tuple[str, Piece]]] = {}
        """By chunk, each piece with the name of its file."""

    def write(self, index: int, data: memoryview, found: str) -> None:
        if self._shared(index, found):
            return
        known = self._known(index)
        unchanged = bool(known) and known[-1][1].digest == found
        hangs = not unchanged and 0 < len(known) <= self._coding.max_chain
        with self._coding.bench() as bench:
            base = None
            if hangs and self._base is not None:
                with self._coding.cores:
                    base = self._base.read(index, len(data), bench)
            self._store(index, data, found, base, self._still if unchanged else self._live, bench)

    def same(self, index: int, length: int, found: str) -> None:
        """Take chunk `index`, of so many bytes, for what it is in the origin: its digest there is `found`.

        Raises:
            StorageError: it is to be written anew, and can't be read there.
        """
        if self._shared(index, found):
            return
        with self._coding.bench() as bench:
            data = None if self._origin is None else self._origin.read(index, length, bench)
            if data is None or digest(data) != found:
                raise StorageError(
                    f"chunk {index} of {self._place.part!r} has not changed since the last save, and can't be read "
                    "there any more; the next save has all of its own",
                    retryable=True,
                )
            self._store(index, data, found, None, self._live, bench)

    def _shared(self, index: int, found: str) -> bool:
        """Whether the chunk lies, with this digest, in files that the base shares."""
        if self._base is None:
            return False
        known = self._base.pieces(index)
        if known[-1][1].digest != found or not all(self._base.shareable(name) for name, _ in known):
            return False
        self._pieces[index] = known
        return True

    def _store(
        self, index: int, data: memoryview, found: str, base: memoryview | None, target: _Growing, bench: Bench
    ) -> None:
        codec, stored = RAW, data
        if self._layout is not None:
            start = index * self._place.chunk_size
            runs = self._layout.runs(start, start + len(data))
            codec, stored = encode(bench, data, runs, base, self._coding, self._place.meter)
        piece = Piece(codec, len(stored), found, 0, target.append(stored))
        before = self._known(index) if codec == DELTA else []
        self._pieces[index] = [*before, (target.name, piece)]

    def finish(self) -> WrittenPart:
        place = self._place
        table = [self._pieces[i] for i in range(len(self._pieces))]
        used = dict.fromkeys(name for pieces in table for name, _ in pieces)
        files = [self._live.finish(), self._still.finish()]
        sizes = {name: size for name, size in zip((self._live.name, self._still.name), files, strict=True) if size}
        for name in used:
            if name not in sizes:
                sizes[name] = self._share(name)
        shared = [Shared(name, self._uses(name)) for name in used]
        order = {name: i for i, name in enumerate(used)}
        coded = [[msgspec.structs.replace(piece, file=order[name]) for name, piece in pieces] for pieces in table]
        record = PartRecord(NO_TREE, None, place.size, place.chunk_size, files=shared, coded=coded)
        digests = digests_of_files(shared, coded, sizes)
        known = {name: FileRecord(sizes[name], digests[name]) for name in used}
        self.abort()
        return WrittenPart(record, known, sum(files), self._live.direct or self._still.direct)

    def abort(self) -> None:
        for file in (self._live, self._still):
            file.abort()

    def _known(self, index: int) -> list[tuple[str, Piece]]:
        """The pieces of the base."""
        return [] if self._base is None else self._base.pieces(index)

    def _uses(self, name: str) -> int:
        """Checkpoints that held this file before."""
        return 0 if self._base is None else self._base.uses(name)

    def _share(self, name: str) -> int:
        """Give a file of the base a name in this attempt, too; its size."""
        assert self._base is not None
        try:
            self._place.storage.share(f"{self._base.folder}/{name}", f"{self._place.folder}/{name}")
        except (FileNotFoundError, StorageError) as error:  # deleted meanwhile, or no more links, or none at all
            raise BaseGone(str(error)) from error
        return self._base.files[name].size


class _Growing:
    """A file that is made when the first piece comes, each piece at the next page. `expected` bytes are reserved."""

    def __init__(self, place: Place, suffix: str, expected: int) -> None:
        self.name = names.coded_file(place.part, place.attempt, suffix, place.rank)
        self.direct = False
        self._place, self._expected = place, expected
        self._lock = threading.Lock()
        self._file: WritableFile | None = None
        self._end = 0

    def append(self, data: memoryview) -> int:
        """Write `data`; returns where."""
        with self._lock:
            if self._file is None:
                key = f"{self._place.folder}/{self.name}"
                self._file = self._place.storage.create(key, self._expected)
            offset = -(-self._end // PAGE) * PAGE
            self._end = offset + len(data)
        with self._place.meter.writing(len(data)):
            self._file.write_at(offset, data)
        return offset

    def finish(self) -> int:
        """The size, once it is durable; 0 where nothing was written, and there is no such file."""
        if self._file is not None:
            self.direct = getattr(self._file, "direct", False)
            with self._place.meter.writing(0):
                self._file.finish(self._end)
        return self._end

    def abort(self) -> None:
        if self._file is not None:
            self._file.abort()
