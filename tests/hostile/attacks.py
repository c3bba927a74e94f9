"""Attacks made by hand: what somebody who read the format would try first."""

from __future__ import annotations

import os
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec

from asyncckpt.codec.frames import zstd
from hostile.forge import FOLDER, Forgery
from hostile.mutate import nested

BOMB = struct.pack("<BBBBBI", 1, 0, 1, 0, 0, 4096) + struct.pack("<BI", 2, 1 << 14) + zstd.compress(bytes(256 << 20))
Attack = Callable[[Forgery], None]
HUGE = 1 << 57


def tree(change: Callable[[dict[str, Any]], None]) -> Attack:
    """On the leaf tree of the part `extra`, a dict of nodes."""
    return lambda forgery: change(forgery.tree("extra"))


def adding(node: Any) -> Attack:
    """A node more in the part `extra`."""
    return tree(lambda nodes: nodes.update(more=node))


def changing(name: str, **members: Any) -> Attack:
    """Other members in a node of the part `extra`."""
    return tree(lambda nodes: nodes[name].update(members))


def header(change: Callable[[dict[str, Any]], None]) -> Attack:
    return lambda forgery: change(forgery.headers["extra"])


def record(part: str = "extra", **members: Any) -> Attack:
    """Other members in the record of a part; the chunk table is left as it is."""

    def attack(forgery: Forgery) -> None:
        forgery.settle()
        forgery.record["parts"][part].update(members)

    return attack


def manifest(**members: Any) -> Attack:
    return lambda forgery: forgery.manifest.update(members)


def file(name: str, change: Callable[[Path], None]) -> Attack:
    """Something else in the place of a file of the attempt."""
    return lambda forgery: forgery.after.append(lambda attempt: change(attempt / name))


def raw_tree(text: bytes) -> Attack:
    return lambda forgery: forgery.record["parts"]["extra"].update(tree=msgspec.Raw(text))


def raw_header(data: bytes) -> Attack:
    return lambda forgery: forgery.headers.update(extra=data)


def _as_link(path: Path) -> None:
    run = next(above for above in path.parents if above.name == FOLDER).parent
    elsewhere = run.parent / f"elsewhere-{path.name}"
    shutil.move(path, elsewhere)
    path.symlink_to(elsewhere)


