"""The records of a checkpoint that several ranks saved together: one of each rank.

A tensor that is spread over the ranks, or stored by one of them for all, is an entry whose shards lie in their images:
each shard is the entry of the same name in the image of its rank. An entry that no record lists as a shard is a
rank's own. A tree names entries as ever; what they are made of is for the reader to find out.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Protocol

import msgspec

from asyncckpt.errors import CorruptCheckpointError
from asyncckpt.format import names
from asyncckpt.format.image import ITEM_SIZE, MAX_DIMENSIONS
from asyncckpt.format.manifest import (
    FileRecord,
    Manifest,
    PartRecord,
    check_part,
    check_record_bytes,
    digest_of_chunks,
)
from asyncckpt.format.pieces import Impossible, digests_of_files
from asyncckpt.format.seal import VERSION, seal, unseal

Box = tuple[tuple[int, ...], tuple[int, ...]]
"""Offsets and sizes, by dimension."""


class StoredShard(msgspec.Struct, frozen=True, array_like=True):
    """Of an entry of `dtype` and `shape`, the box of `size` at `offset`."""

    dtype: str
    shape: tuple[int, ...]
    offset: tuple[int, ...]
    size: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.size) * ITEM_SIZE[self.dtype]


class SharePart(PartRecord, frozen=True):
    """What one rank has of a part. With `same` its tree is that of rank 0."""

    same: bool = False
    shards: dict[str, StoredShard] = msgspec.field(default_factory=dict)


class RankRecord(msgspec.Struct, frozen=True):
    """What one of several ranks has durably written. `sizes` are those of its coded files, by name."""

    step: int
    attempt: str
    rank: int
    world: int
    parts: dict[str, SharePart]
    sizes: dict[str, int] = {}
    format: int = VERSION

    @property
    def nonfinite(self) -> dict[str, list[str]] | None:
        """By part, its tensors that hold NaN or inf; None where nobody looked."""
        found = {name: part.nonfinite for name, part in self.parts.items()}
        return None if None in found.values() else {name: names_ or [] for name, names_ in found.items()}

    def files(self) -> dict[str, FileRecord]:
        """Its data files, as the manifest names them.

        Raises:
            CorruptCheckpointError: there can't be such files.
        """
        found = {}
        for name, part in self.parts.items():
            if part.file is not None:
                size = sum(c.stored for c in part.chunks)
                found[part.file] = FileRecord(size, digest_of_chunks(c.digest for c in part.chunks))
            try:
                digests = digests_of_files(part.files, part.coded, self.sizes)
            except (Impossible, LookupError) as error:
                raise CorruptCheckpointError(
                    f"step {self.step}, part {name!r} of rank {self.rank}: {error}", step=self.step, part=name
                ) from error
            found |= {file: FileRecord(self.sizes[file], known) for file, known in digests.items()}
        return found


def encode_rank_record(record: RankRecord) -> bytes:
    return seal(record)


def prepared(data: bytes, step: int, attempt: str, rank: int, world: int) -> RankRecord:
    """The prepare record that a rank has left in the storage.

    Raises:
        CorruptCheckpointError: it is damaged, or of another save.
    """
    name = names.rank_record(rank)
    record = unseal(data, RankRecord, f"{name} of step {step}")
    if (record.step, record.attempt, record.rank, record.world) != (step, attempt, rank, world):
        raise CorruptCheckpointError(f"{name} of step {step}: it belongs to another save", step=step)
    return record


def decode_rank_records(data: Iterable[bytes], manifest: Manifest) -> list[RankRecord]:
    """The records that `manifest` vouches for, by rank.

    Raises:
        CorruptCheckpointError: one is not that of the manifest, or they do not add up.
    """
    records, files = [], set()
    for rank, text in enumerate(data):
        record = _decode(text, manifest, rank)
        records.append(record)
        files |= {file for part in record.parts.values() for file in part.data_files}
    if files != manifest.files.keys() - set(manifest.records):
        raise _corrupt(manifest, "the files of the records are not those of the manifest")
    for part in manifest.parts:
        _check_shards(part, records, manifest)
    return records


def _decode(data: bytes, manifest: Manifest, rank: int) -> RankRecord:
    name = names.rank_record(rank)
    check_record_bytes(data, name, manifest)
    record = unseal(data, RankRecord, f"{name} of step {manifest.step}")
    if (record.step, record.attempt, record.rank, record.world) != (
        manifest.step,
        manifest.attempt,
        rank,
        manifest.world,
    ) or sorted(record.parts) != sorted(manifest.parts):
        raise _corrupt(manifest, f"{name} belongs to another attempt than the manifest names")
    for part, share in record.parts.items():
        if not set(share.data_files) <= manifest.files.keys():
            raise _corrupt(manifest, f"part {part!r} of rank {rank}: the manifest does not know its files", part)
        check_part(part, share, manifest, rank)
        if sum(_sound(shard, manifest, part, key).nbytes for key, shard in share.shards.items()) > share.size:
            raise _corrupt(manifest, f"part {part!r} of rank {rank}: shards of more bytes than its image", part)
        if share.same and rank == 0:
            raise _corrupt(manifest, f"part {part!r}: rank 0 has no tree", part)
    return record


def _sound(shard: StoredShard, manifest: Manifest, part: str, key: str) -> StoredShard:
    dimensions = len(shard.shape)
    fits = (
        shard.dtype in ITEM_SIZE
        and dimensions == len(shard.offset) == len(shard.size) <= MAX_DIMENSIONS
        and all(
            at >= 0 and n >= 0 and at + n <= whole < 1 << 62
            for whole, at, n in zip(shard.shape, shard.offset, shard.size, strict=True)
        )
    )
    if not fits:
        raise _corrupt(manifest, f"part {part!r}, tensor {key!r}: a shard that reaches outside", part, key)
    return shard


def _check_shards(part: str, records: list[RankRecord], manifest: Manifest) -> None:
    """The shards of every entry must be that entry, without gap or overlap."""
    by_name: dict[str, list[StoredShard]] = {}
    for record in records:
        for key, shard in record.parts[part].shards.items():
            by_name.setdefault(key, []).append(shard)
    for key, shards in by_name.items():
        first = shards[0]
        if any((p.dtype, p.shape) != (first.dtype, first.shape) for p in shards):
            raise _corrupt(manifest, f"part {part!r}, tensor {key!r}: shards of several tensors", part, key)
        if not is_whole(first.shape, shards):
            raise _corrupt(manifest, f"part {part!r}, tensor {key!r}: its shards leave holes or overlap", part, key)


class Boxed(Protocol):
    """Of something with dimensions, the box of `size` at `offset`."""

    @property
    def offset(self) -> tuple[int, ...]: ...
    @property
    def size(self) -> tuple[int, ...]: ...


def is_whole(shape: tuple[int, ...], boxes: Sequence[Boxed]) -> bool:
    """Whether boxes that lie within `shape` make it up without gap or overlap."""
    whole = math.prod(shape)
    return sum(math.prod(box.size) for box in boxes) == whole and not (len(boxes) > 1 and whole and _overlap(boxes))


def _overlap(shards: Sequence[Boxed]) -> bool:
    """Whether two boxes share an item. Sorted along the first dimension, most need not be compared."""
    boxes = sorted((p for p in shards if math.prod(p.size)), key=lambda p: p.offset)
    for i, a in enumerate(boxes):
        for b in boxes[i + 1 :]:
            if b.offset[0] >= a.offset[0] + a.size[0]:
                break
            if all(x < y + n and y < x + m for x, m, y, n in zip(a.offset, a.size, b.offset, b.size, strict=True)):
                return True
    return False


def _corrupt(
    manifest: Manifest, why: str, part: str | None = None, tensor: str | None = None
) -> CorruptCheckpointError:
    return CorruptCheckpointError(f"step {manifest.step}: {why}", step=manifest.step, part=part, tensor=tensor)
