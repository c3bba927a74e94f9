"""Ranks to be commanded: a process that has loaded torch once, and forks each of them.

Run as `python rank_child.py SOCKET`: whoever listens there sends one line of JSON for each rank that is to be, and each
rank comes with a connection of its own, says its rank, and answers commands, one line of JSON each.
"""

from __future__ import annotations

import ctypes
import faulthandler
import json
import os
import signal
import socket
import sys
import threading
import time
import warnings
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

import asyncckpt
from asyncckpt import signals
from asyncckpt.testing import FaultyPosix
from asyncckpt.write import client

PATIENCE = 60.0


class Own:
    """State that each rank has of its own."""

    def __init__(self, rank: int) -> None:
        self.rank, self.step = rank, 0

    def state_dict(self) -> dict[str, Any]:
        values = torch.full((7,), float(1000 * self.rank + self.step))
        return {"rank": self.rank, "step": self.step, "values": values, "alike": torch.full((5,), float(self.step))}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        assert torch.equal(state["values"], torch.full((7,), float(1000 * state["rank"] + state["step"])))
        assert torch.equal(state["alike"], torch.full((5,), float(state["step"])))
        self.rank, self.step = state["rank"], state["step"]


class Whim:
    """A cadence that no two ranks share: this rank would save these steps."""

    def __init__(self, steps: list[int]) -> None:
        self._steps = steps

    def due(self, moment: Any) -> bool:
        return moment.step in self._steps


def clock(about: dict[str, Any]) -> Any:
    return Whim(about["whim"]) if "whim" in about else asyncckpt.Every(**about)


def made(options: dict[str, Any]) -> dict[str, Any]:
    """Options as the Checkpointer takes them, of what JSON can say of them."""
    found = dict(options)
    if "cadence" in found:
        found["cadence"] = clock(found["cadence"])
    if "parts" in found:
        found["parts"] = {name: clock(about) for name, about in found["parts"].items()}
    if "preempt" in found:
        found["preempt"] = asyncckpt.Preemption(signals=(signal.SIGTERM,), **found["preempt"])
    if "keep" in found:
        found["keep"] = asyncckpt.Keep(**found["keep"])
    return found


