"""The checkpoints of one run, read without owning it: beside a live training, or long after."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, MutableMapping
from pathlib import Path
from typing import Any

from torch.optim import Optimizer

from asyncckpt.arguments import checked_metrics, checked_step
from asyncckpt.catalog import notes
from asyncckpt.catalog.catalog import Catalog
from asyncckpt.distributed.group import ranks_of_this_job
from asyncckpt.errors import CheckpointNotFoundError, CorruptCheckpointError, NotSupportedError, StateMismatchError
from asyncckpt.fetching import Loaded, Wish, fetch, listed
from asyncckpt.format import names
from asyncckpt.policy.records import Record
from asyncckpt.read.reader import CheckpointReader
from asyncckpt.snapshot.apply import Mismatch, Rename, all_or_none, apply, fit, rename_keys
from asyncckpt.snapshot.rng import RngState
from asyncckpt.snapshot.view import View
from asyncckpt.storage.base import Storage
from asyncckpt.storage.local import LocalStorage
from asyncckpt.storage.places import open_storage
from asyncckpt.storage.urls import StorageOptions
from asyncckpt.tiers import Tiers

Directory = str | os.PathLike[str]
"""Or a URL: s3://bucket/run, gs://, az://, file://, memory://."""


class Run:
    """The checkpoints below `directory`, which may be a URL. Every call looks anew; only `annotate`, `pin` and `unpin`
    write. `storage_options` and `mirror_options` are for URLs: see `Checkpointer`.

    With a `mirror`, those of that are among what there is, and is loaded and restored; all else is of `directory`.
    """

    def __init__(
        self,
        directory: Directory,
        storage_options: Mapping[str, Any] | None = None,
        mirror: Directory | None = None,
        mirror_options: Mapping[str, Any] | None = None,
    ) -> None:
        self.options = StorageOptions.of(storage_options)
        self.storage = open_storage(check_directory(directory), self.options)
        self._catalog = Catalog(self.storage)
        self.mirror: Storage | None = None
        if mirror is not None:
            self.mirror = open_storage(check_directory(mirror), StorageOptions.of(mirror_options))
        self._tiers = self._catalog if self.mirror is None else Tiers(self.storage, self.mirror)

    def __repr__(self) -> str:
        return f"Run({self.storage.url!r})"

    @property
    def catalog(self) -> Catalog:
        """All that there is to read."""
        return self._tiers

    def steps(self) -> list[int]:
        """Committed steps, oldest first, without those of branches that were left by `rewind`."""
        return self._tiers.candidates()[::-1]

    def records(self) -> list[Record]:
        """What is known of every committed checkpoint, oldest first: damaged ones and those of branches that were left
        are among them. No byte of theirs is verified but the manifest's."""
        return self._catalog.records()

    def latest(self) -> int | None:
        """The newest of `steps()`; None where nothing is committed. Its bytes have not been verified."""
        return max(self._tiers.candidates(), default=None)

    def exists(self, step: int) -> bool:
        """Whether `step` is committed, on a branch that was left or not."""
        return self._tiers.exists(step)

    def taken(self) -> list[int]:
        """Steps of which there is anything at all, committed or left over."""
        return self._tiers.folders()

    def path(self, step: int) -> Path | str:
        """The folder with the files of `step`, such as `path(step) / "model.safetensors"`; of a URL, its URL as text.

        Raises:
            CheckpointNotFoundError: this step is not committed.
            CorruptCheckpointError: its manifest is damaged.
        """
        manifest = self._catalog.manifest(step)
        found = self.storage.path(f"{names.step_name(step)}/{manifest.attempt}")
        return Path(found) if isinstance(self.storage, LocalStorage) else found

    def verify(self, step: int | None = None) -> int:
        """Read every byte of `step` (the newest by default) and check it; returns the step.

        Raises:
            CheckpointNotFoundError: this step is not committed, or none is.
            CorruptCheckpointError: where a byte is not what was committed.
        """
        step = self._given_or_latest(step)
        with CheckpointReader(self._catalog, step) as reader:
            reader.verify()
        return step

    def annotate(self, step: int, metrics: Mapping[str, float]) -> None:
        """Durably add `metrics` to those of a committed step; of the same name, the later one counts.

        Raises:
            CheckpointNotFoundError: this step is not committed.
            CorruptCheckpointError: its manifest or its notes are damaged. Nothing was changed.
            TypeError: a metric is no number.
        """
        notes.annotate(self._catalog, checked_step(step), checked_metrics(metrics))

    def pin(self, step: int) -> None:
        """Durably keep a committed step from every policy and from `delete`, until `unpin`.

        Raises:
            CheckpointNotFoundError: this step is not committed.
            CorruptCheckpointError: its manifest or its notes are damaged. Nothing was changed.
        """
        notes.pin(self._catalog, checked_step(step))

    def unpin(self, step: int) -> None:
        """Take back `pin`. Raises as that does."""
        notes.pin(self._catalog, checked_step(step), False)

    def is_pinned(self, step: int) -> bool:
        """Whether `step` is pinned, or its notes are damaged, so that it may be."""
        try:
            found = self._tiers.notes(step)
        except CorruptCheckpointError:
            return True
        return found is not None and found.pinned

    def load(
        self, step: int | None = None, *, parts: Iterable[str] | None = None, keys: Iterable[str] | None = None
    ) -> dict[str, Any]:
        """Parts of a checkpoint as plain values, tensors on the CPU, by name.

        Without `step`, of the newest that verifies and has the `parts`; without these, whatever the newest has.
        Exports are among them only where `parts` names them, such as "model-bf16". With `keys`, only the tensors of
        these names in the one part that `parts` names; only their chunks are read.

        Raises:
            CheckpointNotFoundError: nothing is committed, or there is no such step, part or tensor.
            CorruptCheckpointError: the step asked for is damaged, or all are.
            ValueError: `keys` without exactly one part.
        """
        wanted = None if parts is None else listed(parts)
        if keys is not None and (wanted is None or len(wanted) != 1):
            raise ValueError("keys= takes tensors of one part: give parts=[name] with it")
        loaded = self.fetch(step, Wish(wanted, None if keys is None else listed(keys)))
        if loaded is None:
            raise CheckpointNotFoundError(f"no checkpoint in {self.storage.url}")
        return loaded.parts

    def restore(
        self,
        state: Mapping[str, Any],
        step: int | None = None,
        *,
        parts: Iterable[str] | None = None,
        strict: bool = True,
        allow_stale: Iterable[str] = (),
        rename: Rename | None = None,
    ) -> int | None:
        """Bring `state` to a checkpoint, in place, and return its step: see `Checkpointer.restore`.

        Raises:
            NotSupportedError: this process is one of several ranks, which only a Checkpointer brings to one step.
        """
        if ranks_of_this_job() > 1:
            raise NotSupportedError(
                f"{self.storage.url}: in a job of several ranks restore by a Checkpointer, which brings all to one "
                "step, and each to what was its own; asyncckpt.load reads anything."
            )
        loaded = self.fetch(step, Wish.of_state(state, parts, strict, allow_stale), View(state, rename=rename))
        if loaded is None:
            return None
        fill = Filling(loaded, state, strict, rename)
        fill()
        return loaded.step

    def fetch(self, step: int | None, wish: Wish, view: View | None = None) -> Loaded | None:
        """What is wanted of `step`, or of the newest that has it, read and verified: see `fetching.fetch`."""
        return fetch(self._tiers, step, wish, view)

    def _given_or_latest(self, step: int | None) -> int:
        step = max(self._catalog.candidates(), default=None) if step is None else step
        if step is None:
            raise CheckpointNotFoundError(f"no checkpoint in {self.storage.url}")
        return step


