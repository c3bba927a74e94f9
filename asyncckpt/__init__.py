"""asyncckpt: asynchronous, durable, verified checkpoints for PyTorch training.

Names are loaded when they are first used: the writer process imports this package, and must not import torch.
"""

from __future__ import annotations

import importlib
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from asyncckpt.checkpointer import Checkpointer as Checkpointer
    from asyncckpt.errors import CheckpointBusyError as CheckpointBusyError
    from asyncckpt.errors import CheckpointError as CheckpointError
    from asyncckpt.errors import CheckpointExistsError as CheckpointExistsError
    from asyncckpt.errors import CheckpointNotFoundError as CheckpointNotFoundError
    from asyncckpt.errors import ConflictError as ConflictError
    from asyncckpt.errors import CorruptCheckpointError as CorruptCheckpointError
    from asyncckpt.errors import NotSupportedError as NotSupportedError
    from asyncckpt.errors import QueueFullError as QueueFullError
    from asyncckpt.errors import RankError as RankError
    from asyncckpt.errors import StateMismatchError as StateMismatchError
    from asyncckpt.errors import StorageError as StorageError
    from asyncckpt.errors import TornSnapshotError as TornSnapshotError
    from asyncckpt.errors import UnsupportedStateError as UnsupportedStateError
    from asyncckpt.handle import SaveHandle as SaveHandle
    from asyncckpt.handle import Timeline as Timeline
    from asyncckpt.policy.auto import Auto as Auto
    from asyncckpt.policy.cadence import Cadence as Cadence
    from asyncckpt.policy.cadence import Every as Every
    from asyncckpt.policy.cadence import Moment as Moment
    from asyncckpt.policy.keep import Keep as Keep
    from asyncckpt.policy.records import Record as Record
    from asyncckpt.preemption import Preemption as Preemption
    from asyncckpt.run import Run as Run
    from asyncckpt.run import load as load
    from asyncckpt.run import open as open
    from asyncckpt.run import restore as restore
    from asyncckpt.snapshot.rng import RngState as RngState
    from asyncckpt.stats import Stats as Stats

__version__ = "0.1.0"

if sys.byteorder != "little":
    raise ImportError(
        "asyncckpt stores tensors as they lie in memory, and that must be little-endian: "
        "it can't run on a machine of the other byte order"
    )

_HOME = {
    "Checkpointer": "checkpointer",
    "SaveHandle": "handle",
    "Timeline": "handle",
    "Stats": "stats",
    "Auto": "policy.auto",
    "Cadence": "policy.cadence",
    "Every": "policy.cadence",
    "Moment": "policy.cadence",
    "Keep": "policy.keep",
    "Record": "policy.records",
    "Preemption": "preemption",
    "RngState": "snapshot.rng",
    "Run": "run",
    "load": "run",
    "open": "run",
    "restore": "run",
    "CheckpointBusyError": "errors",
    "CheckpointError": "errors",
    "CheckpointExistsError": "errors",
    "CheckpointNotFoundError": "errors",
    "ConflictError": "errors",
    "CorruptCheckpointError": "errors",
    "NotSupportedError": "errors",
    "QueueFullError": "errors",
    "RankError": "errors",
    "StateMismatchError": "errors",
    "StorageError": "errors",
    "TornSnapshotError": "errors",
    "UnsupportedStateError": "errors",
}
__all__ = list(_HOME)


def __getattr__(name: str) -> Any:
    home = _HOME.get(name)
    if home is None:
        raise AttributeError(f"module 'asyncckpt' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"asyncckpt.{home}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME})
