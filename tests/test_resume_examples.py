"""What a resume needs beside weights: each example, killed by SIGKILL at any step, ends with the very same bits.

With ASYNCCKPT_TORTURE (`make torture`) each example is killed at every step, at once and a few milliseconds later.
"""

from __future__ import annotations

import json
import os
import random
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
EXAMPLES = ROOT / "examples" / "resume"
HARNESS = Path(__file__).with_name("support") / "interrupted.py"
LONG = "ASYNCCKPT_TORTURE" in os.environ
STEPS = 24


def run_it(*arguments: object) -> str:
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    done = subprocess.run(
        [sys.executable, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=1000 if LONG else 110,
        env={**os.environ, "PYTHONPATH": path},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def kills(example: str) -> list[list[tuple[int, float]]]:
    """For each training, at which steps its runs are killed, and how many milliseconds after that was told."""
    if LONG:
        return [[(step, delay)] for step in range(1, STEPS) for delay in (0, 1, 4)]
    draw = random.Random(example)
    early, late = sorted(draw.sample(range(2, STEPS - 2), 2))
    return [[(early, 0), (late, draw.uniform(0, 4))]]


@pytest.mark.timeout(1200 if LONG else 120)
@pytest.mark.parametrize("example", ["scheduler", "scaler", "ema", "dataloader", "clocks"])
def test_an_interrupted_training_ends_with_the_very_same_bits(tmp_path: Path, example: str) -> None:
    plan, script = kills(example), EXAMPLES / f"{example}.py"
    said = run_it(script, "--run", tmp_path / "undisturbed")
    expected = re.search(r"^digest (\w+)$", said, re.M)
    assert expected is not None and f"step {STEPS} " in said
    told = run_it("-P", HARNESS, script, tmp_path, json.dumps(plan))
    found: list[dict[str, Any]] = [json.loads(line) for line in told.splitlines()]
    assert [training["digest"] for training in found] == [expected[1]] * len(plan)
    for training, planned in zip(found, plan, strict=True):
        assert training["starts"][0] == 0
        assert len(training["starts"]) > 1 or planned[0][1], "nothing was killed"
    assert any(start > 0 for training in found for start in training["starts"]), "nothing was resumed"
