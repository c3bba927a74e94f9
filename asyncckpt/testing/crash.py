"""The power-loss model: every disk that a power cut may leave at every point of a recording.

What it takes a file system to promise, and no more:

    fsync of a file         makes its bytes and its size durable, not its name
    fsync of a directory    makes the names in it durable, not what they stand for
    rename in a directory   happens as a whole or not at all
    everything else         may have happened or not, each change for itself, in any order; a write also in part

So bytes, sizes, reserved blocks, names, unlinks and new directories are volatile until then, and bytes written with
O_DIRECT as much as others. After an fsync that failed, what was pending stays in doubt for ever, whatever a later
fsync says: the kernel may have dropped the pages and marked them clean.
"""

from __future__ import annotations

import errno
import os
import random
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from asyncckpt.testing.recording import Note, Operation

STALE = b"\xdb"
"""What blocks that were never written may read as, where they do not read as zeros."""
_ROOT = 0


@dataclass(frozen=True)
class Disk:
    """Files and folders, by path relative to the base: the bytes of a file, None for a folder."""

    tree: Mapping[str, bytes | None] = field(default_factory=dict)

    @property
    def fingerprint(self) -> int:
        return hash(frozenset(self.tree.items()))

    @classmethod
    def of(cls, base: str | os.PathLike[str]) -> Disk:
        """What lies below the real directory `base` now."""
        paths = sorted(Path(base).rglob("*"))
        return cls({p.relative_to(base).as_posix(): None if p.is_dir() else p.read_bytes() for p in paths})

    def make(self, base: str | os.PathLike[str]) -> None:
        """Make it real below `base`, which must be empty."""
        for path, data in self.tree.items():  # parents stand before what they hold
            if data is None:
                os.mkdir(os.path.join(base, path), 0o700)
            else:
                with open(os.path.join(base, path), "xb") as file:
                    file.write(data)


@dataclass(frozen=True, slots=True)
class Change:
    """One thing that a file system was told, and has not promised."""

    index: int
    """The operation, counted from 0 in the log, that made it."""
    verb: str
    name: str = ""
    inode: int = 0
    offset: int = 0
    data: bytes = b""
    size: int = 0
    source: str = ""


@dataclass(frozen=True, slots=True)
class Torn:
    """A write of which only some sectors arrived. The size grew all the same; the rest is old, zero or stale."""

    sector: int
    seed: int
    stale: bool = False


Fate = bool | Torn
Choice = Callable[[Change], Fate]


@dataclass
class _File:
    durable: bytes = b""
    changes: list[tuple[Change, bool]] = field(default_factory=list)
    """In order; True for those that are durable though an earlier one is in doubt."""
    in_doubt: int = 0

    def fsynced(self) -> None:
        if not self.in_doubt:
            self.durable, self.changes = self.content(lambda _: True), []
            return
        self.changes = [(c, done or i >= self.in_doubt) for i, (c, done) in enumerate(self.changes)]

    def fsync_failed(self) -> None:
        self.in_doubt = len(self.changes)

    def pending(self) -> list[Change]:
        return [change for change, done in self.changes if not done]

    def content(self, choice: Choice) -> bytes:
        if not self.changes:
            return self.durable
        data = bytearray(self.durable)
        for change, done in self.changes:
            fate = True if done else choice(change)
            if fate is False:
                continue
            if change.verb == "truncate":
                del data[change.size :]
                data.extend(bytes(change.size - len(data)))
            elif change.verb == "reserve":
                data.extend(bytes(max(0, change.size - len(data))))
            else:
                _write(data, change, fate)
        return bytes(data)


def _write(data: bytearray, change: Change, fate: Fate) -> None:
    end = change.offset + len(change.data)
    if end > len(data):
        filler = STALE if isinstance(fate, Torn) and fate.stale else b"\0"
        data.extend(filler * (end - len(data)))
    if fate is True:
        data[change.offset : end] = change.data
        return
    assert isinstance(fate, Torn)
    coin = random.Random(fate.seed)
    for start in range(0, len(change.data), fate.sector):
        if coin.random() < 0.5:
            piece = change.data[start : start + fate.sector]
            data[change.offset + start : change.offset + start + len(piece)] = piece


@dataclass
class _Folder:
    durable: dict[str, int] = field(default_factory=dict)
    live: dict[str, int] = field(default_factory=dict)
    changes: list[Change] = field(default_factory=list)

    def change(self, change: Change) -> None:
        self.changes.append(change)
        _rename(self.live, change)

    def fsynced(self) -> None:
        self.durable, self.changes = dict(self.live), []

    def names(self, choice: Choice) -> dict[str, int]:
        if not self.changes:
            return self.durable
        names = dict(self.durable)
        for change in self.changes:
            if choice(change):
                _rename(names, change)
        return names

    def may_hold(self) -> set[int]:
        return {*self.durable.values(), *(c.inode for c in self.changes if c.verb != "remove")}


