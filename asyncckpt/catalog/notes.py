"""What is said of a committed step later: pins, and metrics that come late.

For everyone who may write to the run, beside its owner too. A change holds the step's folder, so that the step can't
be deleted meanwhile, and the run's alone, so that of two changes none is lost. The notes appear whole and durable, or
not at all; where they are damaged no policy deletes the step.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import msgspec

from asyncckpt.catalog.catalog import Catalog
from asyncckpt.errors import CheckpointNotFoundError, CorruptCheckpointError
from asyncckpt.format import names
from asyncckpt.format.manifest import MAX_MANIFEST, Notes, decode_notes, encode


def pin(catalog: Catalog, step: int, pinned: bool = True) -> None:
    """Durably keep `step` from every policy, or no longer.

    Raises:
        CheckpointNotFoundError: this step is not committed.
        CorruptCheckpointError: its manifest or its notes are damaged. Nothing was changed.
    """
    _change(catalog, step, lambda notes: msgspec.structs.replace(notes, pinned=pinned))


def annotate(catalog: Catalog, step: int, metrics: Mapping[str, float]) -> None:
    """Durably add `metrics` to those of `step`; of the same name, the later one counts.

    Raises:
        CheckpointNotFoundError: this step is not committed.
        CorruptCheckpointError: its manifest or its notes are damaged. Nothing was changed.
    """
    _change(catalog, step, lambda notes: msgspec.structs.replace(notes, metrics={**notes.metrics, **metrics}))


def _change(catalog: Catalog, step: int, change: Callable[[Notes], Notes]) -> None:
    storage, folder = catalog.storage, names.step_name(step)
    try:
        here = storage.hold(folder)
    except FileNotFoundError:
        raise CheckpointNotFoundError(f"no checkpoint of step {step} in {storage.url}") from None
    alone = storage.hold("", exclusive=True)
    assert here is not None and alone is not None
    with here, alone:
        attempt = catalog.manifest(step).attempt

        def changed(data: bytes | None) -> bytes:
            notes = Notes(step, attempt) if data is None else decode_notes(data, step)
            if notes.attempt != attempt:
                notes = Notes(step, attempt, notes.pinned)
            return encode(change(notes))

        try:
            storage.update(f"{folder}/{names.NOTES}", MAX_MANIFEST, changed)
        except CorruptCheckpointError as error:
            raise CorruptCheckpointError(
                f"{error}. While {names.NOTES} is there no policy deletes this step; remove the file, then pin or "
                f"annotate the step anew: {storage.url}/{folder}/{names.NOTES}",
                step=step,
            ) from error
