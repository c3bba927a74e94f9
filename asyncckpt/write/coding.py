"""What parts share that are coded, or may be; and what coding would take, where something has to choose."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from queue import SimpleQueue
from typing import TYPE_CHECKING

from asyncckpt.format.image import Entry
from asyncckpt.format.manifest import PartRecord
from asyncckpt.read.pieces import Bench
from asyncckpt.write.meter import Meter
from asyncckpt.write.parts import Place

if TYPE_CHECKING:  # numpy is loaded only where something is coded
    from asyncckpt.codec import Layout, Run


@dataclass(frozen=True)
class Coding:
    """What parts share that are coded, or may be: benches for the threads, the cores that coding may take, and how long
    chains may be.

    `tried`, where something chooses between raw and coded: by part, its record as it was committed last, raw or not.
    """

    benches: SimpleQueue[Bench]
    cores: threading.Semaphore
    max_chain: int
    tried: dict[str, PartRecord] | None = None

    @classmethod
    def of(cls, threads: int, cores: int, max_chain: int, tried: bool) -> Coding:
        """`max_chain` 0: nothing hangs on a base."""
        benches: SimpleQueue[Bench] = SimpleQueue()
        for _ in range(threads):
            benches.put(Bench())
        return cls(benches, threading.Semaphore(cores), max_chain, {} if tried else None)

    @contextmanager
    def bench(self) -> Iterator[Bench]:
        """One for the calling thread alone."""
        bench = self.benches.get()
        try:
            yield bench
        finally:
            self.benches.put(bench)


def encode(
    bench: Bench, data: memoryview, runs: Sequence[Run], base: memoryview | None, coding: Coding, meter: Meter
) -> tuple[str, memoryview]:
    """The codec and the stored bytes of a chunk; they are memory of `bench`, or `data` itself."""
    with coding.cores:
        begun = time.perf_counter()
        codec, stored = bench.coder.encode(data, runs, base)
        meter.coded(len(data), len(stored), time.perf_counter() - begun)
    return codec, stored


def layout_of(place: Place, entries: Mapping[str, Entry]) -> Layout:
    """What the image of a part holds."""
    from asyncckpt.codec import Layout

    header = min((entry.offset for entry in entries.values()), default=place.size)
    return Layout(header, entries.values())


class Trial:
    """What the other ways of storing a part would take, for what chooses between them."""

    EVERY = 32
    """So many chunks are stored while one is coded, too, and forgotten."""

    def __init__(self, place: Place, coding: Coding, entries: Mapping[str, Entry]) -> None:
        self._place, self._coding = place, coding
        self._layout = layout_of(place, entries)
        before = (coding.tried or {}).get(place.part)
        fits = before is not None and (before.size, before.chunk_size) == (place.size, place.chunk_size)
        self._before = before.digests if before is not None and fits else None
        self._seen = itertools.count()

    def compare(self, index: int, size: int, found: str) -> None:
        """Hold the digest `found` of a chunk against what was committed last."""
        if self._before is not None:
            self._place.meter.compared(size, self._before[index] != found)

    def code(self, index: int, data: memoryview) -> None:
        """Code a chunk if it is its turn."""
        if next(self._seen) % self.EVERY == 0:
            start = index * self._place.chunk_size
            with self._coding.bench() as bench:
                encode(bench, data, self._layout.runs(start, start + len(data)), None, self._coding, self._place.meter)