def _rename(names: dict[str, int], change: Change) -> None:
    if change.verb == "remove":
        names.pop(change.name, None)
        return
    names.pop(change.source, None)
    names[change.name] = change.inode


class FileSystem:
    """What a file system holds durably, and what it was told besides. Paths outside `base` are not looked at."""

    def __init__(self, base: str | os.PathLike[str], disk: Disk | None = None) -> None:
        self._base = os.path.abspath(base)
        self._inodes: dict[int, _File | _Folder] = {_ROOT: _Folder()}
        self._fds: dict[int, int] = {}
        self._index = -1
        for path, data in (disk or Disk()).tree.items():
            parent, _, name = path.rpartition("/")
            inode = self._new(_Folder() if data is None else _File(data))
            folder = self._folder(self._walk(parent))
            folder.durable[name] = folder.live[name] = inode

    def apply(self, operation: Operation, index: int) -> None:
        """Take the next operation of a log."""
        self._index = index
        ok = operation.error is None
        match operation.verb, operation.arguments:
            case "create", (path, _) if ok:
                self._fds[operation.result] = self._created(path)
            case "reclaim", (path,) if ok:
                self._fds[operation.result] = self._resolve(path)
            case "mkdir", (path,) if ok:
                self._add(path, self._new(_Folder()))
            case "close", (fd,):
                self._fds.pop(fd, None)
            case "pwrite", (fd, _, offset) if ok:
                self._touch(fd, Change(index, "write", offset=offset, data=operation.data))
            case (("reserve" | "truncate"), (fd, size)) if ok:
                self._touch(fd, Change(index, operation.verb, size=size))
            case "fsync", (fd,):
                file = self._inodes.get(self._fds.get(fd, -1))
                if isinstance(file, _File):
                    file.fsynced() if ok else file.fsync_failed()
            case "fsync_dir", (path,) if ok and self._inside(path):
                self._folder(self._resolve(path)).fsynced()
            case "link", (source, target) if ok:
                self._add(target, self._resolve(source))
            case "rename", (source, target) if ok:
                self._move(source, target)
            case (("unlink" | "rmdir"), (path,)) if ok:
                folder, name = self._parent(path)
                folder.change(Change(index, "remove", name))

    def pending(self) -> list[Change]:
        """Changes that a power cut now may leave out, oldest first, of all that could still be reached."""
        found: dict[int, list[Change]] = {}
        stack = [_ROOT]
        while stack:
            inode = stack.pop()
            if inode in found:
                continue
            node = self._inodes[inode]
            if isinstance(node, _Folder):
                found[inode] = node.changes
                stack.extend(node.may_hold())
            else:
                found[inode] = node.pending()
        return sorted((c for changes in found.values() for c in changes), key=lambda c: c.index)

    def after(self, choice: Choice) -> Disk:
        """The disk where every pending change has met the fate that `choice` gives it."""
        tree: dict[str, bytes | None] = {}
        self._fill(tree, _ROOT, "", choice, frozenset())
        return Disk(tree)

    def live(self) -> Disk:
        """What a process sees now: also what it leaves when it is killed and the machine lives on."""
        return self.after(lambda _: True)

    def _fill(
        self, tree: dict[str, bytes | None], inode: int, prefix: str, choice: Choice, above: frozenset[int]
    ) -> None:
        folder = self._folder(inode)
        for name, child in folder.names(choice).items():
            node, path = self._inodes[child], prefix + name
            if isinstance(node, _File):
                tree[path] = node.content(choice)
            elif child not in above:
                tree[path] = None
                self._fill(tree, child, path + "/", choice, above | {child})

    def _new(self, node: _File | _Folder) -> int:
        inode = len(self._inodes)
        self._inodes[inode] = node
        return inode

    def _folder(self, inode: int) -> _Folder:
        folder = self._inodes[inode]
        if not isinstance(folder, _Folder):
            raise NotADirectoryError(errno.ENOTDIR, "the recording uses a file as a folder")
        return folder

    def _inside(self, path: str) -> bool:
        return path == self._base or path.startswith(self._base + os.sep)

    def _walk(self, relative: str) -> int:
        inode = _ROOT
        for name in filter(None, relative.split("/")):
            inode = self._folder(inode).live[name]
        return inode

    def _resolve(self, path: str) -> int:
        return self._walk(os.path.relpath(path, self._base).removeprefix("."))

    def _parent(self, path: str) -> tuple[_Folder, str]:
        return self._folder(self._resolve(os.path.dirname(path))), os.path.basename(path)

    def _created(self, path: str) -> int:
        """The file that a `create` opened: a new one, or what was there for a storage that allows that."""
        folder, name = self._parent(path)
        known = folder.live.get(name)
        return self._add(path, self._new(_File())) if known is None else known

    def _add(self, path: str, inode: int) -> int:
        folder, name = self._parent(path)
        folder.change(Change(self._index, "add", name, inode))
        return inode

    def _move(self, source: str, target: str) -> None:
        (old, old_name), (new, new_name) = self._parent(source), self._parent(target)
        inode = old.live[old_name]
        if new.live.get(new_name) == inode:  # two names of one file: rename(2) leaves both
            return
        if old is new:
            new.change(Change(self._index, "rename", new_name, inode, source=old_name))
        else:
            new.change(Change(self._index, "add", new_name, inode))
            old.change(Change(self._index, "remove", old_name))

    def _touch(self, fd: int, change: Change) -> None:
        file = self._inodes.get(self._fds.get(fd, -1))
        if isinstance(file, _File):
            file.changes.append((change, False))


