"""The tables of a run, for the terminal and in markdown."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console
from rich.table import Table

from benchmarks import machine
from benchmarks.spread import Spread
from benchmarks.summary import Result, Summary

Grid = tuple[str, list[str], list[list[str]]]
_BEGIN, _END = "<!-- benchmark -->", "<!-- /benchmark -->"
_FLOORS = {
    "memcpy_1": "memcpy, one thread",
    "memcpy_2": "memcpy, two threads",
    "hash": "xxh3_128",
    "write_fresh": "O_DIRECT write, fresh blocks, fsync",
    "write_fresh_2": "the same, two threads",
    "write_over": "O_DIRECT write over the file's blocks, fsync",
    "write_over_2": "the same, two threads",
    "write_buffered": "write through the page cache, fsync",
    "read_direct": "O_DIRECT read",
    "read_direct_2": "the same, two threads",
    "read_warm": "read from the page cache",
    "pinned_d2h": "device to pinned host copy",
}


def grids(result: Result) -> list[Grid]:
    return [_machine(result), _costs(result), _gains(result)]


def headline(result: Result) -> str:
    run, size = result.run, result.floors.get("size", 0)
    shape = run["shape"]
    where = ", ".join(f"{name} {value}" for name, value in run["machine"].items())
    step = f"{result.step.median:.3f} s [{result.step.low:.3f}, {result.step.high:.3f}]" if result.step else "?"
    copy = _memcpy(result)
    ratio = f" = {result.step.median / copy:.1f}x the copy of the state by one thread" if result.step and copy else ""
    return (
        f"GPT {shape['size']} {shape['dtype']} on {shape['device']}, AdamW, {size / 1e9:.2f} GB of state, "
        f"{shape['threads']} threads, torch {run['torch']}. Step {step}{ratio}. {where}."
    )


def _machine(result: Result) -> Grid:
    rows = []
    for name, text in _FLOORS.items():
        value = result.floors.get(name)
        if isinstance(value, float):
            rows.append([text, f"{value:.3f} s", f"{result.floors['size'] / value / 1e9:.2f} GB/s"])
        elif value is not None:
            rows.append([text, str(value), ""])
    return "The machine's floors, for the size of the state", ["floor", "time", "rate"], rows


def _costs(result: Result) -> Grid:
    """Brackets hold the 95 % interval; x is times the copy of the state by one thread."""
    copy = _memcpy(result)
    evers = sorted({every for peer in result.peers for every in peer.wall})
    head = ["peer", "blocked, save every step", "p95", "max", "first", f"blocked, every {evers[-1] if evers else ''}"]
    head += ["save tax, every step", "step in flight", *(f"wall, every {every}" for every in evers)]
    rows = []
    for peer in result.peers:
        if "timing" in peer.errors:
            rows.append([peer.name, f"error: {peer.errors['timing']}", *[""] * (len(head) - 2)])
            continue
        each, rare = peer.blocked.get(1), peer.blocked.get(evers[-1]) if evers else None
        rows.append(
            [
                peer.name,
                _seconds(each, copy),
                f"{each.p95:.3f} s" if each else "-",
                f"{each.max:.3f} s" if each else "-",
                f"{peer.first.median:.3f} s" if peer.first else "-",
                _seconds(rare, copy),
                _seconds(peer.tax.get(1), copy),
                _ratio(peer.inflation),
                *(_ratio(peer.wall.get(every)) for every in evers),
            ]
        )
    return "What a save costs the training", head, rows


def _gains(result: Result) -> Grid:
    head = ["peer", "to committed", "then dirty", "size", "extra memory"]
    head += ["restore cold", "restore warm", "survived kill -9", "fsynced"]
    rows = [_gain(peer, result) for peer in result.peers if peer.name != "none"]
    return "What it gives for that", head, rows


def _gain(peer: Summary, result: Result) -> list[str]:
    floors = result.floors
    size = floors.get("size", 0)
    write, read = machine.best(floors, "write_fresh"), machine.best(floors, "read_direct")
    done = f"{peer.committed.median:.2f} s{_share(write, peer.committed.median, 'write')}" if peer.committed else "-"
    return [
        peer.name,
        done,
        f"{peer.sync.median:.2f} s" if peer.sync else "-",
        f"{peer.size / 1e9:.2f} GB" if peer.size else "-",
        f"{peer.memory.median / 1e9:.2f} GB ({peer.memory.median / size:.1f}x)" if peer.memory and size else "-",
        _rate(peer.cold, size, read, "direct read"),
        _rate(peer.warm, size, _memcpy(result), "memcpy"),
        peer.errors.get("kill", "") or peer.killed or "-",
        peer.fsynced or peer.errors.get("fsync", "-"),
    ]


def _memcpy(result: Result) -> float | None:
    value = result.floors.get("pinned_d2h", result.floors.get("memcpy_1"))
    return value if isinstance(value, float) else None


def _seconds(value: Spread | None, copy: float | None) -> str:
    if value is None:
        return "-"
    times = f" ({value.median / copy:.2f}x)" if copy else ""
    return f"{value.median:.3f} s {_interval(value)}{times}"


def _ratio(value: Spread | None) -> str:
    return "-" if value is None else f"{value.median:.3f} {_interval(value)}"


def _interval(value: Spread) -> str:
    """One sample has none."""
    return "[one sample]" if value.count == 1 else f"[{value.low:.3f}, {value.high:.3f}]"


def _share(limit: float | None, value: float, what: str) -> str:
    return f" ({limit / value:.0%} of {what})" if limit else ""


def _rate(value: Spread | None, size: int, limit: float | None, what: str) -> str:
    if value is None:
        return "-"
    return f"{size / value.median / 1e9:.2f} GB/s{_share(limit, value.median, what)}"


def notes(result: Result) -> list[str]:
    """The errors in full."""
    return [f"{peer.name}, {role}: {text}" for peer in result.peers for role, text in peer.errors.items()]


def show(result: Result, console: Console) -> None:
    console.print(headline(result))
    for title, head, rows in grids(result):
        table = Table(*head, title=title, show_lines=False)
        for row in rows:
            table.add_row(*row)
        console.print(table)
    for note in notes(result):
        console.print(f"- {note}", markup=False)


def markdown(result: Result) -> str:
    parts = [headline(result)]
    for title, head, rows in grids(result):
        lines = [head, ["---"] * len(head), *rows]
        cells = [[cell.replace("|", "\\|") for cell in line] for line in lines]
        parts.append(f"**{title}**\n\n" + "\n".join("| " + " | ".join(line) + " |" for line in cells))
    parts.extend(f"- {note}" for note in notes(result))
    return "\n\n".join(parts) + "\n"


def brief(result: Result) -> str:
    """What matters most, peer by peer: ours first, then by what a save costs the training."""
    copy, size = _memcpy(result), result.floors.get("size", 0)
    write = machine.best(result.floors, "write_fresh")
    head = ["", "save tax", "in copies", "`save` blocks", "committed after; share of a direct write"]
    head += ["memory beside the training", "survives `kill -9`; fsynced"]
    rows = []
    measured = [peer for peer in result.peers if peer.tax.get(1) and peer.name != "none"]
    for peer in sorted(measured, key=lambda peer: (not _ours(peer), peer.tax[1].median)):  # type: ignore[union-attr]
        tax, blocked, done = peer.tax[1], peer.blocked.get(1), peer.committed
        assert tax is not None
        share = f"; {write / done.median:.0%}" if done and write else ""
        rows.append(
            [
                peer.name,
                f"{tax.median:.2f} s [{tax.low:.2f}, {tax.high:.2f}]",
                f"{tax.median / copy:.1f}x" if copy else "-",
                f"{blocked.median:.3f} s" if blocked else "-",
                f"{done.median:.2f} s{share}" if done else "-",
                f"{peer.memory.median / size:.1f}x the state" if peer.memory and size else "-",
                f"{peer.killed or '-'}; {peer.fsynced or peer.errors.get('fsync', '-')}",
            ]
        )
    lines = ["| " + " | ".join(row) + " |" for row in [head, ["---"] * len(head), *rows]]
    failed = [f"- {peer.name}: {peer.errors['timing']}" for peer in result.peers if "timing" in peer.errors]
    counts = sorted({peer.rounds for peer in measured}, reverse=True)
    rounds = ", ".join(f"{count} of {', '.join(p.name for p in measured if p.rounds == count)}" for count in counts)
    versions = ", ".join(f"{name} {version}" for name, version in result.run["versions"].items())
    return "\n".join([headline(result), "", *lines, "", *failed, f"Rounds: {rounds}. Versions: {versions}.", ""])


def _ours(peer: Summary) -> bool:
    return peer.name.startswith("asyncckpt")


def put_into(path: Path, text: str) -> None:
    """Replace what `path` has between its benchmark marks; a file without them becomes the text.

    The marks are `<!-- benchmark -->` and `<!-- /benchmark -->`.
    """
    old = path.read_text() if path.exists() else ""
    if _BEGIN in old and _END in old:
        head, tail = old.split(_BEGIN)[0], old.split(_END)[1]
        text = f"{head}{_BEGIN}\n{text}{_END}{tail}"
    elif old:
        raise ValueError(f"{path} has no {_BEGIN} ... {_END} to put the tables between")
    path.write_text(text)
