"""How much memory can be taken without swapping and without waking the out-of-memory killer.

A limit of a cgroup is not told by an error: whoever takes a page beyond it is killed, or another in that group is. So
it has to be asked for before. The answer is as old as the question: what others of the group take afterwards, nobody
reserves.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

ROOT = "/sys/fs/cgroup"


def available_memory() -> int | None:
    """Bytes, by the system and by the cgroups that this process is in; None where neither can be asked."""
    return min((n for n in (_of_system(), *_of_cgroups()) if n is not None), default=None)


def _of_system() -> int | None:
    try:
        with open("/proc/meminfo", "rb") as file:
            return next(int(line.split()[1]) * 1024 for line in file if line.startswith(b"MemAvailable:"))
    except (OSError, StopIteration):
        return None


def _of_cgroups() -> Iterator[int]:
    """What the limits of this process's cgroup leave, and those of the cgroups above it."""
    try:
        with open("/proc/self/cgroup") as file:
            lines = file.read().splitlines()
    except OSError:
        return
    for line in lines:
        number, controllers, path = line.split(":", 2)
        if number == "0" and not controllers:
            yield from _upwards(ROOT, path, "memory.max", "memory.current", "inactive_file")
        elif "memory" in controllers.split(","):
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
            yield from _upwards(f"{ROOT}/memory", path, *names)


def _upwards(root: str, path: str, limit: str, usage: str, cache: str) -> Iterator[int]:
    """In a container the folders above it, or its own, may not be there to be asked: those that are count."""
    while True:
        left = _left(root + path.rstrip("/"), limit, usage, cache)
        if left is not None:
            yield left
        if path in ("", "/"):
            return
        path = os.path.dirname(path)


def _left(folder: str, limit: str, usage: str, cache: str) -> int | None:
    """The page cache counts as used, and what of it nobody has used lately goes when memory is wanted."""
    try:
        most = _read(folder, limit)
        if most == "max":
            return None
        stat = dict(line.split() for line in _read(folder, "memory.stat").splitlines())
        return max(0, int(most) - int(_read(folder, usage)) + int(stat.get(cache, 0)))
    except (OSError, ValueError):
        return None


def _read(folder: str, name: str) -> str:
    with open(f"{folder}/{name}") as file:
        return file.read().strip()
