"""What is there: a checkpoint exists if and only if `step-N/manifest.json` exists."""

from __future__ import annotations

import errno
import logging
import math
from collections.abc import Mapping
from datetime import UTC, datetime

from asyncckpt.errors import CheckpointNotFoundError, CorruptCheckpointError, StorageError
from asyncckpt.format import names
from asyncckpt.format.manifest import (
    MAX_MANIFEST,
    Manifest,
    Notes,
    Rewinds,
    decode_manifest,
    decode_notes,
    decode_rewinds,
)
from asyncckpt.policy.records import Record
from asyncckpt.storage.base import Hold, Storage

log = logging.getLogger("asyncckpt")
OURS = {errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EACCES, errno.EPERM, errno.EINTR, errno.EAGAIN}
"""Errors that speak of the process that reads, not of what it reads."""


class Catalog:
    """The checkpoints in `storage`. Every call looks anew."""

    def __init__(self, storage: Storage) -> None:
        self.storage = storage

    def tiers(self, step: int) -> list[Catalog]:
        """Where `step` can be read, what is best first."""
        return [self]

    def committed(self) -> list[int]:
        """Steps that have a manifest, oldest first, those of abandoned branches included."""
        return [step for step in self.folders() if self.exists(step)]

    def folders(self) -> list[int]:
        """Steps that have a folder, committed or not, oldest first."""
        return sorted(s for s in map(names.parse_step, self.storage.list("")) if s is not None)

    def exists(self, step: int) -> bool:
        return names.MANIFEST in self.storage.list(names.step_name(step))

    def manifest(self, step: int) -> Manifest:
        """The verified manifest of `step`.

        Raises:
            CheckpointNotFoundError: this step is not committed.
            CorruptCheckpointError: its manifest is damaged.
        """
        try:
            data = self.storage.read(f"{names.step_name(step)}/{names.MANIFEST}", MAX_MANIFEST)
        except FileNotFoundError:
            raise CheckpointNotFoundError(f"no checkpoint of step {step} in {self.storage.url}") from None
        return decode_manifest(data, step)

    def notes(self, step: int) -> Notes | None:
        """What was noted of `step` after its commit, if anything was.

        Raises:
            CorruptCheckpointError: the notes are damaged.
        """
        try:
            data = self.storage.read(f"{names.step_name(step)}/{names.NOTES}", MAX_MANIFEST)
        except FileNotFoundError:
            return None
        return decode_notes(data, step)

    def records(self, before: int | None = None) -> list[Record]:
        """All that are committed, oldest first; damaged ones and those of branches that were left are among them.

        With `before`, which branches were left is told as it was before the commit of that sequence.

        Raises:
            CorruptCheckpointError: the record of the rewinds is damaged.
            StorageError: this process may not read, or has no room to.
        """
        rewinds = self.rewinds() if before is None else self.rewinds().before(before)
        found = []
        for step in self.folders():
            present = self.storage.list(names.step_name(step))
            if names.MANIFEST in present:
                record = self._record_of(step, names.NOTES in present, rewinds)
                found += [record] if record is not None else []
        return found

    def record(self, step: int) -> Record:
        """What is known of `step`: see `records`.

        Raises:
            CheckpointNotFoundError: it is not committed.
        """
        noted = names.NOTES in self.storage.list(names.step_name(step))
        record = self._record_of(step, noted, self.rewinds())
        if record is None:
            raise CheckpointNotFoundError(f"no checkpoint of step {step} in {self.storage.url}")
        return record

    def _record_of(self, step: int, noted: bool, rewinds: Rewinds) -> Record | None:
        """None where it went while we were looking."""
        try:
            manifest = self.manifest(step)
        except CheckpointNotFoundError:
            return None
        except (CorruptCheckpointError, StorageError) as error:
            return Record(step, damaged=True, doubt=_doubt(error))
        notes, doubt = None, ""
        try:
            notes = self.notes(step) if noted else None
        except (CorruptCheckpointError, StorageError) as error:
            doubt = _doubt(error)
        metrics = _numbers(manifest.metrics)
        if notes is not None and notes.attempt == manifest.attempt:
            metrics |= _numbers(notes.metrics)
        return Record(
            step=step,
            attempt=manifest.attempt,
            sequence=manifest.sequence,
            created=_time(manifest.created),
            size=manifest.size,
            parts=tuple(manifest.parts),
            exports=tuple(manifest.exports),
            omitted=tuple(manifest.omitted),
            metrics=metrics,
            pinned=notes is not None and notes.pinned,
            finite=manifest.finite,
            rewound=rewinds.covers(manifest),
            doubt=doubt,
        )

    def hold(self, step: int) -> Hold | None:
        """Keep `step` from being deleted while it is read. None where that can't be had: reading goes on without it."""
        try:
            return self.storage.hold(names.step_name(step))
        except (FileNotFoundError, StorageError) as error:
            log.debug("step %d is read unheld: %s", step, error)
            return None

    def rewinds(self) -> Rewinds:
        """Which branches were left.

        Raises:
            CorruptCheckpointError: the record is damaged.
        """
        try:
            data = self.storage.read(names.REWINDS, MAX_MANIFEST)
        except FileNotFoundError:
            return Rewinds()
        try:
            return decode_rewinds(data)
        except CorruptCheckpointError as error:
            raise CorruptCheckpointError(
                f"{self.storage.url}/{names.REWINDS}: {error}. Without it, checkpoints of a branch that was left look "
                "like the newest. Restore an explicit step, or remove the file if this run was never rewound."
            ) from error

    def candidates(self) -> list[int]:
        """Committed steps that were not rewound, newest first. One with a damaged manifest is among them."""
        rewinds = self.rewinds()
        steps = self.committed()[::-1]
        return [s for s in steps if not self._is_rewound(s, rewinds)]

    def is_rewound(self, step: int) -> bool:
        """Whether `step` lies on a branch that was left; False where its manifest can't tell."""
        return self._is_rewound(step, self.rewinds())

    def _is_rewound(self, step: int, rewinds: Rewinds) -> bool:
        try:
            return bool(rewinds.rewinds) and rewinds.covers(self.manifest(step))
        except CorruptCheckpointError:
            return False
        except StorageError as error:
            if error.errno in OURS:
                raise
            return False
        except CheckpointNotFoundError:
            return True


def _doubt(error: CorruptCheckpointError | StorageError) -> str:
    """In words, what can't be read; an error of the process that reads is raised."""
    if isinstance(error, StorageError) and error.errno in OURS:
        raise error
    return str(error)


def _numbers(metrics: Mapping[str, float | None]) -> dict[str, float]:
    return {name: math.nan if value is None else value for name, value in metrics.items()}


def _time(text: str) -> datetime | None:
    try:
        time = datetime.fromisoformat(text)
        return time.replace(tzinfo=UTC) if time.tzinfo is None else time.astimezone(UTC)
    except (ValueError, OverflowError):
        return None
