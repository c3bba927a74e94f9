"""A real checkpoint taken apart, to be changed anywhere and sealed again, so that the parsers see the change."""

from __future__ import annotations

import hashlib
import shutil
import struct
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch

import asyncckpt
from asyncckpt.codec import Coder
from asyncckpt.format.manifest import digest, digest_of_chunks

STEP = 1
FOLDER = "step-00000001"
ATTEMPT = "0123456789ab"
Json = Any


def live(seed: int) -> dict[str, Any]:
    """Live state, with one of everything that the format has a form for."""
    torch.manual_seed(seed)
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.BatchNorm1d(4))
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.randn(8, 4)).square().sum().backward()
    optimizer.step()
    base = torch.arange(24, dtype=torch.float32)
    extra = {
        "plain": torch.arange(6.0).reshape(2, 3),
        "turned": torch.arange(6.0).reshape(2, 3).t(),
        "views": [base, base[2:14].view(3, 4)],
        "complex": torch.ones(3, dtype=torch.complex64),
        "array": np.arange(5, dtype="<i4"),
        "empty": torch.empty(0, 3),
        "items": (1, {2, 3}, b"x", 1 << 70, float("inf"), {1: "a"}, torch.Size([2]), torch.float16),
    }
    return {"model": model, "optimizer": optimizer, "rng": asyncckpt.RngState(), "extra": extra}


def commit(root: Path) -> None:
    with asyncckpt.Checkpointer(root, writer="thread", overlap=False) as checkpointer:
        checkpointer.save(STEP, live(0)).result(timeout=60)
    (root / "rewinds.json").write_bytes(seal({"rewinds": [{"step": 9, "sequence": 0}], "format": 1}))


@dataclass(repr=False)
class Forgery:
    """The records as plain JSON values (`msgspec.Raw` where the bytes of one are to be chosen), the images as bytes."""

    manifest: Json
    record: Json
    headers: dict[str, Json]
    bodies: dict[str, bytes]
    rewinds: Json = None
    after: list[Callable[[Path], None]] = field(default_factory=list)
    """What is done to the folder of the attempt at the end."""
    blobs: dict[str, bytes] = field(default_factory=dict)
    """Files of coded chunks, by name: of the parts that `code` took out of the images."""
    sealed: bool = True
    """Whether sizes and digests are computed anew from the images; else they are as they stand."""

    headers_settled: bool = False

    @classmethod
    def of(cls, root: Path) -> Forgery:
        folder = root / FOLDER
        manifest = msgspec.json.decode((folder / "manifest.json").read_bytes())
        attempt = folder / manifest["attempt"]
        record = msgspec.json.decode((attempt / "state.json").read_bytes())
        headers, bodies = {}, {}
        for name, part in record["parts"].items():
            if part["file"] is None:
                continue
            data = (attempt / part["file"]).read_bytes()
            (length,) = struct.unpack("<Q", data[:8])
            headers[name] = msgspec.json.decode(data[8 : 8 + length])
            bodies[name] = data[8 + length :]
        for sealed in (manifest, record):
            del sealed["sha256"]
            sealed["attempt"] = ATTEMPT
        return cls(manifest, record, headers, bodies)

    def tree(self, part: str) -> Json:
        return self.record["parts"][part]["tree"]

    def write(self, root: Path) -> None:
        """Write it all below the empty `root`."""
        folder = root / FOLDER
        attempt = folder / ATTEMPT
        attempt.mkdir(parents=True)
        for part, header in self.headers.items():
            data = image(header, self.bodies[part])
            (attempt / f"{part}.safetensors").write_bytes(data)
            if self.sealed and not self.headers_settled:
                self._seal_image(part, data)
        for name, blob in self.blobs.items():
            (attempt / name).write_bytes(blob)
        record = seal(self.record)
        (attempt / "state.json").write_bytes(record)
        files = self.manifest.get("files") if isinstance(self.manifest, dict) else None
        if self.sealed and isinstance(files, dict):
            files["state.json"] = {"size": len(record), "digest": digest(record)}
        (folder / "manifest.json").write_bytes(seal(self.manifest))
        if self.rewinds is not None:
            (root / "rewinds.json").write_bytes(seal(self.rewinds))
        for change in self.after:
            change(attempt)

    def code(self, part: str, chunk_size: int = 8192) -> None:
        """Store a part coded from now on: its first chunk as the difference from another, the rest by themselves."""
        data = image(self.headers.pop(part), self.bodies.pop(part))
        name, blob, table = f"{part}.{ATTEMPT}.coded", bytearray(), []
        coder = Coder()
        for start in range(0, len(data), chunk_size):
            chunk, before = data[start : start + chunk_size], None
            pieces = []
            like = bytes([chunk[0] ^ 1]) + chunk[1:]
            for what in [like, chunk] if start == 0 else [chunk]:
                codec, stored = coder.encode(what, base=before)
                blob += bytes(-len(blob) % 4096)
                pieces.append([codec, len(stored), digest(what), 0, len(blob)])
                blob += stored
                before = what
            table.append(pieces[-1:] if pieces[-1][0] != "delta" else pieces)
        self.blobs[name] = bytes(blob)
        self.record["parts"][part] |= {"file": None, "size": len(data), "chunk_size": chunk_size, "chunks": []}
        self.record["parts"][part] |= {"files": [[name, 0]], "coded": table}
        del self.manifest["files"][f"{part}.safetensors"]
        self.seal_blob(part)

    def seal_blob(self, part: str) -> None:
        """Let the manifest vouch for the table of a coded part as it is now."""
        name = f"{part}.{ATTEMPT}.coded"
        pieces = sorted((p for chunk in self.record["parts"][part]["coded"] for p in chunk), key=lambda p: p[4])
        self.manifest["files"][name] = {
            "size": len(self.blobs[name]),
            "digest": digest_of_chunks(p[2] for p in pieces),
        }

    def settle(self) -> None:
        """Compute the chunk tables now, so that what is changed of them afterwards stays changed."""
        for part, header in self.headers.items():
            self._seal_image(part, image(header, self.bodies[part]))
        self.headers_settled = True

    def _seal_image(self, part: str, data: bytes) -> None:
        if not isinstance(self.record, dict) or not isinstance(self.manifest, dict):
            return
        parts, files = self.record.get("parts"), self.manifest.get("files")
        if not isinstance(parts, dict) or not isinstance(parts.get(part), dict) or not isinstance(files, dict):
            return
        size = parts[part].get("chunk_size")
        size = size if isinstance(size, int) and 4096 <= size <= 1 << 30 else 1 << 20
        chunks = [["raw", len(data[i : i + size]), digest(data[i : i + size])] for i in range(0, len(data), size)]
        parts[part] |= {"size": len(data), "chunks": chunks}
        files[f"{part}.safetensors"] = {"size": len(data), "digest": digest_of_chunks(c[2] for c in chunks)}


def image(header: Json, body: bytes) -> bytes:
    """A safetensors file; a header that is given as bytes stands as it is, its length field included."""
    if isinstance(header, bytes):
        return header + body
    text = msgspec.json.encode(header)
    text += b" " * (-(len(text) + 8) % 4096)
    return struct.pack("<Q", len(text)) + text + body


def seal(record: Json) -> bytes:
    """As `asyncckpt.format.seal` does, written down a second time; bytes are sealed as they are."""
    text = record if isinstance(record, bytes) else msgspec.json.encode(record)
    body = text[:-1]
    return body + b',"sha256":"' + hashlib.sha256(body).hexdigest().encode() + b'"}\n'


def clear(root: Path) -> None:
    shutil.rmtree(root, ignore_errors=True)
    root.mkdir()
