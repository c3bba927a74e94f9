"""What is there: a checkpoint exists if and only if `step-N/manifest.json` exists."""

from __future__ import annotations

import errno

from asyncckpt.errors import CheckpointNotFoundError, CorruptCheckpointError, StorageError
from asyncckpt.format import names
from asyncckpt.format.manifest import MAX_MANIFEST, Manifest, Rewinds, decode_manifest, decode_rewinds
from asyncckpt.storage.base import Storage

OURS = {errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EACCES, errno.EPERM, errno.EINTR, errno.EAGAIN}
"""Errors that speak of the process that reads, not of what it reads."""


class Catalog:
    """The checkpoints in `storage`. Every call looks anew."""

    def __init__(self, storage: Storage) -> None:
        self.storage = storage

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
