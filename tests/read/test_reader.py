"""Reading one checkpoint: all of it exact, or an error; nothing but the chunks that are needed."""

from pathlib import Path

import numpy as np
import pytest
from support.checkpoints import Part, commit, flip, image_of, small

from asyncckpt.catalog.catalog import Catalog
from asyncckpt.errors import CheckpointNotFoundError, CorruptCheckpointError, StorageError
from asyncckpt.format import names
from asyncckpt.format.image import PAGE
from asyncckpt.read.reader import CheckpointReader, PartImage
from asyncckpt.storage.local import LocalStorage
from asyncckpt.storage.posix import Posix

ARRAYS = {f"w{i}": np.full(PAGE * 2, i, np.uint8) for i in range(8)} | {"tail": np.arange(3, dtype=np.float64)}
PARTS = {"model": Part(ARRAYS, tree=[1, {"a": None}]), "plain": Part(tree={"step": 3})}


class Counting(Posix):
    """Which pieces were read, by their offset."""

    def __init__(self) -> None:
        self.offsets: list[int] = []

    def preadv(self, fd: int, buffer: memoryview, offset: int) -> int:
        self.offsets.append(offset)
        return super().preadv(fd, buffer, offset)


def reader(root: Path, step: int = 1, posix: Posix | None = None) -> CheckpointReader:
    return CheckpointReader(Catalog(LocalStorage(str(root), posix)), step)


def array(image: PartImage, name: str) -> bytes:
    entry = image.entries[name]
    return bytes(image.buffer[entry.offset : entry.offset + entry.nbytes])


@pytest.mark.parametrize("chunk_size", [PAGE, 3 * PAGE, 1 << 20])
@pytest.mark.parametrize("direct", [True, False])
def test_what_was_committed_is_read(tmp_path: Path, chunk_size: int, direct: bool) -> None:
    storage = LocalStorage(str(tmp_path), direct=direct)
    commit(storage, 1, PARTS, chunk_size=chunk_size)
    checkpoint = CheckpointReader(Catalog(storage), 1)
    checkpoint.verify()
    assert checkpoint.step == 1 and checkpoint.parts == ["model", "plain"]
    assert checkpoint.tree("model") == [1, {"a": None}] and checkpoint.tree("plain") == {"step": 3}
    image = checkpoint.image("model")
    assert bytes(image.buffer) == image_of(ARRAYS)[1]
    assert {name: array(image, name) for name in ARRAYS} == {name: a.tobytes() for name, a in ARRAYS.items()}
    assert checkpoint.image("plain").entries == {}


@pytest.mark.parametrize("keys", [["w3"], ["w0", "tail"], ["tail"], [], ["w7", "w7"]])
def test_only_the_chunks_that_hold_the_keys_are_read(tmp_path: Path, keys: list[str]) -> None:
    commit(LocalStorage(str(tmp_path)), 1, PARTS, chunk_size=PAGE)
    posix = Counting()
    checkpoint = reader(tmp_path, posix=posix)
    posix.offsets.clear()
    image = checkpoint.image("model", keys)
    needed = {0}  # the header
    for key in keys:
        entry = image.entries[key]
        assert array(image, key) == ARRAYS[key].tobytes()
        needed |= set(range(entry.offset // PAGE, -(-(entry.offset + entry.nbytes) // PAGE)))
    assert {offset // PAGE for offset in posix.offsets} == needed
    aligned = [offset for offset in posix.offsets if offset % PAGE == 0]
    assert len(aligned) == len(needed)


def test_damage_outside_the_keys_does_not_matter_to_them(tmp_path: Path) -> None:
    manifest = commit(LocalStorage(str(tmp_path)), 1, PARTS, chunk_size=PAGE)
    checkpoint = reader(tmp_path)
    entry = checkpoint.image("model").entries["w3"]
    flip(tmp_path / "step-00000001" / manifest.attempt / "model.safetensors", entry.offset + 5)
    assert array(checkpoint.image("model", ["w2", "w4"]), "w2") == ARRAYS["w2"].tobytes()
    for call in (lambda: checkpoint.image("model", ["w3"]), lambda: checkpoint.image("model"), checkpoint.verify):
        with pytest.raises(CorruptCheckpointError) as caught:
            call()
        assert (caught.value.step, caught.value.part) == (1, "model")
        assert caught.value.chunk == (entry.offset + 5) // PAGE


@pytest.mark.parametrize("part", ["model", "plain", "none"])
def test_a_part_or_tensor_that_is_not_there(tmp_path: Path, part: str) -> None:
    commit(LocalStorage(str(tmp_path)), 1, PARTS)
    with pytest.raises(CheckpointNotFoundError):
        reader(tmp_path).image(part, ["nothing"])
    with pytest.raises(CheckpointNotFoundError):
        reader(tmp_path, step=2)


def small_run(tmp_path: Path) -> tuple[Path, list[Path]]:
    """A run with one small checkpoint, and its files."""
    commit(LocalStorage(str(tmp_path)), 1, small(1))
    return tmp_path, sorted(path for path in tmp_path.rglob("*") if path.is_file())


def refused(root: Path) -> bool:
    try:
        CheckpointReader(Catalog(LocalStorage(str(root), direct=False)), 1).verify()
    except CorruptCheckpointError:
        return True
    return False


@pytest.mark.parametrize("which", range(3))
def test_every_flipped_byte_of_every_file_is_found(tmp_path: Path, which: int) -> None:
    root, files = small_run(tmp_path)
    assert len(files) == 3 and not refused(root)
    for position in range(files[which].stat().st_size):
        mask = 1 << position % 8
        flip(files[which], position, mask)
        assert refused(root), position
        flip(files[which], position, mask)
    assert not refused(root)


@pytest.mark.parametrize("which", range(3))
def test_truncation_at_every_length_is_found(tmp_path: Path, which: int) -> None:
    root, files = small_run(tmp_path)
    whole = files[which].read_bytes()
    files[which].write_bytes(whole + b"\0")
    assert refused(root)
    for length in reversed(range(len(whole))):
        with open(files[which], "r+b") as file:
            file.truncate(length)
        assert refused(root), length


@pytest.mark.parametrize("which", range(3))
def test_a_missing_file_is_found(tmp_path: Path, which: int) -> None:
    root, files = small_run(tmp_path)
    files[which].unlink()
    with pytest.raises(CheckpointNotFoundError if files[which].name == names.MANIFEST else CorruptCheckpointError):
        reader(root).verify()


@pytest.mark.parametrize("which", range(3))
def test_a_link_in_the_place_of_a_file_is_not_followed(tmp_path: Path, which: int) -> None:
    root, files = small_run(tmp_path / "run")
    files[which].rename(tmp_path / "moved")
    files[which].symlink_to(tmp_path / "moved")
    with pytest.raises(StorageError):
        reader(root).verify()


def test_a_file_of_another_checkpoint_is_found(tmp_path: Path) -> None:
    storage = LocalStorage(str(tmp_path))
    first, second = commit(storage, 1, small(1)), commit(storage, 2, small(2))
    for name in ("model.safetensors", "state.json"):
        source = tmp_path / "step-00000002" / second.attempt / name
        target = tmp_path / "step-00000001" / first.attempt / name
        good = target.read_bytes()
        target.write_bytes(source.read_bytes())
        assert refused(tmp_path)
        target.write_bytes(good)
    (tmp_path / "step-00000001" / names.MANIFEST).write_bytes(
        (tmp_path / "step-00000002" / names.MANIFEST).read_bytes()
    )
    assert refused(tmp_path)
