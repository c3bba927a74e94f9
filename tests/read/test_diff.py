"""What differs between two checkpoints: all of it, nothing else, and nothing read that digests can tell."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.checkpoints import Part, commit, flip
from support.shards import commit_in_shards

from asyncckpt.catalog.catalog import Catalog
from asyncckpt.errors import CorruptCheckpointError
from asyncckpt.format.image import PAGE
from asyncckpt.read.contents import tensors
from asyncckpt.read.diff import ABSENT, PartDiff, diff
from asyncckpt.read.reader import CheckpointReader
from asyncckpt.storage.local import LocalStorage
from asyncckpt.storage.posix import Posix

SHAPES = st.sampled_from([(1,), (3,), (0,), (2, 5), (PAGE,), (3 * PAGE + 1,)])
ARRAYS = st.dictionaries(
    st.sampled_from("abcdef"),
    st.tuples(st.sampled_from([np.uint8, np.float32]), SHAPES, st.integers(0, 2)),
    max_size=5,
)


def checkpoints(root: Path, *parts: dict[str, Part], chunk_size: int = PAGE) -> list[CheckpointReader]:
    storage = LocalStorage(str(root))
    for step, found in enumerate(parts, 1):
        commit(storage, step, found, chunk_size=chunk_size)
    return [CheckpointReader(Catalog(storage), step) for step in range(1, len(parts) + 1)]


def only(root: Path, before: Part, after: Part, **options: Any) -> PartDiff:
    (found,) = diff(*checkpoints(root, {"p": before}, {"p": after}, **options))
    return found


def made(spec: dict[str, tuple[Any, tuple[int, ...], int]]) -> dict[str, np.ndarray[Any, Any]]:
    return {name: np.full(shape, value, dtype) for name, (dtype, shape, value) in spec.items()}


@given(before=ARRAYS, after=ARRAYS, sizes=st.sampled_from([(PAGE, PAGE), (PAGE, 2 * PAGE), (1 << 20, 1 << 20)]))
def test_exactly_the_tensors_that_differ_are_named(
    tmp_path_factory: pytest.TempPathFactory, before: Any, after: Any, sizes: tuple[int, int]
) -> None:
    storage = LocalStorage(str(tmp_path_factory.mktemp("run")))
    old, new = made(before), made(after)
    commit(storage, 1, {"p": Part(old)}, chunk_size=sizes[0])
    commit(storage, 2, {"p": Part(new)}, chunk_size=sizes[1])
    (found,) = diff(*(CheckpointReader(Catalog(storage), step) for step in (1, 2)))
    common = old.keys() & new.keys()
    alike = {k for k in common if old[k].dtype == new[k].dtype and old[k].shape == new[k].shape}
    assert set(found.added) == new.keys() - old.keys()
    assert set(found.removed) == old.keys() - new.keys()
    assert set(found.retyped or {}) == common - alike
    assert set(found.changed) == {k for k in alike if old[k].tobytes() != new[k].tobytes()}
    assert found.values == ()
    assert (found.how == "same") == (not (old.keys() ^ new.keys() or common - alike or found.changed))


def test_one_changed_byte_is_found_wherever_it_stands(tmp_path: Path) -> None:
    arrays = {"big": np.zeros(3 * PAGE + 5, np.uint8), "small": np.zeros(3, np.uint8)}
    for step, (name, at) in enumerate([("big", 0), ("big", PAGE), ("big", 3 * PAGE + 4), ("small", 1)]):
        changed = {key: array.copy() for key, array in arrays.items()}
        changed[name][at] = 1
        assert only(tmp_path / str(step), Part(arrays), Part(changed)).changed == (name,)


class Reads(Posix):
    def __init__(self) -> None:
        self.bytes = 0

    def preadv(self, fd: int, buffer: memoryview, offset: int) -> int:
        self.bytes += len(buffer)
        return super().preadv(fd, buffer, offset)


def test_what_digests_tell_is_not_read(tmp_path: Path) -> None:
    """Of 2 x 64 chunks, one differs: the headers and that chunk are read on both sides."""
    array = np.arange(64 * PAGE, dtype=np.uint8)
    changed = array.copy()
    changed[10 * PAGE + 7] += 1
    storage = LocalStorage(str(tmp_path))
    for step, value in enumerate([array, array, changed]):
        commit(storage, step, {"p": Part({"w": value})})
    posix = Reads()
    catalog = Catalog(LocalStorage(str(tmp_path), posix))
    before = CheckpointReader(catalog, 0)
    for step, most in ((1, 0), (2, 8 * PAGE)):
        after = CheckpointReader(catalog, step)
        posix.bytes = 0
        (found,) = diff(before, after)
        assert found.how == ("same" if step == 1 else "changed")
        assert posix.bytes <= most


TREES: list[tuple[Any, Any, list[tuple[str, Any, Any]]]] = [
    ({"lr": 0.1, "n": 1}, {"lr": 0.2, "n": 1}, [("p['lr']", 0.1, 0.2)]),
    ({"a": 1}, {"b": 1}, [("p['a']", 1, ABSENT), ("p['b']", ABSENT, 1)]),
    ([1, [2, 3]], [1, [2, 4]], [("p[1][1]", 3, 4)]),
    ([1], [1, 2], [("p", [1], [1, 2])]),
    (1, True, [("p", 1, True)]),
    (1, 1.0, [("p", 1, 1.0)]),
    ({"$": "tuple", "v": [1, 2]}, {"$": "tuple", "v": [1, 3]}, [("p[1]", 2, 3)]),
    ({"$": "dict", "v": [[0, "x"], [True, "y"]]}, {"$": "dict", "v": [[0, "x"], [True, "z"]]}, [("p[True]", "y", "z")]),
    ({"$": "set", "v": [1, 2]}, {"$": "set", "v": [2, 1]}, []),
    ({"$": "set", "v": [1, 2]}, {"$": "set", "v": [1, 3]}, [("p", ..., ...)]),
    ({"a": 1, "b": 2}, {"b": 2, "a": 1}, []),
    ({"$": "odict", "v": [["a", 1], ["b", 2]]}, {"$": "odict", "v": [["b", 2], ["a", 1]]}, [("list(p)", ..., ...)]),
    ({"$": "module", "v": {"w": 1}, "m": None}, {"$": "module", "v": {"w": 2}, "m": None}, [("p['w']", 1, 2)]),
    ({"$": "float", "v": "000000000000f87f"}, {"$": "float", "v": "000000000000f87f"}, []),
    ({"$": "deque", "n": 3, "v": [1]}, {"$": "deque", "n": 4, "v": [1]}, [("p", ..., ...)]),
    ({"x": {"$": "tensor", "n": "w"}}, {"x": {"$": "tensor", "n": "v"}}, [("p['x']", ..., ...)]),
]


@pytest.mark.parametrize(("before", "after", "expected"), TREES)
def test_values_that_differ_are_named_by_their_path(tmp_path: Path, before: Any, after: Any, expected: Any) -> None:
    found = only(tmp_path, Part(tree=before), Part(tree=after))
    assert [(v.path, v.before, v.after) for v in found.values] == [
        (path, v.before if old is ... else old, v.after if new is ... else new)
        for (path, old, new), v in zip(expected, found.values, strict=True)
    ]
    assert all(type(v.before) is not type(v.after) or v.before != v.after for v in found.values)
    assert found.how == ("changed" if expected else "same")


def test_parts_that_only_one_side_has_are_named(tmp_path: Path) -> None:
    one, two = checkpoints(tmp_path, {"a": Part(), "b": Part()}, {"b": Part(), "c": Part()})
    assert [(d.part, d.how) for d in diff(one, two)] == [("a", "removed"), ("b", "same"), ("c", "added")]


def test_damage_in_what_has_to_be_read_is_raised(tmp_path: Path) -> None:
    one, two = checkpoints(
        tmp_path, {"p": Part({"w": np.zeros(PAGE, np.uint8)})}, {"p": Part({"w": np.ones(PAGE, np.uint8)})}
    )
    flip(next(tmp_path.glob("step-00000002/*/p.safetensors")), PAGE + 9)
    with pytest.raises(CorruptCheckpointError) as caught:
        diff(one, two)
    assert (caught.value.step, caught.value.part, caught.value.chunk) == (2, "p", 1)


@pytest.mark.parametrize(
    "tree",
    [{"$": "tuple"}, {"$": "dict", "v": 3}, {"$": "dict", "v": [1]}, {"$": ["x"], "v": 1}, {"$": "module", "v": {}}],
)
def test_a_tree_outside_the_grammar_is_corrupt_or_a_difference(tmp_path: Path, tree: Any) -> None:
    one, two = checkpoints(tmp_path, {"p": Part(tree=tree)}, {"p": Part(tree={**tree, "z": 1})})
    try:
        diff(one, two)
    except CorruptCheckpointError:
        pass


def test_tensors_are_listed_as_the_training_had_them(tmp_path: Path) -> None:
    arrays = {
        "c": np.zeros(16, np.uint8),
        "plain": np.zeros((2, 3), np.float32),
        "array": np.zeros(8, np.uint8),
        "shared": np.zeros(4, np.float32),
    }
    tree = [
        {"$": "tensor", "n": "c", "d": "complex64", "s": [2]},
        {"$": "tensor", "n": "plain"},
        {"$": "ndarray", "n": "array", "d": "<f8", "s": []},
        {"$": "tensor", "n": "shared", "d": "float32", "s": [2], "st": [1], "o": 0},
        {"$": "tensor", "n": "shared", "d": "float32", "s": [2], "st": [1], "o": 8},
    ]
    (reader,) = checkpoints(tmp_path, {"p": Part(arrays, tree)})
    found = {name: (t.dtype, t.shape, t.nbytes) for name, t in tensors(reader, "p").items()}
    assert found == {
        "c": ("complex64", (2,), 16),
        "plain": ("float32", (2, 3), 24),
        "array": ("numpy <f8", (), 8),
        "shared": ("float32", (4,), 16),
    }


def test_what_several_ranks_saved_is_compared_put_together(tmp_path: Path) -> None:
    """However it was cut; what each rank had of its own is compared in tests/distributed."""
    tensor = np.arange(3 * PAGE, dtype=np.float32).reshape(-1, 64)
    rows, columns = tensor.shape
    other = tensor.copy()
    other[-1, -1] += 1
    by_rows = [((0, 0), (7, columns)), ((7, 0), (rows - 7, columns))]
    by_columns = [((0, 0), (rows, 1)), ((0, 1), (rows, 2)), ((0, 3), (rows, columns - 3))]
    commit_in_shards(tmp_path / "rows", tensor, by_rows)
    commit_in_shards(tmp_path / "again", tensor, by_rows)
    commit_in_shards(tmp_path / "columns", tensor, by_columns)
    commit_in_shards(tmp_path / "other", other, by_columns)
    commit(LocalStorage(str(tmp_path / "plain")), 1, {"model": Part({"w": tensor}, {"w": {"$": "tensor", "n": "w"}})})
    readers = {p.name: CheckpointReader(Catalog(LocalStorage(str(p))), 1) for p in tmp_path.iterdir()}
    same = [name for name in readers if name != "other"]
    for one in same:
        for two in same:
            assert diff(readers[one], readers[two]) == [PartDiff("model", "same")]
        for pair in ((one, "other"), ("other", one)):
            (found,) = diff(*(readers[name] for name in pair))
            assert (found.how, found.changed, found.values) == ("changed", ("w",), ())
