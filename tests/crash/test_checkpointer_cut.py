"""The same power cuts, under the library's face: real tensors in, real tensors out."""

import random
from dataclasses import replace

import pytest
import torch

import asyncckpt
from asyncckpt.catalog.catalog import Catalog
from asyncckpt.read.reader import CheckpointReader
from asyncckpt.storage.local import LocalStorage
from asyncckpt.testing import Note, Promises, RecordingPosix, power_cuts
from asyncckpt.testing.crash import materialised
from asyncckpt.testing.promises import Rewinding, Rewound, Saved, Saving, content_of
from crash.rig import RUN, cut_everywhere, memory_folder, scaled

PATIENCE = 60.0
KEEP = asyncckpt.Keep(last=2)


def state_of(seed):
    """A part that an optimizer owns, one that none does, plain values."""
    torch.manual_seed(seed)
    model = torch.nn.Linear(40, 30)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.randn(2, 40)).sum().backward()
    optimizer.step()
    return {"model": model, "optimizer": optimizer, "loop": {"seed": seed, "ema": torch.randn(7)}}


def tensors_of(parts):
    model = parts["model"]
    return [*(model if isinstance(model, dict) else model.state_dict()).values(), parts["loop"]["ema"]]


class Diary:
    """Saves, with a note before and after each; what a checkpoint holds is read once it is there."""

    def __init__(self, base):
        self.posix = RecordingPosix()
        self.root = base / RUN
        self.words = {}

    def save(self, ckpt, step, seed, **options):
        state = state_of(seed)
        self.posix.note(Saving(step, seed))
        handle = ckpt.save(step, state, **options)
        handle.add_done_callback(lambda _: self.posix.note(Saved(step, seed)))
        assert handle.result(PATIENCE) == "committed"
        ckpt.wait_until_flushed(PATIENCE)
        loaded = tensors_of(asyncckpt.load(self.root, step))
        assert all(map(torch.equal, loaded, tensors_of(state)))
        self.words[seed] = content_of(CheckpointReader(Catalog(LocalStorage(str(self.root))), step))

    def log(self):
        """The recording, with the contents where the seeds stood."""

        def filled(entry):
            if isinstance(entry, Note) and isinstance(entry.what, Saving | Saved):
                return Note(replace(entry.what, content=self.words[entry.what.content]))
            return entry

        return [filled(entry) for entry in self.posix.log]


@pytest.fixture
def diary(tmp_path):
    diary = Diary(tmp_path)
    with asyncckpt.Checkpointer(diary.root, keep=KEEP, writer="thread", _posix=diary.posix) as ckpt:
        for step in (10, 20, 30):
            diary.save(ckpt, step, step)
        diary.save(ckpt, 30, 31, overwrite=True)
        diary.posix.note(Rewinding(20))
        assert ckpt.restore(state_of(0), 20, rewind=True) == 20
        diary.posix.note(Rewound(20))
        diary.save(ckpt, 30, 32)
    return diary


@pytest.mark.timeout(3600)
def test_every_cut(tmp_path, diary, figure):
    report = cut_everywhere(diary.log(), tmp_path, {RUN: Promises(KEEP)}, samples=scaled(8), seed=2)
    figure("model states", report.states)
    report.check()


def test_a_training_resumes_from_what_is_left(tmp_path, diary):
    """Restore, go on, save: on a sample of the disks."""
    log = diary.log()
    points = random.Random(3).sample(range(len(log) // 3, len(log)), 8)
    with memory_folder() as folder:
        cuts = power_cuts(log, tmp_path, samples=2, seed=3, points=points)
        for number, cut in enumerate(cuts):
            with materialised(folder / str(number), cut.disk) as base:
                state = state_of(1)
                with asyncckpt.Checkpointer(base / RUN, keep=KEEP, writer="thread") as ckpt:
                    start = ckpt.restore(state)
                    assert start == ckpt.latest() or start is None
                    if start is not None:
                        stored = tensors_of(asyncckpt.load(base / RUN, start))
                        assert all(map(torch.equal, tensors_of(state), stored))
                    assert ckpt.save((start or 0) + 1, state).result(PATIENCE) == "committed"
                    assert ckpt.verify() == (start or 0) + 1
