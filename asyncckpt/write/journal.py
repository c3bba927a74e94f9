"""What a mirror has of a step that is not committed there yet: the files whose bytes were reported durable.

A file that is there may be a part of what it is to be; so this is written down, beside the checkpoints that are copied,
after each one. Where it is lost, files are copied that need not have been. Only the mirror's owner writes it.
"""

from __future__ import annotations

import logging

import msgspec

from asyncckpt.errors import CorruptCheckpointError, StorageError
from asyncckpt.format import names
from asyncckpt.format.manifest import MAX_MANIFEST
from asyncckpt.format.seal import VERSION, seal, unseal
from asyncckpt.storage.base import Storage

log = logging.getLogger("asyncckpt")


class Mirroring(msgspec.Struct, frozen=True):
    """By folder of an attempt, the names of files that are whole at `target`."""

    target: str
    files: dict[str, list[str]] = {}
    format: int = VERSION


class Journal:
    """Not safe for threads."""

    def __init__(self, storage: Storage, target: str) -> None:
        self._storage, self._target = storage, target
        self._files: dict[str, list[str]] = {}
        try:
            found = unseal(storage.read(names.MIRRORING, MAX_MANIFEST), Mirroring, names.MIRRORING)
            self._files = dict(found.files) if found.target == target else {}
        except FileNotFoundError:
            pass
        except (CorruptCheckpointError, StorageError) as error:
            log.info("files are mirrored once more: %s", error)

    def whole(self, folder: str) -> set[str]:
        """The files of `folder` that need not be copied again where they are still there."""
        return set(self._files.get(folder, ()))

    def add(self, folder: str, name: str) -> None:
        self._files.setdefault(folder, []).append(name)
        self._store()

    def drop(self, folder: str) -> bool:
        """Forget `folder`; whether anything was known of it."""
        known = self._files.pop(folder, None) is not None
        if known:
            self._store()
        return known

    def _store(self) -> None:
        try:
            if not self._files:
                self._storage.delete(names.MIRRORING)
                return
            self._storage.publish(names.MIRRORING, seal(Mirroring(self._target, self._files)), replace=True)
        except (OSError, CorruptCheckpointError) as error:
            log.info("what is mirrored already can't be noted: %s", error)
