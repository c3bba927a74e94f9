"""One file for each library. `make` finds a peer by its name; what it needs is imported only then."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from benchmarks.model import Training
    from benchmarks.peers.base import Peer

_HOME = {
    "none": ("plain", "Nothing"),
    "torch.save": ("plain", "TorchSave"),
    "deepcopy+thread": ("plain", "DeepCopyThread"),
    "dcp.save": ("dcp", "Save"),
    "dcp.async thread": ("dcp", "AsyncThread"),
    "dcp.async thread+DefaultStager": ("dcp", "AsyncThreadStager"),
    "dcp.async process": ("dcp", "AsyncProcess"),
    "dcp.async process+DefaultStager": ("dcp", "AsyncProcessStager"),
    "torchsnapshot": ("snapshot", "AsyncTake"),
    "torch_checkpointing": ("manager", "Manager"),
    "lightning": ("async_io", "AsyncIO"),
    "orbax": ("ocp", "Orbax"),
    "asyncckpt overlap=True": ("ours", "Overlapped"),
    "asyncckpt overlap=False": ("ours", "Eager"),
    "asyncckpt": ("ours", "Automatic"),
}
NAMES = list(_HOME)


def make(name: str, directory: Path, training: Training) -> Peer:
    module, cls = _HOME[name]
    peer: Peer = getattr(importlib.import_module(f"benchmarks.peers.{module}"), cls)(directory, training)
    return peer
