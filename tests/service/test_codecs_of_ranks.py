"""Coded checkpoints of several ranks: each rank's files hang on its own, of what all have committed."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from support import chunks
from support.checkpoints import flip, image_of
from support.numbers import weights

from asyncckpt.catalog.catalog import Catalog
from asyncckpt.errors import CorruptCheckpointError, StorageError
from asyncckpt.format import names
from asyncckpt.format.manifest import FileRecord, digest, encode
from asyncckpt.policy.codec import Codec
from asyncckpt.policy.keep import Keep
from asyncckpt.read.reader import CheckpointReader
from asyncckpt.storage.local import LocalStorage
from asyncckpt.testing import RanksDriver
from asyncckpt.testing.service import Value
from asyncckpt.write import ranks
from asyncckpt.write.bases import Base

DELTA = Codec("delta", max_chain=3)
CHUNK = 1 << 16


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    chunks.make_small(monkeypatch, CHUNK)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "run"


def state(step: int) -> Value:
    """A part of whole chunks, half of which are the same at every step, while the others change a little."""
    arrays = {
        f"w{i}": weights("F32", CHUNK // 4, seed=i).view(np.float32) * (1 + (step / 4096 if i < 3 else 0))
        for i in range(6)
    }
    return {"model": (image_of(arrays)[1], step), "note": (b"", {"step": step})}


def reader(root: Path, step: int) -> CheckpointReader:
    return CheckpointReader(Catalog(LocalStorage(str(root))), step)


def check(root: Path, step: int, value: Value) -> None:
    """The checkpoint verifies, its manifest is true, and every rank's share is `value` byte for byte."""
    with reader(root, step) as checkpoint:
        checkpoint.verify()
        for share in checkpoint.shares("model"):
            with checkpoint.sparse("model", share) as image:
                image.fetch((0, share.size))
                assert bytes(image.buffer) == value["model"][0]
        folder = next((root / names.step_name(step)).glob("*/"))
        assert {p.name: p.stat().st_size for p in folder.iterdir()} == {
            name: file.size for name, file in checkpoint.manifest.files.items()
        }


def chains(root: Path, step: int) -> list[int]:
    """Of each rank, the most pieces of a chunk."""
    return [max(map(len, share.coded)) for share in reader(root, step).shares("model")]


def written_by(root: Path, step: int) -> list[set[str]]:
    """Of each rank, the attempts that first wrote the files of its share; all of them are its own."""
    found = []
    for rank, share in enumerate(reader(root, step).shares("model")):
        assert all(names.coded_of(file.name) == ("model", rank) for file in share.files)
        found.append({file.name.split(".")[2] for file in share.files})
    return found


def attempt_of(root: Path, step: int) -> str:
    return reader(root, step).manifest.attempt


def saved(driver: RanksDriver, *steps: int) -> list[int]:
    """Bytes that are new in each."""
    return [driver.save(step, state(step)).written for step in steps]


def test_each_ranks_chain_is_bounded_and_no_checkpoint_needs_another(root: Path) -> None:
    with RanksDriver(str(root), codec=DELTA) as driver:
        written = saved(driver, *range(1, 7))
        assert [chains(root, step) for step in range(1, 7)] == [[n, n] for n in (1, 2, 3, 4, 1, 2)]
    assert max(written[2:4]) < 0.6 * written[0]  # what has not changed is written twice, and then no more
    for step in range(1, 7):
        check(root, step, state(step))
    stills = [{p.name: p.stat().st_ino for p in root.glob(f"step-{step:08d}/*/*.still")} for step in (2, 3, 4)]
    assert len(stills[0]) == 2 and stills[0] == stills[1] == stills[2], "one of each rank, the same inodes"
    for gone in (3, 1, 6, 2):
        shutil.rmtree(root / names.step_name(gone))
        for path in root.glob("step-*"):
            check(root, int(path.name[5:]), state(int(path.name[5:])))
    with RanksDriver(str(root), codec=DELTA, world=3) as driver:  # another world: all is written anew
        saved(driver, 7)
    assert written_by(root, 7) == [{attempt_of(root, 7)}] * 3
    check(root, 7, state(7))


def hang_on_what_is_committed(root: Path) -> None:
    with RanksDriver(str(root), codec=DELTA) as driver:
        saved(driver, 1)
        given_up = driver.give_up(2, state(2))  # the other rank had staged it, and written all
        saved(driver, 3)
    check(root, 3, state(3))
    for attempts in written_by(root, 3):
        assert given_up not in attempts
        assert attempts == {attempt_of(root, 1), attempt_of(root, 3)}, "it hangs on the last that was committed"


def test_after_a_save_that_came_to_nothing_all_hang_on_the_last_committed_one(root: Path) -> None:
    hang_on_what_is_committed(root)


