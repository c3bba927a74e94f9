"""What parts share that are coded, or may be; and what coding would take, where something has to choose."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from queue import SimpleQueue
from typing import TYPE_CHECKING

from asyncckpt.format.image import Entry
from asyncckpt.read.pieces import Bench
from asyncckpt.write.meter import Meter
from asyncckpt.write.parts import Place

if TYPE_CHECKING:  # numpy is loaded only where something is coded
    from asyncckpt.codec import Layout, Run


@dataclass(frozen=True)
class Coding:
    """What coded parts share: benches for the threads, the cores that coding may take, and how long chains may be."""

    benches: SimpleQueue[Bench]
    cores: threading.Semaphore
    max_chain: int

    @classmethod
    def of(cls, threads: int, cores: int, max_chain: int) -> Coding:
        """`max_chain` 0: nothing hangs on a base."""
        benches: SimpleQueue[Bench] = SimpleQueue()
        for _ in range(threads):
            benches.put(Bench())
        return cls(benches, threading.Semaphore(cores), max_chain)

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
    """Codes one chunk of each `EVERY`, and forgets it: for what chooses between raw and coded."""

    EVERY = 32

    def __init__(self, place: Place, coding: Coding, entries: Mapping[str, Entry]) -> None:
        self._place, self._coding = place, coding
        self._layout = layout_of(place, entries)
        self._which = min(1, (place.size - 1) // place.chunk_size)

    def see(self, index: int, data: memoryview) -> None:
        if index % self.EVERY == self._which:
            start = index * self._place.chunk_size
            with self._coding.bench() as bench:
                encode(bench, data, self._layout.runs(start, start + len(data)), None, self._coding, self._place.meter)
