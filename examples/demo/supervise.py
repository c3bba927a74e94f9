"""The demo: an undisturbed training, the same one killed in the middle of saves, and whether they end the same."""

from __future__ import annotations

import argparse
import os
import random
import shutil
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Table
from train_gpt import digest

import asyncckpt
from demo.measure import Measurement, spread
from demo.timeline import draw
from demo.trainer import Begins, Record, Step, Trainer, common, training

ATTEMPTS = 8
"""So many kills, for each that is wanted, may come too late: after the commit."""
OUTLIVES = hasattr(os, "memfd_create")
"""Whether the writer is a process of its own, which finishes what is staged when the trainer is killed."""


@dataclass
class Kill:
    step: int
    """The save of this step had just returned."""
    delay: float
    group: bool
    in_flight: bool
    """The checkpoint was not committed yet *after* the signal was sent."""
    newest: int | None
    """The newest committed step at that moment."""
    resumed: int = -1
    """The step from which the next run went on."""


def demo(args: argparse.Namespace) -> int:
    """Run it all, and return the exit code: 0 if everything is equal."""
    if args.steps < (args.kills + 1) * args.save_every + 2:
        raise SystemExit("too few steps for so many kills")
    console = Console(highlight=False)
    folder = args.demo_dir
    for name in ("reference", "killed", "measure"):
        shutil.rmtree(folder / name, ignore_errors=True)
        (folder / f"{name}.jsonl").unlink(missing_ok=True)
    folder.mkdir(parents=True, exist_ok=True)
    begun = time.monotonic()

    console.print(f"[bold]1  Reference[/]: {args.steps} steps of a {args.size} GPT, undisturbed")
    reference = run_undisturbed(args, folder, console)
    console.print(f"[bold]2  The same, killed[/] with SIGKILL while a save is in flight, {args.kills} times")
    kills = run_killed(args, folder, reference, console)
    console.print("[bold]3  Compared[/]")
    equal = compare(args, folder, reference, kills, console)
    console.print("[bold]4  What saving costs[/]: steps with and without it, in turn")
    measured = run_measurement(args, folder, console)
    for name in ("reference", "measure"):
        shutil.rmtree(folder / name)  # of what takes room, only the killed run stays to be looked at
    picture = folder / "timeline.png"
    draw(measured, picture)
    console.print(table(args, measured, kills))
    console.print(
        f"Timeline: {picture}   Checkpoints: {folder / 'killed'}   {time.monotonic() - begun:.0f} s in all",
        soft_wrap=True,
    )
    console.print(
        "[bold green]EQUAL: killed and resumed, bit for bit the undisturbed training[/]"
        if equal
        else "[bold red]NOT EQUAL: see 3[/]"
    )
    return 0 if equal else 1


# 1 and 2: the trainings


def run_undisturbed(args: argparse.Namespace, folder: Path, console: Console) -> Record:
    log = folder / "reference.jsonl"
    with progress(console, args.steps) as update:
        for event in Trainer(training(args, folder / "reference", log)).events():
            update(event)
    return Record.read(log)


