"""What a run was promised to hold, and the check of a real directory against it, by real recovery."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

from asyncckpt.catalog.catalog import Catalog
from asyncckpt.catalog.custody import Custody
from asyncckpt.errors import CheckpointError, CorruptCheckpointError
from asyncckpt.format import names
from asyncckpt.format.manifest import PartRecord, digest
from asyncckpt.policy.keep import Keep
from asyncckpt.policy.records import Record
from asyncckpt.read.reader import CheckpointReader
from asyncckpt.read.select import newest
from asyncckpt.storage.local import LocalStorage
from asyncckpt.testing.recording import Note, Operation

# What is told, as notes in a recording, when it begins and when it has been reported done.


@dataclass(frozen=True, slots=True)
class Saving:
    """A save of `step` has begun; `content` is what `content_of` would give for it."""

    step: int
    content: str


@dataclass(frozen=True, slots=True)
class Saved:
    """It was reported committed."""

    step: int
    content: str


@dataclass(frozen=True, slots=True)
class Mirrored:
    """It was reported to be on the mirror. `content` is None where an earlier service had saved it."""

    step: int
    content: str | None


@dataclass(frozen=True, slots=True)
class MirrorAwaited:
    """All that was committed by then was reported to be on the mirror, or passed over."""


@dataclass(frozen=True, slots=True)
class Deleting:
    step: int


@dataclass(frozen=True, slots=True)
class Deleted:
    step: int


@dataclass(frozen=True, slots=True)
class Rewinding:
    step: int


@dataclass(frozen=True, slots=True)
class Rewound:
    step: int


@dataclass(frozen=True, slots=True)
class Pinned:
    """The pin of `step` was reported done."""

    step: int


@dataclass(frozen=True, slots=True)
class Unpinning:
    step: int


Event = Saving | Saved | Mirrored | MirrorAwaited | Deleting | Deleted | Rewinding | Rewound | Pinned | Unpinning


@dataclass
class Promises:
    """What may, must and must not be there, after the events it was told of. `keep` is the policy of the run."""

    keep: Keep | None = None
    may: dict[int, list[str]] = field(default_factory=dict)
    """By step, the contents that it may have if it is there, oldest first."""
    must: set[int] = field(default_factory=set)
    pinned: set[int] = field(default_factory=set)
    reported: ClassVar[str] = "committed"

    @classmethod
    def after(cls, log: Iterable[Operation | Note], keep: Keep | None = None) -> Promises:
        """The promises made by the notes of `log`."""
        promises = cls(keep)
        for entry in log:
            if isinstance(entry, Note):
                promises.tell(entry.what)
        return promises

    def tell(self, event: Event) -> None:
        match event:
            case Saving(step, content):
                self.may.setdefault(step, []).append(content)
            case Saved(step, content):
                self._there(step, content)
            case Deleting(step):
                self.must.discard(step)
            case Deleted(step):
                self.may.pop(step, None)
                self.must.discard(step)
            case Rewinding(step):
                self.must = {s for s in self.must if s <= step}
            case Rewound(step):
                self.may = {s: contents for s, contents in self.may.items() if s <= step}
            case Pinned(step):
                self.pinned.add(step)
            case Unpinning(step):
                self.pinned.discard(step)
                self._retire()

    def _there(self, step: int, content: str) -> None:
        saving = self.may[step]
        self.may[step] = saving[saving.index(content) :]
        self.must.add(step)
        self._retire()

    def _retire(self) -> None:
        if self.keep is not None:
            self.must -= {*self.keep.retire([Record(step) for step in self.may])} - self.pinned

    def violations(self, found: Examined) -> list[str]:
        """In what `found` breaks them, in words."""
        broken = []
        if found.error is not None:
            broken.append(f"the run can't be read: {found.error}")
        broken += [f"step {step} is listed and damaged: {why}" for step, why in found.damaged.items()]
        for step, content in found.contents.items():
            if content not in self.may.get(step, ()):
                broken.append(f"step {step} holds what was never saved, or was taken back ({content})")
        for step in self.must.difference(found.contents).difference(found.damaged):
            broken.append(f"step {step} was reported {self.reported} and is not there")
        for step in self.pinned.intersection(found.contents).difference(found.pinned):
            broken.append(f"step {step} was reported pinned and is not")
        if found.error is None and found.newest != max(found.contents, default=None):
            broken.append(f"restore gives step {found.newest}, not the newest of {sorted(found.contents)}")
        return broken


@dataclass
class MirrorPromises(Promises):
    """The same of the mirror of a run, and `keep` is its policy. Of rewinds and pins there nothing is said."""

    saved: dict[int, str] = field(default_factory=dict)
    """What is committed in the run, as it was last."""
    reported = "mirrored"

    def tell(self, event: Event) -> None:
        match event:
            case Saved(step, content):
                self.saved[step] = content
            case Mirrored(step, content) if step in self.may:
                self._there(step, content or self.may[step][0])  # what an earlier service had saved may be any
            case MirrorAwaited():
                for step, content in self.saved.items():
                    self._there(step, content)
            case Deleting(step):
                self.saved.pop(step, None)
                super().tell(event)
            case Saving() | Deleted() | Rewinding():
                super().tell(event)


@dataclass
class Examined:
    """What recovery finds in a run."""

    contents: dict[int, str] = field(default_factory=dict)
    """Of the listed steps that verify."""
    damaged: dict[int, str] = field(default_factory=dict)
    """Listed steps that do not, and why."""
    newest: int | None = None
    error: str | None = None
    pinned: set[int] = field(default_factory=set)


def examine(root: str | os.PathLike[str], *, direct: bool = False) -> Examined:
    """Recover the run in `root` as a reader does: list the steps, take the newest, verify and load every one."""
    catalog = Catalog(LocalStorage(os.fspath(root), direct=direct))
    found = Examined()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            best, passed_over = newest(catalog, lambda step: (step, content_of(CheckpointReader(catalog, step))))
        found.damaged.update(passed_over)
        if best is not None:
            found.newest = best[0]
            found.contents[best[0]] = best[1]
        found.pinned.update(record.step for record in catalog.records() if record.pinned)
        for step in catalog.candidates():
            if step not in found.contents and step not in found.damaged:
                _examine_step(catalog, step, found)
    except (CheckpointError, OSError) as error:
        found.error = f"{type(error).__name__}: {error}"
    return found


def _examine_step(catalog: Catalog, step: int, found: Examined) -> None:
    try:
        reader = CheckpointReader(catalog, step)
        reader.verify()
        found.contents[step] = content_of(reader)
    except CorruptCheckpointError as error:
        found.damaged[step] = str(error)


def content_of(reader: CheckpointReader) -> str:
    """One word for all that a checkpoint holds: equal words, equal bytes and leaf trees."""
    return content_word(
        {
            part if reader.manifest.world == 1 else f"{part} of rank {rank}": (
                _bytes_of(reader, part, share),
                bytes(share.tree),
            )
            for part in reader.parts
            for rank, share in enumerate(reader.shares(part))
        }
    )


def _bytes_of(reader: CheckpointReader, part: str, share: PartRecord) -> memoryview:
    if not share.size:
        return memoryview(b"")
    with reader.sparse(part, share) as image:
        image.fetch((0, share.size))
        return image.buffer


def content_word(parts: Mapping[str, tuple[bytes | memoryview, bytes]]) -> str:
    """The word of `content_of`, from image and leaf tree (JSON) by part."""
    words = [f"{part} {digest(image)} {digest(tree)};" for part, (image, tree) in sorted(parts.items())]
    return digest("".join(words).encode())


def sweep(root: str | os.PathLike[str]) -> None:
    """Clear leftovers, as a new owner of the run does first."""
    storage = LocalStorage(os.fspath(root))
    Custody(storage, None).sweep()


def leftovers(root: str | os.PathLike[str]) -> list[str]:
    """What lies in a run and belongs to no committed checkpoint; below a damaged manifest all counts as belonging."""
    root = Path(root)
    catalog = Catalog(LocalStorage(os.fspath(root)))
    present = {p.relative_to(root).as_posix() for p in root.rglob("*")}
    expected = {names.LOCK, names.REWINDS, names.MIRRORING}
    for step in catalog.committed():
        folder = names.step_name(step)
        try:
            manifest = catalog.manifest(step)
        except CorruptCheckpointError:
            expected |= {path for path in present if path == folder or path.startswith(folder + "/")}
            continue
        expected |= {folder, f"{folder}/{names.MANIFEST}", f"{folder}/{names.NOTES}", f"{folder}/{manifest.attempt}"}
        expected |= {f"{folder}/{manifest.attempt}/{name}" for name in manifest.files}
    return sorted(present - expected)
