"""DCP's storage writer, on this format."""

from __future__ import annotations

import gc
import os
import threading
import weakref
from dataclasses import dataclass, replace
from typing import Any

import msgspec
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta, TensorStorageMetadata
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, WriteItemType
from torch.distributed.checkpoint.storage import StorageWriter, WriteResult
from torch.futures import Future

from asyncckpt.arguments import checked_step
from asyncckpt.distributed.group import ranks_of_this_job
from asyncckpt.errors import NotSupportedError, RankError, UnsupportedStateError
from asyncckpt.format import names
from asyncckpt.format.image import layout
from asyncckpt.format.manifest import MAX_RECORD, FileRecord, PartRecord, PrepareRecord, digest, encode
from asyncckpt.format.ranks import RankRecord, SharePart, StoredShard, encode_rank_record, is_whole, prepared
from asyncckpt.format.tree import TAG, Node, Path, show
from asyncckpt.integrations.dcp import keys
from asyncckpt.integrations.dcp.shares import PartShare, Value, collect, layers, paths, stored_as, tensor_node
from asyncckpt.storage.local import LocalStorage
from asyncckpt.storage.posix import Posix
from asyncckpt.write.author import Author, Draft
from asyncckpt.write.parts import NO_TREE, WrittenPart
from asyncckpt.write.streams import write_image


@dataclass(frozen=True)
class _Order:
    """What the coordinator tells a rank: it writes the shares `first` and following of `world`, under this draft.

    `parts` are those of the checkpoint, `whole` that of them which takes the whole state, if one does.
    """

    draft: Draft
    first: int
    world: int
    parts: tuple[str, ...]
    whole: str | None


@dataclass(frozen=True)
class _Share:
    """The first of the shares, which waits for the leaf trees: they are known when all ranks have written."""

    order: _Order
    parts: dict[str, WrittenPart]
    shards: dict[str, dict[str, StoredShard]]


