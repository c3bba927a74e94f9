"""A fault at any verb of local storage: it surfaces, with its number, and leaves no half of anything."""

import errno
import mmap
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from asyncckpt.errors import StorageError
from asyncckpt.storage.files import BLOCK
from asyncckpt.storage.local import LocalStorage
from asyncckpt.storage.posix import O_DIRECT, Posix

FOLDER = "step-00000001/0123456789ab"
FILE = f"{FOLDER}/model.safetensors"
KEY = "step-00000001/manifest.json"
VERBS = ["mkdir", "create", "reserve", "pwrite", "truncate", "fsync", "fsync_dir", "link", "rename", "unlink"]


class FaultyPosix(Posix):
    """Fails one verb at its `at`-th call, and records all calls."""

    def __init__(self, verb: str = "", at: int = 0, code: int = errno.EIO) -> None:
        self.verb, self.at, self.code = verb, at, code
        self.calls: list[tuple[str, Any]] = []
        self.files: set[int] = set()

    def __getattribute__(self, name: str) -> Any:
        method = super().__getattribute__(name)
        if name not in (*VERBS, "close", "open"):
            return method

        def call(*args: Any) -> Any:
            seen = sum(known == name for known, _ in self.calls)
            self.calls.append((name, args[0]))
            if (name, seen) == (self.verb, self.at):
                raise OSError(self.code, os.strerror(self.code))
            result = method(*args)
            if name in ("create", "open"):
                self.files.add(result)
            elif name == "close":
                self.files.discard(args[0])
            return result

        return call


def save(storage: LocalStorage, replace: bool) -> None:
    """All that one commit calls."""
    storage.begin(FOLDER)
    memory = memoryview(mmap.mmap(-1, 2 * BLOCK))[: BLOCK + 100]
    file = storage.create(FILE, len(memory))
    try:
        file.write_at(0, memory)
        file.finish()
    finally:
        file.abort()
    storage.put(f"{FOLDER}/state.json", b"{}")
    storage.settle(FOLDER)
    storage.publish(KEY, b"new", replace=replace)


def faults() -> list[tuple[str, int, bool]]:
    """Every call of every verb of a whole save."""
    import tempfile

    found = []
    for replace in (False, True):
        with tempfile.TemporaryDirectory() as folder:
            posix = FaultyPosix()
            save(LocalStorage(os.path.join(folder, "run"), posix), replace)
            names = [name for name, _ in posix.calls if name in VERBS]
            found += [(verb, i, replace) for verb in VERBS for i in range(names.count(verb))]
    return found


@pytest.mark.parametrize(("verb", "at", "replace"), faults())
def test_a_fault_surfaces_and_nothing_stays_open(tmp_path: Path, verb: str, at: int, replace: bool) -> None:
    for code in (errno.EIO, errno.ENOSPC, errno.EROFS):
        posix = FaultyPosix(verb, at, code)
        run = tmp_path / str(code) / "run"
        with pytest.raises(StorageError) as caught:
            save(LocalStorage(str(run), posix), replace)
        assert caught.value.errno == code
        assert caught.value.retryable == (code != errno.EROFS)
        assert str(tmp_path) in str(caught.value)
        assert not posix.files
        if not replace and (verb, at) != ("unlink", 0):
            assert not (run / KEY).exists()


@pytest.mark.parametrize("verb", ["fsync", "pwrite", "rename"])
def test_a_replace_that_fails_leaves_the_old(tmp_path: Path, verb: str) -> None:
    LocalStorage(str(tmp_path)).begin(FOLDER)
    LocalStorage(str(tmp_path)).publish(KEY, b"old", replace=False)
    storage = LocalStorage(str(tmp_path), FaultyPosix(verb))
    with pytest.raises(StorageError):
        storage.publish(KEY, b"new", replace=True)
    assert storage.read(KEY, 10) == b"old"


def test_a_file_whose_fsync_failed_is_never_fsynced_again(tmp_path: Path) -> None:
    posix = FaultyPosix("fsync")
    storage = LocalStorage(str(tmp_path), posix)
    storage.begin(FOLDER)
    file = storage.create(FILE, 10)
    file.write_at(0, memoryview(b"x" * 10))
    with pytest.raises(StorageError):
        file.finish()
    with pytest.raises(StorageError):
        file.finish()
    assert [name for name, _ in posix.calls].count("fsync") == 1


def test_a_device_that_writes_nothing_is_an_error_not_a_loop(tmp_path: Path) -> None:
    class Stuck(Posix):
        def pwrite(self, fd: int, data: memoryview | bytes, offset: int) -> int:
            return 0

    storage = LocalStorage(str(tmp_path), Stuck())
    storage.begin(FOLDER)
    with pytest.raises(StorageError) as caught:
        storage.put(FILE, b"x")
    assert caught.value.errno == errno.EIO


@pytest.mark.skipif(not O_DIRECT, reason="no O_DIRECT here")
@pytest.mark.parametrize("leaves_the_name", [True, False])
def test_a_file_system_without_direct_io_is_written_buffered(tmp_path: Path, leaves_the_name: bool) -> None:
    class Refuses(Posix):
        def create(self, path: str, direct: bool) -> int:
            if direct:
                if leaves_the_name:
                    os.close(super().create(path, False))
                raise OSError(errno.EINVAL, "no O_DIRECT")
            return super().create(path, direct)

        def open(self, path: str, direct: bool) -> int:
            if direct:
                raise OSError(errno.EINVAL, "no O_DIRECT")
            return super().open(path, direct)

    storage = LocalStorage(str(tmp_path), Refuses())
    storage.begin(FOLDER)
    file = storage.create(FILE, 5)
    assert not file.direct
    file.write_at(0, memoryview(b"hello"))
    file.finish()
    readable = storage.open(FILE)
    buffer = bytearray(9)
    assert readable.read_into(0, memoryview(buffer)) == 5 and buffer[:5] == b"hello"
    readable.close()


def test_deleting_is_durable_even_where_the_name_was_gone_already(tmp_path: Path) -> None:
    """It may be gone by an unlink whose fsync never came."""
    storage = LocalStorage(str(tmp_path), posix := FaultyPosix())
    storage.begin(FOLDER)
    posix.calls.clear()
    storage.delete(KEY)
    assert ("fsync_dir", str(tmp_path / "step-00000001")) in posix.calls


@pytest.mark.parametrize("act", [lambda s: s.delete(KEY), lambda s: s.list(""), lambda s: s.read(KEY, 10)])
def test_other_calls_surface_their_faults_too(tmp_path: Path, act: Callable[[LocalStorage], object]) -> None:
    class Broken(Posix):
        def unlink(self, path: str) -> None:
            raise OSError(errno.EIO, "broken")

        def listdir(self, path: str) -> list[str]:
            raise OSError(errno.EIO, "broken")

        def preadv(self, fd: int, buffer: memoryview, offset: int) -> int:
            raise OSError(errno.EIO, "broken")

    storage = LocalStorage(str(tmp_path), Broken())
    storage.begin(FOLDER)
    LocalStorage(str(tmp_path)).publish(KEY, b"x", replace=False)
    with pytest.raises(StorageError) as caught:
        act(storage)
    assert caught.value.errno == errno.EIO
