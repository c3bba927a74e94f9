"""Coded checkpoints: smaller and shared, and each of them still whole by itself."""

from __future__ import annotations

import os
import shutil
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from support import chunks
from support.checkpoints import flip, image_of
from support.numbers import noise, weights

from asyncckpt.catalog.catalog import Catalog
from asyncckpt.codec import Coder
from asyncckpt.errors import CorruptCheckpointError, StorageError
from asyncckpt.format import names
from asyncckpt.format.digests import digest
from asyncckpt.policy.codec import Codec
from asyncckpt.policy.keep import Keep
from asyncckpt.read.reader import CheckpointReader
from asyncckpt.storage.local import LocalStorage
from asyncckpt.storage.posix import Posix
from asyncckpt.testing import ServiceDriver
from asyncckpt.testing.service import Value
from asyncckpt.write import bases, coding, pipeline

INCREMENTAL, ZSTD, DELTA = Codec("incremental"), Codec("zstd"), Codec("delta", max_chain=3)
CHUNK = 1 << 16
Arrays = Mapping[str, np.ndarray[Any, Any]]


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    chunks.make_small(monkeypatch, CHUNK)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "run"


def state(step: int, still: int = 8, live: int = 4) -> Value:
    """A part of whole chunks, of which `still` are the same at every step and `live` change a little."""
    frozen = {f"still{i}": weights("F32", CHUNK // 4, seed=i).view(np.float32) for i in range(still)}
    moving = {
        f"w{i}": weights("F32", CHUNK // 4, seed=99 + i).view(np.float32) * (1 + step / 4096) for i in range(live)
    }
    return {"model": (image_of({**frozen, **moving})[1], step), "note": (b"", {"step": step})}


def reader(root: Path, step: int) -> CheckpointReader:
    return CheckpointReader(Catalog(LocalStorage(str(root))), step)


def check(root: Path, step: int, value: Value) -> None:
    """The checkpoint verifies, and is `value` byte for byte."""
    with reader(root, step) as checkpoint:
        checkpoint.verify()
        for part, (image, tree) in value.items():
            assert bytes(checkpoint.image(part).buffer) == image
            assert checkpoint.tree(part) == tree


def files(root: Path, step: int) -> dict[str, int]:
    """The data files of a checkpoint, and their inodes."""
    folder = next((root / names.step_name(step)).glob("*/"))
    return {path.name: path.stat().st_ino for path in folder.iterdir() if path.name != names.RECORD}


def chains(root: Path, step: int) -> set[int]:
    return {len(pieces) for pieces in reader(root, step).part("model").coded}


@pytest.mark.parametrize("codec", [INCREMENTAL, ZSTD, DELTA])
@pytest.mark.parametrize("direct", [True, False])
def test_every_save_comes_back_byte_for_byte(root: Path, codec: Codec, direct: bool) -> None:
    with ServiceDriver(str(root), codec=codec, direct=direct) as driver:
        for step in range(1, 9):
            driver.save(step, state(step))
    for step in range(1, 9):
        check(root, step, state(step))
    assert not list(root.rglob("*.safetensors"))


def test_coded_is_smaller_and_a_difference_smaller_still(root: Path) -> None:
    written = {}
    for codec in (Codec(), ZSTD, DELTA):
        with ServiceDriver(str(root / codec.name), codec=codec) as driver:
            written[codec.name] = [driver.save(step, state(step, still=0)).written for step in (1, 2)][-1]
    assert written["zstd"] < 0.95 * written["raw"]
    assert written["delta"] < 0.85 * written["zstd"]


@pytest.mark.parametrize("codec", [INCREMENTAL, ZSTD])
def test_what_has_not_changed_is_written_twice_and_then_no_more(root: Path, codec: Codec) -> None:
    with ServiceDriver(str(root), codec=codec) as driver:
        replies = [driver.save(step, state(step)) for step in range(1, 6)]
    first, second, *later = [reply.written for reply in replies]
    assert second < 1.1 * first and max(later) < 0.45 * first
    assert all(reply.size > 0.9 * first for reply in replies)
    stills = [{n: i for n, i in files(root, step).items() if n.endswith(names.STILL)} for step in range(2, 6)]
    assert len(stills[0]) == 1 and all(still == stills[0] for still in stills), "the same inode under the same name"


def test_rm_of_any_checkpoint_harms_no_other(root: Path) -> None:
    with ServiceDriver(str(root), codec=DELTA) as driver:
        for step in range(1, 7):
            driver.save(step, state(step))
    for gone in (3, 1, 6, 2, 5):
        shutil.rmtree(root / names.step_name(gone))
        for step in {1, 2, 3, 4, 5, 6} & {int(p.name[5:]) for p in root.glob("step-*")}:
            check(root, step, state(step))


def test_incremental_codes_nothing(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(Coder, "encode")
    with ServiceDriver(str(root), codec=INCREMENTAL) as driver:
        replies = [driver.save(step, state(step)) for step in (1, 2, 3)]
    assert {piece.codec for pieces in reader(root, 3).part("model").coded for piece in pieces} == {"raw"}
    assert replies[0].written > len(state(1)["model"][0]), "all of it at first"


def test_a_chain_is_no_longer_than_it_may_be(root: Path) -> None:
    with ServiceDriver(str(root), codec=DELTA) as driver:
        lengths = []
        for step in range(1, 10):
            driver.save(step, state(step, still=0))
            lengths.append(max(chains(root, step)))
    assert lengths == [1, 2, 3, 4, 1, 2, 3, 4, 1]
    assert all(len(files(root, step)) == length for step, length in enumerate(lengths, 1))


def test_a_shared_file_is_written_anew_after_so_many_checkpoints(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bases, "SHARED_BY", 3)
    with ServiceDriver(str(root), codec=ZSTD) as driver:
        for step in range(1, 12):
            driver.save(step, state(step))
    held: dict[int, int] = {}
    for step in range(1, 12):
        check(root, step, state(step))
        for name, inode in files(root, step).items():
            held[inode] = held.get(inode, 0) + name.endswith(names.STILL)
    assert max(held.values()) == 3


def test_the_bytes_decide_not_what_anybody_says_of_them(root: Path) -> None:
    """One changed bit of a chunk that never changed before is a chunk that has changed."""
    value = state(1)
    with ServiceDriver(str(root), codec=ZSTD) as driver:
        for step in range(1, 4):
            driver.save(step, value)
        image = bytearray(value["model"][0])
        image[5 * CHUNK + 17] ^= 1
        changed: Value = {**value, "model": (bytes(image), 4)}
        driver.save(4, changed)
    check(root, 4, changed)
    check(root, 3, value)


def test_a_planted_blindness_to_changes_is_seen(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipeline, "digest", lambda data: digest(data) if isinstance(data, bytes) else "0" * 32)
    with ServiceDriver(str(root), codec=ZSTD) as driver:
        for step in range(1, 4):
            driver.save(step, state(step))
    with pytest.raises(CorruptCheckpointError, match="is not what was committed"):
        check(root, 3, state(3))


@pytest.mark.parametrize("codec", [INCREMENTAL, ZSTD, DELTA])
def test_a_base_that_is_gone_or_damaged_is_done_without(root: Path, codec: Codec, caplog: Any) -> None:
    with ServiceDriver(str(root), codec=codec) as driver:
        driver.save(1, state(1))
        driver.save(2, state(2))
        shutil.rmtree(root / names.step_name(2))
        driver.save(3, state(3))
        for path in root.glob(f"step-00000003/*/*{names.CODED}"):
            for position in range(0, path.stat().st_size, 500):
                flip(path, position)
        driver.save(4, state(4))
        driver.save(5, state(5))
    for step in (1, 4, 5):
        check(root, step, state(step))


def test_a_file_system_without_hard_links_to_data_only_costs_more(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(self: LocalStorage, source: str, key: str) -> None:
        raise StorageError("no more links", errno=31)

    monkeypatch.setattr(LocalStorage, "share", refused)
    with ServiceDriver(str(root), codec=DELTA) as driver:
        for step in range(1, 5):
            driver.save(step, state(step))
    for step in range(1, 5):
        check(root, step, state(step))
        assert len(set(files(root, step).values())) <= 2


def test_retention_and_sweeps_leave_what_is_shared(root: Path) -> None:
    with ServiceDriver(str(root), codec=DELTA, keep=Keep(last=2)) as driver:
        for step in range(1, 8):
            driver.save(step, state(step))
            driver.save(step, state(step + 100), replace=True)
    assert sorted(path.name for path in root.glob("step-*")) == ["step-00000006", "step-00000007"]
    for step in (6, 7):
        check(root, step, state(step + 100))
    with ServiceDriver(str(root), codec=DELTA) as driver:
        driver.save(8, state(8))
        driver.rewind(6)
        driver.save(7, state(70), replace=True)
        driver.delete(8)
    check(root, 6, state(106))
    check(root, 7, state(70))


def test_parts_that_change_their_size_or_are_left_out(root: Path) -> None:
    values = [state(1), state(2, still=9), {"other": state(3)["model"]}, state(4, still=9), state(5)]
    with ServiceDriver(str(root), codec=DELTA) as driver:
        for step, value in enumerate(values, 1):
            driver.save(step, value)
    for step, value in enumerate(values, 1):
        check(root, step, value)


def test_random_access_reads_only_what_it_needs(root: Path) -> None:
    with ServiceDriver(str(root), codec=DELTA) as driver:
        for step in (1, 2, 3):
            driver.save(step, state(step))
    value = state(3)["model"][0]
    with reader(root, 3) as checkpoint:
        entry = checkpoint.entries("model")["w1"]
        first, last = entry.offset // CHUNK, (entry.offset + entry.nbytes - 1) // CHUNK
        needed = {0, first, last}
        for index, pieces in enumerate(checkpoint.part("model").coded):
            for piece in pieces if index not in needed else []:
                name = checkpoint.part("model").files[piece.file].name
                flip(next(root.glob(f"step-00000003/*/{name}")), piece.offset + piece.stored // 2, 255)
        image = checkpoint.image("model", ["w1"])
        assert bytes(image.buffer[entry.offset :][: entry.nbytes]) == value[entry.offset :][: entry.nbytes]
        with pytest.raises(CorruptCheckpointError):
            checkpoint.image("model")


def some_bytes(path: Path) -> Iterator[int]:
    yield from range(0, path.stat().st_size, max(1, path.stat().st_size // 60))


def test_verify_follows_chains_and_shared_files(root: Path) -> None:
    """Every used byte of every file of a checkpoint counts, in whichever save it was written."""
    with ServiceDriver(str(root), codec=DELTA) as driver:
        for step in (1, 2, 3, 4):
            driver.save(step, state(step, still=2, live=2))
    record = reader(root, 4).part("model")
    assert {len(pieces) for pieces in record.coded} > {1}
    for index, pieces in enumerate(record.coded):
        for piece in pieces:
            path = next(root.glob(f"step-00000004/*/{record.files[piece.file].name}"))
            for offset in (0, piece.stored // 3, piece.stored // 2):
                flip(path, piece.offset + offset, 64)
                with pytest.raises(CorruptCheckpointError) as caught, reader(root, 4) as checkpoint:
                    checkpoint.verify()
                assert caught.value.chunk == index
                flip(path, piece.offset + offset, 64)
    check(root, 4, state(4, still=2, live=2))


def test_files_cut_short_missing_or_longer_are_found(root: Path) -> None:
    with ServiceDriver(str(root), codec=DELTA) as driver:
        for step in (1, 2, 3):
            driver.save(step, state(step, still=2, live=2))
    for name in files(root, 3):
        path = next(root.glob(f"step-00000003/*/{name}"))
        whole = path.read_bytes()
        path.unlink()
        for data in (None, b"", whole[:-1], whole[: len(whole) // 2], whole + b"\0"):
            if data is not None:
                path.write_bytes(data)
            with pytest.raises(CorruptCheckpointError), reader(root, 3) as checkpoint:
                checkpoint.verify()
        path.write_bytes(whole)
        check(root, 3, state(3, still=2, live=2))


def test_memory_does_not_grow_with_the_state(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No copy of the state is held: not for coding, not for the base, which is read back chunk by chunk."""
    chunks.make_small(monkeypatch, 1 << 20)
    peaks = []
    for count in (1, 8):
        arrays = {f"w{i}": weights("BF16", 8 << 20, seed=i).view(np.uint16) for i in range(count)}
        image = image_of(arrays)[1]
        other = image[:-1] + b"\1"
        with ServiceDriver(str(root / str(count)), codec=DELTA) as driver:
            driver.save(1, {"model": (image, None)})
            Path("/proc/self/clear_refs").write_text("5")
            before = _status("VmRSS")
            driver.save(2, {"model": (other, None)})
            peaks.append(_status("VmHWM") - before - len(image))  # the arena is of that size
    assert peaks[1] - peaks[0] < 32 << 20, peaks


def _status(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(name))


def test_a_manifest_names_every_file_and_its_true_size(root: Path) -> None:
    with ServiceDriver(str(root), codec=DELTA) as driver:
        for step in (1, 2, 3):
            driver.save(step, {**state(step), "noise": (image_of({"n": noise(300_000, step)})[1], 0)})
    for step in (1, 2, 3):
        with reader(root, step) as checkpoint:
            folder = next((root / names.step_name(step)).glob("*/"))
            assert {p.name: p.stat().st_size for p in folder.iterdir()} == {
                name: file.size for name, file in checkpoint.manifest.files.items()
            }
            assert os.stat(folder / names.RECORD).st_nlink == 1
            assert msgspec.json.decode((folder / names.RECORD).read_bytes())["format"] == 1


class SlowDisk(Posix):
    """Takes 20 MB in a second, whoever writes."""

    def __init__(self) -> None:
        self._lock = threading.Lock()

    def pwrite(self, fd: int, data: memoryview | bytes, offset: int) -> int:
        with self._lock:
            time.sleep(len(data) / 20e6)
        return super().pwrite(fd, data, offset)


def auto_saves(root: Path, posix: Posix | None = None) -> list[str]:
    """What `codec="auto"` chose for each of some saves of 2 MB."""
    images = [image_of({"w": weights("BF16", 1 << 20, seed=i).view(np.uint16)})[1] for i in range(3)]
    with ServiceDriver(str(root), posix, codec=Codec("auto", cores=1)) as driver:
        chosen = [driver.save(step, {"model": (image, step)}).codec for step, image in enumerate(images)]
    for step, image in enumerate(images):
        check(root, step, {"model": (image, step)})
    return chosen


def test_auto_codes_where_the_disk_is_the_slower(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(coding.Trial, "EVERY", 4)
    assert auto_saves(root, SlowDisk()) == ["raw", "zstd", "zstd"]
    assert list(root.glob("step-00000000/*/model.safetensors")), "a raw one is a safetensors file"


def test_auto_leaves_raw_where_the_coder_is_the_slower(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    encode = Coder.encode

    def slowly(self: Coder, chunk: Any, *args: Any) -> Any:
        time.sleep(len(chunk) / 1e6)
        return encode(self, chunk, *args)

    monkeypatch.setattr(Coder, "encode", slowly)
    assert auto_saves(root) == ["raw", "raw", "raw"]
