"""The picture: what the training, the copy and the writer did, side by side."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes

from demo.measure import Measurement, Moment, spread

STEPS = 8
"""As many as are drawn."""


@dataclass(frozen=True)
class Lane:
    label: str
    who: str
    colour: str


LANES = [
    Lane("compute", "training loop", "#9aa5b1"),
    Lane("copy", "state → shared memory", "#e69f00"),
    Lane("write", "writer process", "#0072b2"),
    Lane("commit", "writer process", "#009e73"),
]
BLOCKED = "#d1495b"
INK = "#2b3440"


def draw(measured: Measurement, path: Path) -> None:
    """The last block of steps with saving, as a PNG at `path`."""
    begin = len(measured.saving) - measured.block
    moments = measured.saving[begin : begin + STEPS]
    saves = measured.saves[begin : begin + STEPS]
    zero = moments[0].begin
    end = max(moments[-1].end, *(save["commit_end"] for save in saves)) - zero

    figure, axes = plt.subplots(figsize=(13, 4.6), dpi=130, layout="constrained")
    axes.set_xlim(0, end * 1.03)
    _draw_loop(axes, moments, saves, zero)
    for save in saves:
        _draw_save(axes, save, zero, end)
    _dress(axes)
    title, subtitle = _words(measured, saves)
    axes.set_title(title, loc="left", fontsize=14, fontweight="bold", color=INK, pad=30)
    axes.annotate(subtitle, (0, 1), xytext=(0, 14), xycoords="axes fraction", textcoords="offset points", color=INK)
    figure.savefig(path)
    plt.close(figure)


def _draw_loop(axes: Axes, moments: list[Moment], saves: list[dict[str, Any]], zero: float) -> None:
    for moment, save in zip(moments, saves, strict=True):
        _bar(axes, 0, moment.begin - zero, moment.computed - zero, LANES[0].colour)
        _text(axes, 0, (moment.begin + moment.computed) / 2 - zero, f"step {save['save']}")
        _bar(axes, 0, moment.computed - zero, moment.end - zero, BLOCKED)


def _draw_save(axes: Axes, save: dict[str, Any], zero: float, end: float) -> None:
    """The three lanes of one save, and a faint line down from the moment it was called."""
    times = {name: at - zero for name, at in save.items() if name not in ("save", "blocked", "size")}
    axes.plot([times["saved"]] * 2, [0, 3.4], color=BLOCKED, linewidth=0.8, linestyle=(0, (2, 3)), zorder=1)
    number = str(save["save"])
    _bar(axes, 1, times["copy_begin"], times["copy_end"], LANES[1].colour)
    _bar(axes, 2, times["write_begin"], times["write_end"], LANES[2].colour)
    _bar(axes, 3, times["write_end"], times["commit_end"], LANES[3].colour)
    for lane, (left, right) in enumerate(
        (("copy_begin", "copy_end"), ("write_begin", "write_end"), ("write_end", "commit_end")), start=1
    ):
        middle, width = (times[left] + times[right]) / 2, times[right] - times[left]
        if width > 0.012 * end * len(number):
            _text(axes, lane, middle, number, colour="white")
        else:
            _text(axes, lane, times[right] + 0.004 * end, number, align="left")


def _bar(axes: Axes, lane: int, left: float, right: float, colour: str) -> None:
    axes.broken_barh([(left, right - left)], (lane - 0.32, 0.64), color=colour, edgecolor=colour, linewidth=0.9)


def _text(axes: Axes, lane: int, x: float, text: str, colour: str = INK, align: str = "center") -> None:
    axes.text(x, lane, text, ha=align, va="center", fontsize=8.5, color=colour, zorder=5, clip_on=True)


def _dress(axes: Axes) -> None:
    axes.set_ylim(3.6, -0.6)
    axes.set_yticks(range(len(LANES)), [f"{lane.label}\n" for lane in LANES], fontsize=11, fontweight="bold", color=INK)
    for y, lane in enumerate(LANES):
        axes.annotate(
            lane.who, (0, y), xytext=(-8, -9), xycoords=("axes fraction", "data"), textcoords="offset points",
            ha="right", va="center", fontsize=8, color="#68737f",
        )  # fmt: skip
        axes.axhspan(y - 0.42, y + 0.42, color="#f4f6f8", zorder=0)
    axes.tick_params(axis="y", length=0)
    axes.set_xlabel("seconds", color=INK)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    legend = [
        plt.Rectangle((0, 0), 1, 1, color=BLOCKED, label="the loop waits in save()"),
        plt.Line2D([], [], color=BLOCKED, linewidth=0.8, linestyle=(0, (2, 3)), label="save() is called"),
    ]
    axes.legend(handles=legend, loc="lower right", bbox_to_anchor=(1.0, 1.0), ncols=2, frameon=False, fontsize=9)


def _words(measured: Measurement, saves: list[dict[str, Any]]) -> tuple[str, str]:
    step, _, _ = spread([moment.seconds for moment in measured.saving])
    blocked, _, _ = spread([save["blocked"] for save in measured.saves])
    durable, _, _ = spread([save["commit_end"] - save["saved"] for save in measured.saves])
    size = saves[0]["size"] / 1e6
    return (
        f"A checkpoint of {size:,.0f} MB after every step" if size >= 10 else "A checkpoint after every step",
        f"Medians: a step {step * 1e3:,.0f} ms, of which save() {blocked * 1e3:,.0f} ms; durable on the disk after "
        f"{durable * 1e3:,.0f} ms",
    )
