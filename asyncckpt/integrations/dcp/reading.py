"""DCP's storage reader, on this format."""

from __future__ import annotations

import io
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from torch.distributed.checkpoint._traverse import set_element
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadItemType, LoadPlan, LoadPlanner, ReadItem
from torch.distributed.checkpoint.storage import StorageReader
from torch.futures import Future

from asyncckpt.arguments import checked_step
from asyncckpt.catalog.catalog import Catalog
from asyncckpt.distributed.group import ranks_of_this_job
from asyncckpt.errors import (
    CheckpointError,
    CheckpointNotFoundError,
    CorruptCheckpointError,
    NotSupportedError,
    RankError,
    StateMismatchError,
)
from asyncckpt.format.ranks import Box, StoredShard
from asyncckpt.format.tree import TAG, Node, Path
from asyncckpt.integrations.dcp import keys
from asyncckpt.read.assemble import assemble, stored_shards
from asyncckpt.read.contents import MALFORMED, tensor_nodes
from asyncckpt.read.reader import CheckpointReader, PartImage
from asyncckpt.read.select import newest
from asyncckpt.snapshot import dtypes
from asyncckpt.snapshot.rebuild import Rebuilder
from asyncckpt.storage.local import LocalStorage


@dataclass(frozen=True)
class _Leaf:
    """What a key of DCP stands for: a value of a part's tree, or a tensor, of a `dtype` and `size`.

    `shards` are those of a tensor that is read box by box; others are read whole. `width` are the bytes of an item,
    where these lie along one more dimension.
    """

    part: str
    node: Node
    shards: tuple[StoredShard, ...] = ()
    dtype: torch.dtype | None = None
    size: torch.Size = field(default_factory=torch.Size)
    width: tuple[int, ...] = ()


class Reader(StorageReader):
    """Lets `dcp.load` read the checkpoints of the run in `path`, whoever wrote them, in any layout, at any world size.

    Every byte that this rank needs is read and verified before the first of its tensors is changed, so that a load
    takes as much memory again as what is loaded. A value that is no tensor comes out of JSON: nothing can be executed.

    Keys are those that DCP gives to the state {part: value, ...}; with `part`, those of the value of that part.

    Args:
        path: the directory of the run; `run/step-00000100` names a step, too. So may the `checkpoint_id` of a load.
        step: which; by default the newest whose records can be read. Damage that is found later is an error.
        part: only this part, for `dcp.load(model.state_dict(), ...)`.

    Of the errors that a load raises, `CheckpointException.failures` has each rank's own:
        CheckpointNotFoundError: no such checkpoint or part.
        CorruptCheckpointError: bytes are not what was committed; no tensor of this rank was changed.
        NotSupportedError: a planner that wants values as pickles.
        RankError: a checkpoint was committed meanwhile, and the ranks have found different ones.
    """

    def __init__(self, path: str | os.PathLike[str], step: int | None = None, *, part: str | None = None) -> None:
        super().__init__()
        self._part = part
        self._given_step = None if step is None else checked_step(step)
        self.step: int | None = None
        """The step that was read last."""
        self._set(path)

    def _set(self, path: str | os.PathLike[str]) -> None:
        self._path = path
        root, step = keys.split_location(path)
        self._catalog = Catalog(LocalStorage(root))
        self._step = self._given_step if step is None else step
        self._reader: CheckpointReader | None = None
        self._leaves: dict[str, _Leaf] = {}

    @property
    def checkpoint_id(self) -> str | os.PathLike[str]:
        return self._path

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        try:
            return os.path.isdir(keys.split_location(checkpoint_id)[0])
        except (TypeError, ValueError):
            return False

    # What dcp.load calls, in this order

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        self._set(self._path if checkpoint_id is None else checkpoint_id)

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """What the checkpoint holds. Of one that can't be read the answer raises, when it is looked into.

        (`dcp.load` takes no exception from here for what it is: it would let this rank go on without the others.)
        """
        self._set(self._path)
        try:
            return self._read_metadata()
        except (CheckpointError, OSError) as error:
            return _Unreadable(error)

    def _read_metadata(self) -> Metadata:
        reader = self._open()
        self._reader, self.step = reader, reader.step
        found = _leaves(reader, self._part)
        self._leaves = {key: leaf for key, (_, leaf) in found.items()}
        metadata = Metadata({key: _described(leaf) for key, leaf in self._leaves.items()})
        metadata.planner_data = {key: path for key, (path, _) in found.items()}
        metadata.storage_meta = StorageMeta(checkpoint_id=self._path, load_id=reader.manifest.attempt)
        return metadata

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        if isinstance(metadata, _Unreadable):
            metadata.fail()

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        manifest = self._opened.manifest
        return replace(plan, storage_data=(manifest.step, manifest.attempt))

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        found = {plan.storage_data for plan in plans}
        if len(found) > 1:
            raise RankError(
                f"{self._catalog.storage.url}: the ranks have found different checkpoints, {sorted(found)}: one was "
                "committed meanwhile. Give the step."
            )
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        items = [(item, self._leaves[item.storage_index.fqn]) for item in plan.items]
        values = [(item, leaf) for item, leaf in items if item.type == LoadItemType.BYTE_IO]
        tensors = [(item, leaf) for item, leaf in items if item.type != LoadItemType.BYTE_IO and 0 not in item.lengths]
        if values:
            _check_takes_values(planner)
        wants = _wanted(values, tensors)
        with self._opened as reader:
            images = {part: assemble(reader, part, boxes) for part, boxes in wants.items()}
        rebuilders = {part: Rebuilder(image) for part, image in images.items()}
        none = Rebuilder(PartImage(memoryview(b""), {}))
        sources = [_box(rebuilders[leaf.part], leaf, item, wants[leaf.part]) for item, leaf in tensors]
        decoded = [rebuilders.get(leaf.part, none).decode(leaf.node) for _, leaf in values]
        for (item, _), source in zip(tensors, sources, strict=True):
            target = planner.resolve_tensor(item).detach()
            if target.size() != source.size():
                raise StateMismatchError(
                    f"{item.dest_index.fqn}: a box of {tuple(source.size())} is read into one of {tuple(target.size())}"
                )
            target.copy_(source)
            planner.commit_tensor(item, target)
        for (item, _), value in zip(values, decoded, strict=True):
            _give(planner, item, value)
        future: Future[None] = Future()
        future.set_result(None)
        return future

    # The checkpoint

    @property
    def _opened(self) -> CheckpointReader:
        if self._reader is None:
            raise CheckpointError("call read_metadata first, as dcp.load does")
        return self._reader

    def _open(self) -> CheckpointReader:
        catalog, rank = self._catalog, dist.get_rank() if ranks_of_this_job() > 1 else 0
        if self._step is not None:
            return CheckpointReader(catalog, self._step, rank)

        def read(step: int) -> CheckpointReader | None:
            reader = CheckpointReader(catalog, step, rank)
            if self._part is None or self._part in reader.parts:
                return reader
            reader.close()
            return None

        found, _ = newest(catalog, read)
        if found is None:
            what = "" if self._part is None else f" with a part {self._part!r}"
            raise CheckpointNotFoundError(f"no checkpoint{what} in {catalog.storage.url}")
        return found


