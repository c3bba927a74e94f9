"""What is wanted of a run: found, read and verified. Which checkpoint has it, and which of its parts."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Collection, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from typing import Any

from asyncckpt.catalog.catalog import OURS, Catalog
from asyncckpt.errors import (
    CheckpointError,
    CheckpointNotFoundError,
    CorruptCheckpointError,
    StateMismatchError,
    StorageError,
)
from asyncckpt.format.manifest import Manifest
from asyncckpt.policy.stale import source
from asyncckpt.read.reader import CheckpointReader
from asyncckpt.read.select import newest
from asyncckpt.snapshot.rebuild import rebuild_part, rebuild_tensors
from asyncckpt.snapshot.view import View

log = logging.getLogger("asyncckpt")


@dataclass(frozen=True)
class Wish:
    """`parts` of a checkpoint, or all that are no exports; with `keys`, only these tensors of the one part.

    To `resume` from, none may be an export. `whole`: the checkpoint is to have all parts of the state that was saved,
    but for those that `allow_stale` says may come from an older one; and if `strict`, no others than `parts`.
    """

    parts: Collection[str] | None = None
    keys: list[str] | None = None
    resume: bool = False
    whole: bool = False
    strict: bool = True
    allow_stale: frozenset[str] = frozenset()

    @classmethod
    def of_state(
        cls, state: Mapping[str, Any], parts: Iterable[str] | None, strict: bool, allow_stale: Iterable[str]
    ) -> Wish:
        """What a restore of `state`, or of some of its parts, needs.

        Raises:
            StateMismatchError: `parts` or `allow_stale` names what the state does not have.
        """
        wanted = list(state) if parts is None else listed(parts)
        stale = listed(allow_stale)
        for option, names in (("parts", wanted), ("allow_stale", stale)):
            absent = [name for name in names if name not in state]
            if absent:
                raise StateMismatchError(f"{option}= names {', '.join(absent)}, which the state does not have")
        return cls(wanted, resume=True, whole=parts is None, strict=strict, allow_stale=frozenset(stale))

    def lacking(self, manifest: Manifest) -> list[str]:
        """The parts that are wanted, and were left out of that save."""
        if self.whole and self.strict:
            return manifest.omitted
        return [name for name in manifest.omitted if name in (self.parts or ())]

    def suits(self, manifest: Manifest) -> bool:
        """Whether a checkpoint may be taken where any would do."""
        lacking = set(self.lacking(manifest))
        demanded = set() if self.whole or not self.strict else set(self.parts or ()) - lacking
        return lacking <= self.allow_stale and demanded <= set(manifest.parts)


@dataclass(frozen=True)
class Loaded:
    """Verified parts of a checkpoint, in memory.

    `stale` are those that it lacked, each with the older step that it was taken from. Newer steps were not taken:
    `passed_over` are damaged, each with the reason; `lacking` have not all that was wanted. `origin` is the url of the
    storage that it was read from.
    """

    step: int
    parts: dict[str, Any]
    stale: dict[str, int] = field(default_factory=dict)
    passed_over: dict[int, str] = field(default_factory=dict)
    lacking: tuple[int, ...] = ()
    origin: str = ""


def fetch(
    catalog: Catalog,
    step: int | None,
    wish: Wish,
    view: View | None = None,
    one: Callable[[int], Loaded] | None = None,
) -> Loaded | None:
    """Read and verify what is wanted of `step`, or of the newest that has it; None where nothing was ever committed.

    `view` is that of whom it is restored for; `one` reads a step, instead of this.

    Raises:
        CheckpointNotFoundError: the step, or what is wanted of it, does not exist; or, without `step`, none has it.
        CorruptCheckpointError: the step is damaged, or what it takes from an older one; or, without `step`, all are.
        StateMismatchError: `strict`, and the checkpoint has other parts than those wanted.
    """
    one = one or (lambda step: _read_in_tiers(catalog, step, wish, view))
    if step is not None:
        return one(step)
    lacking: list[int] = []

    def attempt(step: int) -> Loaded | None:
        if not wish.suits(catalog.manifest(step)):
            lacking.append(step)
            return None
        try:
            return one(step)
        except _NothingOlder:
            lacking.append(step)
            return None

    found, passed_over = newest(catalog, attempt)
    if found is None and lacking:
        raise _nothing_suits(catalog, wish, lacking[0])
    if found is None:
        return None
    return replace(found, passed_over=passed_over, lacking=tuple(s for s in lacking if s > found.step))


class _NothingOlder(CheckpointNotFoundError):
    """No older checkpoint has a part that this one lacks."""


def _read_in_tiers(catalog: Catalog, step: int, wish: Wish, view: View | None) -> Loaded:
    """From the best tier that has it undamaged."""
    failure: CheckpointError | None = None
    for tier in catalog.tiers(step):
        try:
            loaded = read(tier, step, wish, view, sources(tier, step, wish))
        except (CheckpointNotFoundError, CorruptCheckpointError, StorageError) as error:
            if isinstance(error, StorageError) and error.errno in OURS:
                raise
            failure = failure or error
            continue
        if failure is not None:
            warnings.warn(f"step {step} is read from {tier.storage.url}: {failure}", stacklevel=2)
        return replace(loaded, origin=tier.storage.url)
    raise failure or CheckpointNotFoundError(f"no checkpoint of step {step} in {catalog.storage.url}")


def sources(catalog: Catalog, step: int, wish: Wish) -> dict[str, int]:
    """By part that `step` lacks and that may be stale, the older step to take it from.

    Raises:
        CheckpointNotFoundError: nothing has it, or there is no such step.
        CorruptCheckpointError: the manifest of `step` is damaged, or what it would take may be.
    """
    if not wish.allow_stale:
        return {}
    manifest = catalog.manifest(step)
    parts = [name for name in wish.lacking(manifest) if name in wish.allow_stale]
    if not parts:
        return {}
    records = catalog.records(before=manifest.sequence)
    found = {}
    for part in parts:
        origin = source(records, part, manifest.step, manifest.sequence)
        if origin is None:
            raise _NothingOlder(f"step {manifest.step} lacks {part!r}, and no older checkpoint of its branch has it")
        for record in records:
            if record.damaged and origin.step < record.step < manifest.step:
                raise CorruptCheckpointError(
                    f"it lacks {part!r}, which may be that of step {record.step}: {record.doubt}", step=record.step
                )
        found[part] = origin.step
    return found


def read(catalog: Catalog, step: int, wish: Wish, view: View | None, stale: Mapping[str, int]) -> Loaded:
    """What is wanted of `step`, but for the `stale` parts, which come each from the older step that is said there.

    Raises:
        CheckpointNotFoundError: a step, or what is wanted of it, does not exist.
        CorruptCheckpointError: what is read is damaged.
        StateMismatchError: `strict`, and the checkpoint has other parts than those wanted.
    """
    rank = view.rank if view is not None else 0
    rebuild = view.rebuild if view is not None else rebuild_part
    with ExitStack() as held:  # none of them may be deleted before all are read
        reader = held.enter_context(CheckpointReader(catalog, step, rank))
        origins = {older: held.enter_context(CheckpointReader(catalog, older, rank)) for older in set(stale.values())}
        chosen = _choose(reader, wish, stale)
        if wish.keys is not None:
            return Loaded(step, {part: rebuild_tensors(reader, part, wish.keys) for part in chosen})
        wanted = [(origin, [p for p, older in stale.items() if older == origin.step]) for origin in origins.values()]
        wanted.append((reader, chosen))
        if view is not None:
            wanted = [(origin, view.visible(origin, parts)) for origin, parts in wanted]
        parts = {part: rebuild(origin, part) for origin, names in wanted for part in names}
    if stale:
        log.info("step %d, with %s", step, ", ".join(f"{part} of step {older}" for part, older in stale.items()))
    return Loaded(step, parts, dict(stale))


def _choose(reader: CheckpointReader, wish: Wish, stale: Collection[str]) -> list[str]:
    """The parts to read from the checkpoint itself, in its order."""
    there = reader.manifest.resumable if wish.resume or wish.parts is None else reader.parts
    if wish.parts is None:
        return there
    parts = [name for name in wish.parts if name not in stale]
    exports = [name for name in parts if wish.resume and name in reader.manifest.exports]
    if exports:
        raise StateMismatchError(
            f"{', '.join(exports)} of step {reader.step} can't be restored: exports are casts, for reading only. Use "
            "load, and put into a model what you want there."
        )
    missing = [name for name in parts if name not in there]
    unexpected = [name for name in there if name not in parts]
    if wish.whole and wish.strict and (missing or unexpected):
        left_out = [name for name in missing if name in reader.manifest.omitted]
        raise StateMismatchError(
            f"step {reader.step} has the parts {', '.join(reader.parts)}; the state has {', '.join(wish.parts)}. "
            "Nothing was changed. Use parts= for some of them, or strict=False for those that both have."
            + (f" Use allow_stale={left_out} to take from older checkpoints what this save left out." * bool(left_out)),
            missing=tuple(missing),
            unexpected=tuple(unexpected),
        )
    if missing and wish.strict:
        reader.part(missing[0])  # says what there is
    return [name for name in there if name in parts]


def _nothing_suits(catalog: Catalog, wish: Wish, step: int) -> CheckpointNotFoundError:
    there = catalog.manifest(step).parts
    if not wish.whole:
        return CheckpointNotFoundError(
            f"no checkpoint in {catalog.storage.url} has {', '.join(wish.parts or ())}; the newest, step {step}, has "
            f"{', '.join(there)}"
        )
    return CheckpointNotFoundError(
        f"no checkpoint in {catalog.storage.url} has the whole state. The newest, step {step}, has "
        f"{', '.join(there)}, and lacks {', '.join(catalog.manifest(step).omitted)}. Use parts= for some of them, or "
        "allow_stale= for those that may come from an older checkpoint that has them."
    )


def listed(names: Iterable[str]) -> list[str]:
    return [names] if isinstance(names, str) else list(names)
