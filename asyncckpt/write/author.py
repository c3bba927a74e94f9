"""Commits that no service makes: the run is owned, its leftovers are cleared, and one manifest is published at the end.

For those who write a checkpoint by themselves, in the order that `storage.base` names: conversions, and what drops
into other libraries.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

from asyncckpt.catalog.custody import Custody
from asyncckpt.catalog.ownership import RunLock
from asyncckpt.errors import CheckpointError, CheckpointExistsError
from asyncckpt.format import names
from asyncckpt.format.manifest import FileRecord, Manifest
from asyncckpt.storage.local import LocalStorage

log = logging.getLogger("asyncckpt")


@dataclass(frozen=True)
class Draft:
    """A checkpoint that is being written."""

    step: int
    attempt: str
    replace: bool

    @property
    def folder(self) -> str:
        return f"{names.step_name(self.step)}/{self.attempt}"


class Author:
    """Owns the run in `storage` until it is closed; a context manager. `waiting` is called while another owns it.

    Raises:
        ConflictError: another writer owns it, still after `lock_timeout` seconds.
        StorageError: the storage failed.
    """

    def __init__(self, storage: LocalStorage, lock_timeout: float, waiting: Callable[[], None] = lambda: None) -> None:
        self._storage = storage
        storage.make_root()
        self._lock = RunLock.acquire(storage.root, lock_timeout, waiting=waiting)
        try:
            self._custody = Custody(storage, None)
            self._custody.sweep()
        except BaseException:
            self._lock.release()
            raise

    def begin(self, step: int | None, replace: bool) -> Draft:
        """Make room for a checkpoint of `step`; without one, of the next after the newest that there is, from 1 on.

        Raises:
            CheckpointExistsError: this step is committed, and not to be replaced.
        """
        catalog = self._custody.catalog
        if step is None:
            step = max(catalog.folders(), default=0) + 1
        elif not replace and catalog.exists(step):
            raise _exists(step)
        draft = Draft(step, names.new_attempt(), replace)
        self._storage.begin(draft.folder, shared=True)
        self._custody.active.add(draft.folder)
        return draft

    def commit(self, draft: Draft, world: int, parts: Sequence[str], files: dict[str, FileRecord]) -> Manifest:
        """Publish the manifest of what is durable, names included.

        Raises:
            CheckpointExistsError: somebody has committed this step meanwhile.
        """
        custody = self._custody
        manifest = Manifest(
            step=draft.step,
            attempt=draft.attempt,
            sequence=custody.next_sequence(),
            world=world,
            parts=list(parts),
            files=dict(sorted(files.items())),
            created=datetime.now(UTC).isoformat(timespec="milliseconds"),
        )
        try:
            replaced = custody.publish(manifest, replace=draft.replace)
        except FileExistsError:
            raise _exists(draft.step) from None
        custody.active.discard(draft.folder)
        try:
            custody.after_commit(manifest, replaced)
        except (CheckpointError, OSError) as error:
            log.warning("clearing what step %d has replaced: %s", draft.step, error)
        return manifest

    def abandon(self, draft: Draft) -> None:
        """Remove what was written of it, as far as that can be done; nobody may be writing it any more."""
        self._custody.active.discard(draft.folder)
        try:
            self._custody.sweep_step(draft.step)
        except (CheckpointError, OSError) as error:
            log.warning("clearing a failed attempt: %s", error)

    def close(self) -> None:
        """Let go of the run. A second call does nothing."""
        self._lock.release()

    def __enter__(self) -> Author:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def __del__(self) -> None:
        lock = getattr(self, "_lock", None)
        if lock is not None:
            lock.release()


def _exists(step: int) -> CheckpointExistsError:
    return CheckpointExistsError(f"step {step} is committed already; give overwrite=True to replace it")
