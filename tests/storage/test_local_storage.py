"""A directory as storage: what is written is what is read, names appear whole or not at all, links are refused."""

import fcntl
import mmap
import os
import stat
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from asyncckpt.errors import CheckpointError, CorruptCheckpointError, StorageError
from asyncckpt.storage.files import BLOCK
from asyncckpt.storage.local import LocalStorage
from asyncckpt.storage.posix import O_DIRECT, Posix

FOLDER = "step-00000001/0123456789ab"
FILE = f"{FOLDER}/model.safetensors"
KEY = "step-00000001/manifest.json"
SIZES = [0, 1, 511, 512, BLOCK - 1, BLOCK, BLOCK + 1, 3 * BLOCK + 100, 5 * BLOCK]


def pattern(size: int) -> bytes:
    return bytes((7 * i + i // 251) % 256 for i in range(size))


def aligned(data: bytes) -> memoryview:
    """`data` in memory of its own, at the start of a page."""
    memory = mmap.mmap(-1, max(len(data), 1))
    memory[: len(data)] = data
    return memoryview(memory)[: len(data)]


def write(storage: LocalStorage, data: memoryview, key: str = FILE) -> bool:
    """Write `data` as two pieces; whether O_DIRECT was used to the end."""
    file = storage.create(key, len(data))
    cut = len(data) // 2 // BLOCK * BLOCK
    file.write_at(cut, data[cut:])
    file.write_at(0, data[:cut])
    direct = file.direct
    file.finish()
    return direct


def read(storage: LocalStorage, offset: int, size: int, key: str = FILE) -> bytes:
    file = storage.open(key)
    try:
        buffer = aligned(bytes(size))
        return bytes(buffer[: file.read_into(offset, buffer)])
    finally:
        file.close()


class ShortPosix(Posix):
    """Every transfer moves only a part of what was asked."""

    def pwrite(self, fd: int, data: memoryview | bytes, offset: int) -> int:
        return super().pwrite(fd, memoryview(data)[: max(len(data) * 2 // 3, 1)], offset)

    def preadv(self, fd: int, buffer: memoryview, offset: int) -> int:
        return super().preadv(fd, buffer[: max(len(buffer) * 2 // 3, 1)], offset)


@pytest.mark.parametrize("posix", [Posix, ShortPosix])
@pytest.mark.parametrize("direct", [True, False])
@pytest.mark.parametrize("size", SIZES)
def test_what_is_written_is_read(tmp_path: Path, size: int, direct: bool, posix: Callable[[], Posix]) -> None:
    storage = LocalStorage(str(tmp_path / "run"), posix(), direct)
    storage.begin(FOLDER)
    data = pattern(size)
    write(storage, aligned(data))
    assert (tmp_path / "run" / FILE).read_bytes() == data
    for reader in (storage, LocalStorage(storage.root, direct=not direct)):
        assert read(reader, 0, size) == data
        assert read(reader, 0, size + BLOCK) == data
        assert read(reader, BLOCK, BLOCK + 10) == data[BLOCK : 2 * BLOCK + 10]
        assert reader.read(FILE, size) == data


@given(st.integers(1, 3 * BLOCK), st.integers(0, 64))
def test_memory_at_any_address_is_written(tmp_path_factory: pytest.TempPathFactory, size: int, shift: int) -> None:
    storage = LocalStorage(str(tmp_path_factory.mktemp("run")))
    storage.begin(FOLDER)
    data = pattern(size)
    write(storage, aligned(bytes(shift) + data)[shift:])
    assert read(storage, 0, size) == data


def test_files_and_folders_are_private(tmp_path: Path) -> None:
    old = os.umask(0)
    try:
        storage = LocalStorage(str(tmp_path / "a" / "run"))
        storage.begin(FOLDER)
        write(storage, aligned(pattern(100)))
        storage.put(f"{FOLDER}/state.json", b"{}")
        storage.publish(KEY, b"{}", replace=False)
        storage.publish("rewinds.json", b"{}", replace=True)
    finally:
        os.umask(old)
    for path in [tmp_path / "a", *(tmp_path / "a").rglob("*")]:
        assert stat.S_IMODE(path.stat().st_mode) == (0o700 if path.is_dir() else 0o600), path


def test_publish_without_replace_is_exclusive(tmp_path: Path) -> None:
    storage = LocalStorage(str(tmp_path))
    storage.begin(FOLDER)
    start = threading.Barrier(8)
    won: list[int] = []

    def publish(i: int) -> None:
        start.wait(10)
        try:
            storage.publish(KEY, b"%d" % i, replace=False)
            won.append(i)
        except FileExistsError:
            pass

    threads = [threading.Thread(target=publish, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert len(won) == 1
    assert storage.read(KEY, 10) == b"%d" % won[0]
    assert sorted(storage.list("step-00000001")) == ["0123456789ab", "manifest.json"]


def test_publish_with_replace_shows_the_old_or_the_new(tmp_path: Path) -> None:
    storage = LocalStorage(str(tmp_path))
    versions = [bytes([i]) * (1000 * (i + 1)) for i in range(40)]
    storage.begin(FOLDER)
    storage.publish(KEY, versions[0], replace=True)
    done = threading.Event()
    seen: list[bytes] = []
    failed: list[BaseException] = []

    def look() -> None:
        try:
            while not done.is_set():
                seen.append(storage.read(KEY, 1 << 20))
        except BaseException as error:
            failed.append(error)

    reader = threading.Thread(target=look)
    reader.start()
    for data in versions:
        storage.publish(KEY, data, replace=True)
    done.set()
    reader.join(30)
    assert not failed and set(seen) <= set(versions)
    order = [data[0] for data in seen]
    assert order == sorted(order)
    assert storage.list("step-00000001") == ["0123456789ab", "manifest.json"] or len(storage.list("step-00000001")) == 2


def test_what_exists_is_never_overwritten(tmp_path: Path) -> None:
    storage = LocalStorage(str(tmp_path))
    storage.begin(FOLDER)
    storage.put(FILE, b"first")
    with pytest.raises(FileExistsError):
        storage.put(FILE, b"second")
    with pytest.raises(FileExistsError):
        storage.create(FILE, 6)
    with pytest.raises(FileExistsError):
        storage.begin(FOLDER)
    assert storage.read(FILE, 5) == b"first"


def test_what_is_absent_is_not_found(tmp_path: Path) -> None:
    storage = LocalStorage(str(tmp_path / "none"))
    for call in (lambda: storage.read(KEY, 10), lambda: storage.open(KEY)):
        with pytest.raises(FileNotFoundError):
            call()
    assert storage.list("") == [] and storage.list("step-00000001") == []
    storage.delete(KEY)
    storage.remove_folder(FOLDER)
    assert storage.free_bytes()
    assert not (tmp_path / "none").exists()


def test_more_bytes_than_can_be_right_are_not_read(tmp_path: Path) -> None:
    storage = LocalStorage(str(tmp_path))
    (tmp_path / "rewinds.json").write_bytes(b"")
    os.truncate(tmp_path / "rewinds.json", 1 << 40)  # sparse; reading it would take all memory
    with pytest.raises(CorruptCheckpointError):
        storage.read("rewinds.json", 100)


@pytest.mark.parametrize("link", ["step-00000001", FOLDER, FILE, KEY])
def test_nothing_is_read_or_removed_through_a_link(tmp_path: Path, link: str) -> None:
    """The same tree, once as it is and once with one piece of it a link to the real one."""
    real = LocalStorage(str(tmp_path / "real"))
    real.begin(FOLDER)
    write(real, aligned(pattern(100)))
    real.publish(KEY, b"{}", replace=False)
    storage = LocalStorage(str(tmp_path / "run"))
    path = tmp_path / "run" / link
    path.parent.mkdir(parents=True)
    path.symlink_to(tmp_path / "real" / link)
    key = KEY if link == KEY else FILE
    for call in (lambda: storage.read(key, 1000), lambda: storage.open(key)):
        with pytest.raises(StorageError):
            call()
    if link != KEY and link != FILE:
        assert storage.list(link) == []
        storage.remove_folder(link)
        assert path.is_symlink()
    with pytest.raises((CheckpointError, FileExistsError, OSError)):
        storage.put(key, b"changed")
    assert read(real, 0, 100) == pattern(100) and real.read(KEY, 10) == b"{}"


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir], ids=["fifo", "folder"])
def test_what_is_no_regular_file_is_refused_at_once(tmp_path: Path, make: Callable[[Path], None]) -> None:
    make(tmp_path / "rewinds.json")
    storage = LocalStorage(str(tmp_path))
    for call in (lambda: storage.read("rewinds.json", 100), lambda: storage.open("rewinds.json")):
        with pytest.raises(StorageError):
            call()


def test_the_run_itself_may_be_reached_by_a_link(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "run").symlink_to(tmp_path / "disk")
    storage = LocalStorage(str(tmp_path / "run"))
    storage.begin(FOLDER)
    storage.publish(KEY, b"{}", replace=False)
    assert storage.read(KEY, 10) == b"{}"
    assert (tmp_path / "disk" / KEY).exists()


def test_remove_folder_takes_only_what_an_attempt_may_hold(tmp_path: Path) -> None:
    storage = LocalStorage(str(tmp_path))
    storage.begin(FOLDER)
    for name in ("model.safetensors", "state.json", ".state.json-0123456789ab.tmp", "notes.txt"):
        storage.put(f"{FOLDER}/{name}", b"")
    (tmp_path / FOLDER / "mine.safetensors").mkdir()
    storage.remove_folder(FOLDER)
    assert sorted(storage.list(FOLDER)) == ["mine.safetensors", "notes.txt"]
    (tmp_path / FOLDER / "notes.txt").unlink()
    (tmp_path / FOLDER / "mine.safetensors").rmdir()
    storage.remove_folder(FOLDER)
    assert storage.list("step-00000001") == []


def test_data_files_beside_the_attempts_are_foreign(tmp_path: Path) -> None:
    """Another tool's step folder may look like `step-00000001/model.safetensors`."""
    folder = tmp_path / "step-00000001"
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(b"precious")
    LocalStorage(str(tmp_path)).remove_folder("step-00000001")
    assert (folder / "model.safetensors").read_bytes() == b"precious"


def test_a_file_where_a_folder_should_be_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "step-00000001").write_bytes(b"mine")
    storage = LocalStorage(str(tmp_path))
    assert storage.list("step-00000001") == []
    storage.remove_folder("step-00000001")
    with pytest.raises(StorageError):
        storage.begin(FOLDER)
    assert (tmp_path / "step-00000001").read_bytes() == b"mine"


class WhichWay(Posix):
    """Notes by which file descriptors bytes come: through the page cache, or around it."""

    def __init__(self) -> None:
        self.direct: list[bool] = []

    def preadv(self, fd: int, buffer: memoryview, offset: int) -> int:
        self.direct.append(bool(fcntl.fcntl(fd, fcntl.F_GETFL) & O_DIRECT))
        return super().preadv(fd, buffer, offset)


def test_what_the_page_cache_holds_is_read_through_it_unless_the_disk_is_asked(tmp_path: Path) -> None:
    posix = WhichWay()
    storage = LocalStorage(str(tmp_path / "run"), posix)
    storage.begin(FOLDER)
    data = pattern(5 * BLOCK + 100)
    if not write(storage, aligned(data)):
        pytest.skip("no O_DIRECT here")
    path = tmp_path / "run" / FILE
    with path.open("rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        assert not posix.cached(file.fileno(), 0, len(data))
        assert read(storage, 0, len(data)) == data
        assert set(posix.direct) == {True}
        assert not posix.cached(file.fileno(), 0, len(data)), "a look at the cache must not fill it"
        file.read()
        if not posix.cached(file.fileno(), 0, len(data)):
            pytest.skip("this system does not tell what is cached")
    for cached in (True, False):
        posix.direct.clear()
        opened = storage.open(FILE, cached=cached)
        buffer = aligned(bytes(len(data)))
        assert opened.read_into(0, buffer) == len(data)
        opened.close()
        assert bytes(buffer) == data
        assert set(posix.direct) == {not cached}


def test_a_rank_gets_its_folder_though_that_of_the_step_is_cleared_meanwhile(tmp_path: Path) -> None:
    """Rank 0 removes what an earlier save of the step has left, and the empty folder, while another rank begins."""

    class Cleared(Posix):
        times = 3

        def mkdir(self, path: str) -> None:
            if path.endswith("/0123456789ab") and self.times:
                self.times -= 1
                os.rmdir(os.path.dirname(path))
            super().mkdir(path)

    storage = LocalStorage(str(tmp_path / "run"), Cleared())
    storage.begin(FOLDER, shared=True)
    assert storage.list("step-00000001") == ["0123456789ab"]