@dataclass(frozen=True)
class Cut:
    """A power cut after `at` entries of the log, and one of the disks that it may leave."""

    at: int
    disk: Disk
    how: str
    """Which of the pending changes were lost or torn, for a person."""


def power_cuts(
    log: Sequence[Operation | Note],
    base: str | os.PathLike[str],
    *,
    samples: int,
    seed: int,
    disk: Disk | None = None,
    points: Iterable[int] | None = None,
) -> Iterator[Cut]:
    """Every point of `log` (or the given ones) x the disks that a power cut there may leave, no two the same at one
    point. What lies below `base` in the beginning is `disk`, durable.

    Where n changes are pending and 2**n is not more than `samples`, those are all subsets; else nothing, everything,
    every prefix, each change alone, all but each, and random subsets up to `samples`. Writes are torn at random too.
    """
    system = FileSystem(base, disk)
    wanted = None if points is None else set(points)
    coin = random.Random(seed)
    for at in range(len(log) + 1):
        if at:
            entry = log[at - 1]
            if isinstance(entry, Operation):
                system.apply(entry, at - 1)
        if wanted is not None and at not in wanted:
            continue
        seen: set[int] = set()
        for fates in _fates(system.pending(), samples, coin):
            left = system.after(lambda change, fates=fates: fates.get(change, False))  # type: ignore[misc]
            if left.fingerprint not in seen:
                seen.add(left.fingerprint)
                yield Cut(at, left, _describe(system.pending(), fates))


def _fates(pending: list[Change], samples: int, coin: random.Random) -> Iterator[dict[Change, Fate]]:
    if 1 << min(len(pending), 60) <= samples:
        for bits in range(1 << len(pending)):
            yield {change: bool(bits >> i & 1) for i, change in enumerate(pending)}
        torn = samples // 4 if any(c.verb == "write" for c in pending) else 0
        for _ in range(torn):
            yield random_fates(pending, coin)
        return
    kept: list[set[Change]] = [set(pending[:n]) for n in range(len(pending) + 1)]
    kept += [set(pending) - {one} for one in pending]
    kept += [{one} for one in pending]
    regular: list[dict[Change, Fate]] = [{change: change in some for change in pending} for some in kept]
    if len(regular) > samples // 2:
        regular = [regular[0], regular[len(pending)], *coin.sample(regular, max(0, samples // 2 - 2))]
    yield from regular
    for _ in range(samples - len(regular)):
        yield random_fates(pending, coin)


def random_fates(pending: list[Change], coin: random.Random) -> dict[Change, Fate]:
    """A fate for each change, by chance: few or many kept, few or many writes torn."""
    kept, torn = coin.choice((0.1, 0.5, 0.9)), coin.choice((0.0, 0.3, 0.8))

    def fate(change: Change) -> Fate:
        if change.verb == "write" and coin.random() < torn:
            return Torn(coin.choice((512, 4096)), coin.getrandbits(32), coin.random() < 0.3)
        return coin.random() < kept

    return {change: fate(change) for change in pending}


def _describe(pending: list[Change], fates: Mapping[Change, Fate]) -> str:
    def word(change: Change) -> str:
        what = change.name or f"inode {change.inode} at {change.offset}"
        fate = fates.get(change, False)
        return f"{'torn' if isinstance(fate, Torn) else 'kept' if fate else 'lost'} {change.index}:{change.verb} {what}"

    return "; ".join(map(word, pending))


@contextmanager
def materialised(base: Path, disk: Disk) -> Iterator[Path]:
    """`disk`, real in a new directory below `base`, gone again at the end."""
    base.mkdir()
    try:
        disk.make(base)
        yield base
    finally:
        shutil.rmtree(base)
