"""Memory of a process and all that it started."""

from __future__ import annotations

import threading
from pathlib import Path

_PROC = Path("/proc")


def tree(root: int) -> list[int]:
    """`root` and its descendants."""
    parents: dict[int, int] = {}
    for entry in _PROC.iterdir():
        if entry.name.isdigit():
            try:
                text = (entry / "stat").read_text()
            except OSError:
                continue
            parents[int(entry.name)] = int(text.rpartition(")")[2].split()[1])
    found = [root]
    for pid in found:
        found.extend(child for child, parent in parents.items() if parent == pid)
    return found


def usage(root: int) -> int:
    """Bytes: the PSS of all processes of the tree, without its shared memory, and all shared memory of the system.

    So memory that is shared but mapped by nobody (a memfd, /dev/shm) counts as well. Shared memory of others is in
    it: take differences.
    """
    total = _field(_PROC / "meminfo", "Shmem:")
    for pid in tree(root):
        path = _PROC / str(pid) / "smaps_rollup"
        try:
            total += _field(path, "Pss:") - _field(path, "Pss_Shmem:")
        except OSError:
            continue
    return total


def _field(path: Path, name: str) -> int:
    for line in path.read_text().splitlines():
        if line.startswith(name):
            return int(line.split()[1]) * 1024
    return 0


class Sampler:
    """Keeps the peak of `usage` for each named phase."""

    def __init__(self, root: int, every: float = 0.03) -> None:
        self.peaks: dict[str, int] = {}
        self._root, self._every = root, every
        self._phase = ""
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def phase(self, name: str) -> None:
        """Sample for `name` from now on; for nothing with ""."""
        self._phase = name

    def _run(self) -> None:
        while not self._stop.wait(self._every):
            phase = self._phase
            if phase:
                self.peaks[phase] = max(self.peaks.get(phase, 0), usage(self._root))

    def close(self) -> None:
        self._stop.set()
        self._thread.join()
