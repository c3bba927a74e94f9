"""Entries whose shards lie in the images of several ranks, put together: whole, or only a box of each.

Only the chunks that hold what is wanted are read, one rank's image after the other.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from asyncckpt.format.image import ITEM_SIZE, Entry
from asyncckpt.format.manifest import PartRecord
from asyncckpt.format.ranks import Box, SharePart, StoredShard
from asyncckpt.read.reader import CheckpointReader, PartImage, SparseImage, allocate, place

_ALIGN = 64


@dataclass(frozen=True)
class _Job:
    """A shard of the entry `target`, whose box is `wanted`."""

    shard: StoredShard
    wanted: Box
    target: Entry


def assemble(reader: CheckpointReader, part: str, wants: Mapping[str, Box | None] | None) -> PartImage:
    """The entries of `part` that `wants` names, each whole or the box it says; without it, all that the rank may see.

    An entry of which a box is wanted has the shape of the box.

    Raises:
        CheckpointNotFoundError: no such tensor.
        CorruptCheckpointError: some byte that is needed is not what was committed.
    """
    shares = reader.shares(part)
    shards = _by_name(shares)
    own = _own_entries(reader, part, shares[reader.rank], shards, wants)
    wants = dict.fromkeys([*shards, *own]) if wants is None else wants
    jobs: dict[int, list[_Job]] = {}
    entries: dict[str, Entry] = {}
    position = 0
    for name, box in wants.items():
        if name not in shards and name not in own:
            raise reader.no_tensor(part, name)
        known = shards.get(name) or [(reader.rank, own[name])]
        first = known[0][1]
        wanted = box or ((0,) * len(first.shape), first.shape)
        size = math.prod(wanted[1]) * ITEM_SIZE[first.dtype]
        entries[name] = target = Entry(name, first.dtype, tuple(wanted[1]), position, size)
        position += -(-size // _ALIGN) * _ALIGN
        for rank, shard in known:
            if size and _common((shard.offset, shard.size), wanted) is not None:
                jobs.setdefault(rank, []).append(_Job(shard, wanted, target))
    for rank in jobs:
        with reader.sparse(part, shares[rank]):
            pass  # it has its size: what is declared is there, and memory may be taken for it
    buffer = allocate(position)
    for rank, todo in sorted(jobs.items()):
        with reader.sparse(part, shares[rank]) as image:
            _fill(reader, part, image, todo, buffer)
    return PartImage(buffer, entries)


def whole_entries(reader: CheckpointReader, part: str) -> dict[str, Entry]:
    """The entries of `part` that the rank may see, as they would be if they were whole. None of them has an offset.

    Raises:
        CorruptCheckpointError: a header is not what was committed.
    """
    return {
        name: Entry(name, shards[0].dtype, shards[0].shape, 0, math.prod(shards[0].shape) * ITEM_SIZE[shards[0].dtype])
        for name, shards in stored_shards(reader, part).items()
    }


def stored_shards(reader: CheckpointReader, part: str) -> dict[str, list[StoredShard]]:
    """The shards of each entry of `part` that the rank may see: one, where it lies in one image.

    Raises:
        CorruptCheckpointError: a header is not what was committed.
    """
    shares = reader.shares(part)
    shards = _by_name(shares)
    found = {name: [shard for _, shard in known] for name, known in shards.items()}
    own = _own_entries(reader, part, shares[reader.rank], shards, None)
    return found | {name: [shard] for name, shard in own.items()}


def _shards(share: PartRecord) -> Mapping[str, StoredShard]:
    return share.shards if isinstance(share, SharePart) else {}


def _by_name(shares: list[PartRecord]) -> dict[str, list[tuple[int, StoredShard]]]:
    found: dict[str, list[tuple[int, StoredShard]]] = {}
    for rank, share in enumerate(shares):
        for name, shard in _shards(share).items():
            found.setdefault(name, []).append((rank, shard))
    return found


def _own_entries(
    reader: CheckpointReader,
    part: str,
    share: PartRecord,
    shards: Mapping[str, object],
    wants: Mapping[str, Box | None] | None,
) -> dict[str, StoredShard]:
    """What only this rank has."""
    if not share.size or (wants is not None and all(name in shards for name in wants)):
        return {}
    with reader.sparse(part, share) as image:
        entries = image.entries()
    return {
        name: StoredShard(entry.dtype, entry.shape, (0,) * len(entry.shape), entry.shape)
        for name, entry in entries.items()
        if name not in _shards(share)
    }


def _fill(reader: CheckpointReader, part: str, image: SparseImage, jobs: list[_Job], buffer: memoryview) -> None:
    entries = image.entries()
    found = []
    for job in jobs:
        entry = entries.get(job.target.name)
        if entry is None or (entry.dtype, entry.shape) != (job.shard.dtype, job.shard.size):
            raise reader.corrupt(part, "an image does not hold the shard its record names", tensor=job.target.name)
        found.append(entry)
    image.fetch(*(_span(job, entry) for job, entry in zip(jobs, found, strict=True)))
    for job, entry in zip(jobs, found, strict=True):
        box = _common((job.shard.offset, job.shard.size), job.wanted)
        assert box is not None
        source = _array(image.buffer, entry)[_slices(box, job.shard.offset)]
        _array(buffer, job.target)[_slices(box, job.wanted[0])] = source


def _span(job: _Job, entry: Entry) -> tuple[int, int]:
    """The bytes of the image from the first to the last item that is wanted."""
    box = _common((job.shard.offset, job.shard.size), job.wanted)
    assert box is not None
    if box == (job.shard.offset, job.shard.size):
        return place(entry)
    first, last, stride = 0, 0, ITEM_SIZE[entry.dtype]
    for dimension in reversed(range(len(entry.shape))):
        at = box[0][dimension] - job.shard.offset[dimension]
        first += at * stride
        last += (at + box[1][dimension] - 1) * stride
        stride *= entry.shape[dimension]
    return entry.offset + first, entry.offset + last + ITEM_SIZE[entry.dtype]


def _common(a: Box, b: Box) -> Box | None:
    """The box that lies in both; None where none does."""
    starts = tuple(map(max, a[0], b[0]))
    ends = [min(x + m, y + n) for x, m, y, n in zip(*a, *b, strict=True)]
    sizes = tuple(end - start for start, end in zip(starts, ends, strict=True))
    return (starts, sizes) if all(n > 0 for n in sizes) else None


def _slices(box: Box, origin: tuple[int, ...]) -> tuple[slice, ...]:
    return tuple(slice(at - zero, at - zero + n) for at, zero, n in zip(box[0], origin, box[1], strict=True))


def _array(buffer: memoryview, entry: Entry) -> npt.NDArray[np.unsignedinteger]:
    return np.ndarray(entry.shape, f"u{ITEM_SIZE[entry.dtype]}", buffer, entry.offset)
