"""What ranks do with torch.distributed.checkpoint, on the drop-ins."""

from __future__ import annotations

import warnings
from typing import Any

import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.checkpoint.state_dict_saver import AsyncCheckpointerType

from asyncckpt.integrations.dcp import Reader, Stager, Writer


def _state(rank: Any) -> dict[str, Any]:
    model, optimizer = get_state_dict(rank.model, rank.optimizer)
    return {"model": model, "optimizer": optimizer, "progress": {"step": 7, "words": ("a", b"b", None)}}


def _told(deed: Any) -> str:
    """What went wrong on which ranks, in words; empty where all went well."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is")
        try:
            deed()
        except CheckpointException as error:
            return " ".join(f"rank {n}: {type(e).__name__}: {e};" for n, (e, _) in sorted(error.failures.items()))
        except RuntimeError as error:
            return f"RuntimeError: {error}"
    return ""


def save(rank: Any, root: str, asynchronous: str = "", **options: Any) -> str:
    """`asynchronous`: on a "thread", or in a "process"."""
    process = asynchronous == "process"
    writer = Writer(root, **options, _posix=None if process else rank.posix)
    if asynchronous:
        kind = AsyncCheckpointerType.PROCESS if process else AsyncCheckpointerType.THREAD
        how = {"storage_writer": writer, "async_stager": Stager(), "async_checkpointer_type": kind}
        return _told(lambda: dcp.async_save(_state(rank), **how).result(60))
    return _told(lambda: dcp.save(_state(rank), storage_writer=writer))


def refuse(rank: Any, root: str, on: int) -> str:
    """Save a state of which one rank has something that can't be stored."""
    state = {"values": {f"of_{rank.rank}": print if rank.rank == on else rank.rank}}
    return _told(lambda: dcp.save(state, storage_writer=Writer(root)))


def load(rank: Any, root: str, **options: Any) -> Any:
    state = _state(rank)
    state["progress"] = {"step": 0, "words": 0}
    told = _told(lambda: dcp.load(state, storage_reader=Reader(root, **options)))
    if told:
        return told
    set_state_dict(rank.model, rank.optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
    assert state["progress"] == {"step": 7, "words": ("a", b"b", None)}
    return rank.content()[:2]


def load_model(rank: Any, root: str) -> Any:
    """Load only the model, out of the part of that name."""
    state = rank.model.state_dict()
    told = _told(lambda: dcp.load(state, storage_reader=Reader(root, part="model")))
    if told:
        return told
    rank.model.load_state_dict(state)
    return rank.content()[0]
