"""prune, pin and unpin: what they say they do, and do."""

from __future__ import annotations

from pathlib import Path

from support.checkpoints import flip, snapshot
from support.cli import Command, image_of
from support.processes import Trainer

from asyncckpt.catalog.ownership import RunLock
from asyncckpt.cli import answers
from asyncckpt.format import names
from asyncckpt.storage.local import LocalStorage

PRUNE = ("--keep-last", "1", "--keep-best", "1", "--metric", "loss")


def test_a_dry_run_says_why_and_changes_nothing(cli: Command, run: Path) -> None:
    cli("pin", f"{run}@100")
    before = snapshot(run)
    found = cli("prune", run, *PRUNE, "--dry-run")
    assert snapshot(run) == before
    rows = {line.split()[0]: line for line in found.out.splitlines()}
    assert "stays" in rows["100"] and "pinned" in rows["100"]
    assert "stays" in rows["200"] and "the best by loss" in rows["200"]
    assert "would go" in rows["300"] and "would go" in rows["400"]
    assert "stays" in rows["500"] and "newest" in rows["500"]
    data = cli("prune", run, *PRUNE, "--dry-run", "--json").json
    assert data["dry_run"] and data["deleted"] == []
    assert [c["stays"] for c in data["checkpoints"]] == [True, True, False, False, True]


def test_prune_deletes_what_the_dry_run_said(cli: Command, run: Path) -> None:
    said = [c["step"] for c in cli("prune", run, *PRUNE, "--dry-run", "--json").json["checkpoints"] if not c["stays"]]
    freed = sum(p.stat().st_size for step in said for p in image_of(run, step).parent.iterdir())
    data = cli("prune", run, *PRUNE, "--json").json
    assert data["deleted"] == said == [100, 300, 400]
    assert data["bytes"] == freed
    assert sorted(p.name for p in run.glob("step-*")) == ["step-00000200", "step-00000500"]
    assert cli("verify", run, "--all").code == 0
    assert cli("prune", run, *PRUNE, "--json").json["deleted"] == []


def test_prune_relies_on_no_damaged_checkpoint(cli: Command, run: Path) -> None:
    """The newest is damaged: the newest whole one stays as well, though no clause keeps it."""
    flip(image_of(run, 500), 4100)
    data = cli("prune", run, "--keep-last", "1", "--json").json
    assert data["deleted"] == [100, 200, 300]
    assert "nothing newer could be verified" in data["checkpoints"][3]["why"]
    assert cli("verify", f"{run}@400").code == 0


def test_prune_deletes_nothing_where_nothing_is_whole(cli: Command, run: Path) -> None:
    for step in range(100, 600, 100):
        flip(image_of(run, step), 4100)
    assert cli("prune", run, "--keep-last", "1", "--json").json["deleted"] == []


def test_prune_leaves_what_is_being_read(cli: Command, run: Path) -> None:
    held = LocalStorage(str(run)).hold(names.step_name(300))
    assert held is not None
    with held:
        data = cli("prune", run, "--keep-last", "1", "--json").json
    assert 300 not in data["deleted"] and "being read" in data["checkpoints"][2]["why"]
    assert cli("prune", run, "--keep-last", "1", "--json").json["deleted"] == [300]


def test_a_live_writer_is_named_and_nothing_is_deleted(cli: Command, run: Path) -> None:
    trainer = Trainer(
        "import os, sys\n"
        "from asyncckpt.catalog.ownership import RunLock\n"
        "lock = RunLock.acquire(sys.argv[1], 5)\n"
        "print('owned', flush=True)\n"
        "sys.stdin.readline()",
        run,
    )
    try:
        assert trainer.read_line() == "owned"
        before = snapshot(run)
        found = cli("prune", run, *PRUNE, "--json")
        assert found.code == answers.CONFLICT
        assert found.json["error"]["pid"] == trainer.pid and str(trainer.pid) in found.err
        assert snapshot(run) == before
        assert cli("prune", run, *PRUNE, "--dry-run").code == 0
        assert cli("pin", f"{run}@300").code == 0, "a pin needs no ownership"
    finally:
        trainer.close()
    assert cli("prune", run, *PRUNE, "--json").json["deleted"] == [100, 400]


def test_prune_gives_the_run_up(cli: Command, run: Path) -> None:
    cli("prune", run, *PRUNE)
    RunLock.acquire(str(run), 0).release()


def test_pins_come_and_go(cli: Command, run: Path) -> None:
    assert cli("pin", f"{run}@200", "--json").json == {"step": 200, "pinned": True}
    cli("prune", run, "--keep-last", "1")
    assert [c["step"] for c in cli("ls", run, "--json").json["checkpoints"]] == [200, 500]
    assert cli("unpin", f"{run}@200", "--json").json == {"step": 200, "pinned": False}
    cli("prune", run, "--keep-last", "1")
    assert [c["step"] for c in cli("ls", run, "--json").json["checkpoints"]] == [500]
