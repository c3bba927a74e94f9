"""What differs between two checkpoints: by the digests of their chunks first, then by tensor and by value.

Chunks with equal digests in the same place are not read. All else is read in bounded memory, and verified. What several
ranks saved is compared put together, tensor by tensor, unless all digests are equal; what each had of its own, by rank.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

from asyncckpt.errors import CorruptCheckpointError
from asyncckpt.format.image import Entry
from asyncckpt.format.manifest import PartRecord
from asyncckpt.format.ranks import SharePart
from asyncckpt.read.contents import MALFORMED, StoredTensor, tensors
from asyncckpt.read.reader import CheckpointReader

if TYPE_CHECKING:
    from asyncckpt.format.tree import Node

How = Literal["same", "changed", "added", "removed"]
_BATCH = 64 << 20
"""Bytes of tensors that are read together where they can't be read chunk by chunk."""

ABSENT = object()
"""Stands for a value that one side does not have."""


@dataclass(frozen=True, slots=True)
class ValueDiff:
    """A value of a leaf tree: where it stands, as one writes it in Python, and its nodes on both sides, or `ABSENT`."""

    path: str
    before: Node
    after: Node


@dataclass(frozen=True)
class PartDiff:
    """How a part of the second checkpoint stands to that of the first.

    `added`, `removed` and `changed` (in their bytes) are names of tensors; `retyped` have another dtype or shape.
    """

    part: str
    how: How
    added: tuple[str, ...] = ()
    removed: tuple[str, ...] = ()
    changed: tuple[str, ...] = ()
    retyped: Mapping[str, tuple[StoredTensor, StoredTensor]] | None = None
    values: tuple[ValueDiff, ...] = ()


def diff(before: CheckpointReader, after: CheckpointReader) -> list[PartDiff]:
    """Each part of either checkpoint, in the order of the first, then of the second.

    Raises:
        CorruptCheckpointError: what had to be read of either is damaged.
    """
    names = dict.fromkeys([*before.parts, *after.parts])
    return [_part(before, after, name) for name in names]


def _part(before: CheckpointReader, after: CheckpointReader, name: str) -> PartDiff:
    if name not in before.parts:
        return PartDiff(name, "added")
    if name not in after.parts:
        return PartDiff(name, "removed")
    shares = before.shares(name), after.shares(name)
    images_same = len(shares[0]) == len(shares[1]) and all(map(_same_image, *shares))
    if images_same and all(bytes(one.tree) == bytes(two.tree) for one, two in zip(*shares, strict=True)):
        return PartDiff(name, "same")
    found = _seen(before, after, name, images_same, {})
    if not (before.is_common(name) and after.is_common(name)):
        for rank in range(1, max(before.manifest.world, after.manifest.world)):
            found = _and(found, _of_rank(before, after, name, rank, images_same), f" of rank {rank}")
    silent = not (found.added or found.removed or found.changed or found.retyped or found.values)
    return PartDiff(name, "same") if silent else found


def _of_rank(before: CheckpointReader, after: CheckpointReader, name: str, rank: int, images_same: bool) -> PartDiff:
    """What one of several ranks had of its own."""
    if rank >= before.manifest.world:
        return PartDiff(name, "changed", values=(ValueDiff(name, ABSENT, after.seen_by(rank).tree(name)),))
    if rank >= after.manifest.world:
        return PartDiff(name, "changed", values=(ValueDiff(name, before.seen_by(rank).tree(name), ABSENT),))
    common = {**before.sharded(name), **after.sharded(name)}
    return _seen(before.seen_by(rank), after.seen_by(rank), name, images_same, common)


def _and(one: PartDiff, two: PartDiff, label: str) -> PartDiff:
    """Both; what is from the second bears a label."""
    return replace(
        one,
        added=(*one.added, *(key + label for key in two.added)),
        removed=(*one.removed, *(key + label for key in two.removed)),
        changed=(*one.changed, *(key + label for key in two.changed)),
        retyped={**(one.retyped or {}), **{key + label: pair for key, pair in (two.retyped or {}).items()}},
        values=(*one.values, *(replace(value, path=value.path + label) for value in two.values)),
    )


def _seen(
    before: CheckpointReader, after: CheckpointReader, name: str, images_same: bool, without: Mapping[str, object]
) -> PartDiff:
    """What differs as the ranks of these readers see it, tensors `without` some."""
    old, new = (
        {key: tensor for key, tensor in tensors(reader, name).items() if key not in without}
        for reader in (before, after)
    )
    common = [key for key in old if key in new]
    retyped = {key: (old[key], new[key]) for key in common if _type(old[key]) != _type(new[key])}
    alike = [key for key in common if key not in retyped]
    return PartDiff(
        name,
        "changed",
        added=tuple(key for key in new if key not in old),
        removed=tuple(key for key in old if key not in new),
        changed=() if images_same else tuple(_changed(before, after, name, alike)),
        retyped=retyped,
        values=_values_of(before, after, name, retyped),
    )


def _type(tensor: StoredTensor) -> tuple[str, tuple[int, ...]]:
    return tensor.dtype, tensor.shape


def _same_image(one: PartRecord, two: PartRecord) -> bool:
    """By digests alone; False where they can't tell."""
    shards = [part.shards if isinstance(part, SharePart) else {} for part in (one, two)]
    alike = (one.size, one.chunk_size, one.digests) == (two.size, two.chunk_size, two.digests)
    return alike and shards[0] == shards[1]


