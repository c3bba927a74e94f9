"""What a killed trainer was told staged or committed is what the next one finds, bit for bit."""

import json
import subprocess
import sys

import pytest

from crash.rig import FACTOR, environment, scaled

TRIALS = 5 if FACTOR <= 1 else 8


@pytest.mark.timeout(3600)
def test_kills_at_any_instant(figure):
    """By processes of their own: see `trainer_kills`."""
    command = [sys.executable, "-P", "-m", "crash.trainer_kills", str(scaled(TRIALS)), "1"]
    done = subprocess.run(command, env=environment(), stdout=subprocess.PIPE, timeout=3000)
    assert done.returncode == 0
    found = json.loads(done.stdout)
    kills = sum(found["kills"].values())
    figure("kills of trainers", kills)
    figure("saves staged before kills of trainers", found["staged"])
    assert found["violations"] == []
    assert kills == scaled(TRIALS)
    assert set(found["kills"]) == {"kill", "killpg", "kill with workers", "killpg with workers", "writer too"}
