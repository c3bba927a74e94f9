"""The trainer's Python must not stand still while a chunk is coded in another thread of it."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterator

import numpy as np
import pytest
from support.numbers import text, weights

from asyncckpt.codec import Coder, Run

SIZE = 32 << 20


@pytest.fixture(autouse=True)
def prompt_switches() -> Iterator[None]:
    usual = sys.getswitchinterval()
    sys.setswitchinterval(0.0002)
    yield
    sys.setswitchinterval(usual)


def longest_hold(call: Callable[[], object], tries: int = 8, enough: float = 0.005) -> float:
    """Seconds that a thread which only looks at the clock was kept from it while `call` ran in another one.

    The least of some tries: what comes from other processes is not the same each time. The interpreter itself lets a
    thread wait for its switch interval, 5 ms, before it asks another to make way; that is not counted here.
    """
    least = float("inf")
    for _ in range(tries):
        go = threading.Event()
        worker = threading.Thread(target=lambda go=go: (go.wait(), call()))
        worker.start()
        go.set()
        last, longest = time.perf_counter(), 0.0
        while worker.is_alive():
            now = time.perf_counter()
            longest, last = max(longest, now - last), now
        worker.join()
        least = min(least, longest)
        if least < enough:
            break
    return least


def test_a_call_that_holds_it_is_seen() -> None:
    assert longest_hold(lambda: sum(range(3_000_000)), tries=2) > 0.005


CHUNKS = {
    "BF16": lambda: weights("BF16", SIZE // 2),
    "F32": lambda: weights("F32", SIZE // 4),
    "I64": lambda: weights("I64", SIZE // 8),
    "U8": lambda: text(SIZE),
}


@pytest.mark.parametrize("dtype", CHUNKS)
@pytest.mark.parametrize("against_base", [False, True])
def test_coding_lets_others_run(dtype: str, against_base: bool) -> None:
    chunk, coder = CHUNKS[dtype](), Coder()
    base = np.roll(chunk, 1) if against_base else None
    runs = [Run(SIZE, dtype)]
    codec, stored = coder.encode(chunk, runs, base)
    assert codec != "raw"
    assert longest_hold(lambda: coder.encode(chunk, runs, base)) < 0.005
    kept, out = bytes(stored), bytearray(SIZE)
    assert longest_hold(lambda: coder.decode(codec, kept, out, base)) < 0.005