class Writer(StorageWriter):
    """Lets `dcp.save` and `dcp.async_save` commit checkpoints to the run in `path`.

    A save is committed for all ranks by the last thing that the coordinator does, once everything is durable: data
    files, the ranks' records, directories, then the manifest. If any rank fails or dies before, nothing is committed.
    Until then the coordinator owns the run, as a Checkpointer would. Tensors are written from where they lie, a few
    chunks of 8 MiB at a time, and values that are no tensors as JSON: there is no pickle.

    Each key at the top level of the state becomes a part, such as "model" and "optimizer", if all of them can be names
    of parts and one is a dict; else the whole state is the one part "__root__", or the one that `part` names.

    Args:
        path: the directory of the run, on a storage that all ranks share; `run/step-00000100` names a step, too. So
            may the `checkpoint_id` of a save.
        step: the step that is written; by default the next after the newest in the run, from 1 on.
        part: store the whole state as this part: for `dcp.save(model.state_dict(), ...)`.
        overwrite: replace the step if it is committed already.
        lock_timeout: seconds to wait for another writer of the run.

    Of the errors that a save raises, `CheckpointException.failures` has each rank's own:
        CheckpointExistsError: the step is committed, and `overwrite` is not given.
        ConflictError: another writer owns the run.
        UnsupportedStateError: a value can't be stored without pickle; the message names its path.
        NotSupportedError: a planner that hides the values from the writer, or a save without collectives.
        RankError: the ranks do not see the same directory.
        StorageError: the storage failed.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        step: int | None = None,
        *,
        part: str | None = None,
        overwrite: bool = False,
        lock_timeout: float = 120.0,
        _posix: Posix | None = None,
    ) -> None:
        super().__init__()
        self._posix = _posix
        self._part, self._overwrite, self._lock_timeout = part, overwrite, lock_timeout
        if part is not None and not names.is_part(part):
            raise ValueError(f"part={part!r}: give {names.PART_RULE}")
        self._given_step = None if step is None else checked_step(step)
        self.step: int | None = None
        """The step of the save under way, or of the last one."""
        self._set(path)

    def _set(self, path: str | os.PathLike[str]) -> None:
        self._path = path
        root, step = keys.split_location(path)
        self._storage = LocalStorage(root, self._posix)
        self._step = self._given_step if step is None else step
        self._clear()

    def _clear(self) -> None:
        self._author: Author | None = None
        self._share: _Share | None = None
        self._rank = 0
        self._coordinator = False

    def __getstate__(self) -> dict[str, Any]:
        """To be sent to another process; a save under way stays here."""
        return {key: value for key, value in self.__dict__.items() if key not in ("_author", "_share")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._clear()

    @property
    def checkpoint_id(self) -> str | os.PathLike[str]:
        return self._path

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        try:
            keys.split_location(checkpoint_id)
        except (TypeError, ValueError):
            return False
        return True

    def storage_meta(self) -> StorageMeta | None:
        return StorageMeta(checkpoint_id=self._path)

    # What dcp.save calls, in this order

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        self._set(self._path if checkpoint_id is None else checkpoint_id)

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        self._clear()
        if not kwargs.get("use_collectives", True) and ranks_of_this_job() > 1:
            raise NotSupportedError(
                "use_collectives=False: without collectives several ranks can't commit one checkpoint"
            )
        self._coordinator = is_coordinator
        self._rank = kwargs.get("rank") or 0

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        """On the coordinator: own the run, and give each rank its orders."""
        if not all(getattr(plan, "usable", True) for plan in plans):
            raise _cached_plans()
        where: dict[str, Path] = {}
        for plan in plans:
            where |= paths((item.index.fqn for item in plan.items), plan.planner_data)
        _check_whole(plans, where)
        whole = keys.whole_part(where.values(), self._part)
        parts = list(dict.fromkeys(keys.placed(path, whole)[0] for path in where.values())) or [whole or keys.ROOT]
        if _need_listing(plans, where, whole):
            parts.append(keys.KEYS)
        self._author = _own(self._storage, self._lock_timeout)
        try:
            draft = self._author.begin(self._step, self._overwrite)
        except BaseException:
            self._let_go()
            raise
        counts = [len(layers(plan)) for plan in plans]
        order = _Order(draft, 0, sum(counts), tuple(parts), whole)
        orders, number = {}, 0
        for i in range(self._rank, self._rank + len(plans)):  # the coordinator's first share is number 0
            rank = i % len(plans)
            orders[rank] = replace(order, first=number)
            number += counts[rank]
        return [replace(plan, storage_data=orders[rank]) for rank, plan in enumerate(plans)]

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        order = plan.storage_data
        if getattr(planner, "_enable_plan_caching", False):
            self._let_go()
            raise _cached_plans()
        if not isinstance(order, _Order):
            self._let_go()
            raise NotSupportedError(f"{type(planner).__name__} does not hand on what the writer has put into its plan")
        self.step = order.draft.step
        results: list[WriteResult] = []
        try:
            for k, items in enumerate(layers(plan)):
                shares, told = collect(items, plan, planner, order.parts, order.whole)
                self._write(replace(order, first=order.first + k), shares)
                results += told
        except BaseException:
            self._let_go()
            raise
        future: Future[list[WriteResult]] = Future()
        future.set_result(results)
        return future

    def _let_go(self) -> None:
        """The save is over. What it left behind, if it failed, is cleared by whoever owns the run next."""
        if self._author is not None:
            self._author.close()
        self._author = self._share = None

    def _write(self, order: _Order, shares: dict[str, PartShare]) -> None:
        """Make one share durable; its record too, but for that of the first, which `finish` writes."""
        folder, number = order.draft.folder, order.first
        self._storage.begin(folder, shared=True)
        written = {}
        for part, share in shares.items():
            if share.specs:
                file = names.image_file(part, number if order.world > 1 else None)
                written[part] = write_image(self._storage, folder, part, file, layout(share.specs), share.sources)
        shards = {part: share.shards for part, share in shares.items()}
        if number == 0:
            self._share = _Share(order, written, shards)
        else:
            self._storage.settle(folder)
            self._publish_record(order, {part: _record(written, shards, part, None) for part in order.parts})

    def _publish_record(self, order: _Order, parts: dict[str, SharePart]) -> None:
        draft = order.draft
        record = encode_rank_record(RankRecord(draft.step, draft.attempt, order.first, order.world, parts))
        self._storage.publish(f"{draft.folder}/{names.rank_record(order.first)}", record, replace=False)

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """On the coordinator, when all ranks have written: commit."""
        author, share = self._author, self._share
        assert author is not None and share is not None
        order = share.order
        try:
            trees = _trees(metadata, [result for mine in results for result in mine], order)
            files = self._store_alone(share, trees) if order.world == 1 else self._store_together(share, trees)
            author.commit(order.draft, order.world, order.parts, files)
        except BaseException:
            author.abandon(order.draft)
            raise
        finally:
            self._let_go()
        metadata.storage_meta = StorageMeta(checkpoint_id=self._path, save_id=order.draft.attempt)

    def _store_alone(self, share: _Share, trees: dict[str, Node]) -> dict[str, FileRecord]:
        """The record of a checkpoint of one share; its files, names durable."""
        draft = share.order.draft
        parts = {
            part: msgspec.structs.replace(
                share.parts[part].record if part in share.parts else PartRecord(NO_TREE), tree=_json(trees[part])
            )
            for part in share.order.parts
        }
        record = encode(PrepareRecord(draft.step, draft.attempt, 0, parts))
        self._storage.put(f"{draft.folder}/{names.RECORD}", record)
        self._storage.settle(draft.folder)
        files = {names.RECORD: FileRecord(len(record), digest(record))}
        for part in share.parts.values():
            files |= part.files
        return files

    def _store_together(self, share: _Share, trees: dict[str, Node]) -> dict[str, FileRecord]:
        """The first record of several; the files of all of them, as they are found in the storage, names durable.

        Raises:
            RankError: a record is not there, although its rank has written it.
            CorruptCheckpointError: a record is damaged, or of another save.
        """
        order, draft = share.order, share.order.draft
        self._storage.settle(draft.folder)
        self._publish_record(order, {p: _record(share.parts, share.shards, p, trees[p]) for p in order.parts})
        files: dict[str, FileRecord] = {}
        for number in range(order.world):
            name = names.rank_record(number)
            try:
                data = self._storage.read(f"{draft.folder}/{name}", MAX_RECORD)
            except FileNotFoundError:
                raise RankError(
                    f"{name} of step {draft.step} is not in {self._storage.url}, although it was written. All ranks "
                    "must be given the same directory, on a storage that they share."
                ) from None
            record = prepared(data, draft.step, draft.attempt, number, order.world)
            files |= {name: FileRecord(len(data), digest(data)), **record.files()}
        self._storage.settle(draft.folder)
        return files


def _json(node: Node) -> msgspec.Raw:
    return msgspec.Raw(msgspec.json.encode(node))


def _record(
    written: dict[str, WrittenPart], shards: dict[str, dict[str, StoredShard]], part: str, tree: Node | None
) -> SharePart:
    """What a share has of a part; without a tree, that is the one of the first share."""
    record = written[part].record if part in written else PartRecord(NO_TREE)
    known = {field: getattr(record, field) for field in record.__struct_fields__}
    known |= {"tree": NO_TREE if tree is None else _json(tree)}
    return SharePart(**known, same=tree is None, shards=shards[part])


def _check_whole(plans: list[SavePlan], where: dict[str, Path]) -> None:
    """
    Raises:
        UnsupportedStateError: what the ranks have of a tensor leaves holes, overlaps, or is of several tensors.
    """
    boxes: dict[str, list[StoredShard]] = {}
    for plan in plans:
        for item in plan.items:
            if item.type != WriteItemType.BYTE_IO:
                key = item.index.fqn
                boxes.setdefault(key, []).append(stored_as(item, where[key]))
    for key, found in boxes.items():
        first = found[0]
        alike = all((box.dtype, box.shape) == (first.dtype, first.shape) for box in found)
        if not alike or not is_whole(first.shape, found):
            path = show(where[key])
            raise UnsupportedStateError(
                f"{path}: what this save has of the tensor leaves holes, overlaps, or is of several tensors; all ranks "
                "that have some of it must take part (no_dist=False)",
                path=path,
            )


def _need_listing(plans: list[SavePlan], where: dict[str, Path], whole: str | None) -> bool:
    """Whether the keys can't be told from the trees."""
    tensors = {item.index.fqn for plan in plans for item in plan.items if item.type != WriteItemType.BYTE_IO}
    if len(tensors) < len(where) and any(not isinstance(plan.planner_data, dict) for plan in plans):
        return True  # values that were not flattened
    some = {TAG: "tensor"}
    leaves: dict[str, dict[Path, Node]] = {}
    expected = set()
    for key, path in where.items():
        part, below = keys.placed(path, whole)
        leaves.setdefault(part, {})[below] = some if key in tensors else None
        expected.add((key, part, below))
    found = {
        (keys.key_of(below if part == whole else (part, *below)), part, below)
        for part, inside in leaves.items()
        for below, _ in keys.flatten(msgspec.json.decode(_json(keys.compose(part, inside))))
    }
    return found != expected


