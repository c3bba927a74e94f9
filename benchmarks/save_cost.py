"""How long `save()` itself takes by the number of tensors: `python -m benchmarks.save_cost`.

The tensors are tiny, so that nothing but the walk over the state is measured. Beside it stands a plain `state_dict()`
of the same model and optimizer, called in turn with the saves.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks import child
from benchmarks.child import ChildError, Record
from benchmarks.spread import Spread, spread

GOALS = {200: 0.002, 10_000: 0.025, 100_000: 0.250}
"""Seconds in `save()` with `overlap=True`, once the first save has been made."""
_RESULTS = Path(__file__).resolve().parent / "results" / "save-cost.jsonl"


def measure(tell: Callable[..., None], tensors: int, saves: int, directory: str) -> None:
    """Runs in a child: tells the seconds of the first save, of those after it, of the fence and of `state_dict()`."""
    import torch

    import asyncckpt

    torch.set_num_threads(2)
    # Each Linear has two parameters, and AdamW keeps three tensors for each.
    model = torch.nn.Sequential(*(torch.nn.Linear(4, 4) for _ in range(tensors // 8)))
    optimizer = torch.optim.AdamW(model.parameters())
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    state = {"model": model, "optimizer": optimizer}
    with asyncckpt.Checkpointer(directory, keep=asyncckpt.Keep(last=2), overlap=True) as checkpointer:
        checkpointer.prepare(state)
        blocked, fenced, walked = [], [], []
        for step in range(saves + 1):
            begun = time.perf_counter()
            model.state_dict()
            optimizer.state_dict()
            walked.append(time.perf_counter() - begun)
            begun = time.perf_counter()
            handle = checkpointer.save(step, state)
            blocked.append(time.perf_counter() - begun)
            begun = time.perf_counter()
            checkpointer.fence()
            fenced.append(time.perf_counter() - begun)
            optimizer.step()
            handle.result(120)
    tell(tensors=tensors, first=blocked[0], steady=blocked[1:], fence=fenced[1:], state_dict=walked[1:])


def _table(found: list[Record]) -> Table:
    head = ["tensors", "first save", "save()", "p95", "max", "then fence()", "state_dict()", "goal", "reached"]
    table = Table(*head, title="Time in save(), overlap=True, tiny tensors (median, 95 % interval)")
    for record in found:
        number = record["tensors"]
        if "error" in record:
            table.add_row(f"{number:,}", f"error: {record['error']}")
            continue
        steady = spread(record["steady"])
        assert steady is not None
        goal = GOALS.get(number)
        table.add_row(
            f"{number:,}",
            f"{record['first'] * 1e3:.2f} ms",
            _milliseconds(steady),
            f"{steady.p95 * 1e3:.2f} ms",
            f"{steady.max * 1e3:.2f} ms",
            _milliseconds(spread(record["fence"])),
            _milliseconds(spread(record["state_dict"])),
            f"{goal * 1e3:g} ms" if goal else "",
            ("yes" if steady.high <= goal else "no") if goal else "",
        )
    return table


def _milliseconds(value: Spread | None) -> str:
    return f"{value.median * 1e3:.2f} ms [{value.low * 1e3:.2f}, {value.high * 1e3:.2f}]" if value else "-"


def main() -> None:
    parser = argparse.ArgumentParser("python -m benchmarks.save_cost", description=__doc__)
    parser.add_argument("--tensors", type=int, nargs="+", default=list(GOALS))
    parser.add_argument("--saves", type=int, help="of each size, after the first (40; with --quick 5)")
    parser.add_argument("--limit", type=float, default=600.0, help="seconds that one size may take")
    parser.add_argument("--quick", action="store_true", help="few saves")
    parser.add_argument("--directory", type=Path, default=Path(), help="where to checkpoint to (a temporary one here)")
    arguments = parser.parse_args()
    saves = arguments.saves or (5 if arguments.quick else 40)
    found: list[dict[str, Any]] = []
    for number in arguments.tensors:
        print(f"{number:,} tensors, {saves} saves", file=sys.stderr, flush=True)
        folder = tempfile.mkdtemp(prefix=".bench-", dir=arguments.directory)
        options = {"tensors": number, "saves": saves, "directory": str(Path(folder).resolve())}
        try:
            found.extend(child.run("save_cost", arguments.limit, **options))
        except ChildError as error:
            found.append({"tensors": number, "error": str(error)})
        finally:
            shutil.rmtree(folder, ignore_errors=True)
    if not arguments.quick:
        _RESULTS.parent.mkdir(exist_ok=True)
        _RESULTS.write_text("".join(json.dumps(record) + "\n" for record in found))
    console = Console()
    (console if console.is_terminal else Console(width=160)).print(_table(found))


if __name__ == "__main__":
    main()
