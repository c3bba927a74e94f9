"""`asyncckpt show`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from asyncckpt.cli import listing, places
from asyncckpt.cli.answers import Answer, safe, table
from asyncckpt.cli.units import show_size
from asyncckpt.policy.records import Record
from asyncckpt.read.contents import StoredTensor, tensors
from asyncckpt.read.reader import CheckpointReader


def show(reference: str, part: str | None) -> Answer:
    """What is in a checkpoint. Its records and headers are verified, its tensors are not read."""
    run, step = places.checkpoint_of(reference)
    with CheckpointReader(run, step) as reader:
        record = run.record(step)
        parts = reader.parts if part is None else [part]
        found = {name: tensors(reader, name) for name in parts}
    data = listing.as_data(record) | {
        "run": run.storage.url,
        "parts": {name: _part_data(reader, name, found[name]) for name in parts},
    }
    return Answer(data, _lines(reader, record, found))


def _part_data(reader: CheckpointReader, name: str, found: dict[str, StoredTensor]) -> dict[str, Any]:
    stored = reader.part(name)
    return {
        "file": stored.file,
        "files": stored.data_files,
        "bytes": stored.size,
        "chunks": len(stored.digests),
        "tensors": [
            {"name": t.name, "dtype": t.dtype, "shape": list(t.shape), "bytes": t.nbytes} for t in found.values()
        ],
    }


def _lines(reader: CheckpointReader, record: Record, found: dict[str, dict[str, StoredTensor]]) -> Iterator[str]:
    manifest = reader.manifest
    yield f"step {record.step}, attempt {manifest.attempt}, committed {manifest.created}, {show_size(manifest.size)}"
    if record.metrics:
        yield f"metrics: {safe(listing.show_metrics(record.metrics))}"
    for remark in listing.remarks(record):
        yield f"note: {remark}"
    for name, tensors_ in found.items():
        stored = reader.part(name)
        yield ""
        if not stored.size:
            yield f"{name}: no tensors, values only"
            continue
        yield f"{name}: {len(tensors_)} tensors, {show_size(stored.size)} in {', '.join(stored.data_files)}"
        rows = [[t.name, t.dtype, _shape(t.shape), show_size(t.nbytes)] for t in tensors_.values()]
        yield from table(["  TENSOR", "DTYPE", "SHAPE", "SIZE"], [[f"  {n}", *rest] for n, *rest in rows], right=[3])


def _shape(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape)) or "scalar"
