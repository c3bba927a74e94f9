"""The example: four ranks under torchrun are killed in the middle, two go on."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import asyncckpt

EXAMPLE = Path(__file__).parents[2] / "examples" / "fsdp.py"


def torchrun(ranks, *arguments):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(EXAMPLE.parents[1])}
    done = subprocess.run(
        [*command, str(EXAMPLE), *map(str, arguments)], capture_output=True, text=True, timeout=250, env=environment
    )
    return done.returncode, done.stdout, done.stderr


def losses(output):
    return {int(step): float(loss) for step, loss in re.findall(r"step (\d+): loss ([\d.]+)", output)}


@pytest.mark.timeout(600)
def test_killed_with_four_ranks_and_resumed_with_two(tmp_path):
    code, first, _ = torchrun(4, tmp_path / "run", "--steps", 30, "--kill-at", 20)
    assert code != 0 and "4 ranks, from step 0" in first
    code, second, errors = torchrun(2, tmp_path / "run", "--steps", 30)
    assert code == 0, errors
    start = int(re.search(r"2 ranks, from step (\d+)", second)[1])
    assert start in (15, 20)  # what was staged when they were killed is committed
    assert asyncckpt.open(tmp_path / "run").verify() == 30
    after = losses(second)
    assert max(after) == 30
    if start < 20:  # the steps that were taken twice gave the same, whatever the number of ranks
        assert after[20] == pytest.approx(losses(first)[20], rel=1e-3)
