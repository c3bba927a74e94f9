"""For torch.distributed.checkpoint: `dcp.save`, `dcp.async_save` and `dcp.load` on this format.

    dcp.save(state, storage_writer=Writer("runs/gpt"))
    dcp.async_save(state, storage_writer=Writer("runs/gpt"), async_stager=stager)
    dcp.load(state, storage_reader=Reader("runs/gpt"))

What they write is an ordinary checkpoint, durable, digested and without pickle. What a Checkpointer saved they read.

keys     how the names that DCP gives to values stand to parts and paths
shares   what each rank has of a part, as DCP's plans say it
writing  Writer
reading  Reader
staging  Stager
"""

from asyncckpt.integrations.dcp.reading import Reader as Reader
from asyncckpt.integrations.dcp.staging import Stager as Stager
from asyncckpt.integrations.dcp.writing import Writer as Writer

__all__ = ["Reader", "Stager", "Writer"]