def run_killed(args: argparse.Namespace, folder: Path, reference: Record, console: Console) -> list[Kill]:
    """Train to the end in spite of the kills. Each strikes at random in its share of the steps, and of a save."""
    chance = random.Random(args.seed)
    window = statistics.median(s["commit_end"] - s["saved"] - s["blocked"] for s in reference.saves)
    share = max(1, (args.steps - 2) // max(1, args.kills))
    kills: list[Kill] = []
    with progress(console, args.steps) as update:

        def train(target: int | None, delay: float) -> bool:
            """Train until `delay` seconds after the first save from step `target` on; whether the training ended."""
            trainer = Trainer(training(args, folder / "killed", folder / "killed.jsonl"))
            for event in trainer.events():
                if isinstance(event, Begins) and kills:
                    kills[-1].resumed = event.start
                    console.print("   " + describe(kills[-1], len(kills)), soft_wrap=True)
                elif isinstance(event, Step) and event.saving and target is not None and event.step >= target:
                    time.sleep(delay)
                    kills.append(kill(trainer, folder / "killed", event.step, delay, group=len(kills) % 2 == 1))
                    target = None
                update(event)
            return trainer.finished

        for number in range(args.kills):
            target = 2 + number * share + chance.randrange(-(-share // 2))  # the rest is for further attempts
            for attempt in range(ATTEMPTS):
                if train(target, chance.uniform(0, window) / 2**attempt):
                    return kills
                if kills[-1].in_flight:
                    break
        train(None, 0)
    return kills


def kill(trainer: Trainer, run: Path, step: int, delay: float, *, group: bool) -> Kill:
    trainer.kill(group=group)
    newest = asyncckpt.open(run).latest()
    return Kill(step, delay, group, in_flight=newest is None or newest < step, newest=newest)


def describe(kill: Kill, number: int) -> str:
    whom = "its process group" if kill.group else "the trainer"
    when = f"{kill.delay * 1e3:.1f} ms after save({kill.step}) had returned"
    if not kill.in_flight:
        return f"kill {number}: {whom}, {when}: too late, it was committed already; once more"
    end = "the writer finished that save" if kill.resumed >= kill.step else "that snapshot was not whole yet"
    return f"kill {number}: {whom}, {when}; resumed from step {kill.resumed}: {end}"


# 3: the comparison


def compare(args: argparse.Namespace, folder: Path, reference: Record, kills: list[Kill], console: Console) -> bool:
    """Print every claim with whether it holds; True if all do."""
    killed = Record.read(folder / "killed.jsonl")
    steps = list(range(1, args.steps + 1))
    same = sum(loss == reference.losses.get(step) for step, loss in killed.computed)
    again = len(killed.computed) - len(killed.losses)
    landed = [kill for kill in kills if kill.in_flight]
    committed = asyncckpt.load(folder / "killed", parts=["model", "optimizer"])
    claims = [
        (
            f"losses: {same} of {len(killed.computed)} equal, over all {args.steps} steps ({again} computed again)",
            same == len(killed.computed) and sorted(killed.losses) == sorted(reference.losses) == steps,
        ),
        (
            f"final weights and optimizer state: {str(killed.digest)[:16]} and {str(reference.digest)[:16]}",
            killed.digest is not None and killed.digest == reference.digest,
        ),
        (
            "the newest checkpoint on the disk holds these very bits",
            args.steps % args.save_every != 0 or digest(committed) == reference.digest,
        ),
        (f"kills that landed in a save in flight: {len(landed)} of {args.kills}", len(landed) == args.kills),
        ("every resume lost at most the save that was being copied", all(lost_little(args, kill) for kill in kills)),
    ]
    for claim, holds in claims:
        console.print(f"   {'[green]yes[/]' if holds else '[bold red]NO [/]'}  {claim}", soft_wrap=True)
    return all(holds for _, holds in claims)


def lost_little(args: argparse.Namespace, kill: Kill) -> bool:
    """Whether the run went on from the save before the one in flight, or later; without a writer that outlives the
    trainer, from the newest committed one or later."""
    promised = max(0, kill.step - args.save_every) if OUTLIVES else 0
    return kill.resumed >= max(promised, kill.newest or 0)


# 4: the cost


def run_measurement(args: argparse.Namespace, folder: Path, console: Console) -> Measurement:
    out = folder / "measure.jsonl"
    with console.status("measuring"):
        for _ in Trainer(
            ["-m", "demo.measure", "--run", str(folder / "measure"), "--log", str(out), *common(args)]
        ).events():
            pass
    return Measurement.load(out)


def table(args: argparse.Namespace, measured: Measurement, kills: list[Kill]) -> Table:
    without, saving = ([m.seconds for m in moments] for moments in (measured.without, measured.saving))
    durable = [save["commit_end"] - save["saved"] for save in measured.saves]
    size, dearer = measured.saves[0]["size"], measured.dearer
    resumes = ", ".join(f"{kill.resumed} (killed at {kill.step})" for kill in kills)
    ways = {True: "during the next step", False: "before save() returns", None: "both ways, still trying"}
    rows = [
        ("steps, saves", f"{len(without)} without, {len(saving)} with a save each, of {size / 1e6:,.1f} MB"),
        ("copied", ways[measured.overlap]),
        ("save() blocks", milliseconds([save["blocked"] for save in measured.saves])),
        ("step without saving", milliseconds(without)),
        ("step with saving", milliseconds(saving)),
        (
            "  more, drain included",
            f"{statistics.median(dearer):+.0%}   (pairs of blocks {min(dearer):+.0%} to {max(dearer):+.0%})",
        ),
        ("durable after", milliseconds(durable)),
        ("  to durable", f"{size / statistics.median(durable) / 1e9:.2f} GB/s"),
        ("resumed from step", resumes or "-"),
    ]
    made = Table(show_header=False, box=box.SIMPLE_HEAD, pad_edge=False)
    made.add_column(style="bold")
    for row in rows:
        made.add_row(*row)
    return made


def milliseconds(seconds: list[float]) -> str:
    median, low, high = (1e3 * value for value in spread(seconds))
    return f"{median:,.1f} ms   (80 % within {low:,.1f} - {high:,.1f})"


@contextmanager
def progress(console: Console, steps: int) -> Iterator[Callable[[Begins | Step], None]]:
    """A bar that follows the training, back to where it resumes, too."""
    bar = Progress(
        TextColumn("  "),
        BarColumn(),
        MofNCompleteColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )
    with bar:
        task = bar.add_task("", total=steps)
        yield lambda event: bar.update(task, completed=event.step if isinstance(event, Step) else event.start)
