"""Which checkpoints stay: pure functions over records."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from itertools import pairwise
from typing import Literal

from asyncckpt.policy.records import Record
from asyncckpt.policy.stale import needed, source

Policy = Callable[[Sequence[Record]], Iterable[int]]
"""From the records of a run, oldest first, the steps that may go: see `candidates`."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """Whether a checkpoint stays, and why, in words."""

    stays: bool
    why: str


@dataclass(frozen=True, slots=True)
class Keep:
    """Which checkpoints stay. Clauses are joined by *or*: what any of them names stays.

    Whatever they say, the newest complete checkpoint stays, the newest one not known to hold NaN or inf, the newest
    verified one, and all that are pinned or being read. Where one that is kept lacks parts, those stay that a restore
    with `allow_stale` takes these parts from. Branches left by a rewind go first.

    Args:
        last: the newest N complete ones; and of those that lack parts and are newer than all of these, the newest N,
            and the newest N that older ones have all these parts for.
        every: those whose step is a multiple of it.
        within: those made at most so long before the newest. All, where the times of the run go backwards.
        best: the N best by `metric`, the newer of equals; NaN and inf never count. One that has no such metric yet
            stays until a later one has it, since `annotate` may still bring it.
        metric: the name of that metric.
        mode: whether the least ("min") or the greatest ("max") is best.

    Raises:
        ValueError: a count below 1, a time span that is not positive, a mode there is none of, `best` without
            `metric` or the other way round.
        TypeError: `within` is no timedelta, `metric` no text.
    """

    last: int = 3
    every: int | None = None
    within: timedelta | None = None
    best: int | None = None
    metric: str | None = None
    mode: Literal["min", "max"] = "min"

    def __post_init__(self) -> None:
        for name in ("last", "every", "best"):
            value = getattr(self, name)
            if value is None and name != "last":
                continue
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"Keep({name}={value!r}): give a whole number from 1 on")
        if self.within is not None and not isinstance(self.within, timedelta):
            raise TypeError(f"Keep(within={self.within!r}): give a datetime.timedelta, such as timedelta(hours=6)")
        if self.within is not None and self.within <= timedelta(0):
            raise ValueError(f"Keep(within={self.within!r}): give a positive time span")
        if self.metric is not None and not isinstance(self.metric, str):
            raise TypeError(f"Keep(metric={self.metric!r}): give the name of a metric")
        if self.mode not in ("min", "max"):
            raise ValueError(f"Keep(mode={self.mode!r}): give 'min' or 'max'")
        if self.best is not None and not self.metric:
            raise ValueError(f"Keep(best={self.best}): best by what? Give metric= too, such as metric='val_loss'")
        if self.metric is not None and self.best is None:
            raise ValueError(f"Keep(metric={self.metric!r}): give best= too, the number of best ones to keep")

    def retire(self, records: Sequence[Record]) -> list[int]:
        """The steps that no clause keeps, oldest first: see `Policy`."""
        kept = self.clauses(records)
        return sorted(r.step for r in records if r.step not in kept)

    def explain(self, records: Iterable[Record]) -> dict[int, Verdict]:
        """What becomes of each checkpoint of a run, by step."""
        return judge(records, self)

    def clauses(self, records: Sequence[Record]) -> dict[int, str]:
        """By step, what keeps those that a clause keeps."""
        ordered = sorted(records, key=lambda r: r.step)
        found: dict[int, list[str]] = {}
        for clause in (self._last, self._every, self._within, self._best):
            for step, why in clause(ordered).items():
                found.setdefault(step, []).append(why)
        return {step: ", ".join(whys) for step, whys in found.items()}

    def _last(self, records: list[Record]) -> dict[int, str]:
        complete = [r for r in records if r.complete]
        newest = complete[-1].step if complete else -1
        lacking = [r for r in records if not r.complete and r.step > newest]
        whole = [r for r in lacking if all(source(records, part, r.step, r.sequence) for part in r.omitted)]
        kept = {r.step: f"one of the last {self.last}" for r in complete[-self.last :]}
        return kept | {
            r.step: "newer than the newest complete one" for r in lacking[-self.last :] + whole[-self.last :]
        }

    def _every(self, records: list[Record]) -> dict[int, str]:
        if self.every is None:
            return {}
        return {r.step: f"a multiple of {self.every}" for r in records if r.step % self.every == 0}

    def _within(self, records: list[Record]) -> dict[int, str]:
        if self.within is None or not records:
            return {}
        by_commit = sorted(records, key=lambda r: (r.sequence, r.step))
        times = [r.created for r in by_commit if r.created is not None]
        if len(times) < len(by_commit):
            return {r.step: "the times of the run are not all known" for r in records}
        if any(later < earlier for earlier, later in pairwise(times)):
            return {r.step: "the times of the run go backwards" for r in records}
        kept = [r for r, time in zip(by_commit, times, strict=True) if times[-1] - time <= self.within]
        return {r.step: f"made within {self.within} of the newest" for r in kept}

    def _best(self, records: list[Record]) -> dict[int, str]:
        if self.best is None or self.metric is None:
            return {}
        metric, sign = self.metric, 1 if self.mode == "min" else -1
        having = [r for r in records if metric in r.metrics]
        counting = [r for r in having if math.isfinite(r.metrics[metric])]
        ranked = sorted(counting, key=lambda r: (sign * r.metrics[metric], -r.step))
        which = "the best" if self.best == 1 else f"one of the best {self.best}"
        newest = having[-1].step if having else -1
        waiting = [r for r in records if metric not in r.metrics and r.step > newest]
        kept = {r.step: f"{which} by {metric}" for r in ranked[: self.best]}
        return kept | {r.step: f"may still get its {metric}" for r in waiting}


def judge(records: Iterable[Record], keep: Keep | Policy | None) -> dict[int, Verdict]:
    """What becomes of each checkpoint of a run under `keep`, by step, oldest first. Without `keep` all stay.

    What `keep` says is heard only of those that nothing here holds; it is asked of neither damaged ones nor branches
    that were left.
    """
    ordered = sorted(records, key=lambda r: r.step)
    asked, held = candidates(ordered), _held(ordered)
    kept = keep.clauses(asked) if isinstance(keep, Keep) else {}
    going = set() if keep is None else set((keep.retire if isinstance(keep, Keep) else keep)(asked))

    def verdict(record: Record) -> Verdict:
        if record.step in held:
            return Verdict(True, held[record.step])
        if keep is None:
            return Verdict(True, "there is no policy")
        if record.rewound:
            return Verdict(False, "on a branch that was left by a rewind")
        if record.step in going:
            return Verdict(False, "no clause keeps it" if isinstance(keep, Keep) else "the policy lets it go")
        return Verdict(True, kept.get(record.step, "the policy keeps it"))

    verdicts = {record.step: verdict(record) for record in ordered}
    for step, why in needed(asked, [r for r in asked if verdicts[r.step].stays]).items():
        if not verdicts[step].stays:
            verdicts[step] = Verdict(True, why)
    return verdicts


def candidates(records: Iterable[Record]) -> list[Record]:
    """Those that a policy decides on, oldest first: neither damaged ones nor branches that were left."""
    return sorted((r for r in records if not r.rewound and not r.damaged), key=lambda r: r.step)


def _held(records: Sequence[Record]) -> dict[int, str]:
    """By step, why those stay that no policy may delete."""
    held: dict[int, list[str]] = {}
    whole = [r for r in candidates(records) if r.complete]
    for found, why in ((whole, "the newest complete one"), ([r for r in whole if sound(r)], "the newest finite one")):
        if found:
            held.setdefault(found[-1].step, []).append(why)
    for record in records:
        if record.pinned:
            held.setdefault(record.step, []).append("pinned")
        if record.doubt:
            held.setdefault(record.step, []).append(record.doubt)
    return {step: ", ".join(whys) for step, whys in held.items()}


def sound(record: Record) -> bool:
    """Whether it is not known to hold NaN or inf."""
    return record.finite is not False