def _trees(metadata: Metadata, results: list[WriteResult], order: _Order) -> dict[str, Node]:
    """The leaf trees, by part.

    Raises:
        CheckpointError: two tensors of a part would bear the same name.
    """
    values = {result.index.fqn: result.storage_data for result in results if isinstance(result.storage_data, Value)}
    where = paths(metadata.state_dict_metadata, metadata.planner_data)
    leaves: dict[str, dict[Path, Node]] = {part: {} for part in order.parts}
    entries: list[tuple[str, str]] = []
    for key, about in metadata.state_dict_metadata.items():
        part, below = keys.placed(where[key], order.whole)
        if isinstance(about, TensorStorageMetadata):
            name = keys.entry_name(part, below)
            entries.append((part, name))
            leaves[part][below] = tensor_node(name, about.properties, about.size)
        else:
            entries += [(part, name) for name in values[key].tensors]
            leaves[part][below] = msgspec.Raw(values[key].node)
    keys.check_unlike(entries)
    trees = {part: keys.compose(part, inside) for part, inside in leaves.items()}
    if keys.KEYS in trees:
        trees[keys.KEYS] = keys.listed(where, order.whole)
    return trees


def _cached_plans() -> NotSupportedError:
    return NotSupportedError(
        "enable_plan_caching=True: a planner that hands out plans of an earlier save can't name this one. Leave it out."
    )


_authors: dict[str, tuple[weakref.ref[Author], threading.Thread]] = {}
"""By run, who has owned it last in this process, and the thread that saved. DCP does not tell a writer that its save
has failed on another rank, so a run may be owned for a save that is over."""


def _own(storage: LocalStorage, timeout: float) -> Author:
    """Own the run; of a save of this process that is over and failed, it is taken.

    Raises:
        ConflictError: another writer owns it, still after `timeout` seconds.
    """
    if storage.root in _authors:
        gc.collect()  # the exception of a save that failed holds its writer in a cycle

    def take_over() -> None:
        former, thread = _authors.get(storage.root, (None, None))
        author = None if former is None else former()
        if (
            author is not None
            and thread is not None
            and (thread is threading.current_thread() or not thread.is_alive())
        ):
            author.close()

    take_over()
    author = Author(storage, timeout, take_over)
    _authors[storage.root] = weakref.ref(author), threading.current_thread()
    return author
