"""A save reported committed survives a real power cut, on real file systems."""

import json
import shutil
import subprocess
import sys

import pytest

from crash.real_cuts import SKIP
from crash.rig import FACTOR, environment, scaled

CUTS = 10
BOUND = 40
"""Cuts within which a planted bug is found."""


def cut(module, *arguments):
    """Cuts by a process of its own: see `real_cuts` and `peer_cuts`."""
    if shutil.which("unshare") is None or subprocess.run(["unshare", "-m", "true"], capture_output=True).returncode:
        pytest.skip("needs root: there may be no mount namespace")
    command = ["unshare", "-m", sys.executable, "-P", "-m", f"crash.{module}", *map(str, arguments)]
    done = subprocess.run(command, env=environment(), stdout=subprocess.PIPE, timeout=3000)
    if done.returncode == SKIP:
        pytest.skip(done.stdout.decode().strip())
    assert done.returncode == 0
    return json.loads(done.stdout)


@pytest.mark.timeout(3600)
@pytest.mark.parametrize("kind", ["ext4", "xfs"])
def test_cuts_at_any_instant(tmp_path, figure, kind):
    found = cut("real_cuts", kind, tmp_path, scaled(CUTS), 1)
    figure(f"real power cuts on {kind}", found["cuts"])
    figure("saves before real power cuts", found["saves"])
    assert found["violations"] == []
    assert found["cuts"] == scaled(CUTS)
    assert found["saves"] >= found["cuts"]


@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    ("verb", "expected"), [("fsync_dir", "reported committed and is not there"), ("fsync", "damaged")]
)
@pytest.mark.parametrize("kind", ["ext4", "xfs"])
def test_a_service_without(tmp_path, kind, verb, expected):
    """The same rig, which finds nothing above, finds the bug of a service that leaves out this verb; then it stops."""
    found = cut("real_cuts", kind, tmp_path, BOUND, 2, verb, expected)
    assert any(expected in why for why in found["violations"]), f"not found in {found['cuts']} cuts"


@pytest.mark.parametrize("kind", ["ext4", "xfs"])
def test_a_directory_is_not_durable_after_the_cut(tmp_path, kind):
    """XFS that has shut down lets fsync of a directory succeed: a save in the middle of its commit would be lost."""
    found = cut("after_the_cut", kind, tmp_path)
    assert found == {"durable": False, "there": ["before"]}


@pytest.mark.timeout(3600)
@pytest.mark.skipif(FACTOR <= 1, reason="a comparison, for the long form")
@pytest.mark.parametrize("kind", ["ext4", "xfs"])
@pytest.mark.parametrize("peer", ["asyncckpt", "dcp", "dcp-async"])
def test_side_by_side(tmp_path, peer, kind):
    """Prints the row of the table; only of this library is anything demanded."""
    found = cut("peer_cuts", peer, kind, tmp_path, 40, 100, 1)
    row = " | ".join(f"{count} {name}" for name, count in found.items())
    print(f"\n| {peer} | {kind} | {row} |", file=sys.__stderr__, flush=True)
    assert found["cuts"] == 40
    assert found["flips"] == 100
    if peer == "asyncckpt":
        assert found["lost"] == found["wrong"] == found["silent"] == 0
