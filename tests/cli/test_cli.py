"""The command line: what it prints for people and for programs, its exit codes, and what it must not do."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import numpy as np
import pytest
from support.checkpoints import Part, commit, flip, snapshot
from support.checkpoints import image_of as whole_image
from support.processes import Trainer

from asyncckpt.catalog.ownership import RunLock
from asyncckpt.cli import answers
from asyncckpt.cli.app import app
from asyncckpt.format import names
from asyncckpt.format.manifest import encode
from asyncckpt.policy.codec import Codec
from asyncckpt.storage.local import LocalStorage
from asyncckpt.testing import ServiceDriver

HOSTILE = "w\x1b[31m\n\x07\u202e\x9b"
"""A tensor's name that would colour, break a line, beep, turn the text around, and start a control sequence."""


class Result(NamedTuple):
    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        assert self.out.count("\n") == 1, "one object, on one line"
        return json.loads(self.out)


Command = Callable[..., Result]


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str]) -> Command:
    def run(*words: object) -> Result:
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            app([str(word) for word in words], prog_name="asyncckpt")
        captured = capsys.readouterr()
        code = ended.value.code
        assert isinstance(code, int)
        return Result(code, captured.out, captured.err)

    return run


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """Steps 100 to 500, each with a loss."""
    storage = LocalStorage(str(tmp_path / "run"))
    for step, loss in zip(range(100, 600, 100), [5.0, 1.0, 3.0, 4.0, 2.0], strict=True):
        commit(storage, step, metrics={"loss": loss})
    return tmp_path / "run"


def test_a_coded_part_is_shown_and_verified_and_has_no_file_for_others(cli: Command, tmp_path: Path) -> None:
    image = whole_image({"w": np.arange(20_000, dtype=np.float32)})[1]
    with ServiceDriver(str(tmp_path), codec=Codec("zstd")) as driver:
        driver.save(7, {"model": (image, {"w": {"$": "tensor", "n": "w"}})})
    assert cli("verify", tmp_path).code == answers.OK
    shown = cli("show", tmp_path, "--json").json["parts"]["model"]
    assert shown["file"] is None and shown["bytes"] == len(image) and shown["chunks"] == 1
    assert [names.part_of_coded(name) for name in shown["files"]] == ["model"]
    assert shown["files"][0] in cli("show", tmp_path).out
    refused = cli("path", tmp_path, "model")
    assert refused.code != answers.OK and "is coded" in refused.err


def manifest_of(run: Path, step: int) -> Path:
    return run / names.step_name(step) / names.MANIFEST


def image_of(run: Path, step: int) -> Path:
    return next(run.glob(f"{names.step_name(step)}/*/model.safetensors"))


# ls, show, path


def test_ls_lists_what_is_committed_oldest_first(cli: Command, run: Path) -> None:
    manifest_of(run, 200).unlink()
    found = cli("ls", run)
    assert found.code == 0 and found.err == ""
    assert [line.split()[0] for line in found.out.splitlines()] == ["STEP", "100", "300", "400", "500"]
    assert "loss=5" in found.out and "model,note" in found.out
    data = cli("ls", run, "--json").json
    assert [c["step"] for c in data["checkpoints"]] == [100, 300, 400, 500]
    first = data["checkpoints"][0]
    assert (first["metrics"], first["parts"], first["pinned"]) == ({"loss": 5.0}, ["model", "note"], False)
    assert first["bytes"] == sum(p.stat().st_size for p in image_of(run, 100).parent.iterdir())


def test_ls_shows_damaged_and_pinned_ones_and_nan_is_null(cli: Command, run: Path) -> None:
    flip(manifest_of(run, 300), 5)
    commit(LocalStorage(str(run)), 600, metrics={"loss": None}, omitted=["optimizer"])
    cli("pin", f"{run}@100")
    data = {c["step"]: c for c in cli("ls", run, "--json").json["checkpoints"]}
    assert data[300]["damaged"] and "seal" in data[300]["doubt"]
    assert data[100]["pinned"] and not data[400]["pinned"]
    assert data[600]["metrics"] == {"loss": None} and data[600]["omitted"] == ["optimizer"]
    text = cli("ls", run).out
    assert "damaged: " in text and "pinned" in text and "loss=nan" in text and "lacks optimizer" in text


