"""Changes to a forgery that know its structure. All chance comes from the `Random` given."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import msgspec

from hostile.forge import Forgery, Json, image

NUMBERS = [-1, 0, 1, 2, 7, 64, 4095, 4096, 4097, 1 << 20, 1 << 31, (1 << 32) + 1, 1 << 53, (1 << 63) - 1, 1 << 63,
           (1 << 64) - 1, -(1 << 63), 0.5, 1e300]  # fmt: skip
TEXTS = ["", ".", "..", "../x", "/etc/passwd", "a/b", "x\x00y", "state.json", "manifest.json", "model.safetensors",
         "../model.safetensors", "é", "raw", "zstd", "0123456789ab", "F32", "F64", "U8", "BOOL", "Q4", "float32",
         "qint8", "quint4x2", "bits8", "int4", "complex64", "bool", "|O", "<f8", "|S0", "|V0", "|V999999", "<M8[s]",
         "cuda:0", "meta", "os:system", "enum:Enum", "torch.nn:Module", "0" * 5000]  # fmt: skip
TAGS = ["int", "float", "complex", "str", "bytes", "bytearray", "tuple", "set", "frozenset", "deque", "dict", "odict",
        "counter", "defaultdict", "range", "path", "enum", "npscalar", "npdtype", "npstr", "npbytes", "tensor",
        "ndarray", "module", "dtype", "device", "size", "nonsense"]  # fmt: skip
MEMBERS = ["$", "v", "n", "d", "s", "st", "o", "m", "f", "c", "k", "version", "dtype", "shape", "data_offsets", "size",
           "digest", "file", "chunks", "chunk_size", "tree", "step", "attempt", "world", "parts", "files"]  # fmt: skip


def value(chance: random.Random) -> Json:
    """A value that is likely to be wrong where it is put."""
    kind = chance.randrange(8)
    if kind < 2:
        return chance.choice(NUMBERS)
    if kind < 4:
        return chance.choice(TEXTS)
    if kind == 4:
        return chance.choice([None, True, False, [], {}, [[]], [{}], {"": None}])
    if kind == 5:
        return [chance.choice(NUMBERS) for _ in range(chance.choice([1, 2, 3, 65, 300]))]
    if kind == 6:
        return msgspec.Raw(
            nested(chance.choice([50, 199, 201, 900, 5000]), chance.choice(["[]", '{"a":}', '{"$":"tuple","v":[]}']))
        )
    return {"$": chance.choice(TAGS)} | {chance.choice(MEMBERS[1:]): value(chance) for _ in range(chance.randrange(4))}


def nested(depth: int, form: str) -> bytes:
    """JSON text, `form` in itself `depth` times."""
    at = form.index("]") if "]" in form else form.index("}")
    return (form[:at] * depth + "null" + form[at:] * depth).encode()


Place = tuple[Any, Any]
"""A container and the key in it."""


def places(node: Json) -> list[Place]:
    """Every place of a JSON value."""
    found: list[Place] = []
    waiting = [node]
    while waiting:
        node = waiting.pop()
        items = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
        for key, item in items:
            found.append((node, key))
            waiting.append(item)
    return found


def _nudge(old: Json, chance: random.Random) -> Json:
    """Something near `old`."""
    if isinstance(old, bool) or old is None:
        return not old
    if isinstance(old, int | float):
        new = chance.choice([old + 1, old - 1, -old, old * 2, old * (1 << 40), old + 4096, old + 0.5, str(old)])
        return msgspec.Raw(b"%d" % new) if isinstance(new, int) and not -(1 << 63) <= new < 1 << 64 else new
    if isinstance(old, str):
        cut = chance.randrange(len(old) + 1)
        return chance.choice([old[:cut], old + old[cut:], old.upper(), old[::-1], "../" + old, "/" + old])
    if isinstance(old, list):
        return chance.choice([old[1:], old + old, old[::-1], {}, [*old, 0], [*old, None]])
    return chance.choice([list(old.items()), {}, {**old, "$": chance.choice(TAGS)}]) if isinstance(old, dict) else 0


def edit(node: Json, chance: random.Random) -> None:
    """Change one place of a JSON value."""
    found = places(node)
    if not found:
        return
    holder, key = chance.choice(found)
    how = chance.randrange(7)
    if how == 0:
        holder[key] = value(chance)
    elif how < 3:
        holder[key] = _nudge(holder[key], chance)
    elif how == 3:
        del holder[key]
    elif how == 4:  # the value of another place
        other, name = chance.choice(found)
        try:
            holder[key] = msgspec.json.decode(msgspec.json.encode(other[name]))
        except (KeyError, IndexError, RecursionError):
            pass
    elif isinstance(holder, dict):
        if how == 5 and isinstance(key, str):  # another name for the same
            holder[chance.choice([*MEMBERS, *TEXTS])] = holder.pop(key)
        else:
            holder[chance.choice(MEMBERS)] = value(chance)
    else:
        holder.insert(key, value(chance))


def _tree(forgery: Forgery, chance: random.Random) -> None:
    edit(forgery.record["parts"][chance.choice(list(forgery.record["parts"]))]["tree"], chance)


def _leaf(forgery: Forgery, chance: random.Random) -> None:
    """A node of the tree that names a tensor or an array: its name, dtype, shape, strides, offset."""
    leaves = [n for part in forgery.record["parts"].values() for n in _nodes(part["tree"]) if n.get("$") in
              ("tensor", "ndarray")]  # fmt: skip
    leaf = chance.choice(leaves)
    leaf[chance.choice(["n", "d", "s", "st", "o", "$"])] = chance.choice(
        [
            value(chance),
            chance.choice(leaves).get("n"),
            chance.choice(TEXTS),
            [chance.choice(NUMBERS) for _ in range(2)],
        ]
    )


def _nodes(tree: Json) -> list[dict[str, Any]]:
    return [h[k] for h, k in places([tree]) if isinstance(h[k], dict)]


def _record(forgery: Forgery, chance: random.Random) -> None:
    parts = forgery.record["parts"]
    forgery.sealed = chance.random() < 0.7
    edit(
        chance.choice([forgery.record, *({k: v for k, v in p.items() if k != "tree"} for p in parts.values())]), chance
    )
    part = parts[chance.choice(list(parts))] if isinstance(parts, dict) and parts else {}
    if isinstance(part, dict):
        part[chance.choice(["file", "size", "chunk_size", "chunks"])] = value(chance)


def _manifest(forgery: Forgery, chance: random.Random) -> None:
    forgery.sealed = chance.random() < 0.7
    edit(forgery.manifest, chance)


def _header(forgery: Forgery, chance: random.Random) -> None:
    edit(forgery.headers[chance.choice(list(forgery.headers))], chance)


def _raw_header(forgery: Forgery, chance: random.Random) -> None:
    """Bytes of an image, the length field and the text of the header among them."""
    part = chance.choice(list(forgery.headers))
    data = bytearray(image(forgery.headers[part], b""))
    for _ in range(chance.randrange(1, 4) if data else 0):
        data[chance.randrange(min(len(data), chance.choice([8, 300, len(data)])))] = chance.randrange(256)
    forgery.headers[part] = bytes(data[: chance.choice([len(data), len(data), 0, 7, 8, 9, 100])])


def _body(forgery: Forgery, chance: random.Random) -> None:
    part = chance.choice(list(forgery.bodies))
    body = bytearray(forgery.bodies[part])
    if chance.random() < 0.3:
        body = chance.choice([body[:-1], body + b"x", body * 2, bytearray()])
    for _ in range(chance.randrange(20) if body else 0):
        body[chance.randrange(len(body))] = chance.randrange(256)
    forgery.bodies[part] = bytes(body)


def _coded(forgery: Forgery, chance: random.Random) -> None:
    """A part stored coded: its table, or its bytes."""
    if forgery.headers:
        forgery.code(chance.choice(list(forgery.headers)), chance.choice([4096, 8192, 8192]))
    part = chance.choice([name.split(".")[0] for name in forgery.blobs])
    stored = forgery.record["parts"][part]
    how = chance.randrange(4)
    if how == 0:
        edit({key: stored[key] for key in ("files", "coded")}, chance)
    elif how == 1:
        pieces = chance.choice(stored["coded"])
        piece = chance.choice(pieces)
        piece[chance.randrange(len(piece))] = value(chance)
        if chance.random() < 0.5:
            stored[chance.choice(["size", "chunk_size", "files", "coded"])] = value(chance)
    elif how == 2:
        chance.choice(stored["coded"]).append(list(chance.choice(chance.choice(stored["coded"]))))
    name = next(name for name in forgery.blobs if name.startswith(f"{part}."))
    blob = bytearray(forgery.blobs[name])
    for _ in range(chance.randrange(8) if how == 3 and blob else 0):
        at = chance.randrange(min(len(blob), chance.choice([40, 600, len(blob)])))
        blob[at] = chance.randrange(256)
    forgery.blobs[name] = bytes(blob)
    if chance.random() < 0.7:
        forgery.seal_blob(part)


def _rewinds(forgery: Forgery, chance: random.Random) -> None:
    forgery.rewinds = {"rewinds": [{"step": 0, "sequence": 0}], "format": 1}
    edit(forgery.rewinds, chance)


MUTATORS: list[Callable[[Forgery, random.Random], None]] = [
    _tree, _tree, _leaf, _leaf, _leaf, _record, _manifest, _header, _header, _raw_header, _body, _rewinds,
    _coded, _coded,
]  # fmt: skip


def mutate(forgery: Forgery, chance: random.Random) -> list[str]:
    """One to three changes; their names."""
    done = []
    for _ in range(chance.choice([1, 1, 2, 3])):
        mutator = chance.choice(MUTATORS)
        try:
            mutator(forgery, chance)
        except (AttributeError, TypeError, LookupError, OverflowError):
            continue  # an earlier change took away what this one would have changed
        done.append(mutator.__name__)
    return done
