"""The floors of this machine, for one size of state: no library can be faster."""

from __future__ import annotations

import os
import platform
import statistics
from pathlib import Path
from typing import Any

import xxhash

from benchmarks import disk


def floors(directory: Path, size: int, repeats: int, cuda: bool = False) -> dict[str, Any]:
    """Seconds for each floor (medians); what can't be measured here is its error's text."""
    size = -(-size // 4096) * 4096
    source, target = disk.Buffer(size), disk.Buffer(size)
    found: dict[str, Any] = {"size": size}

    def measure(name: str, call: Any) -> None:
        try:
            found[name] = statistics.median(call() for _ in range(repeats))
        except OSError as error:
            found[name] = f"{type(error).__name__}: {error}"

    measure("memcpy_1", lambda: disk.copy(target, source))
    measure("memcpy_2", lambda: disk.copy(target, source, threads=2))
    measure("hash", lambda: disk.timed(lambda: _hash(source)))
    path = directory / "floor"

    def fresh(threads: int) -> float:
        path.unlink(missing_ok=True)
        return disk.write_direct(path, source, threads=threads)

    measure("write_fresh", lambda: fresh(1))
    measure("write_fresh_2", lambda: fresh(2))
    measure("write_over", lambda: disk.write_direct(path, source))
    measure("write_over_2", lambda: disk.write_direct(path, source, threads=2))
    measure("read_direct", lambda: disk.read(path, target, direct=True))
    measure("read_direct_2", lambda: disk.read(path, target, direct=True, threads=2))
    measure("write_buffered", lambda: disk.write_buffered(path, source))
    disk.read(path, target, direct=False)
    measure("read_warm", lambda: disk.read(path, target, direct=False))
    path.unlink(missing_ok=True)
    if cuda:
        found["pinned_d2h"] = pinned_copy(size, repeats)
    return found


def _hash(buffer: disk.Buffer) -> None:
    for at, length in buffer.blocks():
        xxhash.xxh3_128_digest(buffer.view[at : at + length])


def pinned_copy(size: int, repeats: int) -> float:
    import torch

    source = torch.ones(size, dtype=torch.uint8, device="cuda")
    target = torch.empty(size, dtype=torch.uint8, pin_memory=True)

    def run() -> None:
        target.copy_(source, non_blocking=True)
        torch.cuda.synchronize()

    run()
    return statistics.median(disk.timed(run) for _ in range(repeats))


def merged(measured: list[dict[str, Any]]) -> dict[str, Any]:
    """One table from several: the median of each floor."""
    out = dict(measured[0])
    for name in out:
        numbers = [floor[name] for floor in measured if isinstance(floor[name], int | float)]
        if numbers:
            out[name] = statistics.median(numbers)
    return out


def best(floor: dict[str, Any], name: str) -> float | None:
    """The faster of one thread and two; None where it could not be measured."""
    numbers = [floor.get(key) for key in (name, f"{name}_2")]
    known = [number for number in numbers if isinstance(number, float)]
    return min(known) if known else None


def describe(directory: Path) -> dict[str, str]:
    """What a reader must know of where this ran."""
    cpu = next((line.split(":")[1].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")), "?")
    memory = next((line.split()[1] for line in _lines("/proc/meminfo") if line.startswith("MemTotal")), "0")
    mounts = [line.split()[1:3] for line in _lines("/proc/mounts")]
    below = [mount for mount in mounts if directory.resolve().is_relative_to(mount[0])]
    system = max(below, key=lambda mount: len(mount[0]))[1] if below else "?"
    return {
        "cpu": cpu,
        "cores": str(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()),
        "memory": f"{int(memory) / 2**20:.0f} GiB",
        "file system": system,
        "kernel": platform.release(),
        "python": platform.python_version(),
    }


def _lines(path: str) -> list[str]:
    try:
        return Path(path).read_text().splitlines()
    except OSError:
        return []
