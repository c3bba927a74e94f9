"""How long `asyncckpt ls` takes for a run of 1,000 checkpoints: `python -m benchmarks.ls_speed`.

Each sample is a process of its own, from its start to its end, output into a pipe. In turn with it, what it can't be
faster than: a Python that does nothing, and one that imports typer, which the command line is made with.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from asyncckpt.format import names
from asyncckpt.format.manifest import FileRecord, Manifest, digest, encode
from benchmarks import machine
from benchmarks.child import ROOT
from benchmarks.spread import spread

GOAL = 0.3
"""Seconds for 1,000 checkpoints."""
_RESULTS = Path(__file__).resolve().parent / "results" / "ls-speed.jsonl"
_PARTS = ["loader", "model", "optimizer", "rng", "scheduler"]


def make_run(folder: Path, checkpoints: int) -> None:
    """Manifests such as a training leaves; `ls` looks at nothing else."""
    files = {f"{part}.safetensors": FileRecord(400_000_000, digest(part.encode())) for part in ("model", "optimizer")}
    files["state.json"] = FileRecord(20_000, digest(b"state"))
    for number in range(1, checkpoints + 1):
        manifest = Manifest(
            step=100 * number,
            attempt=f"{number:012x}",
            sequence=number,
            world=1,
            parts=_PARTS,
            files=files,
            created="2026-01-01T00:00:00.000+00:00",
            metrics={"loss": 1 / number, "val_loss": 2 / number},
        )
        step = folder / names.step_name(manifest.step)
        (step / manifest.attempt).mkdir(parents=True)
        (step / names.MANIFEST).write_bytes(encode(manifest))


def sample(command: list[str]) -> float:
    begun = time.perf_counter()
    subprocess.run([sys.executable, *command], cwd=ROOT, stdout=subprocess.PIPE, check=True, timeout=60)
    return time.perf_counter() - begun


def main() -> None:
    parser = argparse.ArgumentParser("python -m benchmarks.ls_speed", description=__doc__)
    parser.add_argument("--checkpoints", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--quick", action="store_true", help="three rounds; nothing is written to results/")
    arguments = parser.parse_args()
    rounds = 3 if arguments.quick else arguments.rounds
    with tempfile.TemporaryDirectory(prefix=".bench-", dir=ROOT) as folder:
        make_run(Path(folder), arguments.checkpoints)
        commands = {
            "ls": ["-m", "asyncckpt", "ls", folder],
            "ls --json": ["-m", "asyncckpt", "ls", folder, "--json"],
            "import typer": ["-c", "import typer"],
            "nothing": ["-c", "pass"],
        }
        for command in commands.values():  # what is compiled and cached once
            sample(command)
        found: dict[str, list[float]] = {name: [] for name in commands}
        for _ in range(rounds):
            for name, command in commands.items():
                found[name].append(sample(command))
        where = machine.describe(Path(folder))
    print(", ".join(f"{name} {value}" for name, value in where.items()))
    for name, samples in found.items():
        taken = spread(samples)
        assert taken is not None
        print(
            f"{name:14}{taken.median * 1e3:6.0f} ms [{taken.low * 1e3:.0f}, {taken.high * 1e3:.0f}]  "
            f"least {min(samples) * 1e3:.0f}, p95 {taken.p95 * 1e3:.0f}, most {taken.max * 1e3:.0f}, of {taken.count}"
        )
    within = sum(taken < GOAL for taken in found["ls"])
    print(f"{within} of {rounds} listings of {arguments.checkpoints} checkpoints below {GOAL * 1e3:.0f} ms")
    if not arguments.quick:
        _RESULTS.parent.mkdir(exist_ok=True)
        lines = [{"machine": where, "checkpoints": arguments.checkpoints, "seconds": found}]
        _RESULTS.write_text("".join(json.dumps(line) + "\n" for line in lines))


if __name__ == "__main__":
    main()
