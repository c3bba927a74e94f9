"""What only the owner of a run does: give out sequence numbers, clear leftovers, retire, delete, rewind.

Deleting makes a checkpoint not exist first (its manifest, durably), and removes bytes after. The newest verified
checkpoint is never deleted by retention; *verified* means made durable by this process, or digest-checked since its
start. What is pinned or being read, by whatever process, is not deleted at all. No clock and no file time is ever
asked.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

from asyncckpt.catalog.catalog import Catalog
from asyncckpt.errors import CheckpointBusyError, CheckpointNotFoundError, CorruptCheckpointError, StorageError
from asyncckpt.format import names
from asyncckpt.format.manifest import Manifest, Rewind, Rewinds, encode
from asyncckpt.policy.keep import Keep, Policy, candidates, judge, sound
from asyncckpt.policy.records import Record
from asyncckpt.policy.stale import needed
from asyncckpt.storage.base import Hold, Storage

log = logging.getLogger("asyncckpt")


def _kinds(records: list[Record]) -> list[list[Record]]:
    """What a restore may want the newest of: any checkpoint, a complete one, one not known to hold NaN or inf."""
    present = candidates(records)
    whole = [r for r in present if r.complete]
    return [present, whole, [r for r in whole if sound(r)]]


class Custody:
    """The owner's hand on a run. Not safe for threads: the service calls it one at a time.

    `check` raises where the run belongs to another by now: it is called before anything is changed.
    """

    def __init__(self, storage: Storage, keep: Keep | None, check: Callable[[], None] = lambda: None) -> None:
        self.storage = storage
        self.check = check
        self.catalog = Catalog(storage)
        self.keep = keep
        self.verified: set[int] = set()
        self.active: set[str] = set()
        """Folders of the attempts that are being written now: never leftovers."""
        self.spared: Callable[[Record], bool] = lambda record: False
        """What no policy may delete yet, for a reason that only its owner knows."""
        self.recycle: Callable[[str], None] = lambda folder: None
        """Takes what it can use of the folder of an attempt that was committed, and is of no checkpoint any more."""
        self._postponed: set[int] = set()
        """Steps that were being read when something of theirs was to be removed."""
        self._sequence = self._highest_sequence()

    def _highest_sequence(self) -> int:
        highest = self.catalog.rewinds().sequence
        for step in self.catalog.committed():
            try:
                highest = max(highest, self.catalog.manifest(step).sequence)
            except (CorruptCheckpointError, CheckpointNotFoundError, StorageError):
                continue
        return highest

    def next_sequence(self) -> int:
        self._sequence += 1
        return self._sequence

    @property
    def sequence(self) -> int:
        """The highest that was ever given out, as far as is known."""
        return self._sequence

    @property
    def postponed(self) -> bool:
        """Whether something could not be removed, for it was being read."""
        return bool(self._postponed)

    def go_on_from(self, sequence: int) -> None:
        """Give out only sequence numbers that are higher."""
        self._sequence = max(self._sequence, sequence)

    def sweep(self) -> None:
        """Remove what attempts that never committed have left. Foreign files stay, and so does what is in doubt."""
        self.check()
        for name in self.storage.list(""):
            if names.is_temporary(name) or names.is_spare(name):
                self.storage.delete(name)
        for step in self.catalog.folders():
            self.sweep_step(step)

    def sweep_step(self, step: int) -> None:
        """`sweep`, for one step. Of one that somebody reads nothing goes: it may be an attempt that was replaced."""
        folder = names.step_name(step)
        self.check()
        if names.MANIFEST not in self.storage.list(folder):
            self._clear_uncommitted(folder)
            return
        held = self._alone(folder)
        if held is None:
            self._postponed.add(step)
            return
        with held:
            self._clear_replaced(step, folder)

    def _alone(self, folder: str) -> Hold | None:
        """A hold of `folder` that keeps readers out; None where there are some."""
        return self.storage.hold(folder, exclusive=True, wait=False)

    def _clear_uncommitted(self, folder: str) -> None:
        present = self.storage.list(folder)
        if any(map(names.is_attempt, present)):
            self.storage.delete(f"{folder}/{names.MANIFEST}")  # an unlink that was cut short may not be durable
        for name in present:
            if names.is_attempt(name) and f"{folder}/{name}" not in self.active:
                self.storage.remove_folder(f"{folder}/{name}")
            elif names.is_temporary(name) or (name == names.NOTES and self._is_ours(folder)):
                self.storage.delete(f"{folder}/{name}")
        self.storage.remove_folder(folder)

    def _is_ours(self, folder: str) -> bool:
        """Whether the notes in `folder` are notes of ours, and not a foreign file of that name."""
        try:
            return self.catalog.notes(names.parse_step(folder) or 0) is not None
        except (CorruptCheckpointError, StorageError):
            return False

    def _clear_replaced(self, step: int, folder: str) -> None:
        present = self.storage.list(folder)
        try:
            keep = self.catalog.manifest(step).attempt
        except (CorruptCheckpointError, CheckpointNotFoundError):
            return
        stale = [n for n in present if names.is_attempt(n) and n != keep and f"{folder}/{n}" not in self.active]
        if stale:
            self.storage.settle(f"{folder}/{stale[0]}")  # the manifest that took their place may not be durable
        for name in stale:
            self.storage.remove_folder(f"{folder}/{name}")
        for name in filter(names.is_temporary, present):
            self.storage.delete(f"{folder}/{name}")

    def trust(self, step: int) -> None:
        """A reader has digest-checked `step`: once its names are durable too, retention may rely on it."""
        attempt = self.attempt_of(step)
        if attempt is not None:
            self.storage.settle(f"{names.step_name(step)}/{attempt}")
            self.verified.add(step)

    def attempt_of(self, step: int) -> str | None:
        """The attempt that `step` is committed as; None where it is not committed, or its manifest is damaged."""
        try:
            return self.catalog.manifest(step).attempt
        except (CorruptCheckpointError, CheckpointNotFoundError):
            return None

    def publish(self, manifest: Manifest, *, replace: bool) -> str | None:
        """Commit what `manifest` names, which is durable, names included; the attempt whose place it took, if any.

        Raises:
            FileExistsError: this step is committed, and not to be replaced.
            ConflictError: the run is not this writer's any more.
        """
        replaced = self.attempt_of(manifest.step) if replace else None
        self.check()
        self.storage.publish(f"{names.step_name(manifest.step)}/{names.MANIFEST}", encode(manifest), replace=replace)
        self.verified.add(manifest.step)
        return replaced

    def after_commit(self, manifest: Manifest, replaced: str | None) -> list[int]:
        """Remove the attempt that a commit replaced; apply retention. Returns the steps retired."""
        if replaced is not None and replaced != manifest.attempt:
            self._remove_replaced(manifest.step, replaced)
        return self.tidy()

    def tidy(self) -> list[int]:
        """Remove what could not be removed before; apply retention. Returns the steps retired."""
        postponed, self._postponed = self._postponed, set()
        for step in postponed:
            self.sweep_step(step)
        return self.retire()

    def _remove_replaced(self, step: int, attempt: str) -> None:
        folder = names.step_name(step)
        held = self._alone(folder)
        if held is None:
            self._postponed.add(step)
            return
        with held:
            self.check()
            self.recycle(f"{folder}/{attempt}")
            self.storage.remove_folder(f"{folder}/{attempt}")

    def retire(self, policy: Policy | None = None) -> list[int]:
        """Delete what `policy`, or else `keep`, lets go, branches that were left first. Returns the steps."""
        keep = policy or self.keep
        if keep is None:
            return []
        records = self.catalog.records()
        safe = self._safe(records)
        verdicts = judge(records, keep)
        going = [r for r in records if safe and not (verdicts[r.step].stays or r.step in safe or self.spared(r))]
        retired = []
        for record in sorted(going, key=lambda r: not r.rewound):
            try:
                self.delete(record.step, recycled=record.attempt)
            except CheckpointBusyError as error:
                log.debug("retention: %s", error)
            else:
                retired.append(record.step)
        return retired

    def _safe(self, records: list[Record]) -> set[int]:
        """The newest verified of each kind that a restore may want; of a kind none of which is verified, all.

        And those that a restore of these takes stale parts from. Empty where nothing at all is verified: then nothing
        may be deleted.
        """
        kinds = _kinds(records)
        if not any(r.step in self.verified for r in kinds[0]):
            return set()
        safe: set[int] = set()
        for kind in kinds:
            steps = {r.step for r in kind}
            verified = steps & self.verified
            safe |= {max(verified)} if verified else steps
        present = candidates(records)
        return safe | needed(present, [r for r in present if r.step in safe]).keys()

    def vouch(self, check: Callable[[int], bool]) -> None:
        """Verify the newest of each kind that a restore may want, so that retention has something to rely on.

        `check` reads a step, and says whether it is whole; of each kind, the newest for which it does is trusted.
        """
        damaged: set[int] = set()
        for kind in _kinds(self.catalog.records()):
            for step in [r.step for r in reversed(kind) if r.step not in damaged]:
                if step in self.verified or check(step):
                    self.trust(step)
                    break
                damaged.add(step)

    def delete(self, step: int, *, recycled: str = "") -> None:
        """Make `step` not exist, then remove its bytes, but for those that `recycle` takes of the attempt `recycled`.

        Raises:
            ConflictError: the run belongs to another writer by now.
            CheckpointBusyError: it is pinned, or being read.
            CorruptCheckpointError: its notes are damaged, so that it may be pinned.
        """
        folder = names.step_name(step)
        self.check()
        if names.MANIFEST in self.storage.list(folder):
            held = self._alone(folder)
            if held is None:
                raise CheckpointBusyError(f"step {step} of {self.storage.url} is being read; delete it later")
            with held:  # nobody can begin to read it, or pin it, until it does not exist
                self._check_unpinned(step)
                self.verified.discard(step)
                self.storage.delete(f"{folder}/{names.MANIFEST}")
                if recycled:
                    self.recycle(f"{folder}/{recycled}")
        self.sweep_step(step)

    def _check_unpinned(self, step: int) -> None:
        notes = self.catalog.notes(step)
        if notes is not None and notes.pinned:
            raise CheckpointBusyError(f"step {step} of {self.storage.url} is pinned; unpin it first")

    def rewind(self, step: int) -> None:
        """Durably take all checkpoints after `step` that exist now out of what a restore may choose."""
        self.check()
        known = self.catalog.rewinds().rewinds
        record = Rewinds(rewinds=[*known, Rewind(step=step, sequence=self._sequence)])
        self.storage.publish(names.REWINDS, encode(record), replace=True)
