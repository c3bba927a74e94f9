"""Retired files are written over by later checkpoints: faster, and nobody's bytes change by it."""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from support.checkpoints import image_of

from asyncckpt.catalog.catalog import Catalog
from asyncckpt.errors import StorageError
from asyncckpt.format import names
from asyncckpt.policy.codec import Codec, Name
from asyncckpt.policy.keep import Keep
from asyncckpt.read.reader import CheckpointReader
from asyncckpt.storage import spares
from asyncckpt.storage.local import LocalStorage
from asyncckpt.storage.posix import Posix
from asyncckpt.testing import FaultyPosix, ServiceDriver
from asyncckpt.testing.service import Value
from asyncckpt.write import committing

SIZE = 1 << 17


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spares, "SMALLEST", SIZE)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    with open(tmp_path / "probe", "wb") as file:
        try:
            fcntl.fcntl(file.fileno(), fcntl.F_SETLEASE, fcntl.F_WRLCK)
            os.close(os.open(tmp_path / "direct", os.O_RDWR | os.O_CREAT | os.O_DIRECT))
        except (AttributeError, OSError) as error:
            pytest.skip(f"no leases or no O_DIRECT in {tmp_path}: {error}")
    return tmp_path / "run"


def value(step: int, size: int = SIZE) -> Value:
    noise = np.random.default_rng(step).integers(0, 256, size, np.uint8)
    return {"model": (image_of({"w": noise})[1], step), "other": (image_of({"b": noise[::2]})[1], {})}


def inodes(root: Path) -> dict[str, int]:
    return {p.name: p.stat().st_ino for p in root.glob("step-*/*/*.safetensors")}


def spare(root: Path) -> list[Path]:
    return [path for path in root.iterdir() if names.is_spare(path.name)]


def check(root: Path, step: int, value: Value) -> None:
    with CheckpointReader(Catalog(LocalStorage(str(root))), step) as checkpoint:
        checkpoint.verify()
        for part, (image, _) in value.items():
            same = bytes(checkpoint.image(part).buffer) == image
            assert same, part


def settle(driver: ServiceDriver) -> None:
    """Retention is over when a command that comes after it has been answered."""
    with pytest.raises(Exception, match="no checkpoint of step 77"):
        driver.delete(77)


def run(root: Path, steps: int, between: Callable[[int], None] = lambda step: None, size: int = SIZE) -> list[int]:
    """Save, keeping one; the inode of the model's file at each step."""
    found = []
    with ServiceDriver(str(root), keep=Keep(last=1)) as driver:
        for step in range(1, steps + 1):
            driver.save(step, value(step, size))
            settle(driver)
            check(root, step, value(step, size))
            found.append(inodes(root)["model.safetensors"])
            between(step)
    return found


def test_the_same_few_files_are_used_in_turn_and_none_is_left(root: Path) -> None:
    found = run(root, 8, lambda step: None)
    assert len(set(found)) == 2, "one that is there, and one that is set aside"
    assert not spare(root)


def test_a_file_whose_fsync_failed_is_never_written_over(root: Path) -> None:
    """What a save that failed has left is removed, not set aside."""
    posix = FaultyPosix()
    with ServiceDriver(str(root), posix, keep=Keep(last=1)) as driver:
        driver.save(1, value(1))
        posix.heal()
        posix.fail("fsync", 1, errno.ENOSPC)
        with pytest.raises(StorageError):
            driver.save(2, value(2))
        posix.heal()
        settle(driver)
        assert not spare(root)
        driver.save(3, value(3))
        check(root, 3, value(3))


def test_files_may_grow_and_shrink(root: Path) -> None:
    with ServiceDriver(str(root), keep=Keep(last=1)) as driver:
        for step, size in enumerate([1, 3, 2, 1, 5, 1, 1], 1):
            driver.save(step, value(step, size * SIZE + step))
            settle(driver)
            check(root, step, value(step, size * SIZE + step))
    assert not spare(root)


def reader_keeps_its_bytes(root: Path) -> None:
    mapped: list[tuple[mmap.mmap, bytes]] = []

    def read(step: int) -> None:
        path = next(root.glob("step-*/*/model.safetensors"))
        with open(path, "rb") as file:
            view = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)  # as safetensors does it, without any lock
        mapped.append((view, path.read_bytes()))

    run(root, 6, read)
    assert all(view[:] == data for view, data in mapped)


def test_what_somebody_has_mapped_keeps_its_bytes(root: Path) -> None:
    reader_keeps_its_bytes(root)


def test_planted_no_lease(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Posix, "reclaim", lambda self, path: os.open(path, os.O_RDWR | os.O_DIRECT))
    with pytest.raises(AssertionError):
        reader_keeps_its_bytes(root)


def second_name_keeps_its_bytes(root: Path, backup: Path) -> None:
    backup.mkdir()

    def link(step: int) -> None:
        os.link(next(root.glob("step-*/*/model.safetensors")), backup / str(step))

    run(root, 6, link)
    spoiled = [step for step in range(1, 7) if (backup / str(step)).read_bytes() != value(step)["model"][0]]
    assert not spoiled  # bytes are not compared in an assertion: pytest spends minutes on showing how they differ


def test_a_backup_by_hard_links_keeps_its_bytes(root: Path, tmp_path: Path) -> None:
    second_name_keeps_its_bytes(root, tmp_path / "backup")


def test_planted_second_names_not_looked_at(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def careless(self: Posix, path: str) -> int:
        fd = os.open(path, os.O_RDWR | os.O_DIRECT)
        fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_WRLCK)
        fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_UNLCK)
        return fd

    monkeypatch.setattr(Posix, "reclaim", careless)
    with pytest.raises(AssertionError):
        second_name_keeps_its_bytes(root, tmp_path / "backup")


def test_deleting_by_hand_gives_the_space_back(root: Path) -> None:
    with ServiceDriver(str(root)) as driver:
        for step in (1, 2, 3):
            driver.save(step, value(step))
        driver.delete(2)
        assert not spare(root)


def test_what_a_killed_writer_has_set_aside_goes_at_the_next_start(root: Path) -> None:
    run(root, 3)
    left = root / names.new_spare()
    left.write_bytes(b"x")
    run(root, 1)
    assert not left.exists()


def test_a_full_disk_gets_what_is_set_aside(root: Path) -> None:
    class Full(Posix):
        full = False

        def reserve(self, fd: int, size: int) -> None:
            if self.full and spare(root):
                raise OSError(28, "No space left on device")
            super().reserve(fd, size)

    posix = Full()
    with ServiceDriver(str(root), posix, keep=Keep(last=1)) as driver:
        for step in (1, 2, 3):
            driver.save(step, value(step))
            settle(driver)
        (before,) = spare(root)  # the other part's file is too small to be worth it
        posix.full = True
        driver.save(4, {"fresh": value(4)["model"]})
        check(root, 4, {"fresh": value(4)["model"]})
        assert not before.exists()


def test_nothing_stays_set_aside_once_files_are_coded(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    chosen: list[Name] = ["raw", "raw", "zstd", "zstd", "zstd"]
    monkeypatch.setattr(committing, "choose", lambda *about: chosen.pop(0))
    with ServiceDriver(str(root), keep=Keep(last=1), codec=Codec("auto")) as driver:
        for step in range(1, 6):
            driver.save(step, value(step))
            settle(driver)
            check(root, step, value(step))
            assert bool(spare(root)) == (step == 2), "the third save was raw, and is known to be the last"
