"""The same power cuts and flipped bytes for this library and for torch's own: what is reported saved, and then?

    unshare -m python -m crash.peer_cuts asyncckpt|dcp|dcp-async ext4|xfs FOLDER CUTS FLIPS SEED

prints what it found as JSON. One process saves one step after another, each call waits until its library says that
it is saved; no process group. It has torch imported and no thread but its first, so that it may fork.
"""

from __future__ import annotations

import json
import logging
import random
import shutil
import sys
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from support.checkpoints import flip

import asyncckpt
from crash.kill_sweep import in_child
from crash.loop_disk import LoopDisk, Unavailable
from crash.real_cuts import PATIENCE, SKIP, Child
from crash.rig import Progress

Tell = Callable[[object], None]
State = dict[str, torch.Tensor]


@dataclass
class Figures:
    cuts: int = 0
    saved: int = 0
    """Reported saved, and then cut."""
    lost: int = 0
    """Of these, those that did not load after it."""
    wrong: int = 0
    """Of these, those that loaded with other values."""
    cuts_with_loss: int = 0
    flips: int = 0
    silent: int = 0
    """Checkpoints with a flipped byte that loaded, with that byte, and no error."""


def state_of(step: int) -> State:
    return {f"layer{i}": torch.full((4096 * (i + 1),), float(step * 10 + i)) for i in range(3)}


class Ours:
    def save_all(self, folder: Path, first: int, tell: Tell) -> None:
        with asyncckpt.Checkpointer(folder / "run", writer="thread") as ckpt:
            for step in range(first, 1000):
                ckpt.save(step, {"model": state_of(step)}).result(PATIENCE)
                tell(step)

    def home(self, folder: Path, step: int) -> Path:
        return asyncckpt.open(folder / "run").path(step)

    def load(self, folder: Path, step: int) -> State:
        state: State = asyncckpt.load(folder / "run", step)["model"]
        return state


class Dcp:
    def save_all(self, folder: Path, first: int, tell: Tell) -> None:
        for step in range(first, 1000):
            dcp.save(state_of(step), checkpoint_id=self.home(folder, step), no_dist=True)
            tell(step)

    def home(self, folder: Path, step: int) -> Path:
        return folder / f"step-{step}"

    def load(self, folder: Path, step: int) -> State:
        state = {name: torch.zeros_like(tensor) for name, tensor in state_of(step).items()}
        dcp.load(state, checkpoint_id=self.home(folder, step), no_dist=True)
        return state


class DcpAsync(Dcp):
    def save_all(self, folder: Path, first: int, tell: Tell) -> None:
        for step in range(first, 1000):
            saved = dcp.async_save(state_of(step), checkpoint_id=self.home(folder, step), no_dist=True)
            getattr(saved, "upload_completion", saved).result(PATIENCE)
            tell(step)


PEERS = {"asyncckpt": Ours(), "dcp": Dcp(), "dcp-async": DcpAsync()}


def outcome(peer: Ours | Dcp, folder: Path, step: int) -> str:
    try:
        state = peer.load(folder, step)
    except BaseException:  # what this peer raises is no Exception
        return "lost"
    wanted = state_of(step)
    return "exact" if all(torch.equal(state[name], wanted[name]) for name in wanted) else "wrong"


def cut(peer: Ours | Dcp, disk: LoopDisk, folder: Path, coin: random.Random, figures: Figures) -> None:
    child = Child(lambda tell: peer.save_all(folder, 1, tell))
    child.listen(lambda _: True, PATIENCE)
    for _ in range(coin.randint(0, 3)):
        child.listen(lambda _: True, PATIENCE)
    if coin.random() < 0.5:
        child.listen(lambda _: False, coin.uniform(0, 0.05))
    disk.cut()
    child.kill()
    disk.unmount()
    disk.mount()
    (found,) = in_child(lambda tell: tell([outcome(peer, folder, step) for step in child.told]))[0]
    figures.cuts += 1
    figures.saved += len(found)  # type: ignore[arg-type]
    figures.lost += found.count("lost")  # type: ignore[attr-defined]
    figures.wrong += found.count("wrong")  # type: ignore[attr-defined]
    figures.cuts_with_loss += set(found) != {"exact"}  # type: ignore[call-overload]


def flips(peer: Ours | Dcp, folder: Path, count: int, coin: random.Random) -> list[str]:
    """What loading gives with one byte of a tensor changed, at so many places."""
    child = Child(lambda tell: peer.save_all(folder, 1, tell))
    child.listen(lambda _: True, PATIENCE)
    child.kill()
    data = max(peer.home(folder, 1).rglob("*"), key=lambda path: path.stat().st_size)
    found = []
    for _ in range(count):
        position = coin.randrange(8192, data.stat().st_size - 8192)
        flip(data, position)
        found += in_child(lambda tell: tell(outcome(peer, folder, 1)))[0]
        flip(data, position)
    return found  # type: ignore[return-value]


def main() -> None:
    name, kind, place, cuts, flipped, seed = sys.argv[1:]
    logging.disable(logging.CRITICAL)
    warnings.simplefilter("ignore")
    try:
        disk = LoopDisk(Path(place), kind)
    except Unavailable as reason:
        print(reason)
        sys.exit(SKIP)
    figures, coin, peer = Figures(), random.Random(int(seed)), PEERS[name]
    progress = Progress(f"real power cuts of {name} on {kind}", int(cuts))
    for number in range(int(cuts)):
        folder = disk.base / f"life-{number}"
        folder.mkdir()
        disk.sync()
        cut(peer, disk, folder, coin, figures)
        shutil.rmtree(folder)
        progress.step()
    folder = disk.base / "flips"
    folder.mkdir()
    found = flips(peer, folder, int(flipped), coin)
    figures.flips, figures.silent = len(found), found.count("wrong")
    print(json.dumps(asdict(figures)))


if __name__ == "__main__":
    main()
