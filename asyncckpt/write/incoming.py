"""A whole checkpoint out of streams, as a conversion makes it: one process, one image a part."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import msgspec

from asyncckpt.errors import CheckpointError, UnsupportedStateError
from asyncckpt.format import names
from asyncckpt.format.image import Image, Spec, layout
from asyncckpt.format.manifest import FileRecord, Manifest, PartRecord, PrepareRecord, digest, encode
from asyncckpt.storage.local import LocalStorage
from asyncckpt.write.author import Author, Draft
from asyncckpt.write.parts import NO_TREE
from asyncckpt.write.streams import Source, write_image


@dataclass
class IncomingPart:
    """A part that comes: its leaf tree, as JSON, the tensors that this names, and where their bytes come from."""

    name: str
    tree: bytes
    specs: list[Spec] = field(default_factory=list)
    sources: list[Source] = field(default_factory=list)

    @property
    def nbytes(self) -> int:
        return sum(spec.nbytes for spec in self.specs)


def store(
    storage: LocalStorage,
    parts: Sequence[IncomingPart],
    step: int | None = None,
    *,
    overwrite: bool = False,
    lock_timeout: float = 10.0,
) -> Manifest:
    """Commit `parts` as `step` of the run in `storage`, or as the next after its newest.

    Raises:
        CheckpointExistsError: this step is committed already, and `overwrite` is not given.
        ConflictError: another writer owns the run, still after `lock_timeout` seconds.
        UnsupportedStateError: a part can't be called so, or has more tensors than fit one file.
        CheckpointError, CorruptCheckpointError: a source did not give the bytes that it had to.
        StorageError: the storage failed. In all these cases nothing is committed.
    """
    images = [_image(part) for part in parts]
    _check_names(parts)
    with Author(storage, lock_timeout) as author:
        draft = author.begin(step, overwrite)
        try:
            files = _write(storage, draft, parts, images)
            return author.commit(draft, 1, [part.name for part in parts], files)
        except BaseException:
            author.abandon(draft)
            raise


def _image(part: IncomingPart) -> Image | None:
    try:
        return layout(part.specs) if part.specs else None
    except ValueError as error:
        raise UnsupportedStateError(f"part {part.name!r}: {error}", path=part.name) from error


def _check_names(parts: Sequence[IncomingPart]) -> None:
    if not parts:
        raise CheckpointError("there is nothing to store")
    for part in parts:
        if not names.is_part(part.name):
            raise UnsupportedStateError(f"{part.name!r} can't be the name of a part: {names.PART_RULE}", path=part.name)
    if len({part.name.lower() for part in parts}) < len(parts):
        raise UnsupportedStateError("two parts have the same name but for upper and lower case")


def _write(
    storage: LocalStorage, draft: Draft, parts: Sequence[IncomingPart], images: Sequence[Image | None]
) -> dict[str, FileRecord]:
    """Everything but the manifest, names durable; the files."""
    files: dict[str, FileRecord] = {}
    records: dict[str, PartRecord] = {}
    for part, image in zip(parts, images, strict=True):
        record = PartRecord(NO_TREE)
        if image is not None:
            written = write_image(storage, draft.folder, part.name, names.image_file(part.name), image, part.sources)
            record, files = written.record, files | written.files
        records[part.name] = msgspec.structs.replace(record, tree=msgspec.Raw(part.tree))
    text = encode(PrepareRecord(draft.step, draft.attempt, 0, records))
    storage.put(f"{draft.folder}/{names.RECORD}", text)
    storage.settle(draft.folder)
    return files | {names.RECORD: FileRecord(len(text), digest(text))}
