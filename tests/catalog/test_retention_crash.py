"""Retention on real files, killed at every change that it makes, with clocks ten years off either way."""

import ast
import random
import shutil
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.checkpoints import commit, snapshot
from support.dying import Dead, DyingPosix

from asyncckpt.catalog import custody, notes
from asyncckpt.catalog.catalog import Catalog
from asyncckpt.catalog.custody import Custody
from asyncckpt.policy import keep
from asyncckpt.policy.keep import Keep
from asyncckpt.read.reader import CheckpointReader
from asyncckpt.storage.local import LocalStorage

NOW = datetime(2026, 1, 1, tzinfo=UTC)
TEN_YEARS = 10 * 365 * 24
KEEPS = [
    Keep(last=1),
    Keep(last=2, every=3),
    Keep(last=1, within=timedelta(hours=5)),
    Keep(last=1, best=1, metric="loss"),
    Keep(last=1, within=timedelta(days=400), best=2, metric="loss", mode="max"),
]
FOREIGN = "step-{:08d}/theirs.txt"


@dataclass(frozen=True)
class Life:
    """What a run is like, and what retention is told of it."""

    steps: list[int]
    hours: list[int]
    pinned: set[int]
    read: set[int]
    verified: set[int]
    rewound: int | None
    keep: Keep


@st.composite
def lives(draw: st.DrawFn) -> Life:
    steps = sorted(draw(st.sets(st.integers(0, 12), min_size=2, max_size=6)))
    return Life(
        steps,
        draw(st.lists(st.integers(-TEN_YEARS, TEN_YEARS), min_size=len(steps), max_size=len(steps))),
        pinned=draw(st.sets(st.sampled_from(steps), max_size=2)),
        read=draw(st.sets(st.sampled_from(steps[:-1]), max_size=2)),
        verified=draw(st.sets(st.sampled_from(steps)) | st.just(set(steps))),
        rewound=draw(st.none() | st.sampled_from(steps)),
        keep=draw(st.sampled_from(KEEPS)),
    )


def build(root: Path, life: Life) -> None:
    storage = LocalStorage(str(root))
    catalog = Catalog(storage)
    for sequence, (step, hours) in enumerate(zip(life.steps, life.hours, strict=True)):
        created = (NOW + timedelta(hours=hours)).isoformat()
        commit(storage, step, sequence=sequence + 1, created=created, metrics={"loss": step % 4 / 2})
        root.joinpath(FOREIGN.format(step)).write_text(f"theirs {step}")
    for step in life.pinned:
        notes.pin(catalog, step)
    if life.rewound is not None:
        Custody(storage, None).rewind(life.rewound)
    root.joinpath("theirs").write_text("theirs")


def retire(root: Path, life: Life, at: int = 10**9) -> bool:
    """Retention over what lies in `root`, which dies at its `at`-th change; False where it came to its end."""
    owner = Custody(LocalStorage(str(root), DyingPosix(at)), life.keep)
    owner.verified |= life.verified & set(owner.catalog.committed())
    try:
        owner.sweep()
        owner.retire()
    except Dead:
        return True
    return False


def check(root: Path, life: Life) -> None:
    """What must never be deleted is there, and all that is listed is whole."""
    catalog = Catalog(LocalStorage(str(root)))
    there = set(catalog.committed())
    candidates = [s for s in life.steps if life.rewound is None or s <= life.rewound]
    assert there >= life.pinned | life.read
    assert there >= {max(candidates)}
    verified = life.verified.intersection(candidates)
    assert there >= ({max(verified)} if verified else set(life.steps))
    for step in there:
        CheckpointReader(catalog, step).verify()
    for step in life.steps:
        assert root.joinpath(FOREIGN.format(step)).read_text() == f"theirs {step}"
    assert root.joinpath("theirs").read_text() == "theirs"


@settings(max_examples=25)
@given(lives(), st.randoms(use_true_random=False))
def test_killed_anywhere_it_has_deleted_nothing_that_must_stay_and_the_next_finishes_it(
    tmp_path_factory: pytest.TempPathFactory, life: Life, luck: random.Random
) -> None:
    base = tmp_path_factory.mktemp("runs")
    build(base / "original", life)
    with ExitStack() as reading:
        at, alive, ends = 0, True, []
        while alive:
            at += 1
            work = base / f"killed-{at}"
            shutil.copytree(base / "original", work)
            for step in life.read:
                reading.enter_context(CheckpointReader(Catalog(LocalStorage(str(work))), step))
            alive = retire(work, life, at)
            check(work, life)
            if alive and luck.random() < 0.3:
                retire(work, life, luck.randint(1, 8))
                check(work, life)
            retire(work, life)
            check(work, life)
            ends.append(sorted(snapshot(work)))
            assert at < 500
    assert all(end == ends[-1] for end in ends)
    shutil.rmtree(base)


def test_no_clock_and_no_file_time_is_asked() -> None:
    for module in (custody, keep):
        tree = ast.parse(Path(module.__file__ or "").read_text())
        called = {ast.unparse(node.func).rpartition(".")[2] for node in ast.walk(tree) if isinstance(node, ast.Call)}
        assert not called & {"now", "utcnow", "today", "time", "stat", "lstat", "getmtime", "monotonic"}
