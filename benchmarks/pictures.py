"""Two pictures of a run: the tax of every peer, and the saves of one in time."""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt

from benchmarks.child import Record
from benchmarks.summary import Result

_OURS, _THEIRS = "tab:blue", "tab:gray"


def tax(result: Result, path: Path) -> None:
    """Seconds that a save adds to the training when every step is saved, on a logarithmic scale."""
    shown = [(peer.name, peer.tax[1]) for peer in result.peers if peer.tax.get(1) and peer.name != "none"]
    figure, axes = plt.subplots(figsize=(9, 0.42 * len(shown) + 1.6), layout="constrained")
    for at, (name, value) in enumerate(reversed(shown)):
        assert value is not None
        least = 1e-4
        middle, low, high = max(value.median, least), max(value.low, least), max(value.high, least)
        color = _OURS if name.startswith("asyncckpt") else _THEIRS
        axes.barh(at, middle, color=color, xerr=[[middle - min(low, middle)], [max(high, middle) - middle]], capsize=3)
        axes.text(max(high, middle) * 1.1, at, f"{value.median:.3f} s", va="center", fontsize=8)
    copy = result.floors.get("pinned_d2h", result.floors.get("memcpy_1"))
    if isinstance(copy, float):
        axes.axvline(copy, color="black", linestyle=":", label="one copy of the state, one thread")
        figure.legend(loc="outside upper right", fontsize=8)
    axes.set_xscale("log")
    axes.set_yticks(range(len(shown)), [name for name, _ in reversed(shown)])
    axes.set_xlabel("seconds added per save, a save every step (median, 95 % interval)")
    axes.margins(x=0.15)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def timeline(records: list[Record], peer: str, path: Path) -> bool:
    """The steps and saves of the first window of `peer` with a save every step. False: there is none."""
    windows = [r for r in records if r["kind"] == "window" and r["peer"] == peer and r["every"] == 1]
    if not windows:
        return False
    window = windows[0]
    start = window["ticks"][0][0]
    figure, axes = plt.subplots(figsize=(11, 0.35 * len(window["saves"]) + 2.2), layout="constrained")
    steps = [(begin - start, end - begin) for begin, end, _ in window["ticks"]]
    axes.broken_barh(steps, (-0.4, 0.8), facecolor="lightgray", edgecolor="white", label="training step")
    for row, save in enumerate(window["saves"], 1):
        spans = _spans(save)
        for name, color, begin, end in spans:
            label = name if row == 1 else None
            axes.broken_barh([(begin - start, end - begin)], (row - 0.4, 0.8), facecolor=color, label=label)
    labels = ["steps", *(f"save {save['step']}" for save in window["saves"])]
    axes.set_yticks(range(len(labels)), labels)
    axes.invert_yaxis()
    axes.set_xlabel("seconds")
    axes.set_title(f"{peer}: a save every step")
    figure.legend(loc="outside right upper", fontsize=8)
    figure.savefig(path, dpi=130)
    plt.close(figure)
    return True


def _spans(save: Record) -> list[tuple[str, str, float, float]]:
    """Name, colour, begin and end; what comes later is drawn over what comes before."""
    spans = []
    if save["done"]:
        spans.append(("in flight", "#cfe3f5", save["called"], save["done"]))
    phases = save["phases"]
    if "write_end" in phases:
        spans.append(("writing", "tab:green", phases["write_begin"], phases["write_end"]))
        spans.append(("commit", "tab:purple", phases["write_end"], phases["commit_end"]))
        spans.append(("copying", "tab:orange", phases["copy_begin"], phases["copy_end"]))
    spans.append(("save() blocks", "tab:red", save["called"], save["returned"]))
    return spans
