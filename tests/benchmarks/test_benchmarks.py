"""What the benchmark concludes from what it measured."""

import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks import auto_overhead, durability, report, spread, summary


def test_an_interval_holds_the_median_and_lies_within_the_samples():
    found = spread.spread([3.0, 1.0, 2.0, 5.0, 4.0])
    assert found is not None
    assert found.median == 3.0
    assert 1.0 <= found.low <= found.median <= found.high <= 5.0
    assert spread.spread([]) is None


def test_the_slope_of_growth_is_found_and_that_of_noise_is_not():
    noise = [float((n * 7919) % 13) for n in range(200)]
    _, low, high = spread.slope(noise)
    assert low <= 0 <= high
    rate, low, high = spread.slope([value + 5 * n for n, value in enumerate(noise)])
    assert low <= 5 <= high
    assert rate == pytest.approx(5, abs=0.1)
    assert low > 0


def _window(every: int, wall: float, steps: int = 4, blocked: float = 0.0) -> dict:
    at = wall / steps
    ticks = [(n * at, (n + 1) * at, blocked) for n in range(steps)]
    saves = [
        {"step": n, "called": n * at, "returned": n * at, "blocked": blocked, "phases": {}, "done": n * at + at}
        for n in range(steps)
        if every and n % every == 0
    ]
    extra = {"bytes": 10, "sync": 0.5} if every else {}
    window = {"kind": "window", "peer": "x", "round": 0, "every": every, "steps": steps}
    return {**window, "wall": wall, "saves": saves, "ticks": ticks, **extra}


def test_the_tax_is_what_a_save_adds_to_the_quiet_windows_beside_it():
    records = [{"kind": "run", "peers": ["x"]}, _window(0, 4.0), _window(1, 8.0, blocked=0.5), _window(0, 8.0)]
    peer = summary.summarise(records).peers[0]
    # A quiet step takes 1.5 s: four take 6 s, and four saves added 2 s.
    assert peer.tax[1] is not None
    assert peer.tax[1].median == pytest.approx(0.5)
    assert peer.wall[1] is not None
    assert peer.wall[1].median == pytest.approx(8 / 6)
    assert peer.inflation is not None
    assert peer.inflation.median == pytest.approx(1.5 / 1.5)
    assert peer.blocked[1] is not None
    assert peer.blocked[1].max == 0.5


def test_the_table_of_the_readme_is_that_of_the_results_beside_it(tmp_path):
    root = Path(__file__).resolve().parents[2]
    results = (root / "benchmarks" / "results" / "overlap-cpu.jsonl").read_text().splitlines()
    readme = (root / "README.md").read_text()
    (tmp_path / "README.md").write_text(readme)
    report.put_into(tmp_path / "README.md", report.brief(summary.summarise([json.loads(line) for line in results])))
    same = (tmp_path / "README.md").read_text() == readme
    assert same, "python -m benchmarks.overlap --show --markdown README.md puts it there"


def test_an_error_is_kept_and_one_loss_outweighs_a_survival():
    records = [
        {"kind": "run", "peers": ["x"]},
        {"kind": "error", "peer": "x", "round": 0, "role": "timing", "text": "ImportError: no x"},
        {"kind": "kill", "peer": "x", "round": 0, "survived": True, "why": "", "cold": [1.0], "warm": [0.5]},
        {"kind": "kill", "peer": "x", "round": 1, "survived": False, "why": "gone"},
    ]
    peer = summary.summarise(records).peers[0]
    assert peer.errors == {"timing": "ImportError: no x", "kill -9": "gone"}
    assert peer.killed == "NO"


def test_a_fsync_is_found_under_the_name_that_the_file_came_to_bear(tmp_path):
    folder = tmp_path / "step"
    folder.mkdir()
    for name in ("data", "manifest", "unsynced"):
        (folder / name).touch()
    trace = [
        f"fsync(5<{folder}/data.tmp>) = 0",
        f'rename("{folder}/data.tmp", "{folder}/data") = 0',
        f'openat(AT_FDCWD</work>, "{folder}/manifest", O_WRONLY|O_CREAT|O_DSYNC, 0644) = 7',
        f'renameat(AT_FDCWD</x>, "{folder}/other", AT_FDCWD</x>, "{folder}/unsynced") = 0',
        f"fdatasync(6<{folder}>) = 0",
    ]
    found = durability.synced(trace, tmp_path)
    assert (found.files, found.of_files, found.directories, found.of_directories) == (2, 3, 1, 2)
    assert str(found) == "files 2/3, dirs 1/2"


def test_what_saves_cost_is_found_beside_steps_that_drift():
    """Steps grow slowly; one save blocks 20 ms, is committed two steps later, and makes these 5 ms longer."""
    ends, saves, at = [], [], 0.0
    for number in range(60):
        at += 0.1 + 0.0001 * number
        if number % 15 == 10:
            at += 0.02
            saves.append({"step": number, "committed": at + 0.15})
        if number % 15 in (11, 12):
            at += 0.005
        ends.append(at)
    found = auto_overhead.costs({"begun": 0.0, "ends": ends, "saves": saves})
    assert len(found) == 4
    assert found == pytest.approx([0.03] * 4, abs=0.004)