def _changed(before: CheckpointReader, after: CheckpointReader, part: str, keys: list[str]) -> Iterator[str]:
    """Those of the tensors `keys` whose bytes differ."""
    if not keys:
        return
    old, new = before.entries(part), after.entries(part)
    if before.manifest.world > 1 or after.manifest.world > 1:
        for some in _batches(keys, old):
            one_image, two_image = before.image(part, some), after.image(part, some)
            yield from (key for key in some if one_image.bytes_of(key) != two_image.bytes_of(key))
        return
    with _Image.opened(before, part) as one, _Image.opened(after, part) as two:
        for key in sorted(keys, key=lambda key: old[key].offset):
            if not _same_bytes(one, old[key], two, new[key]):
                yield key


def _batches(keys: list[str], entries: Mapping[str, Entry]) -> Iterator[list[str]]:
    """`keys` in turn, as many together as take a few megabytes, at least one."""
    some: list[str] = []
    for key in keys:
        some.append(key)
        if sum(entries[key].nbytes for key in some) >= _BATCH:
            yield some
            some = []
    if some:
        yield some


class _Image:
    """An image, read chunk by chunk; the last chunk is kept, since small tensors share one."""

    def __init__(self, record: PartRecord, read: Callable[[int], memoryview]) -> None:
        self.record, self._read = record, read
        self.digests = record.digests
        self._index, self._chunk = -1, memoryview(b"")

    @classmethod
    @contextmanager
    def opened(cls, reader: CheckpointReader, part: str) -> Iterator[_Image]:
        with reader.chunks(part) as read:
            yield cls(reader.part(part), read)

    def at(self, offset: int) -> tuple[int, int]:
        """The chunk that `offset` lies in, and the place in it."""
        return divmod(offset, self.record.chunk_size)

    def rest(self, offset: int) -> int:
        """Bytes from `offset` to the end of its chunk."""
        return self.record.chunk_size - offset % self.record.chunk_size

    def bytes(self, offset: int, count: int) -> bytes:
        index, place = self.at(offset)
        if index != self._index:
            self._index, self._chunk = index, self._read(index)
        return bytes(self._chunk[place : place + count])


def _same_bytes(one: _Image, a: Entry, two: _Image, b: Entry) -> bool:
    done = 0
    while done < a.nbytes:
        at, to = a.offset + done, b.offset + done
        count = min(a.nbytes - done, one.rest(at), two.rest(to))
        if not _same_chunk(one, at, two, to) and one.bytes(at, count) != two.bytes(to, count):
            return False
        done += count
    return True


def _same_chunk(one: _Image, at: int, two: _Image, to: int) -> bool:
    """Whether digests tell that the bytes at both places are the same."""
    (i, x), (j, y) = one.at(at), two.at(to)
    sizes = one.record.chunk_size, two.record.chunk_size
    return x == y and sizes[0] == sizes[1] and one.digests[i] == two.digests[j]


def _values_of(
    before: CheckpointReader, after: CheckpointReader, part: str, retyped: Mapping[str, object]
) -> tuple[ValueDiff, ...]:
    try:
        return tuple(_values(before.tree(part), after.tree(part), part, retyped))
    except MALFORMED as error:
        if isinstance(error, CorruptCheckpointError):
            raise
        where = f"steps {before.step} and {after.step}, part {part!r}"
        raise CorruptCheckpointError(f"{where}: a leaf tree outside the grammar: {error!r}", part=part) from error


def _values(old: Node, new: Node, path: str, retyped: Mapping[str, object]) -> Iterator[ValueDiff]:
    """What differs below `path`. A tensor of another dtype or shape is told of elsewhere."""
    tags = _tag(old), _tag(new)
    if tags[0] != tags[1] or old is ABSENT or new is ABSENT:
        yield ValueDiff(path, old, new)
    elif isinstance(old, list) and len(old) == len(new):
        for index, (one, two) in enumerate(zip(old, new, strict=True)):
            yield from _values(one, two, f"{path}[{index}]", retyped)
    elif tags[0] is dict or tags[0] in _PAIRS:
        yield from _members(old, new, path, retyped)
    elif tags[0] == "module":
        yield from _values(old["v"], new["v"], path, retyped)
        yield from _values(old["m"], new["m"], f"{path}._metadata", retyped)
    elif tags[0] in ("tuple", "deque") and old.get("n") == new.get("n"):
        yield from _values(old["v"], new["v"], path, retyped)
    elif tags[0] in ("tensor", "ndarray") and old["n"] == new["n"] and old["n"] in retyped:
        return
    elif tags[0] in ("set", "frozenset"):
        if sorted(map(repr, old["v"])) != sorted(map(repr, new["v"])):
            yield ValueDiff(path, old, new)
    elif old != new:
        yield ValueDiff(path, old, new)


_PAIRS = ("dict", "odict", "counter", "defaultdict")


def _tag(node: Node) -> object:
    """What kind of value `node` stands for."""
    return node["$"] if isinstance(node, dict) and "$" in node else type(node)


def _members(old: Node, new: Node, path: str, retyped: Mapping[str, object]) -> Iterator[ValueDiff]:
    one, two = _by_key(old), _by_key(new)
    for key in dict.fromkeys([*one, *two]):
        yield from _values(one.get(key, ABSENT), two.get(key, ABSENT), f"{path}[{key}]", retyped)
    if _tag(old) == "odict" and one.keys() == two.keys() and [*one] != [*two]:
        yield ValueDiff(f"list({path})", [*one], [*two])
    if old.get("f") != new.get("f") and _tag(old) == "defaultdict":
        yield ValueDiff(f"{path}.default_factory", old["f"], new["f"])


def _by_key(node: dict[str, Any]) -> dict[str, Node]:
    """The members of a dict's node, by their keys as Python shows them."""
    pairs = node["v"] if "$" in node else node.items()
    return {repr(key): value for key, value in pairs}
