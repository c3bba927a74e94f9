"""How the names that DCP gives to the values of a state (its keys) stand to parts and their leaf trees.

DCP flattens a state: it goes into mappings, and into lists that hold tensors or mappings, and joins the path to each
value with dots. The top level of the path is a part here, if that is possible for all; else the whole state is one
part, `ROOT`. A tree is flattened by the same rule when it is read. Where that does not give the same keys back, as for
states that a planner was told not to flatten, one more part without tensors, `KEYS`, lists them.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from asyncckpt.errors import CheckpointError, UnsupportedStateError
from asyncckpt.format import names
from asyncckpt.format.tree import TAG, Decoder, Encoder, Node, Path, show

ROOT = "__root__"
"""The part that holds a whole state, where its keys can't be parts."""
KEYS = "__dcp__"
"""The part whose tree lists the keys, each with its path, part first."""

_MAPPINGS = ("dict", "odict", "defaultdict", "counter")


def split_location(location: str | os.PathLike[str]) -> tuple[str, int | None]:
    """The run and the step of a checkpoint id: RUN, or RUN/step-00000100.

    Raises:
        ValueError: not a path.
    """
    path = os.fspath(location)
    if not isinstance(path, str) or not path or "://" in path:
        raise ValueError(f"{location!r}: give the path of a run, or of a step in it, such as runs/gpt/step-00000100")
    parent, name = os.path.split(path.rstrip("/"))
    step = names.parse_step(name)
    return (path, None) if step is None else (parent or ".", step)


def whole_part(paths: Iterable[Path], part: str | None) -> str | None:
    """The part that takes the whole state; None where each key of its top level is a part of its own."""
    if part is not None:
        return part
    paths = list(paths)
    tops = {str(path[0]) for path in paths}
    as_parts = (
        all(map(names.is_part, tops))
        and len({top.lower() for top in tops}) == len(tops)
        and not tops & {ROOT, KEYS}
        and any(len(path) > 1 for path in paths)
    )
    return None if as_parts else ROOT


def placed(path: Path, whole: str | None) -> tuple[str, Path]:
    """The part that a value lies in, and its path below that."""
    return (str(path[0]), tuple(path[1:])) if whole is None else (whole, tuple(path))


def entry_name(part: str, path: Path) -> str:
    """What a tensor is called in the image of its part."""
    name = ".".join(map(str, path)) or part
    name = name.encode("utf-8", "backslashreplace").decode()
    return f"{name}#2" if name == "__metadata__" else name


class _Leaf:
    def __init__(self, node: Node) -> None:
        self.node = node


class _Composer(Encoder):
    def other(self, value: Any, path: Path) -> Node:
        return value.node if isinstance(value, _Leaf) else super().other(value, path)


def compose(part: str, leaves: Mapping[Path, Node]) -> Node:
    """The leaf tree of a part, of the nodes at its leaves. Holes in lists become null.

    Raises:
        UnsupportedStateError: nested too deep, or a value lies below another one.
    """
    if list(leaves) == [()]:
        return leaves[()]
    root: Any = [] if leaves and all(type(path[0]) is int for path in leaves if path) else {}
    for path, node in leaves.items():
        at = root
        for key, following in zip(path, (*path[1:], None), strict=True):
            value: Any = _Leaf(node) if following is None else [] if type(following) is int else {}
            at = _child(at, key, value, part, path)
    return _Composer().encode(root, (part,))


def _child(at: Any, key: Any, value: Any, part: str, path: Path) -> Any:
    """The child `key` of a container, which becomes `value` where it was not there."""
    where = show((part, *path))
    if isinstance(at, list) and type(key) is int:
        at.extend([None] * (key + 1 - len(at)))
        if at[key] is None:
            at[key] = value
    elif isinstance(at, dict):
        at.setdefault(key, value)
    else:
        raise UnsupportedStateError(f"{where} lies below a value that is no container", path=where)
    if type(at[key]) is not type(value) or (isinstance(value, _Leaf) and at[key] is not value):
        raise UnsupportedStateError(f"{where} stands at the same place as another value", path=where)
    return at[key]


def flatten(node: Node, path: Path = ()) -> Iterator[tuple[Path, Node]]:
    """The values in a leaf tree that DCP has keys for, each with its path."""
    mapping = _as_mapping(node)
    if mapping is not None:
        for key, item in mapping:
            yield from flatten(item, (*path, key))
    elif isinstance(node, list) and not _is_terminal(node):
        for i, item in enumerate(node):
            yield from flatten(item, (*path, i))
    else:
        yield path, node


def _is_terminal(node: Node) -> bool:
    if _as_mapping(node) is not None:
        return False
    if not isinstance(node, list):
        return True
    return not any(
        is_tensor(item) or (_as_mapping(item) is not None) or (isinstance(item, list) and not _is_terminal(item))
        for item in node
    )


def is_tensor(node: Node) -> bool:
    return isinstance(node, dict) and node.get(TAG) == "tensor"


def _as_mapping(node: Node) -> list[tuple[str, Node]] | None:
    """The items of a node that is a mapping in Python, keys as DCP writes them; None where it is something else."""
    if not isinstance(node, dict):
        return None
    kind = node.get(TAG)
    if kind is None:
        return list(node.items())
    if kind == "module":
        return _as_mapping(node["v"])
    if kind in _MAPPINGS:
        return [(str(Decoder().decode(key)), item) for key, item in node["v"]]
    return None


def find(node: Node, path: Path) -> Node:
    """The node at `path`.

    Raises:
        LookupError: there is none.
    """
    for key in path:
        mapping = _as_mapping(node)
        if mapping is not None:
            node = dict(mapping)[str(key)]
        elif isinstance(node, list):
            node = node[key]
        else:
            raise LookupError(key)
    return node


def key_of(path: Path) -> str:
    """The key that DCP's own planner gives to a path."""
    return ".".join(map(str, path))


def listed(paths: Mapping[str, Path], whole: str | None) -> Node:
    """The tree of `KEYS`."""
    places = {key: placed(path, whole) for key, path in paths.items()}
    listing = [[key, [part, *path]] for key, (part, path) in places.items()]
    return _Composer().encode({"keys": listing, "whole": whole}, (KEYS,))


def check_unlike(entries: Iterable[tuple[str, str]]) -> None:
    """
    Raises:
        CheckpointError: two tensors would bear the same name in a part.
    """
    seen: set[tuple[str, str]] = set()
    for entry in entries:
        if entry in seen:
            raise CheckpointError(
                f"two tensors of part {entry[0]!r} would be called {entry[1]!r}: rename a key that has dots"
            )
        seen.add(entry)
