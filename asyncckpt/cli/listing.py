"""`asyncckpt ls` and `path`."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

from asyncckpt.catalog.catalog import Catalog
from asyncckpt.cli import places
from asyncckpt.cli.answers import Answer, table
from asyncckpt.cli.units import show_size
from asyncckpt.errors import CheckpointNotFoundError
from asyncckpt.format import names
from asyncckpt.policy.records import Record


def ls(location: str) -> Answer:
    """All committed checkpoints of a run, oldest first."""
    run = places.run_of(location)
    records = run.records()
    return Answer({"run": run.storage.url, "checkpoints": [as_data(r) for r in records]}, _lines(records))


def _lines(records: list[Record]) -> Iterable[str]:
    head = ["STEP", "CREATED (UTC)", "SIZE", "PARTS", "METRICS", "REMARKS"]
    rows = [
        [
            str(record.step),
            "-" if record.created is None else f"{record.created:%Y-%m-%d %H:%M:%S}",
            "-" if record.damaged else show_size(record.size),
            ",".join(record.parts) or "-",
            show_metrics(record.metrics) or "-",
            "; ".join(remarks(record)),
        ]
        for record in records
    ]
    return table(head, rows, right=(0, 2))


def remarks(record: Record) -> list[str]:
    """What a person must know of a checkpoint beside its numbers."""
    said = {
        "pinned": record.pinned,
        f"lacks {', '.join(record.omitted)}": not record.complete,
        "holds NaN or inf": record.finite is False,
        "left by a rewind": record.rewound,
    }
    found = [text for text, holds in said.items() if holds]
    if record.doubt:
        found.append(f"damaged: {record.doubt}" if record.damaged else record.doubt)
    return found


def as_data(record: Record) -> dict[str, Any]:
    return {
        "step": record.step,
        "attempt": record.attempt,
        "sequence": record.sequence,
        "created": record.created.isoformat() if record.created else None,
        "bytes": record.size,
        "parts": list(record.parts),
        "exports": list(record.exports),
        "omitted": list(record.omitted),
        "complete": record.complete,
        "metrics": finite(record.metrics),
        "pinned": record.pinned,
        "finite": record.finite,
        "rewound": record.rewound,
        "damaged": record.damaged,
        "doubt": record.doubt,
    }


def show_metrics(metrics: Mapping[str, float | None]) -> str:
    return " ".join(f"{name}={math.nan if value is None else value:.6g}" for name, value in metrics.items())


def finite(metrics: Mapping[str, float | None]) -> dict[str, float | None]:
    """JSON has neither NaN nor inf."""
    return {k: v if v is not None and math.isfinite(v) else None for k, v in metrics.items()}


def path(reference: str, part: str | None) -> Answer:
    """The folder with the files of a checkpoint, or the file of one part."""
    run, step = places.checkpoint_of(reference)
    found = f"{run.storage.url}/{names.step_name(step)}/{run.manifest(step).attempt}"
    if part is not None:
        found = _file_of(run, step, part)
    return Answer({"step": step, "path": found}, [found], exact=True)


def _file_of(run: Catalog, step: int, part: str) -> str:
    from asyncckpt.read.reader import CheckpointReader

    with CheckpointReader(run, step) as reader:
        reader.check_alone()
        stored = reader.part(part)
    file = stored.file
    if stored.size and file is None:
        raise CheckpointNotFoundError(f"step {step}, part {part!r} is coded, and so is no file that others can read")
    if file is None:
        raise CheckpointNotFoundError(f"step {step}, part {part!r} holds no tensors, and so has no file")
    return f"{run.storage.url}/{names.step_name(step)}/{reader.manifest.attempt}/{file}"
