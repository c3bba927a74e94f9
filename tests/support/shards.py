"""A checkpoint of several ranks, made by hand: one tensor in shards, one to each rank."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from asyncckpt.format import names
from asyncckpt.format.manifest import Chunk, FileRecord, Manifest, digest, encode
from asyncckpt.format.ranks import RankRecord, SharePart, StoredShard, encode_rank_record
from asyncckpt.storage.local import LocalStorage
from support.checkpoints import CODES, PAGE, image_of

Cut = tuple[tuple[int, ...], tuple[int, ...]]


def commit_in_shards(
    root: Path,
    whole: np.ndarray[Any, Any],
    cuts: Sequence[Cut],
    *,
    forge: Callable[[int, StoredShard], StoredShard] = lambda rank, shard: shard,
    lie: Callable[[RankRecord], RankRecord] = lambda record: record,
) -> None:
    """Commit `whole` as the entry "w" of the part "model", as step 1; rank k has the box `cuts[k]` (offset, size).

    `forge` may change what the records say of the shards, and `lie` the records as they are stored.
    """
    storage, attempt, world = LocalStorage(str(root)), names.new_attempt(), len(cuts)
    folder = f"{names.step_name(1)}/{attempt}"
    files: dict[str, FileRecord] = {}
    for rank, (offset, size) in enumerate(cuts):
        storage.begin(folder, shared=True)
        box = tuple(slice(at, at + n) for at, n in zip(offset, size, strict=True))
        _, data = image_of({"w": np.ascontiguousarray(whole[box])})
        chunks = [Chunk("raw", len(c), digest(c)) for c in (data[i : i + PAGE] for i in range(0, len(data), PAGE))]
        file = names.image_file("model", rank)
        storage.put(f"{folder}/{file}", data)
        shard = forge(rank, StoredShard(CODES[whole.dtype.name], whole.shape, offset, size))
        tree = msgspec.Raw(msgspec.json.encode({"w": {"$": "tensor", "n": "w"}} if rank == 0 else None))
        share = SharePart(tree, file, len(data), PAGE, chunks, same=rank > 0, shards={"w": shard})
        record = RankRecord(1, attempt, rank, world, {"model": share})
        text = encode_rank_record(lie(record))
        storage.put(f"{folder}/{names.rank_record(rank)}", text)
        files |= {names.rank_record(rank): FileRecord(len(text), digest(text)), **record.files()}
    manifest = Manifest(1, attempt, 1, world, ["model"], files, "2026-01-01T00:00:00.000+00:00")
    storage.publish(f"{names.step_name(1)}/{names.MANIFEST}", encode(manifest), replace=False)
