"""What the rounds of a save, and whether to save, exchange."""

from __future__ import annotations

import msgspec

from asyncckpt.write.messages import Fault


class Item(msgspec.Struct, frozen=True, array_like=True):
    """A tensor, or a shard, that a rank has: in `part`, of the entry `name`, the box of `size` at `offset`.

    `lowest` says that of the ranks that have it, it is the lowest one's that counts.
    """

    part: str
    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: tuple[int, ...]
    size: tuple[int, ...]
    lowest: bool


class Loose(msgspec.Struct, frozen=True, array_like=True):
    """A tensor of which only its bytes say whether all ranks have the same one."""

    digest: str
    nbytes: int


class Offer(msgspec.Struct, frozen=True):
    """What a rank brings to a save. Empty but for the fault where it can't.

    `plan` is the digest of `items`, which are left out where rank 0 knows them; `version` names the assignment of items
    that this rank knows. `trees` are digests of the leaf trees,
    `samples` of some items of those tensors that all ranks must have alike; both by part.
    """

    room: bool = True
    fault: Fault | None = None
    failures: dict[str, Fault] = {}
    plan: str = ""
    version: str = ""
    items: list[Item] | None = None
    parts: list[str] = []
    omitted: list[str] = []
    overwrite: bool = False
    trees: dict[str, str] = {}
    samples: dict[str, str] = {}
    loose: dict[str, dict[str, Loose]] = {}


class Verdict(msgspec.Struct, frozen=True):
    """What is done. Exactly one of: `attempt` (go), `skip`, `failures` (of earlier saves, raised now), `faults`.

    `owned` are, by rank, the numbers of the items it stores; None where the ranks know it from the last time. `same`
    are the parts whose trees are all alike, `assigned` the loose tensors that are, each with the rank that stores it.
    """

    attempt: str = ""
    skip: bool = False
    failures: dict[str, Fault] = {}
    faults: dict[int, Fault] = {}
    version: str = ""
    owned: list[list[int]] | None = None
    same: list[str] = []
    assigned: dict[str, dict[str, int]] = {}


class Move(msgspec.Struct, frozen=True):
    """What a call of `maybe_save` does: whether it saves, which `parts` (None: as its caller says), and whether
    `again`, over what was saved just now. `parting`: it is the call in which all save because of a notice to leave.
    """

    save: bool
    parts: list[str] | None = None
    again: bool = False
    parting: bool = False
