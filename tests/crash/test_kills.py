"""A save reported committed survives SIGKILL at any storage operation, and so does it survive a killed recovery."""

import json
import subprocess
import sys

import pytest

from crash.rig import FACTOR, Progress, environment, scaled
from crash.scenarios import SCENARIOS

TRIALS = 12 if FACTOR <= 1 else 6
ROUND = 80
"""Trials of one process in the long form: so often is progress shown."""


def sweep(name, mode, trials, seed):
    """Kills by a process of its own: see `kill_sweep`."""
    command = [sys.executable, "-P", "-m", "crash.kill_sweep", name, mode, str(trials), str(seed)]
    done = subprocess.run(command, env=environment(), capture_output=True, timeout=600)
    assert done.returncode == 0, done.stderr.decode()
    return json.loads(done.stdout)


@pytest.mark.timeout(3600)
@pytest.mark.parametrize("mode", ["buffered", "direct"])
@pytest.mark.parametrize("name", SCENARIOS)
def test_kills_at_every_operation(figure, name, mode):
    rounds = [ROUND] * (scaled(TRIALS) // ROUND) or [scaled(TRIALS)]
    progress = Progress(f"kills, {name}, {mode}", len(rounds))
    kills, broken = 0, []
    for seed, trials in enumerate(rounds):
        found = sweep(name, mode, trials, seed)
        kills += found["kills"] + found["kills_of_recovery"]
        broken += found["violations"]
        progress.step(f"{kills} kills")
    figure("kills", kills)
    assert kills >= (scaled(TRIALS) // 2 if FACTOR <= 1 else ROUND // 2)
    assert not broken, f"{len(broken)} in {kills} kills:\n" + "\n".join(broken[:10])
