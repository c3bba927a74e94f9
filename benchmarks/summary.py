"""From the records of a run to the numbers of its table: pure functions."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from benchmarks import machine
from benchmarks.child import Record
from benchmarks.spread import Spread, spread


@dataclass
class Summary:
    """One peer. Seconds, bytes and ratios; None where nothing was measured, and `errors` then says why."""

    name: str
    rounds: int = 0
    first: Spread | None = None
    """Blocked by the first save."""
    blocked: dict[int, Spread | None] = field(default_factory=dict)
    """Blocked by a save, by how many steps lie between saves."""
    tax: dict[int, Spread | None] = field(default_factory=dict)
    wall: dict[int, Spread | None] = field(default_factory=dict)
    inflation: Spread | None = None
    committed: Spread | None = None
    sync: Spread | None = None
    size: int = 0
    memory: Spread | None = None
    cold: Spread | None = None
    warm: Spread | None = None
    killed: str = ""
    fsynced: str = ""
    errors: dict[str, str] = field(default_factory=dict)


@dataclass
class Result:
    run: Record
    floors: dict[str, Any]
    peers: list[Summary]
    step: Spread | None
    """A step with nothing in flight."""


def summarise(records: list[Record]) -> Result:
    run = next(record for record in records if record["kind"] == "run")
    measured = [record for record in records if record["kind"] == "floors"]
    names = list(dict.fromkeys(record["peer"] for record in records if "peer" in record))
    order = [name for name in run["peers"] if name in names]
    quiet = [r for r in records if r["kind"] == "window" and r["every"] == 0]
    steps = [end - begin for window in quiet for begin, end, _ in window["ticks"]]
    peers = [_peer(name, [r for r in records if r.get("peer") == name]) for name in order]
    return Result(run, machine.merged(measured) if measured else {}, peers, spread(steps))


def _peer(name: str, records: list[Record]) -> Summary:
    out = Summary(name, len({record["round"] for record in records if record["kind"] == "window"}))
    windows = list(_with_baseline(records))
    busy = [(window, base) for window, base in windows if window["every"]]
    out.first = spread([s["blocked"] for r in records if r["kind"] == "first" for s in r["saves"]])
    for every in sorted({window["every"] for window, _ in busy}):
        chosen = [(window, base) for window, base in busy if window["every"] == every]
        out.blocked[every] = spread([s["blocked"] for window, _ in chosen for s in window["saves"]])
        out.tax[every] = spread([(w["wall"] - w["steps"] * base) / len(w["saves"]) for w, base in chosen])
        out.wall[every] = spread([w["wall"] / (w["steps"] * base) for w, base in chosen])
    calm = [window for window, _ in busy if window["every"] > 1] or [window for window, _ in busy]
    out.committed = spread([s["done"] - s["called"] for window in calm for s in window["saves"] if s["done"]])
    out.inflation = spread([ratio for window, base in busy for ratio in _in_flight(window, base)])
    out.sync = spread([window["sync"] for window, _ in busy])
    out.size = max((window["bytes"] for window, _ in busy), default=0)
    out.memory = spread([r["with"] - r["without"] for r in records if r["kind"] == "memory"])
    for record in records:
        if record["kind"] == "error":
            out.errors[record["role"]] = record["text"]
        elif record["kind"] == "fsync":
            out.fsynced = record["fsynced"]
            if record["why"]:
                out.errors["fsync"] = record["why"]
    kills = [r for r in records if r["kind"] == "kill"]
    if kills:
        out.killed = "yes" if all(r["survived"] for r in kills) else "NO"
        out.cold = spread([s for r in kills for s in r.get("cold", ())])
        out.warm = spread([s for r in kills for s in r.get("warm", ())])
        failures = [r["why"] for r in kills if r["why"]]
        if failures:
            out.errors["kill -9"] = failures[0]
    return out


def _with_baseline(records: list[Record]) -> Iterable[tuple[Record, float]]:
    """Each window, with the seconds of a step by the quiet windows nearest to it in the same process."""
    rounds = dict.fromkeys(r["round"] for r in records if r["kind"] == "window")
    for number in rounds:
        windows = [r for r in records if r["kind"] == "window" and r["round"] == number]
        quiet = [(at, w["wall"] / w["steps"]) for at, w in enumerate(windows) if w["every"] == 0]
        for at, window in enumerate(windows):
            before = [step for where, step in quiet if where <= at][-1:]
            after = [step for where, step in quiet if where >= at][:1]
            if before or after:
                yield window, sum(before + after) / len(before + after)


def _in_flight(window: Record, base: float) -> Iterable[float]:
    """Steps with a save in flight for half of them or more: their length without what was blocked, over a quiet one."""
    spans = [(save["called"], save["done"]) for save in window["saves"] if save["done"]]
    for begin, end, blocked in window["ticks"]:
        covered = max((min(end, done) - max(begin, called) for called, done in spans), default=0.0)
        if covered >= 0.5 * (end - begin):
            yield (end - begin - blocked) / base
