"""Each promise has a test that fails when it is broken: see `gate`."""

import json
import subprocess
import sys

import pytest

from crash.gate import MUTANTS
from crash.rig import FACTOR, environment

GROUPS = 6 if FACTOR > 1 else 2


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("group", range(GROUPS))
def test_a_bug_planted_for_each_promise_is_found(figure, group):
    """In the long form all of them, and also that the same tests pass without it."""
    names = [name for name, mutant in MUTANTS.items() if FACTOR > 1 or not mutant.slow][group::GROUPS]
    command = [sys.executable, "-P", "-m", "crash.gate", *(["--control"] if FACTOR > 1 else []), *names]
    done = subprocess.run(command, env=environment(ASYNCCKPT_TORTURE="1"), stdout=subprocess.PIPE, timeout=1500)
    assert done.returncode == 0
    assert json.loads(done.stdout.splitlines()[-1]) == {}
    figure("planted bugs of the gate", len(names))
