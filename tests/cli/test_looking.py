"""ls, show, path, verify, diff and export: what they print for people and for programs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from support.checkpoints import Part, commit, flip, snapshot
from support.checkpoints import image_of as whole_image
from support.cli import Command, image_of, manifest_of

from asyncckpt.cli import answers
from asyncckpt.format import names
from asyncckpt.policy.codec import Codec
from asyncckpt.storage.local import LocalStorage
from asyncckpt.testing import ServiceDriver


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


def test_a_coded_part_is_shown_and_verified_and_has_no_file_for_others(cli: Command, tmp_path: Path) -> None:
    image = whole_image({"w": np.arange(20_000, dtype=np.float32)})[1]
    with ServiceDriver(str(tmp_path), codec=Codec("zstd")) as driver:
        driver.save(7, {"model": (image, {"w": {"$": "tensor", "n": "w"}})})
    assert cli("verify", tmp_path).code == answers.OK
    shown = cli("show", tmp_path, "--json").json["parts"]["model"]
    assert shown["file"] is None and shown["bytes"] == len(image) and shown["chunks"] == 1
    assert [names.coded_of(name) for name in shown["files"]] == [("model", None)]
    assert shown["files"][0] in cli("show", tmp_path).out
    refused = cli("path", tmp_path, "model")
    assert refused.code != answers.OK and "is coded" in refused.err


def test_export_writes_a_part_as_one_file(cli: Command, tmp_path: Path) -> None:
    storage, weights = LocalStorage(str(tmp_path / "run")), np.array([1.0, 1.00390625, -2.5], np.float32)
    commit(storage, 1, {"model": Part({"w": weights}, {"w": {"$": "tensor", "n": "w"}}), "note": Part(tree=1)})
    commit(storage, 2, {"note": Part(tree=2)}, omitted=["model"])
    target = tmp_path / "model.safetensors"
    found = cli("export", tmp_path / "run", target, "--dtype", "bf16", "--json")
    assert found.code == answers.OK
    assert found.json == {
        "run": str(tmp_path / "run"), "step": 1, "part": "model", "file": str(target),
        "bytes": 4096 + 6, "tensors": 1, "dtype": "bf16", "files": 1,
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
