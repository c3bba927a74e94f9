"""What a mirror has of a run beside its checkpoints: which branches were left, and what was noted of each step."""

from __future__ import annotations

import logging

from asyncckpt.catalog.catalog import Catalog
from asyncckpt.errors import CheckpointNotFoundError, CorruptCheckpointError
from asyncckpt.format import names
from asyncckpt.format.manifest import MAX_MANIFEST, Rewinds, decode_notes, encode
from asyncckpt.storage.base import Storage

log = logging.getLogger("asyncckpt")


class Sidecars:
    """Not safe for threads. The source decides; of rewinds, what only the target knows stays."""

    def __init__(self, source: Catalog, target: Storage) -> None:
        self._source, self._target = source, target
        self._there = Catalog(target)
        self._noted: dict[int, bytes] = {}
        """What the target is known to have."""

    def copy(self) -> None:
        """Bring the target up to date.

        Raises:
            CheckpointError, OSError: the target can't be read or written, or is damaged.
        """
        self.copy_rewinds()
        for step in self._source.folders():
            if names.NOTES in self._source.storage.list(names.step_name(step)):
                self.copy_notes_of(step)

    def copy_rewinds(self) -> None:
        known, there = self._source.rewinds().rewinds, self._there.rewinds().rewinds
        new = [rewind for rewind in known if rewind not in there]
        if new:
            self._target.publish(names.REWINDS, encode(Rewinds(rewinds=[*there, *new])), replace=True)

    def copy_notes_of(self, step: int) -> None:
        """Where the target has the very checkpoint that they are of."""
        key = f"{names.step_name(step)}/{names.NOTES}"
        try:
            data = self._source.storage.read(key, MAX_MANIFEST)
            attempt = decode_notes(data, step).attempt
        except FileNotFoundError:
            return
        except CorruptCheckpointError as error:
            log.info("notes are not mirrored: %s", error)
            return
        if self._noted.get(step) == data or self._attempt_there(step) != attempt:
            return
        alone = self._target.hold("", exclusive=True)
        assert alone is not None
        with alone:
            if self._read_there(key) != data:
                self._target.publish(key, data, replace=True)
        self._noted[step] = data

    def _attempt_there(self, step: int) -> str | None:
        try:
            return self._there.manifest(step).attempt
        except (CorruptCheckpointError, CheckpointNotFoundError):
            return None

    def _read_there(self, key: str) -> bytes | None:
        try:
            return self._target.read(key, MAX_MANIFEST)
        except (FileNotFoundError, CorruptCheckpointError):
            return None
