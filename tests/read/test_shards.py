"""Tensors that lie in the images of several ranks."""

import itertools

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.shards import commit_in_shards

from asyncckpt.catalog.catalog import Catalog
from asyncckpt.errors import CorruptCheckpointError
from asyncckpt.format import names
from asyncckpt.format.pieces import Piece, Shared
from asyncckpt.format.ranks import RankRecord, SharePart, StoredShard, encode_rank_record, prepared
from asyncckpt.read.assemble import assemble
from asyncckpt.read.reader import CheckpointReader
from asyncckpt.storage.local import LocalStorage
from asyncckpt.write.parts import NO_TREE

CUTS = [((0, 0), (3, 6)), ((3, 0), (4, 2)), ((3, 2), (4, 4))]


def whole(*shape):
    return np.arange(np.prod(shape), dtype=np.float32).reshape(shape)


def reader_of(root):
    return CheckpointReader(Catalog(LocalStorage(str(root))), 1)


def box_of(reader, offset, size):
    image = assemble(reader, "model", {"w": (offset, size)})
    entry = image.entries["w"]
    assert entry.shape == size
    return np.frombuffer(image.buffer, np.float32, int(np.prod(size)), entry.offset).reshape(size)


def test_every_box_read_alone_is_that_box_of_the_whole(tmp_path):
    tensor = whole(7, 6)
    commit_in_shards(tmp_path, tensor, CUTS)
    with reader_of(tmp_path) as reader:
        reader.verify()
        for top, left in itertools.product(range(0, 7, 2), range(6)):
            for height, width in itertools.product((1, 7 - top), (1, 6 - left)):
                found = box_of(reader, (top, left), (height, width))
                assert np.array_equal(found, tensor[top : top + height, left : left + width])


@settings(max_examples=15, deadline=None)
@given(st.data())
def test_any_cut_along_any_dimension(tmp_path_factory, data):
    shape = tuple(data.draw(st.lists(st.integers(1, 5), min_size=1, max_size=3)))
    dimension = data.draw(st.integers(0, len(shape) - 1))
    ends = sorted({*data.draw(st.lists(st.integers(1, shape[dimension]), max_size=3)), shape[dimension]})
    cuts = []
    for start, end in itertools.pairwise([0, *ends]):
        offset, size = [0] * len(shape), list(shape)
        offset[dimension], size[dimension] = start, end - start
        cuts.append((tuple(offset), tuple(size)))
    tensor, root = whole(*shape), tmp_path_factory.mktemp("run")
    commit_in_shards(root, tensor, cuts if len(cuts) > 1 else [*cuts, (cuts[0][0], (0,) * len(shape))])
    offset = tuple(data.draw(st.integers(0, n - 1)) for n in shape)
    size = tuple(data.draw(st.integers(1, n - at)) for n, at in zip(shape, offset, strict=True))
    with reader_of(root) as reader:
        box = tuple(slice(at, at + n) for at, n in zip(offset, size, strict=True))
        assert np.array_equal(box_of(reader, offset, size), tensor[box])


FORGED = {
    "overlap": lambda rank, shard: msgspec.structs.replace(shard, offset=(2, 0)) if rank == 1 else shard,
    "outside": lambda rank, shard: msgspec.structs.replace(shard, offset=(5, 0)) if rank == 1 else shard,
    "negative": lambda rank, shard: msgspec.structs.replace(shard, offset=(-1, 0)) if rank == 1 else shard,
    "hole": lambda rank, shard: msgspec.structs.replace(shard, size=(4, 1)) if rank == 1 else shard,
    "another shape": lambda rank, shard: msgspec.structs.replace(shard, shape=(8, 6)) if rank == 1 else shard,
    "another dtype": lambda rank, shard: msgspec.structs.replace(shard, dtype="I32") if rank == 1 else shard,
    "no dtype": lambda rank, shard: msgspec.structs.replace(shard, dtype="F1"),
    "huge": lambda rank, shard: StoredShard("F32", (1 << 40, 6), (0, 0), (1 << 40, 6)) if rank == 0 else shard,
    "as large as can be": lambda rank, shard: StoredShard("F32", (1 << 61,) * 2, (0, 0), (1 << 61,) * 2),
    "two dimensions for one": lambda rank, shard: msgspec.structs.replace(shard, offset=(0,)),
    "not what lies there": lambda rank, shard: StoredShard("F32", (42,), ((0, 18, 26)[rank],), ((18, 8, 16)[rank],)),
}  # fmt: skip


@pytest.mark.parametrize("what", FORGED)
def test_records_that_lie_about_their_pieces_are_damage(tmp_path, what):
    commit_in_shards(tmp_path, whole(7, 6), CUTS, forge=FORGED[what])
    with pytest.raises(CorruptCheckpointError), reader_of(tmp_path) as reader:
        reader.image("model")


def of_rank(rank, **changes):
    """A lie of one rank about its part."""
    change = lambda part: {"model": msgspec.structs.replace(part, **changes)}  # noqa: E731
    return lambda r: msgspec.structs.replace(r, parts=change(r.parts["model"])) if r.rank == rank else r


LIES = {
    "another attempt": lambda r: msgspec.structs.replace(r, attempt=names.new_attempt()),
    "another step": lambda r: msgspec.structs.replace(r, step=2),
    "another rank": lambda r: msgspec.structs.replace(r, rank=1 - r.rank) if r.rank < 2 else r,
    "more ranks": lambda r: msgspec.structs.replace(r, world=4),
    "a part less": lambda r: msgspec.structs.replace(r, parts={}),
    "a file that there is not": of_rank(1, file="model.rank-00007.safetensors"),
    "a file less": of_rank(2, file=None, size=0, chunks=[], shards={}),
    "no tree at all": of_rank(0, same=True),
}


@pytest.mark.parametrize("what", LIES)
def test_records_that_do_not_add_up_are_damage(tmp_path, what):
    commit_in_shards(tmp_path, whole(7, 6), CUTS, lie=LIES[what])
    with pytest.raises(CorruptCheckpointError):
        reader_of(tmp_path)


def test_a_prepared_record_is_of_this_save_or_damage():
    save = 3, "0123456789ab", 1, 2
    record = RankRecord(*save, {})
    assert prepared(encode_rank_record(record), *save) == record
    for place, other in enumerate((4, "ba9876543210", 0, 3)):
        with pytest.raises(CorruptCheckpointError):
            prepared(encode_rank_record(record), *save[:place], other, *save[place + 1 :])


def test_a_coded_file_of_no_size_is_damage():
    piece = Piece("raw", 10, 32 * "0", 0, 0)
    part = SharePart(NO_TREE, size=10, files=[Shared("model.x.coded", 0)], coded=[[piece]])
    with pytest.raises(CorruptCheckpointError):
        RankRecord(3, "0123456789ab", 1, 2, {"model": part}).files()


@pytest.mark.parametrize("victim", ["rank-00001.json", "model.rank-00002.safetensors"])
def test_what_is_missing_or_changed_is_found(tmp_path, victim):
    commit_in_shards(tmp_path, whole(7, 6), CUTS)
    (path,) = tmp_path.rglob(victim)
    data = path.read_bytes()
    for damaged in (data[:-1] + bytes([data[-1] ^ 1]), data[:-1], data + b"\0"):
        path.write_bytes(damaged)
        with pytest.raises(CorruptCheckpointError), reader_of(tmp_path) as reader:
            reader.verify()
    path.unlink()
    with pytest.raises(CorruptCheckpointError), reader_of(tmp_path) as reader:
        reader.verify()
