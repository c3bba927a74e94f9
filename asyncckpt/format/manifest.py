"""The records. The existence of `manifest.json` is the commit; everything it vouches for hangs on its digests:

manifest -> size and digest of each file -> prepare record (`state.json`) -> chunk digests -> bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import msgspec

from asyncckpt.errors import CorruptCheckpointError
from asyncckpt.format import names, pieces
from asyncckpt.format.digests import digest as digest
from asyncckpt.format.digests import digest_of_chunks as digest_of_chunks
from asyncckpt.format.pieces import Piece, Shared
from asyncckpt.format.seal import VERSION, seal, unseal

CHUNK_SIZE = 8 << 20
"""Bytes of image in a chunk (the last of a file may be shorter)."""

MAX_MANIFEST = 64 << 20
MAX_RECORD = 4 << 30


class FileRecord(msgspec.Struct, frozen=True):
    """A file of a checkpoint: its size in bytes, and its digest."""

    size: int
    digest: str


class Manifest(msgspec.Struct, frozen=True):
    """The commit of one step. `files` are relative to the folder of the attempt; a metric not finite is null.

    `parts` are those that it has, `exports` those of them that are for reading only: no training is resumed from
    them. `omitted` are the parts of the state that were left out of this save.
    `finite` is whether all floating tensors are, null where nobody looked.

    `world` is how many ranks saved it together: one has one record, several have one each (`format.ranks`).
    """

    step: int
    attempt: str
    sequence: int
    world: int
    parts: list[str]
    files: dict[str, FileRecord]
    created: str
    metrics: Mapping[str, float | None] = {}
    omitted: list[str] = []
    exports: list[str] = []
    finite: bool | None = None
    format: int = VERSION

    @property
    def records(self) -> list[str]:
        """The names of the prepare records, by rank."""
        return [names.RECORD] if self.world == 1 else [names.rank_record(rank) for rank in range(self.world)]

    @property
    def complete(self) -> bool:
        """Whether every part of the state that was given to `save` is here.

        Only a complete checkpoint is enough to resume from: retention counts these, and never deletes the newest.
        """
        return not self.omitted

    @property
    def resumable(self) -> list[str]:
        """The parts that a training is resumed from: those that are no exports."""
        return [part for part in self.parts if part not in self.exports]

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(file.size for file in self.files.values())


class Chunk(msgspec.Struct, frozen=True, array_like=True):
    """How one chunk is stored: its codec, its size in the file, and the digest of its decoded bytes."""

    codec: str
    stored: int
    digest: str


class PartRecord(msgspec.Struct, frozen=True):
    """One part: its leaf tree, and where its image lies (nowhere where the part holds no tensor).

    Either `file` is the image, in `chunks`; or it lies coded in `files`, each chunk in the pieces of one item of
    `coded` (see `pieces`). `nonfinite` names the tensors with NaN or inf, null where nobody looked.
    """

    tree: msgspec.Raw
    file: str | None = None
    size: int = 0
    chunk_size: int = CHUNK_SIZE
    chunks: list[Chunk] = []
    nonfinite: list[str] | None = None
    files: list[Shared] = []
    coded: list[list[Piece]] = []

    @property
    def lengths(self) -> list[int]:
        """Decoded bytes of each chunk."""
        return [min(self.chunk_size, self.size - start) for start in range(0, self.size, self.chunk_size)]

    @property
    def data_files(self) -> list[str]:
        """Names of the files that hold it."""
        return [file.name for file in self.files] if self.file is None else [self.file]

    @property
    def digests(self) -> list[str]:
        """Of each decoded chunk."""
        return [pieces[-1].digest for pieces in self.coded] or [chunk.digest for chunk in self.chunks]

    def pieces(self, index: int) -> Sequence[Piece]:
        """Where chunk `index` lies, in `data_files`."""
        if self.coded:
            return self.coded[index]
        chunk = self.chunks[index]
        return (Piece(chunk.codec, chunk.stored, chunk.digest, 0, index * self.chunk_size),)


class PrepareRecord(msgspec.Struct, frozen=True):
    """What one rank has durably written."""

    step: int
    attempt: str
    rank: int
    parts: dict[str, PartRecord]
    format: int = VERSION


class Rewind(msgspec.Struct, frozen=True):
    """Checkpoints later than `step` with a sequence up to `sequence` were left behind."""

    step: int
    sequence: int


class Rewinds(msgspec.Struct, frozen=True):
    rewinds: list[Rewind] = []
    format: int = VERSION

    def covers(self, manifest: Manifest) -> bool:
        """Whether `manifest` lies on a branch that was left."""
        return any(manifest.step > r.step and manifest.sequence <= r.sequence for r in self.rewinds)

    def before(self, sequence: int) -> Rewinds:
        """Those that were made before the commit of that sequence."""
        return Rewinds(rewinds=[r for r in self.rewinds if r.sequence < sequence])

    @property
    def sequence(self) -> int:
        return max((r.sequence for r in self.rewinds), default=0)


class Notes(msgspec.Struct, frozen=True):
    """What was said of a committed step later. The manifest never changes; these do.

    `metrics` are those of the save `attempt`, and mean nothing for another; a pin is one of the step.
    """

    step: int
    attempt: str
    pinned: bool = False
    metrics: Mapping[str, float | None] = {}
    format: int = VERSION


def encode(record: Manifest | PrepareRecord | Rewinds | Notes) -> bytes:
    return seal(record)


def decode_manifest(data: bytes, step: int) -> Manifest:
    """The manifest of `step`, verified and its names held against the grammar.

    Raises:
        CorruptCheckpointError: broken seal, wrong step, or a name outside the grammar.
    """
    what = f"the manifest of step {step}"
    manifest = unseal(data, Manifest, what)
    fits = (
        manifest.step == step
        and names.is_attempt(manifest.attempt)
        and 1 <= manifest.world <= min(names.MAX_WORLD, len(manifest.files))
        and all(name in manifest.files and manifest.files[name].size <= MAX_RECORD for name in manifest.records)
        and all(names.is_data_file(name) and file.size >= 0 for name, file in manifest.files.items())
        and all(names.is_part(part) for part in (*manifest.parts, *manifest.omitted))
        and not set(manifest.omitted) & set(manifest.parts)
        and set(manifest.exports) <= set(manifest.parts)
    )
    if not fits:
        raise CorruptCheckpointError(f"{what}: its members contradict each other or its place", step=step)
    return manifest


def decode_record(data: bytes, manifest: Manifest) -> PrepareRecord:
    """The prepare record that `manifest` vouches for.

    Raises:
        CorruptCheckpointError: it is not the one of the manifest, or its chunk tables do not add up.
    """
    step, what = manifest.step, f"{names.RECORD} of step {manifest.step}"
    check_record_bytes(data, names.RECORD, manifest)
    record = unseal(data, PrepareRecord, what)
    if (record.step, record.attempt) != (step, manifest.attempt) or sorted(record.parts) != sorted(manifest.parts):
        raise CorruptCheckpointError(f"{what}: it belongs to another attempt than the manifest names", step=step)
    files = {file for part in record.parts.values() for file in part.data_files}
    if files != manifest.files.keys() - {names.RECORD}:
        raise CorruptCheckpointError(f"{what}: its files are not those of the manifest", step=step)
    for name, part in record.parts.items():
        check_part(name, part, manifest)
    return record


def check_record_bytes(data: bytes, name: str, manifest: Manifest) -> None:
    """Hold the bytes of the record `name` against the manifest.

    Raises:
        CorruptCheckpointError: it is not the one that the manifest vouches for.
    """
    known = manifest.files[name]
    if len(data) != known.size or digest(data) != known.digest:
        what = f"{name} of step {manifest.step}"
        raise CorruptCheckpointError(f"{what}: its size or digest is not that of the manifest", step=manifest.step)


def check_part(name: str, part: PartRecord, manifest: Manifest, rank: int | None = None) -> None:
    """Hold one part of a record, of one of several ranks if `rank` is given, against the manifest.

    Raises:
        CorruptCheckpointError: its chunk table does not add up, or is not that of its file.
    """

    def corrupt(why: str) -> CorruptCheckpointError:
        return CorruptCheckpointError(f"step {manifest.step}, part {name!r}: {why}", step=manifest.step, part=name)

    if part.file is None:
        if part.chunks or (part.size and not part.files):
            raise corrupt("it has chunks and no file")
        _check_coded(name, part, manifest, rank, corrupt)
        return
    if part.files or part.coded:
        raise corrupt("it is stored in two ways")
    if part.file != names.image_file(name, rank):
        raise corrupt(f"its file bears the name {part.file!r}")
    if part.size <= 0 or not 4096 <= part.chunk_size <= 1 << 30:
        raise corrupt("its sizes are out of bounds")
    if len(part.chunks) != -(-part.size // part.chunk_size):
        raise corrupt("its chunk table does not cover its image")
    for index, chunk in enumerate(part.chunks):
        if chunk.codec != "raw":
            raise corrupt(f"chunk {index} has the codec {chunk.codec!r}, which this asyncckpt does not know")
        if chunk.stored != min(part.chunk_size, part.size - index * part.chunk_size):
            raise corrupt(f"chunk {index} has an impossible size")
    known = manifest.files[part.file]
    if known.size != sum(c.stored for c in part.chunks) or known.digest != digest_of_chunks(
        c.digest for c in part.chunks
    ):
        raise corrupt("its chunk table is not the one that was committed")


def _check_coded(
    name: str,
    part: PartRecord,
    manifest: Manifest,
    rank: int | None,
    corrupt: Callable[[str], CorruptCheckpointError],
) -> None:
    if part.size < 0 or not 4096 <= part.chunk_size <= pieces.MAX_CHUNK:
        raise corrupt("its sizes are out of bounds")
    if part.size > part.chunk_size * len(part.coded):  # before anything is made of that size
        raise corrupt("its chunk table does not cover its image")
    sizes = {file.name: manifest.files[file.name].size for file in part.files}
    try:
        pieces.check(name, rank, part.lengths, part.files, part.coded)
        digests = pieces.digests_of_files(part.files, part.coded, sizes)
    except pieces.Impossible as error:
        raise corrupt(str(error)) from error
    if any(manifest.files[name].digest != found for name, found in digests.items()):
        raise corrupt("its chunk table is not the one that was committed")


def decode_rewinds(data: bytes) -> Rewinds:
    return unseal(data, Rewinds, names.REWINDS)


def decode_notes(data: bytes, step: int) -> Notes:
    """The notes of `step`.

    Raises:
        CorruptCheckpointError: broken seal, or of another step.
    """
    what = f"{names.NOTES} of step {step}"
    notes = unseal(data, Notes, what)
    if notes.step != step or not names.is_attempt(notes.attempt):
        raise CorruptCheckpointError(f"{what}: it belongs to another step", step=step)
    return notes