class _Unreadable(Metadata):
    """Stands for the metadata of a checkpoint that can't be read."""

    def __init__(self, error: CheckpointError | OSError) -> None:
        self._error = error
        self.planner_data = self.storage_data = self.storage_meta = self.version = None

    def fail(self) -> NoReturn:
        raise self._error

    @property
    def state_dict_metadata(self) -> NoReturn:  # type: ignore[override]
        self.fail()


def _leaves(reader: CheckpointReader, only: str | None) -> dict[str, tuple[Path, _Leaf]]:
    """By DCP's key, the path of a value in the state that is loaded, and what it is.

    Raises:
        CorruptCheckpointError: a leaf tree outside the grammar.
    """
    if only is not None:
        reader.part(only)  # says what there is
    try:
        found = _listed(reader, only) if keys.KEYS in reader.parts else _found(reader, only)
        stored = {part: stored_shards(reader, part) for part in {part for _, part, _ in found.values()}}
        return {key: (path, _leaf(part, node, stored[part])) for key, (path, part, node) in found.items()}
    except MALFORMED as error:
        if isinstance(error, CheckpointError):
            raise
        message = f"step {reader.step}: a leaf tree outside the grammar: {type(error).__name__}: {error}"
        raise CorruptCheckpointError(message, step=reader.step) from error


_Found = dict[str, tuple[Path, str, Node]]
"""By key: the path in the state, the part, and the node."""


def _found(reader: CheckpointReader, only: str | None) -> _Found:
    """The keys that the trees tell of."""
    found: _Found = {}
    for part in reader.manifest.resumable if only is None else [only]:
        for below, node in keys.flatten(reader.tree(part)):
            path = below if part in (only, keys.ROOT) else (part, *below)
            found[keys.key_of(path or (part,))] = (path or (part,), part, node)
    return found


def _listed(reader: CheckpointReader, only: str | None) -> _Found:
    """The keys that the writer has listed."""
    listing = reader.tree(keys.KEYS)
    trees = {part: reader.tree(part) for part in reader.parts if part != keys.KEYS}
    found: _Found = {}
    for key, (part, *below) in listing["keys"]:
        if only is not None and part != only:
            continue
        path = tuple(below)
        node = keys.find(trees[part], path)
        inside = part in (only, keys.ROOT)
        if listing["whole"] is None and inside:
            key = key.removeprefix(f"{part}.")
        elif listing["whole"] is not None and not inside:
            key = f"{part}.{key}"
        path = path if inside else (part, *path)
        found[str(key)] = (path or (part,), part, node)
    return found