def test_an_empty_run_is_listed_as_such(cli: Command, tmp_path: Path) -> None:
    assert cli("ls", tmp_path, "--json").json["checkpoints"] == []
    assert cli("ls", tmp_path).out.splitlines()[1:] == []


@pytest.mark.parametrize("form", ["{run}", "{run}/", "{run}@500", "{run}/step-00000500", "{run}/step-00000500/"])
def test_every_form_of_a_reference_names_the_checkpoint(cli: Command, run: Path, form: str) -> None:
    assert cli("show", form.format(run=run), "--json").json["step"] == 500


def test_a_run_in_the_working_directory_is_found(cli: Command, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(run)
    assert cli("show", "step-00000200", "--json").json["step"] == 200
    assert cli("show", ".", "--json").json["step"] == 500
    assert cli("show", ".@300", "--json").json["step"] == 300


def test_a_directory_whose_name_looks_like_a_reference_is_a_run(cli: Command, tmp_path: Path) -> None:
    commit(LocalStorage(str(tmp_path / "run@7")), 3)
    assert cli("show", tmp_path / "run@7", "--json").json["step"] == 3
    assert cli("show", f"{tmp_path / 'run@7'}@3", "--json").json["step"] == 3


def test_show_says_what_is_in_a_checkpoint(cli: Command, tmp_path: Path) -> None:
    tree = [{"$": "tensor", "n": "w"}, {"$": "tensor", "n": "c", "d": "complex64", "s": [3]}]
    arrays = {"w": np.zeros((2, 5), np.float32), "c": np.zeros(24, np.uint8)}
    commit(LocalStorage(str(tmp_path)), 1, {"model": Part(arrays, tree), "note": Part(tree=1)}, metrics={"acc": 0.5})
    data = cli("show", tmp_path, "--json").json
    assert sorted(data["parts"]["model"]["tensors"], key=lambda tensor: tensor["name"]) == [
        {"name": "c", "dtype": "complex64", "shape": [3], "bytes": 24},
        {"name": "w", "dtype": "float32", "shape": [2, 5], "bytes": 40},
    ]
    assert data["metrics"] == {"acc": 0.5} and data["parts"]["note"]["tensors"] == []
    text = cli("show", tmp_path).out
    assert "float32" in text and "2x5" in text and "acc=0.5" in text and "40 B" in text
    assert list(cli("show", tmp_path, "--part", "note", "--json").json["parts"]) == ["note"]


def test_path_names_files_that_are_there(cli: Command, run: Path) -> None:
    assert Path(cli("path", f"{run}@100").out.strip()) == image_of(run, 100).parent
    assert Path(cli("path", f"{run}@100", "model").out.strip()) == image_of(run, 100)
    assert cli("path", run, "--json").json == {"step": 500, "path": str(image_of(run, 500).parent)}


# verify, diff


def test_verify_finds_the_damaged_one(cli: Command, run: Path) -> None:
    assert cli("verify", run).code == 0
    flip(image_of(run, 300), 4100)
    found = cli("verify", f"{run}@300", "--json")
    assert found.code == answers.CORRUPT
    (checkpoint,) = found.json["checkpoints"]
    assert not checkpoint["ok"] and checkpoint["error"]["part"] == "model" and checkpoint["error"]["chunk"] == 1
    every = cli("verify", run, "--all")
    assert every.code == answers.CORRUPT and every.out.count("whole") == 4 and every.out.count("DAMAGED") == 1
    flip(manifest_of(run, 100), 3)
    assert [c["ok"] for c in cli("verify", run, "--all", "--json").json["checkpoints"]] == [
        False,
        True,
        False,
        True,
        True,
    ]


def test_diff_answers_by_its_exit_code(cli: Command, run: Path) -> None:
    assert cli("diff", f"{run}@100", f"{run}@100").code == answers.OK
    found = cli("diff", f"{run}@100", f"{run}@200")
    assert found.code == answers.NO
    assert found.out.splitlines() == ["model: changed", "  ~ w", "note: changed", "  ~ note['seed']: 100 -> 200"]
    data = cli("diff", f"{run}@100", f"{run}@200", "--json").json
    assert not data["same"] and data["parts"][0]["changed"] == ["w"]
    assert data["parts"][1]["values"] == [{"path": "note['seed']", "before": 100, "after": 200}]


# prune, pin


PRUNE = ("--keep-last", "1", "--keep-best", "1", "--metric", "loss")


def test_export_writes_a_part_as_one_file(cli: Command, tmp_path: Path) -> None:
    storage, weights = LocalStorage(str(tmp_path / "run")), np.array([1.0, 1.00390625, -2.5], np.float32)
    commit(storage, 1, {"model": Part({"w": weights}, {"w": {"$": "tensor", "n": "w"}}), "note": Part(tree=1)})
    commit(storage, 2, {"note": Part(tree=2)}, omitted=["model"])
    target = tmp_path / "model.safetensors"
    found = cli("export", tmp_path / "run", target, "--dtype", "bf16", "--json")
    assert found.code == answers.OK
    assert found.json == {
        "run": str(tmp_path / "run"), "step": 1, "part": "model", "file": str(target),
        "bytes": 4096 + 6, "tensors": 1, "dtype": "bf16",
    }  # fmt: skip
    upper = np.frombuffer(target.read_bytes()[4096:], "<u2").astype("<u4") << 16
    assert upper.view("<f4").tolist() == [1.0, 1.0, -2.5]
    again = cli("export", f"{tmp_path / 'run'}@1", target)
    assert again.code == answers.USAGE and "is there already" in again.err
    assert "1 tensors" in cli("export", f"{tmp_path / 'run'}@1", target, "--overwrite").out
    assert np.frombuffer(target.read_bytes()[4096:], "<f4").tolist() == weights.tolist()


def test_export_takes_no_older_checkpoint_for_a_damaged_one(cli: Command, run: Path) -> None:
    flip(manifest_of(run, 500), 5)
    found = cli("export", run, run.parent / "out.safetensors")
    assert found.code == answers.CORRUPT and "step 500" in found.err
    assert cli("export", f"{run}@400", run.parent / "out.safetensors").code == answers.OK


@pytest.mark.parametrize(
    ("words", "code"),
    [
        (["{run}@7"], answers.NOT_FOUND), (["{run}", "--part", "nothing"], answers.NOT_FOUND),
        (["{run}", "--part", "note"], answers.NOT_FOUND), (["{run}", "--dtype", "int8"], answers.USAGE),
        (["{run}@300"], answers.CORRUPT), (["{run}@200"], answers.CORRUPT),
    ],
)  # fmt: skip
def test_an_export_that_fails_leaves_nothing(cli: Command, run: Path, words: list[str], code: int) -> None:
    flip(manifest_of(run, 300), 5)
    flip(image_of(run, 200), 4096)
    before = snapshot(run.parent)
    reference, *options = (word.format(run=run) for word in words)
    found = cli("export", reference, run.parent / "out.safetensors", *options)
    assert found.code == code and found.out == "" and found.err != ""
    assert snapshot(run.parent) == before


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


# Exit codes


@pytest.mark.parametrize(
    ("words", "code"),
    [
        (["ls"], answers.USAGE),
        (["nonsense"], answers.USAGE),
        (["ls", "{run}", "--nonsense"], answers.USAGE),
        (["ls", "s3://bucket/run"], answers.USAGE),
        (["ls", ""], answers.USAGE),
        (["ls", "{run}/nothing"], answers.NOT_FOUND),
        (["show", "{run}@7"], answers.NOT_FOUND),
        (["show", "{run}", "--part", "nothing"], answers.NOT_FOUND),
        (["path", "{run}", "note"], answers.NOT_FOUND),
        (["path", "{run}@7"], answers.NOT_FOUND),
        (["verify", "{run}@7"], answers.NOT_FOUND),
        (["verify", "{run}@100", "--all"], answers.USAGE),
        (["diff", "{run}", "{run}@7"], answers.NOT_FOUND),
        (["pin", "{run}@7"], answers.NOT_FOUND),
        (["prune", "{run}"], answers.USAGE),
        (["prune", "{run}", "--keep-last", "0"], answers.USAGE),
        (["prune", "{run}", "--keep-last", "-3"], answers.USAGE),
        (["prune", "{run}", "--keep-best", "1"], answers.USAGE),
        (["prune", "{run}", "--keep-best", "1", "--metric", "loss", "--mode", "most"], answers.USAGE),
        (["prune", "{run}", "--keep-within", "soon"], answers.USAGE),
        (["prune", "{run}", "--keep-within", "99999999999d"], answers.USAGE),
        (["show", "{run}@300"], answers.CORRUPT),
        (["diff", "{run}", "{run}@300"], answers.CORRUPT),
        (["path", "{run}@300"], answers.CORRUPT),
        (["pin", "{run}@300"], answers.CORRUPT),
        (["plan"], answers.USAGE),
        (["plan", "--state", "much"], answers.USAGE),
    ],
)
def test_each_kind_of_failure_has_its_exit_code(cli: Command, run: Path, words: list[str], code: int) -> None:
    flip(manifest_of(run, 300), 5)
    before = snapshot(run)
    found = cli(*(word.format(run=run) for word in words))
    assert found.code == code
    assert found.out == "" and found.err != ""
    assert snapshot(run) == before, "what fails changes nothing"


def test_a_storage_that_fails_has_its_exit_code(cli: Command, tmp_path: Path) -> None:
    commit(LocalStorage(str(tmp_path)), 1)
    manifest_of(tmp_path, 1).unlink()
    manifest_of(tmp_path, 1).mkdir()
    found = cli("show", tmp_path, "--json")
    assert (found.code, found.json["error"]["type"]) == (answers.STORAGE, "StorageError")


def test_errors_are_json_too(cli: Command, run: Path) -> None:
    found = cli("show", f"{run}@7", "--json")
    assert found.json["code"] == found.code == answers.NOT_FOUND
    assert found.json["error"]["type"] == "CheckpointNotFoundError" and "step 7" in found.json["error"]["message"]


def test_a_bug_of_ours_is_told_as_such(cli: Command, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from asyncckpt.cli import listing

    monkeypatch.setattr(listing, "ls", lambda location: 1 / 0)
    found = cli("ls", run)
    assert found.code == answers.BUG and "Traceback" in found.err


def test_the_exit_codes_stand_in_the_help(cli: Command) -> None:
    """And in the README."""
    text = " ".join(cli("--help").out.split())
    readme = (Path(__file__).parents[2] / "README.md").read_text()
    for code, meaning in answers.EXIT_CODES.items():
        assert f"{code} {meaning}" in text
        assert f"| {code} | {meaning} |" in readme


# Names that are meant to harm


def controls(text: str) -> set[str]:
    return {c for c in text if not c.isprintable()} - {"\n"}


@pytest.mark.parametrize(
    "words", [["show"], ["show", "--json"], ["diff"], ["diff", "--json"], ["ls"], ["ls", "--json"]]
)
def test_no_control_character_of_a_name_reaches_the_terminal(cli: Command, tmp_path: Path, words: list[str]) -> None:
    storage = LocalStorage(str(tmp_path))
    metrics = {HOSTILE: 1.0}
    commit(storage, 1, {"p": Part({HOSTILE: np.zeros(3)}, {HOSTILE: HOSTILE})}, metrics=metrics)
    commit(storage, 2, {"p": Part({HOSTILE: np.ones(3)}, {HOSTILE: HOSTILE + "x"})}, metrics=metrics)
    command, *options = words
    places = [f"{tmp_path}@1", f"{tmp_path}@2"] if command == "diff" else [f"{tmp_path}"]
    found = cli(command, *places, *options)
    assert not controls(found.out) and "\\u202e" in found.out
    if command == "show" and not options:
        assert r"w\x1b[31m\n\x07\u202e\x9b" in found.out
    if command == "show" and options:
        assert found.json["parts"]["p"]["tensors"][0]["name"] == HOSTILE


@pytest.mark.parametrize("name", ["[red]x[/red]", "[/]", "[link=file:///]"])
def test_names_are_no_markup(cli: Command, tmp_path: Path, name: str) -> None:
    commit(LocalStorage(str(tmp_path)), 1, {"p": Part({name: np.zeros(3)})})
    assert name in cli("show", tmp_path).out


def test_errors_are_escaped(cli: Command, tmp_path: Path) -> None:
    found = cli("ls", tmp_path / HOSTILE.replace("\n", ""))
    assert found.code == answers.NOT_FOUND and not controls(found.err) and "\\x1b" in found.err


# The plan


def test_the_plan_prints_goodput_interval_and_limit(cli: Command) -> None:
    text = cli("plan", "--state", "280GB", "--nodes", "2048").out
    assert "1h 48m" in text and "limited by  failures" in text and "assumed: " in text
    data = cli("plan", "--state", "280GB", "--nodes", "2048", "--json").json
    assert data["job"]["mtbf"] == pytest.approx(1.8 * 3600, rel=0.005)
    assert data["limit"] == "failures" and 0.9 < data["estimate"]["goodput"] < 1
    assert data["simulated"]["goodput"] == pytest.approx(data["estimate"]["goodput"], rel=0.05)
    assert data["models"]["ettr"] == pytest.approx(data["estimate"]["goodput"], rel=0.05)
    assert len(data["assumed"]) == 4


@pytest.mark.parametrize(
    ("options", "limit", "interval"),
    [
        (["--mtbf", "1h", "--tax", "2s", "--total-bandwidth", "10GB/s"], "failures", 120.7),
        (["--mtbf", "1h", "--total-bandwidth", "1GB/s"], "bandwidth", 280),
        (["--mtbf", "1h", "--bandwidth", "1GB/s", "--total-bandwidth", "0.5GB/s"], "bandwidth", 560),
        (["--mtbf", "1h", "--nodes", "100", "--latency", "10m"], "queue", 301.4),
        (["--mtbf", "1h", "--nodes", "100", "--latency", "10m", "--max-in-flight", "8"], "failures", 85.3),
        (["--mtbf", "1h", "--nodes", "100", "--max-overhead", "1%"], "overhead", 100),
        (["--mtbf", "1h", "--nodes", "100", "--step-time", "100s"], "step", 100),
    ],
)
def test_the_plan_follows_its_options(cli: Command, options: list[str], limit: str, interval: float) -> None:
    data = cli("plan", "--state", "280GB", *options, "--simulate", "0", "--json").json
    assert (data["limit"], data["interval"]) == (limit, pytest.approx(interval, rel=0.01))
    assert data["simulated"] is None


def test_the_plan_says_what_another_interval_gives(cli: Command) -> None:
    data = cli("plan", "--state", "1GB", "--mtbf", "1h", "--interval", "30m", "--json").json
    assert data["asked"]["interval"] == 1800 and data["asked"]["goodput"] < data["estimate"]["goodput"]


@pytest.mark.parametrize(
    "options",
    [
        ["--state", "0"],
        ["--state", "1GB", "--nodes", "0"],
        ["--state", "1GB", "--mtbf", "0"],
        ["--state", "1GB", "--mtbf", "1h", "--failure-rate", "1e-3"],
        ["--state", "1GB", "--failure-rate", "-1"],
        ["--state", "1GB", "--failure-rate", "nan"],
        ["--state", "1GB", "--bandwidth", "0"],
        ["--state", "1GB", "--tax", "-1s"],
        ["--state", "1GB", "--max-in-flight", "0"],
        ["--state", "1GB", "--max-overhead", "200%"],
        ["--state", "1GB", "--interval", "1ms"],
        ["--state", "1GB", "--simulate", "-1"],
    ],
)
def test_the_plan_refuses_what_makes_no_sense(cli: Command, options: list[str]) -> None:
    found = cli("plan", *options)
    assert found.code == answers.USAGE and found.out == "" and found.err


# As a process

LOOK = """
import sys
from asyncckpt.cli.app import main
try:
    main()
finally:
    heavy = [name for name in ("torch", "numpy", "pandas") if name in sys.modules]
    print("loaded:", *heavy, file=sys.stderr)
"""


@pytest.mark.parametrize(
    "words",
    [
        "ls R",
        "show R",
        "verify R",
        "path R",
        "diff R@1 R",
        "prune R --keep-last 1",
        "pin R",
        "unpin R",
        "plan --state 1GB",
    ],
)
def test_no_command_loads_torch(tmp_path: Path, words: str) -> None:
    """Nor numpy, which takes a third of the time that `ls` may take."""
    storage = LocalStorage(str(tmp_path))
    commit(storage, 1)
    commit(storage, 2)
    words = words.replace("R", str(tmp_path))
    ended = subprocess.run(
        [sys.executable, "-W", "error", "-c", LOOK, *words.split()], capture_output=True, text=True, timeout=60
    )
    assert ended.returncode in (answers.OK, answers.NO), ended.stderr
    assert ended.stderr.splitlines()[-1] == "loaded:"


def test_an_export_loads_numpy_and_no_torch(run: Path) -> None:
    words = ["export", str(run), str(run.parent / "out.safetensors"), "--dtype", "fp16"]
    ended = subprocess.run([sys.executable, "-W", "error", "-c", LOOK, *words], capture_output=True, timeout=60)
    assert (ended.returncode, ended.stderr.decode().splitlines()[-1]) == (answers.OK, "loaded: numpy")


def test_python_m_asyncckpt_is_the_command_line(run: Path) -> None:
    command = [sys.executable, "-W", "error", "-m", "asyncckpt", "ls", str(run), "--json"]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert ended.returncode == 0 and len(json.loads(ended.stdout)["checkpoints"]) == 5


def test_a_reader_that_goes_away_is_no_error(run: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "asyncckpt", "ls", str(run)], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stdout is not None and process.stderr is not None
    process.stdout.close()
    assert process.wait(timeout=60) == 141
    with process.stderr as errors:
        assert errors.read() == b""


def test_a_thousand_checkpoints_are_listed_at_once(tmp_path: Path) -> None:
    """Under 300 ms alone on the machine; a loaded one gets four times that. With torch it would be seconds."""
    storage = LocalStorage(str(tmp_path))
    manifest = commit(storage, 0)
    for step in range(1, 1000):
        folder = tmp_path / names.step_name(step)
        (folder / manifest.attempt).mkdir(parents=True)
        (folder / names.MANIFEST).write_bytes(encode(msgspec.structs.replace(manifest, step=step, sequence=step)))
    took = []
    for _ in range(3):
        begun = time.perf_counter()
        command = [sys.executable, "-m", "asyncckpt", "ls", str(tmp_path)]
        ended = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
        took.append(time.perf_counter() - begun)
        assert len(ended.stdout.splitlines()) == 1001
    assert min(took) < 1.2
