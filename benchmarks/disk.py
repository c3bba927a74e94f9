"""Plain reads and writes, as fast as the machine lets them: what results are held against."""

from __future__ import annotations

import ctypes
import mmap
import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

BLOCK = 8 << 20
_DIRECT = getattr(os, "O_DIRECT", 0)


class Buffer:
    """Page-aligned memory, every page touched."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.memory = mmap.mmap(-1, size)
        self.view = memoryview(self.memory)
        for start in range(0, size, BLOCK):
            length = min(BLOCK, size - start)
            self.view[start : start + length] = os.urandom(4096) * (length // 4096) + bytes(length % 4096)
        self.address = ctypes.addressof(ctypes.c_char.from_buffer(self.memory))

    def blocks(self) -> list[tuple[int, int]]:
        return [(start, min(BLOCK, self.size - start)) for start in range(0, self.size, BLOCK)]


def timed(call: Callable[[], object]) -> float:
    begun = time.perf_counter()
    call()
    return time.perf_counter() - begun


def spread_over(threads: int, items: list[tuple[int, int]], call: Callable[[int, int], object]) -> None:
    """`call` for each of `items`, on so many threads."""
    if threads == 1:
        for item in items:
            call(*item)
        return
    with ThreadPoolExecutor(threads) as pool:
        for done in [pool.submit(call, *item) for item in items]:
            done.result()


def write_direct(path: Path, buffer: Buffer, *, threads: int = 1) -> float:
    """Seconds for an O_DIRECT write with fallocate and fsync; over the file's own blocks where it exists.

    Raises:
        OSError: the file system does not take O_DIRECT.
    """
    if not _DIRECT:
        raise OSError("this system has no O_DIRECT")

    def run() -> None:
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | _DIRECT, 0o644)
        try:
            os.posix_fallocate(fd, 0, buffer.size)
            spread_over(threads, buffer.blocks(), lambda at, n: os.pwrite(fd, buffer.view[at : at + n], at))
            os.fsync(fd)
        finally:
            os.close(fd)

    return timed(run)


def write_buffered(path: Path, buffer: Buffer) -> float:
    """Seconds for a write through the page cache, with fsync."""

    def run() -> None:
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        try:
            spread_over(1, buffer.blocks(), lambda at, n: os.pwrite(fd, buffer.view[at : at + n], at))
            os.fsync(fd)
        finally:
            os.close(fd)

    return timed(run)


def read(path: Path, buffer: Buffer, *, direct: bool, threads: int = 1) -> float:
    """Seconds to read `buffer.size` bytes into touched memory."""

    def run() -> None:
        fd = os.open(path, os.O_RDONLY | (_DIRECT if direct else 0))
        try:
            spread_over(threads, buffer.blocks(), lambda at, n: os.preadv(fd, [buffer.view[at : at + n]], at))
        finally:
            os.close(fd)

    return timed(run)


def copy(target: Buffer, source: Buffer, *, threads: int = 1) -> float:
    """Seconds for a memcpy between touched pages."""
    size = source.size // threads // 4096 * 4096
    items = [(start, size) for start in range(0, size * threads, size)]
    return timed(
        lambda: spread_over(threads, items, lambda at, n: ctypes.memmove(target.address + at, source.address + at, n))
    )


def evict(path: Path) -> None:
    """Drop what the page cache holds of the files at or below `path`; of all files where that is allowed."""
    files = [path] if path.is_file() else [found for found in path.rglob("*") if found.is_file()]
    for file in files:
        fd = os.open(file, os.O_RDONLY)
        try:
            os.fsync(fd)
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(fd)
    try:
        Path("/proc/sys/vm/drop_caches").write_text("1")
    except OSError:
        pass


def bytes_below(path: Path) -> int:
    """Of all files at or below `path`."""
    files = [path] if path.is_file() else [found for found in path.rglob("*") if found.is_file()]
    return sum(file.stat().st_size for file in files)
