"""The trainer's Python must not stand still while a chunk is coded in another thread of it."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable, Iterator

import numpy as np
import pytest
from support.numbers import text, weights

from asyncckpt.codec import Coder, Run

SIZE = 32 << 20
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="threads are watched through /proc")


@pytest.fixture(autouse=True)
def prompt_switches() -> Iterator[None]:
    usual = sys.getswitchinterval()
    sys.setswitchinterval(0.0002)
    yield
    sys.setswitchinterval(usual)


def _waited(status: int) -> float:
    """Seconds that a thread was ready to run and had no core: the second number of its `schedstat` (proc(5))."""
    return int(os.pread(status, 64, 0).split()[1]) / 1e9


def longest_hold(call: Callable[[], object], tries: int = 8, enough: float = 0.005) -> float:
    """Seconds that a thread which only looks at the clock was kept from it while `call` ran in another one.

    Of each gap counts at most what the other thread computed in it, less what the first one waited for a core: other
    processes are not to blame on `call`. The least of some tries, for that is an estimate. The interpreter itself lets
    a thread wait for its switch interval, 5 ms, before it asks another to make way; that is not counted here.
    """
    least = float("inf")
    for _ in range(tries):
        go, done, seen = threading.Event(), threading.Event(), threading.Event()
        steps = (go.wait, call, done.set, seen.wait)
        worker = threading.Thread(target=lambda steps=steps: [step() for step in steps])
        worker.start()
        clock = time.pthread_getcpuclockid(worker.ident or 0)
        with open("/proc/thread-self/schedstat", "rb") as status:
            go.set()
            last, waited, computed, longest = time.perf_counter(), _waited(status.fileno()), 0.0, 0.0
            ended = False
            while not ended:
                ended = done.is_set()
                before = last, waited, computed
                waited, last, computed = _waited(status.fileno()), time.perf_counter(), time.clock_gettime(clock)
                longest = max(longest, min(computed - before[2], last - before[0] - (waited - before[1])))
        seen.set()
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
