"""What one layout has saved every other restores: worlds of other sizes, sharded, alike, or one plain process."""

import pytest
import safetensors.torch
import torch
from support.ranks import RankFailed

import asyncckpt
from asyncckpt.catalog.catalog import Catalog
from asyncckpt.read.export import export
from asyncckpt.read.reader import CheckpointReader
from asyncckpt.storage.local import LocalStorage


def train_and_save(world, step):
    world.well("train")
    assert world.well("save", step=step) == [None] * len(world.members)
    assert world.well("outcome", step=step) == [["committed", ""]] * len(world.members)


def numbers(world):
    """Parameters and optimizer state, whole; they must be the same on all ranks."""
    contents = [content[:2] for content in world.well("content")]
    assert all(content == contents[0] for content in contents)
    return contents[0]


CHAINS = [
    [("fsdp", 4), ("fsdp", 2), ("plain", 1), ("fsdp", 3)],
    [("2d", 4), ("hybrid", 4), ("ddp", 2), ("2d", 2)],
]


@pytest.mark.parametrize("chain", CHAINS, ids=lambda chain: "-".join(f"{layout}{size}" for layout, size in chain))
def test_a_run_goes_on_in_one_layout_after_another(tmp_path, nursery, chain):
    root = tmp_path / "run"
    known = None
    for step, (layout, size) in enumerate(chain):
        with nursery.world(root, size, layout, seed=step) as world:
            world.well("open")
            assert [answer[0] for answer in world.well("restore")] == [step or None] * size
            if known is not None:
                assert numbers(world) == known
            train_and_save(world, step + 1)
            known = numbers(world)
            world.well("close")
    assert asyncckpt.open(root).verify() == len(chain)
    loaded = asyncckpt.load(root)
    weights = [w.double().flatten().tolist() for w in loaded["model"].values()]
    assert weights == known[0]


@pytest.mark.parametrize(("layout", "size"), [("ddp", 3), ("fsdp", 4), ("hybrid", 4)])
def test_what_is_alike_is_stored_once(tmp_path, nursery, layout, size):
    root = tmp_path / "run"
    with nursery.world(root, size, layout) as world:
        world.well("open")
        train_and_save(world, 1)
        world.well("close")
    state = asyncckpt.load(root)
    one_copy = sum(t.nbytes for t in state["model"].values())
    one_copy += sum(t.nbytes for entry in state["optimizer"]["state"].values() for t in entry.values())
    with CheckpointReader(Catalog(LocalStorage(str(root))), 1) as reader:
        export(reader, "model", tmp_path / "model.safetensors")
    whole = safetensors.torch.load_file(tmp_path / "model.safetensors")
    assert whole.keys() == state["model"].keys()
    assert all(torch.equal(whole[name], tensor) for name, tensor in state["model"].items())
    headers = stored = 0
    for path in asyncckpt.open(root).path(1).glob("*.safetensors"):
        if path.name.startswith(("model", "optimizer")):
            data = path.read_bytes()
            header = 8 + int.from_bytes(data[:8], "little")
            headers, stored = headers + header, stored + len(data)
    assert stored - headers == one_copy
    own = list(asyncckpt.open(root).path(1).glob("own.*.safetensors"))
    assert len(own) == size  # what each rank has of its own is there for each


def test_a_value_of_each_rank_is_for_the_rank_of_its_number(tmp_path, nursery):
    root = tmp_path / "run"
    with nursery.world(root, 3) as world:
        world.well("open")
        train_and_save(world, 1)
        world.well("close")
    for size, expected in ((2, [0, 1]), (4, [0, 1, 2, 3])):
        with nursery.world(root, size) as world:
            world.well("open")
            answers = world.well("restore")
            contents = world.well("content")
            assert [content[2] for content in contents] == expected
            assert [content[3] for content in contents] == [1] * min(size, 3) + [0] * max(size - 3, 0)
            assert all("own differed between them" in warned[0] for _, warned in answers)


def test_another_model_on_each_rank_is_refused_and_nothing_is_written(tmp_path, nursery):
    with nursery.world(tmp_path / "run", 2, "plain") as world:
        world.well("open")
        for rank, member in enumerate(world.members):
            member.ask("set", value=rank)
        assert [member.answer() for member in world.members] == [None, None]
        answers = world.all("save", step=1)
        assert all(
            isinstance(a, RankFailed) and "'model' is not the same on rank 0 and rank 1" in str(a) for a in answers
        )
        world.well("set", value=3)
        assert world.well("save", step=2) == [None, None]
        assert world.well("outcome", step=2) == [["committed", ""]] * 2
        assert world.well("steps") == [[2], [2]]


def test_a_damaged_newest_step_is_passed_over_by_all_though_only_one_needs_the_bytes(tmp_path, nursery):
    root = tmp_path / "run"
    with nursery.world(root, 2) as world:
        world.well("open")
        for step in (1, 2):
            train_and_save(world, step)
        world.well("close")
    file = asyncckpt.open(root).path(2) / "own.rank-00001.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    with nursery.world(root, 2) as world:
        world.well("open")
        answers = world.well("restore")
        assert [step for step, _ in answers] == [1, 1]
        assert any("passed over step 2" in text for text in answers[0][1])
        assert [content[2:] for content in world.well("content")] == [[0, 1], [1, 1]]
        train_and_save(world, 2)
