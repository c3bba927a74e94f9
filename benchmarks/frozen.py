"""What a save costs where nearly nothing changes: `python -m benchmarks.frozen`.

A model of 24 (`--layers`) frozen layers of 2048 x 2048 with adapters of rank 16 beside them, and AdamW over the
adapters: 4.5 % of the state is trained. Two Checkpointers save it in turn after each step: one raw, one with the
codec; the first three saves are not counted, for the frozen chunks are written in two of them.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn

import asyncckpt
from benchmarks.machine import describe

RESULTS = Path(__file__).resolve().parent / "results" / "frozen.jsonl"
WARM = 3
_COLUMNS = ("written", "total", "copy")


class Layer(nn.Module):
    def __init__(self, width: int, rank: int) -> None:
        super().__init__()
        self.frozen = nn.Linear(width, width, bias=False).requires_grad_(False)
        self.down, self.up = nn.Linear(width, rank, bias=False), nn.Linear(rank, width, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.frozen(x) + self.up(self.down(x))


def run(directory: Path, codec: Any, saves: int, layers: int) -> list[dict[str, Any]]:
    torch.manual_seed(0)
    model = nn.Sequential(*(Layer(2048, 16) for _ in range(layers)))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    state = {"model": model, "optimizer": optimizer}
    rows = []
    keep = asyncckpt.Keep(last=2)
    with (
        asyncckpt.Checkpointer(directory / "raw", keep=keep, max_in_flight=1) as raw,
        asyncckpt.Checkpointer(directory / codec, codec=codec, keep=keep, max_in_flight=1) as coded,
    ):
        for step in range(saves + WARM):
            model(torch.randn(8, 2048)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            for name, checkpointer in (("raw", raw), (codec, coded)):
                handle = checkpointer.save(step, state)
                handle.result(300)
                times = handle.timeline
                assert times is not None
                took = {"copy": times.copy_end - times.saved, "total": times.commit_end - times.saved}
                rows.append({"by": name, "step": step, "written": times.written, "size": times.size, **took})
            print(f"save {step + 1} of {saves + WARM}", file=sys.stderr, flush=True)
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    lines = [
        "| stored | written per save | over raw | from `save` to committed | over raw | until the copy is whole |",
        "|---" * 6 + "|",
    ]
    counted = [row for row in rows if row["step"] >= WARM]
    middle = {
        name: {key: statistics.median(row[key] for row in counted if row["by"] == name) for key in _COLUMNS}
        for name in dict.fromkeys(row["by"] for row in counted)
    }
    for name, found in middle.items():
        share = [found[key] / middle["raw"][key] for key in ("written", "total")]
        spread = sorted(row["total"] for row in counted if row["by"] == name)
        lines.append(
            f"| {name} | {found['written'] / 1e6:.1f} MB | {share[0]:.1%} | {found['total']:.3f} s "
            f"[{spread[0]:.3f}, {spread[-1]:.3f}] | {share[1]:.0%} | {found['copy']:.3f} s |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--directory", default=".", help="on the disk that is written to")
    parser.add_argument("--codec", default="zstd", choices=["incremental", "zstd", "delta"])
    parser.add_argument("--saves", type=int, default=15)
    parser.add_argument("--layers", type=int, default=24)
    args = parser.parse_args()
    torch.set_num_threads(2)
    begun = time.strftime("%Y-%m-%d")
    with tempfile.TemporaryDirectory(dir=args.directory) as folder:
        rows = run(Path(folder), args.codec, args.saves, args.layers)
    head = {"machine": describe(Path(args.directory)), "date": begun, "cores": os.cpu_count(), "layers": args.layers}
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text("".join(json.dumps(row) + "\n" for row in [head, *rows]))
    print(table(rows))


if __name__ == "__main__":
    main()