def test_a_planted_base_that_is_only_staged_is_seen(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prepare = ranks.Share.prepare

    async def take_as_base(self: ranks.Share) -> Any:
        prepared = await prepare(self)
        bases: Any = self._bases
        about = self._storage, self.folder
        bases.update({part: Base(*about, w.record, w.files) for part, w in prepared.parts.items()})
        return prepared

    monkeypatch.setattr(ranks.Share, "prepare", take_as_base)
    with pytest.raises(AssertionError):
        hang_on_what_is_committed(root)


def test_bases_that_are_gone_damaged_or_can_not_be_shared(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with RanksDriver(str(root), codec=DELTA) as driver:
        saved(driver, 1, 2)
        shutil.rmtree(root / names.step_name(2))
        saved(driver, 3)
        for path in root.glob(f"step-00000003/*/*rank-00001*{names.CODED}"):
            for position in range(0, path.stat().st_size, 500):
                flip(path, position)
        saved(driver, 4, 5)

        def refused(self: LocalStorage, source: str, key: str) -> None:
            raise StorageError("no more links", errno=31)

        monkeypatch.setattr(LocalStorage, "share", refused)
        saved(driver, 6, 7)
    for step in (1, 4, 5, 6, 7):
        check(root, step, state(step))
    with pytest.raises(CorruptCheckpointError):
        check(root, 3, state(3))


def test_retention_leaves_what_is_shared_and_verify_follows_chains(root: Path) -> None:
    with RanksDriver(str(root), codec=DELTA, keep=Keep(last=2)) as driver:
        saved(driver, *range(1, 5))
    assert sorted(path.name for path in root.glob("step-*")) == ["step-00000003", "step-00000004"]
    check(root, 3, state(3))
    for share in reader(root, 4).shares("model"):
        for pieces in share.coded[1:4]:
            for piece in pieces:
                path = next(root.glob(f"step-00000004/*/{share.files[piece.file].name}"))
                flip(path, piece.offset + piece.stored // 2)
                with pytest.raises(CorruptCheckpointError):
                    check(root, 4, state(4))
                flip(path, piece.offset + piece.stored // 2)
    check(root, 4, state(4))


@pytest.mark.parametrize("codec", ["zstd", "auto"])
def test_other_codecs(root: Path, codec: Any) -> None:
    with RanksDriver(str(root), codec=Codec(codec)) as driver:
        saved(driver, 1, 2, 3)
    for step in (1, 2, 3):
        check(root, step, state(step))


def forged(root: Path, step: int, change: Callable[[dict[str, Any]], None]) -> None:
    """Change what rank 1's record says of the part, and let the manifest vouch for that."""
    with reader(root, step) as checkpoint:
        manifest, folder = checkpoint.manifest, next((root / names.step_name(step)).glob("*/"))
    name = names.rank_record(1)
    record = msgspec.json.decode((folder / name).read_bytes())
    del record["sha256"]
    change(record["parts"]["model"])
    body = msgspec.json.encode(record)[:-1]
    data = body + b',"sha256":"' + hashlib.sha256(body).hexdigest().encode() + b'"}\n'
    (folder / name).write_bytes(data)
    files = {**manifest.files, name: FileRecord(len(data), digest(data))}
    (folder.parent / names.MANIFEST).write_bytes(encode(msgspec.structs.replace(manifest, files=files)))


def of_another_rank(about: dict[str, Any]) -> None:
    about["files"][0][0] = about["files"][0][0].replace("rank-00001", "rank-00000")


FORGERIES: dict[str, Callable[[dict[str, Any]], None]] = {
    "a file of another rank": of_another_rank,
    "a file of no rank": lambda about: about["files"][0].__setitem__(0, f"model.{'0' * 12}.coded"),
    "a file outside": lambda about: about["files"][0].__setitem__(0, "../x.rank-00001.0123456789ab.coded"),
    "a file that is not there": lambda about: about["coded"][0][0].__setitem__(3, 9),
    "beyond the end": lambda about: about["coded"][0][0].__setitem__(4, 1 << 40),
    "a terabyte": lambda about: about.update(size=1 << 40),
    "a chunk too few": lambda about: about["coded"].pop(),
    "an image as well": lambda about: about.update(file="model.rank-00001.safetensors"),
    "a shard of more than there is": lambda about: about["shards"].update(
        w=["F32", [1 << 30, 1 << 30], [0, 0], [1 << 30, 1 << 30]]
    ),
}


def test_records_that_contradict_themselves_are_refused(root: Path) -> None:
    with RanksDriver(str(root), codec=DELTA) as driver:
        saved(driver, 1, 2)
    shutil.copytree(root, root.with_name("as it was"))
    for what, change in FORGERIES.items():
        shutil.rmtree(root)
        shutil.copytree(root.with_name("as it was"), root)
        forged(root, 2, change)
        with pytest.raises(CorruptCheckpointError):
            check(root, 2, state(2))
            pytest.fail(f"{what} was taken")
    shutil.rmtree(root)
    shutil.copytree(root.with_name("as it was"), root)
    forged(root, 2, lambda about: None)
    check(root, 2, state(2))
