"""What a Checkpointer has done so far, as an immutable record."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from asyncckpt.handle import Outcome, SaveHandle
from asyncckpt.policy.auto import Interval
from asyncckpt.policy.codec import Rates


@dataclass(frozen=True, slots=True)
class MirrorStats:
    """How the mirror stands, as the writer that runs now has told."""

    step: int | None
    """The step that was mirrored last."""
    steps: int
    """Steps mirrored."""
    bytes: int
    """Bytes sent there, those of tries that failed among them."""
    backlog: int
    """Committed steps that are not there yet."""
    passed_over: int
    """Steps that were not sent: retention there would not keep them, or they were saved again, or are gone."""
    error: str
    """What it fails of; empty while it does not fail."""


@dataclass(frozen=True, slots=True)
class Stats:
    """A reading. Times are in seconds, sizes in bytes."""

    saves: int
    """Calls of `save` that were not refused."""
    committed: int
    skipped: int
    replaced: int
    failed: int
    in_flight: int
    """Saves that are not over."""
    blocked: float
    """Time that all calls of `save` took together; what waited for the queue (`when_full="wait"`) is part of it."""
    blocked_last: float
    blocked_max: float
    fenced: float
    """Time that optimizer steps waited for copies, all together."""
    bytes_committed: int
    seconds_to_committed: float | None
    """Of the last committed save: from `save` until it was committed."""
    bytes_per_second: float | None
    """Of the last committed save: of what it wrote, from its first byte until all was durable."""
    step_seconds: float | None
    """One step while no save is in flight; None before one was measured."""
    save_tax: float | None
    """What a save costs the training: waits, and slower steps until it is over; the mean of the last five."""
    interval: Interval | None
    """What `Auto` has chosen, and why; None while it measures, and with any other cadence."""
    arena_bytes: int
    """Memory that snapshots take beside the training."""
    overlap: bool | None
    """The way of copying in use; None while `overlap="auto"` is still trying both."""
    codec: str | None
    """How the last committed save is stored: "raw", "incremental", "zstd" or "delta". None before the first."""
    rates: Rates | None
    """What storing takes, as measured; `codec="auto"` goes by it."""
    direct_io: bool | None
    """Whether the last committed save went past the page cache; None before the first."""
    writer: str
    """"process" or "thread"."""
    writer_pid: int | None
    """None while no writer runs."""
    mirror: MirrorStats | None = None
    """None without a mirror (of several ranks, that of rank 0)."""


class Tally:
    """The counts behind `Stats`. Its owner holds a lock."""

    def __init__(self) -> None:
        self.saves = 0
        self.blocked = 0.0
        self.blocked_last = 0.0
        self.blocked_max = 0.0
        self.outcomes: Counter[Outcome] = Counter()
        self.bytes_committed = 0
        self.seconds_to_committed: float | None = None
        self.bytes_per_second: float | None = None
        self.direct_io: bool | None = None
        self.codec: str | None = None
        self.rates: Rates | None = None

    def returned(self, seconds: float) -> None:
        """A call of `save` took `seconds`."""
        self.saves += 1
        self.blocked += seconds
        self.blocked_last = seconds
        self.blocked_max = max(self.blocked_max, seconds)

    def ended(self, handle: SaveHandle) -> None:
        self.outcomes[handle.outcome] += 1
        times = handle.timeline
        if times is not None:
            self.bytes_committed += times.size
            self.seconds_to_committed = times.commit_end - times.saved
            took = times.write_end - times.write_begin
            self.bytes_per_second = times.written / took if took > 0 else None