class Rank:
    def __init__(self, order: dict[str, Any]) -> None:
        self.rank, self.world = order["rank"], order["world"]
        if self.world > 1 or order.get("group"):
            store = dist.TCPStore("127.0.0.1", order["port"], is_master=False, timeout=timedelta(seconds=PATIENCE))
            dist.init_process_group(
                "gloo", store=store, rank=self.rank, world_size=self.world, timeout=timedelta(seconds=PATIENCE)
            )
        self.layout = order["layout"]
        self.model = self._laid_out(_model(order.get("seed", 0)))
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.01)
        self.own = Own(self.rank)
        self.state: dict[str, Any] = {"model": self.model, "optimizer": self.optimizer, "own": self.own}
        self.options = order.get("options", {})
        self.root = order["root"]
        self.handles: dict[int, asyncckpt.SaveHandle] = {}
        self.posix = FaultyPosix()
        self.checkpointer: Any = None

    def _laid_out(self, model: torch.nn.Module) -> torch.nn.Module:
        if self.layout == "plain":
            return model
        if self.layout == "ddp":
            return torch.nn.parallel.DistributedDataParallel(model)
        if self.layout == "fsdp":
            mesh = init_device_mesh("cpu", (self.world,))
        else:  # "2d": sharded twice over two dimensions of ranks, or sharded over one and alike over the other
            mesh = init_device_mesh("cpu", (2, self.world // 2), mesh_dim_names=("a", "b"))
            placements = [Shard(0), Shard(1)] if self.layout == "2d" else [Replicate(), Shard(0)]
            for module in model.modules():
                for name, p in list(module.named_parameters(recurse=False)):
                    spread = placements if p.dim() > 1 else [Replicate(), Shard(0)]
                    module.register_parameter(name, torch.nn.Parameter(distribute_tensor(p.data, mesh, spread)))
            return model
        for layer in model:
            fully_shard(layer, mesh=mesh)
        return fully_shard(model, mesh=mesh)

    def do(self, command: dict[str, Any]) -> Any:
        return getattr(self, command.pop("do"))(**command)

    def elsewhere(self, root: str) -> None:
        self.root = root

    def open(self, **options: Any) -> None:
        fault = self.options.pop("fault", None)
        if fault is not None:
            plan(self.posix, **fault)
        writer = self.options.pop("command", None)
        if writer is not None:
            client.COMMAND = writer
        self.checkpointer = asyncckpt.Checkpointer(self.root, **made(self.options | options), _posix=self.posix)

    def dcp(self, deed: str, **options: Any) -> Any:
        """What `rank_dcp` does with torch.distributed.checkpoint."""
        from support import rank_dcp

        return getattr(rank_dcp, deed)(self, **options)

    def fault(self, **fault: Any) -> None:
        """Plan a fault; calls are counted from now on. (Its writer must be a thread.)"""
        self.posix.heal()
        plan(self.posix, **fault)

    def heal(self) -> None:
        self.posix.heal()

    def train(self) -> None:
        self.optimizer.zero_grad()
        if self.layout in ("2d", "hybrid"):
            for p in self.model.parameters():
                p.grad = torch.ones_like(p)
        else:
            self.model(torch.ones(3, 13)).square().sum().backward()
        self.optimizer.step()

    def set(self, value: float) -> None:
        """Give every parameter this value."""
        with torch.no_grad():
            for p in self.model.parameters():
                p.fill_(value)

    def save(self, step: int, **options: Any) -> None:
        self.own.step = step
        self.handles[step] = self.checkpointer.save(step, self.state, **options)

    def maybe_save(self, step: int, **options: Any) -> bool:
        self.own.step = step
        handle = self.checkpointer.maybe_save(step, self.state, **options)
        if handle is not None:
            self.handles[step] = handle
        return handle is not None

    def loop(self, steps: int, start: int = 1, signal_at: list[int | None] | None = None) -> list[Any]:
        """Train until preempted, or for all `steps`; rank K gets a signal before the step `signal_at[K]`.

        Returns the last step, whether preempted, and which steps were saved.
        """
        saved = []
        for step in range(start, start + steps):
            if signal_at and signal_at[self.rank] == step:
                os.kill(os.getpid(), signal.SIGTERM)
            self.train()
            if self.maybe_save(step):
                saved.append(step)
            if self.checkpointer.preempted:
                break
        return [step, self.checkpointer.preempted, saved]

    def loop_alone(self, start: int) -> list[Any]:
        """`loop`, for ever, without collectives."""
        step, saved = start, []
        while not self.checkpointer.preempted:
            if self.maybe_save(step):
                saved.append(step)
            step += 1
        return [step, self.checkpointer.preempted, saved]

    def notice(self) -> None:
        os.kill(os.getpid(), signal.SIGTERM)

    def sit(self, step: int) -> None:
        """Save, and stay in a C call for ever while the snapshot is copied, which goes on when a notice has come."""
        signals._ECHO = 0.0
        may_copy, locked = threading.Event(), ctypes.create_string_buffer(64)
        self.checkpointer._snapshotter.pool.submit(may_copy.wait)
        self.save(step)

        def witness() -> None:
            while not self.checkpointer._company._notices.first[0]:
                time.sleep(0.002)
            may_copy.set()

        threading.Thread(target=witness, daemon=True).start()
        libc = ctypes.CDLL(None)
        libc.pthread_mutex_lock(locked)
        libc.pthread_mutex_lock(locked)  # never returns

    def outcome(self, step: int) -> list[str]:
        """How a save has ended: its outcome, and what its error says."""
        handle = self.handles[step]
        try:
            handle.result(PATIENCE)
        except asyncckpt.CheckpointError as error:
            return [handle.outcome, f"{type(error).__name__}: {error}"]
        return [handle.outcome, ""]

    def ended(self, step: int) -> bool:
        """Wait for the end of a save, and do not ask how it was."""
        over = threading.Event()
        self.handles[step].add_done_callback(lambda handle: over.set())
        return over.wait(PATIENCE)

    def staged(self, step: int) -> bool:
        return self.handles[step].wait_staged(PATIENCE)

    def restore(self, **options: Any) -> list[Any]:
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            step = self.checkpointer.restore(self.state, **options)
        return [step, [str(warning.message) for warning in told]]

    def restore_alone(self) -> int | None:
        return asyncckpt.restore(self.root, self.state)

    def content(self) -> Any:
        """All there is, whole, as numbers."""
        numbers = [_whole(p).double().flatten().tolist() for p in self.model.parameters()]
        state = [
            _whole(value).double().flatten().tolist()
            for entry in self.optimizer.state.values()
            for value in entry.values()
        ]
        return [numbers, state, self.own.rank, self.own.step]

    def writer(self) -> int:
        return int(self.checkpointer.stats().writer_pid)

    def written(self) -> int:
        return int(self.checkpointer.stats().bytes_committed)

    def flush(self) -> None:
        self.checkpointer.wait_until_flushed()

    def steps(self) -> list[int]:
        return list(self.checkpointer.steps())

    def delete(self, step: int) -> None:
        self.checkpointer.delete(step)

    def close(self) -> None:
        self.checkpointer.close()


def _model(seed: int) -> torch.nn.Module:
    torch.manual_seed(seed)
    return torch.nn.Sequential(torch.nn.Linear(13, 6), torch.nn.Linear(6, 10))


def _whole(tensor: torch.Tensor) -> torch.Tensor:
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach()


def plan(posix: FaultyPosix, deed: str, at: int, verb: str = "any", error: int = 5) -> None:
    """Plan the fault `deed` at a call of a verb: "kill" or "stop" this process, or "fail" with an errno."""
    if deed == "kill":
        posix.kill(at, "before", verb)
    elif deed == "fail":
        posix.fail(verb, at, error)
    elif deed == "stop":
        posix.hold(verb, at, _Stopper())


class _Stopper:
    def stand(self) -> None:
        os.kill(os.getpid(), signal.SIGSTOP)


def live(order: dict[str, Any], address: str) -> None:
    link = socket.socket(socket.AF_UNIX)
    link.connect(address)
    commands, answers = link.makefile("r"), link.makefile("w")

    def say(what: Any) -> None:
        print(json.dumps(what), file=answers, flush=True)

    say({"rank": order["rank"], "pid": os.getpid()})
    rank = Rank(order)
    say({"value": "there"})
    for line in commands:
        command = json.loads(line)
        try:
            answer = {"value": rank.do(command)}
        except Exception as error:
            answer = {"error": f"{type(error).__name__}: {error}"}
        say(answer)


def main(address: str) -> None:
    faulthandler.register(signal.SIGUSR1)
    torch.set_num_threads(1)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    for line in sys.stdin:
        if os.fork() == 0:
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            os.setsid()
            live(json.loads(line), address)
            os._exit(0)


if __name__ == "__main__":
    main(sys.argv[1])