class Filling:
    """Loaded parts, held against live state before anything is touched; calling it changes the live objects.

    Raises:
        StateMismatchError: they do not fit; nothing was changed.
    """

    def __init__(self, loaded: Loaded, state: Mapping[str, Any], strict: bool, rename: Rename | None) -> None:
        self.loaded = loaded
        self._state, self._strict = state, strict
        self._saved = {name: rename_keys(state[name], value, rename) for name, value in loaded.parts.items()}
        found = Mismatch()
        for name, value in self._saved.items():
            fit(state[name], value, (name,), found)
        found.check(strict)

    def __call__(self) -> None:
        state = self._state
        optimizers = [name for name in self._saved if isinstance(state[name], Optimizer)]
        with all_or_none([state[name] for name in optimizers]):  # first: they judge what they load, and can be undone
            for name in optimizers:
                self._fill(name)
        others = [name for name in self._saved if name not in optimizers]
        for name in sorted(others, key=lambda name: isinstance(state[name], RngState)):  # loading may draw numbers
            self._fill(name)

    def _fill(self, name: str) -> None:
        state = self._state
        value = apply(state[name], self._saved[name], self._strict)
        if value is not state[name]:
            if not isinstance(state, MutableMapping):
                raise StateMismatchError(f"part {name!r} can't be restored in place; give the state as a dict")
            state[name] = value


def check_directory(directory: Directory) -> str:
    """The path of a run, or its URL.

    Raises:
        ValueError: empty.
    """
    path = os.fspath(directory)
    if not isinstance(path, str) or not path:
        raise ValueError(f"{directory!r} is not the path of a directory")
    return path


def open(directory: Directory, *, storage_options: Mapping[str, Any] | None = None) -> Run:
    """The run in `directory`, or at a URL, to be read without owning it."""
    return Run(directory, storage_options)


def restore(
    directory: Directory,
    state: Mapping[str, Any],
    step: int | None = None,
    *,
    parts: Iterable[str] | None = None,
    strict: bool = True,
    allow_stale: Iterable[str] = (),
    rename: Rename | None = None,
    storage_options: Mapping[str, Any] | None = None,
) -> int | None:
    """Bring `state` to a checkpoint in `directory` without owning the run: see `Checkpointer.restore`."""
    run = Run(directory, storage_options)
    return run.restore(state, step, parts=parts, strict=strict, allow_stale=allow_stale, rename=rename)


def load(
    directory: Directory,
    step: int | None = None,
    *,
    parts: Iterable[str] | None = None,
    keys: Iterable[str] | None = None,
    storage_options: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Parts of a checkpoint in `directory` as plain values: see `Run.load`."""
    return Run(directory, storage_options).load(step, parts=parts, keys=keys)