def _as_fifo(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def _as_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def _attempt_as_link(attempt: Path) -> None:
    elsewhere = attempt.parent.parent.parent / "elsewhere"
    shutil.move(attempt, elsewhere)
    attempt.symlink_to(elsewhere)


def _step_as_link(attempt: Path) -> None:
    step = attempt.parent
    elsewhere = step.parent.parent / "elsewhere"
    shutil.move(step, elsewhere)
    step.symlink_to(elsewhere)


def coded(change: Callable[[Forgery, dict[str, Any]], None]) -> Attack:
    """On the part `extra`, stored coded, and sealed again."""

    def attack(forgery: Forgery) -> None:
        forgery.code("extra")
        change(forgery, forgery.record["parts"]["extra"])
        forgery.seal_blob("extra")

    return attack


def stream(data: bytes, codec: str = "zstd") -> Attack:
    """The first chunk is decoded from `data`."""

    def change(forgery: Forgery, stored: dict[str, Any]) -> None:
        name = stored["files"][0][0]
        blob = forgery.blobs[name] + bytes(-len(forgery.blobs[name]) % 4096)
        piece = [codec, len(data), stored["coded"][0][-1][2], 0, len(blob)]
        stored["coded"][0] = [piece] if codec == "zstd" else [stored["coded"][0][0], piece]
        forgery.blobs[name] = blob + data

    return coded(change)


def _all_of_it_at_one_place(forgery: Forgery, stored: dict[str, Any]) -> None:
    """A page that stands for a terabyte."""
    piece = stored["coded"][0][0]
    stored.update(size=16384 << 26, chunk_size=1 << 26, coded=[[piece]] * 16384)


def _copies(forgery: Forgery, node: dict[str, Any]) -> None:
    """One entry of 1 MB, and 2000 nodes that each want a copy of it."""
    forgery.headers["extra"]["big"] = {"dtype": "F32", "shape": [512, 512], "data_offsets": []}
    end = max(e["data_offsets"][1] for n, e in forgery.headers["extra"].items() if n != "big")
    forgery.headers["extra"]["big"]["data_offsets"] = [end, end + (1 << 20)]
    forgery.bodies["extra"] += bytes(1 << 20)
    forgery.tree("extra")["more"] = [node | {"n": "big", "x": i} for i in range(2000)]


def _hide_outside(forgery: Forgery) -> None:
    part = forgery.record["parts"]["extra"]
    part["file"] = "../../extra.safetensors"


def _metadata(key: str, about: Any) -> Attack:
    def attack(forgery: Forgery) -> None:
        forgery.tree("model")["m"] = {key: about}

    return attack


def _weights(**nodes: Any) -> Attack:
    return lambda forgery: forgery.tree("model")["v"].update({key.replace("__", "."): n for key, n in nodes.items()})


def _weight_as_array(forgery: Forgery) -> None:
    node = forgery.tree("model")["v"]["1.bias"]
    forgery.tree("model")["v"]["1.bias"] = {"$": "ndarray", "n": node["n"], "d": "<f4", "s": [4]}


def _optimizer(change: Callable[[Any], None]) -> Attack:
    return lambda forgery: change(forgery.tree("optimizer"))


def _states(tree: dict[str, Any]) -> list[dict[str, Any]]:
    """The states by parameter: a dict with integers for keys, so a list of pairs."""
    return [state for _, state in tree["state"]["v"]]


def _rng(name: str, node: Any) -> Attack:
    return lambda forgery: forgery.tree("rng").update({name: node})


def _numpy_position(forgery: Forgery) -> None:
    forgery.tree("rng")["numpy"]["v"][2] = 1 << 40


ATTACKS: dict[str, Attack] = {
    "strides of a terabyte": changing("turned", st=[1, 1 << 38]),
    "strides beyond any memory": changing("turned", st=[1, HUGE]),
    "negative strides": changing("turned", st=[-1, 3]),
    "a view beyond its entry": tree(lambda nodes: nodes["views"][1].update(o=1 << 20)),
    "a view before its entry": tree(lambda nodes: nodes["views"][1].update(o=-4)),
    "a view with a fractional offset": tree(lambda nodes: nodes["views"][1].update(o=0.0)),
    "a view whose strides reach outside": tree(lambda nodes: nodes["views"][1].update(st=[1 << 40, 1])),
    "a view of more items than 63 bits": tree(lambda nodes: nodes["views"][1].update(s=[1 << 50] * 4, st=[0] * 4)),
    "a view of text": tree(lambda nodes: nodes["views"][1].update(s="ab", st="cd")),
    "a shape whose product is a gigabyte of text": changing("complex", s=[1 << 30, "a"]),
    "a shape of 100,000 dimensions": changing("complex", s=[3] * 100_000),
    "a dtype of other width": changing("complex", d="complex128"),
    "a quantized dtype": changing("complex", d="qint8", s=[24]),
    "a dtype that is no dtype": changing("complex", d="Tensor"),
    "an array of empty items, a trillion of them": changing("array", d="|S0", s=[1 << 40], n="empty"),
    "an array with a shape of huge sizes": changing("array", s=[0, 1 << 62], n="empty"),
    "an array of objects": changing("array", d="|O8"),
    "an array with a negative shape": changing("array", s=[-5]),
    "an array whose shape is text": changing("array", s="5"),
    "2000 arrays of one megabyte": lambda forgery: _copies(forgery, {"$": "ndarray", "d": "<f4", "s": [512, 512]}),
    "2000 turned copies of one megabyte": lambda forgery: _copies(
        forgery, {"$": "tensor", "s": [512, 512], "st": [1, 512]}
    ),
    "a tensor that the image does not have": adding({"$": "tensor", "n": "nobody"}),
    "a tensor without a name": adding({"$": "tensor"}),
    "a tensor whose name is a list": adding({"$": "tensor", "n": []}),
    "a device that torch does not know": adding({"$": "device", "v": "nonsense:-1"}),
    "a device that is no text": adding({"$": "device", "v": []}),
    "a torch.Size beyond 63 bits": adding({"$": "size", "v": [1 << 63]}),
    "a torch.Size of text": adding({"$": "size", "v": ["a"]}),
    "an enum that is a function": adding({"$": "enum", "c": "os:system", "v": "id"}),
    "an enum of a module not imported": adding({"$": "enum", "c": "antigravity:X", "v": "A"}),
    "a pickled tag": adding({"$": "pickle", "v": "80049500"}),
    "a range of ranges": adding({"$": "range", "v": [{"$": "range", "v": [0, 1, 1]}] * 3}),
    "a deque of negative length": adding({"$": "deque", "n": -1, "v": []}),
    "a set of lists": adding({"$": "set", "v": [[]]}),
    "a module within modules": raw_tree(b'{"$":"module","m":null,"v":{"a":' * 900 + b"null" + b"}}" * 900),
    "lists 900 deep": raw_tree(nested(900, "[]")),
    "lists 100,000 deep": raw_tree(nested(100_000, "[]")),
    "a leaf tree that is cut off": raw_tree(b'{"a":'),
    "a leaf tree with bytes that are no UTF-8": raw_tree(b'"\xff"'),
    "offsets that overlap": header(lambda e: e["plain"].update(data_offsets=[0, 24])),
    "offsets beyond 64 bits": header(lambda e: e["plain"].update(data_offsets=[0, (1 << 64) - 1])),
    "negative offsets": header(lambda e: e["plain"].update(data_offsets=[-24, 0])),
    "a shape of a petabyte": header(lambda e: e["plain"].update(shape=[1 << 50])),
    "a shape whose product overflows to the size": header(lambda e: e["plain"].update(shape=[1 << 32, 1 << 32, 6])),
    "a negative shape of the right product": header(lambda e: e["plain"].update(shape=[-2, -3])),
    "a header shape of 1000 dimensions": header(lambda e: e["plain"].update(shape=[1] * 1000)),
    "an empty tensor of huge sizes": header(lambda e: e["empty"].update(shape=[0, 1 << 62, 1 << 62])),
    "an unknown dtype in the header": header(lambda e: e["plain"].update(dtype="Q4_K")),
    "a tensor left out of the header": header(lambda e: e.pop("plain")),
    "a header longer than its file": raw_header(struct.pack("<Q", (1 << 64) - 1) + b"{}"),
    "a header of 99 MB that is not there": raw_header(struct.pack("<Q", 99_000_000) + b"{}"),
    "a header that is a list": raw_header(struct.pack("<Q", 2) + b"[]"),
    "a header of brackets": raw_header(struct.pack("<Q", 100_000) + b"[" * 100_000),
    "a header with bytes that are no UTF-8": raw_header(struct.pack("<Q", 5) + b'{"\xff"'),
    "an image of five bytes": raw_header(b"\x02\0\0\0\0"),
    "a file outside of the folder": _hide_outside,
    "a file with an absolute name": lambda f: f.record["parts"]["extra"].update(file="/etc/passwd"),
    "the record as an image": lambda f: f.record["parts"]["extra"].update(file="state.json"),
    "the image of another part": lambda f: f.record["parts"]["extra"].update(file="model.safetensors"),
    "an attempt that leads outside": lambda f: (f.manifest.update(attempt=".."), f.record.update(attempt=".."))[0],
    "a part with a path for a name": lambda f: f.record["parts"].update({"../x": f.record["parts"].pop("extra")}),
    "a frame of 256 MB in a chunk of 4 KB": stream(BOMB),
    "a difference of 256 MB in a chunk of 4 KB": stream(BOMB, "delta"),
    "a coded chunk of nothing": stream(b""),
    "a coded chunk of zeros": stream(bytes(4096)),
    "a page that stands for a terabyte": coded(_all_of_it_at_one_place),
    "a coded chunk that hangs on itself": coded(lambda f, s: s["coded"][0].append(s["coded"][0][-1])),
    "a chain of a thousand": coded(lambda f, s: s["coded"][0].extend([["delta", 1, "", 0, 0]] * 1000)),
    "pieces beyond the end": coded(lambda f, s: s["coded"][0][0].__setitem__(4, 1 << 40)),
    "pieces in a file that is not there": coded(lambda f, s: s["coded"][0][0].__setitem__(3, 5)),
    "pieces outside of the folder": coded(lambda f, s: s["files"][0].__setitem__(0, "../../x.0123456789ab.coded")),
    "pieces in an image": coded(lambda f, s: s["files"][0].__setitem__(0, "model.safetensors")),
    "a coded part with an image too": coded(lambda f, s: s.update(file="extra.safetensors")),
    "a chunk of a terabyte, coded": coded(lambda f, s: s.update(chunk_size=1 << 40, size=1 << 40)),
    "an unknown codec": lambda f: (f.settle(), f.record["parts"]["extra"]["chunks"][0].__setitem__(0, "zstd"))[0],
    "a chunk of negative size": lambda f: (f.settle(), f.record["parts"]["extra"]["chunks"][0].__setitem__(1, -1))[0],
    "a part of 2**62 bytes": record(size=1 << 62),
    "a chunk size of nothing": record(chunk_size=0),
    "a chunk size of a terabyte": record(chunk_size=1 << 40),
    "no chunks": record(chunks=[]),
    "an image and no file": record(file=None),
    "another format": manifest(format=99),
    "a format that is text": manifest(format="1"),
    "a world of nobody": manifest(world=0),
    "another step": manifest(step=2),
    "a step beyond 64 bits": manifest(step=msgspec.Raw(b"9" * 400)),
    "parts named twice": lambda f: f.manifest["parts"].extend(f.manifest["parts"]),
    "a manifest that is a list": lambda f: setattr(f, "manifest", [[]]),
    "a manifest of brackets": lambda f: setattr(f, "manifest", b"[" * 100_000),
    "a record of brackets": lambda f: setattr(f, "record", b'{"format":' * 100_000),
    "members named twice": lambda f: setattr(
        f, "record", msgspec.json.encode(f.record)[:-1] + b',"parts":{},"parts":null}'
    ),
    "rewinds of brackets": lambda f: setattr(f, "rewinds", b"[" * 100_000),
    "an image that is a link": file("model.safetensors", _as_link),
    "an image that is a pipe": file("model.safetensors", _as_fifo),
    "an image that is a folder": file("model.safetensors", _as_folder),
    "a record that is a link": file("state.json", _as_link),
    "a record that is a pipe": file("state.json", _as_fifo),
    "a record that is a folder": file("state.json", _as_folder),
    "a manifest that is a link": file("../manifest.json", lambda path: _as_link(path.resolve())),
    "a manifest that is a pipe": file("../manifest.json", _as_fifo),
    "a manifest that is a folder": file("../manifest.json", _as_folder),
    "rewinds that are a pipe": lambda f: f.after.append(
        lambda attempt: os.mkfifo(attempt.parent.parent / "rewinds.json")
    ),
    "an attempt that is a link": lambda f: f.after.append(_attempt_as_link),
    "a step that is a link": lambda f: f.after.append(_step_as_link),
    "a weight that is an array": _weight_as_array,
    "a weight that is text": _weights(**{"1__bias": "x"}),
    "metadata that is a number": _metadata("", 5),
    "metadata with a version that is text": _metadata("1", {"version": "x"}),
    "a model that is a list": lambda f: f.record["parts"]["model"].update(tree=[]),
    "an optimizer that is text": lambda f: f.record["parts"]["optimizer"].update(tree="x"),
    "an optimizer without state": _optimizer(lambda tree: tree.pop("state")),
    "an optimizer whose state is a list": _optimizer(lambda tree: tree.update(state=[])),
    "an optimizer whose groups are numbers": _optimizer(lambda tree: tree.update(param_groups=[1])),
    "an optimizer whose steps are text": _optimizer(lambda tree: _states(tree)[0].update(step="x")),
    "an optimizer that has no steps": _optimizer(lambda tree: _states(tree)[0].pop("step")),
    "generators that are text": lambda f: f.record["parts"]["rng"].update(tree="x"),
    "a Python generator of nothing": _rng("python", {"$": "tuple", "v": []}),
    "a torch generator of nothing": _rng("torch", None),
    "a position of numpy's generator beyond its memory": _numpy_position,
}
