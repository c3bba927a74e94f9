"""Train a small model sharded by FSDP2 over several processes, be killed, and go on with another number of them.

    torchrun --nproc-per-node 4 examples/fsdp.py runs/fsdp --steps 40 --kill-at 25
    torchrun --nproc-per-node 2 examples/fsdp.py runs/fsdp --steps 40

The first command ends by SIGKILL of every rank after step 25, in the middle of a save perhaps; the second restores the
newest checkpoint of four ranks into the shards of two and goes on. Without a GPU it runs on gloo and CPUs.
"""

import argparse
import os
import signal

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import asyncckpt

WIDTH, BATCH = 256, 32


def sharded_model(device: str) -> torch.nn.Module:
    torch.manual_seed(0)
    layers = [torch.nn.Sequential(torch.nn.Linear(WIDTH, WIDTH), torch.nn.GELU()) for _ in range(6)]
    model = torch.nn.Sequential(*layers, torch.nn.Linear(WIDTH, 1)).to(device)
    mesh = init_device_mesh(device, (dist.get_world_size(),))
    for layer in model:
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def batch(step: int, device: str) -> tuple[torch.Tensor, torch.Tensor]:
    """This rank's share of the batch of `step`: the same whole batch for any number of ranks."""
    numbers = torch.Generator().manual_seed(step)
    inputs = torch.randn(BATCH, WIDTH, generator=numbers)
    share = slice(dist.get_rank(), None, dist.get_world_size())
    return inputs[share].to(device), inputs.sum(1, keepdim=True).sin()[share].to(device)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--kill-at", type=int, help="SIGKILL every rank at the end of this step")
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    dist.init_process_group("nccl" if device == "cuda" else "gloo")
    torch.set_num_threads(1)

    model = sharded_model(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    state = {"model": model, "optimizer": optimizer, "rng": asyncckpt.RngState()}
    with asyncckpt.Checkpointer(
        options.directory, cadence=asyncckpt.Every(steps=5), preempt=asyncckpt.Preemption(), rank_timeout=60
    ) as ckpt:
        start = ckpt.restore(state) or 0
        if dist.get_rank() == 0:
            print(f"{dist.get_world_size()} ranks, from step {start}", flush=True)
        for step in range(start + 1, options.steps + 1):
            inputs, targets = batch(step, device)
            loss = (model(inputs) - targets).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            ckpt.maybe_save(step, state)
            dist.all_reduce(loss.detach_(), dist.ReduceOp.SUM)
            if dist.get_rank() == 0 and step % 5 == 0:
                print(f"step {step}: loss {loss.item() / dist.get_world_size():.6f}", flush=True)
            if step == options.kill_at:
                os.kill(os.getpid(), signal.SIGKILL)
            if ckpt.preempted:  # a SIGTERM to torchrun, or to any rank: all have saved this step
                if dist.get_rank() == 0:
                    print(f"told to leave at step {step}", flush=True)
                break
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