def _leaf(part: str, node: Node, stored: Mapping[str, list[StoredShard]]) -> _Leaf:
    if not keys.is_tensor(node):
        return _Leaf(part, node)
    shards = tuple(stored[node["n"]])
    if "d" not in node:
        return _Leaf(part, node, shards, dtypes.BY_CODE[shards[0].dtype], torch.Size(shards[0].shape))
    dtype, size = dtypes.BY_NAME[node["d"]], torch.Size(node["s"])
    if "o" in node or shards[0].shape != (*size, dtype.itemsize):
        return _Leaf(part, node, (), dtype, size)
    return _Leaf(part, node, shards, dtype, size, (dtype.itemsize,))


def _described(leaf: _Leaf) -> TensorStorageMetadata | BytesStorageMetadata:
    if leaf.dtype is None:
        return BytesStorageMetadata()
    n = len(leaf.size)
    boxes = [(shard.offset[:n], shard.size[:n]) for shard in leaf.shards] or [((0,) * n, tuple(leaf.size))]
    chunks = [ChunkStorageMetadata(torch.Size(offset), torch.Size(size)) for offset, size in boxes]
    return TensorStorageMetadata(TensorProperties(dtype=leaf.dtype), leaf.size, chunks)


_Items = list[tuple[ReadItem, _Leaf]]


def _wanted(values: _Items, tensors: _Items) -> dict[str, dict[str, Box | None]]:
    """By part, the boxes of its entries that must be read; None stands for all of one."""
    wants: dict[str, dict[str, Box | None]] = {}
    for _, leaf in values:
        for node in tensor_nodes(leaf.node):
            wants.setdefault(leaf.part, {})[str(node["n"])] = None
    for item, leaf in tensors:
        boxes, name = wants.setdefault(leaf.part, {}), str(leaf.node["n"])
        box = _box_of(item, leaf) if leaf.shards else None
        known = boxes.get(name, box)
        boxes[name] = None if box is None or known is None else _around(box, known)
    return wants


def _box_of(item: ReadItem, leaf: _Leaf) -> Box:
    """What of its entry an item wants."""
    base = item.storage_index.offset or (0,) * len(item.lengths)
    offset = tuple(at + more for at, more in zip(base, item.storage_offsets, strict=True))
    return (*offset, *(0 for _ in leaf.width)), (*item.lengths, *leaf.width)


def _around(a: Box, b: Box) -> Box:
    """The least box that holds both."""
    starts = tuple(map(min, a[0], b[0]))
    ends = [max(x + m, y + n) for x, m, y, n in zip(*a, *b, strict=True)]
    return starts, tuple(end - start for start, end in zip(starts, ends, strict=True))


def _box(rebuilder: Rebuilder, leaf: _Leaf, item: ReadItem, wants: Mapping[str, Box | None]) -> torch.Tensor:
    """The tensor that an item wants, in memory that was verified."""
    offset, size = _box_of(item, leaf)
    origin = (0,) * len(offset)
    node = leaf.node
    wanted = wants[str(node["n"])]
    if leaf.shards and wanted is not None:
        origin = wanted[0]
        node = {TAG: "tensor", "n": node["n"]}
        if leaf.width:
            node |= {"d": leaf.node["d"], "s": list(wanted[1][:-1])}
    tensor: torch.Tensor = rebuilder.decode(node)
    for dimension in range(len(item.lengths)):
        tensor = tensor.narrow(dimension, offset[dimension] - origin[dimension], size[dimension])
    return tensor


def _check_takes_values(planner: LoadPlanner) -> None:
    if getattr(type(planner), "load_bytes", None) is not DefaultLoadPlanner.load_bytes:
        raise NotSupportedError(
            f"{type(planner).__name__} has a load_bytes of its own, which takes pickles; here are none. Derive it "
            "from torch's DefaultLoadPlanner without that, or load only tensors by it."
        )


def _give(planner: Any, item: ReadItem, value: Any) -> None:
    """What DefaultLoadPlanner.load_bytes does, but for the pickle. Bytes are put where an io.BytesIO is as one."""
    key = item.dest_index.fqn
    if isinstance(value, bytes) and isinstance(planner.state_dict.get(key), io.BytesIO):
        value = io.BytesIO(value)
    if planner.flatten_state_dict:
        set_element(planner.original_state_dict, planner.mappings[key], value)
    else:
        planner.state_dict[key] = value
