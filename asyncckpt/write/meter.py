"""What storing one save takes: how fast the storage is while it is at work, and how fast a core codes."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from asyncckpt.policy.codec import Rates


class Meter:
    """Told of every write and every coding of one save, by the threads that do them."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._writers, self._since = 0, 0.0
        self._wrote, self._writing = 0, 0.0
        self._took, self._gave, self._coding = 0, 0, 0.0

    @contextmanager
    def writing(self, size: int) -> Iterator[None]:
        """Around a call that hands `size` bytes to the storage, or waits for it. Time in which some do counts once."""
        with self._lock:
            if not self._writers:
                self._since = time.perf_counter()
            self._writers += 1
        try:
            yield
        finally:
            with self._lock:
                self._writers -= 1
                self._wrote += size
                if not self._writers:
                    self._writing += time.perf_counter() - self._since

    def coded(self, took: int, gave: int, seconds: float) -> None:
        """So many bytes became so many in `seconds` of one thread."""
        with self._lock:
            self._took, self._gave, self._coding = self._took + took, self._gave + gave, self._coding + seconds

    @property
    def rates(self) -> Rates:
        with self._lock:
            return Rates(
                sink=self._wrote / self._writing if self._writing else None,
                coder=self._took / self._coding if self._coding else None,
                share=self._gave / self._took if self._took else None,
            )
