"""Tables of coded parts that can't be true are refused, before anything is read."""

from typing import Any

import msgspec
import pytest

from asyncckpt.errors import CorruptCheckpointError
from asyncckpt.format import names
from asyncckpt.format.manifest import (
    Chunk,
    FileRecord,
    Manifest,
    PartRecord,
    PrepareRecord,
    decode_record,
    digest,
    digest_of_chunks,
    encode,
)
from asyncckpt.format.pieces import MAX_CHAIN, Piece, Shared

OLD, NEW = "0123456789ab", "ba9876543210"
LIVE, STILL = f"model.{NEW}.coded", f"model.{OLD}.still"
D = [digest(bytes([i])) for i in range(8)]
CODED = [
    [Piece("zstd", 4096, D[0], 1, 8192)],
    [Piece("raw", 8192, D[1], 0, 4096)],
    [Piece("zstd", 4096, D[2], 1, 0), Piece("delta", 100, D[3], 0, 0)],
]
PART = PartRecord(msgspec.Raw(b"null"), None, 3 * 8192 - 5, 8192, files=[Shared(LIVE), Shared(STILL, 3)], coded=CODED)
FILES = {
    LIVE: FileRecord(12288, digest_of_chunks([D[3], D[1]])),
    STILL: FileRecord(50000, digest_of_chunks([D[2], D[0]])),
}


def decode(part: PartRecord, files: dict[str, FileRecord] = FILES) -> PartRecord:
    record = encode(PrepareRecord(7, NEW, 0, {"model": part}))
    known = {names.RECORD: FileRecord(len(record), digest(record)), **files}
    return decode_record(record, Manifest(7, NEW, 1, 1, ["model"], known, "now")).parts["model"]


def change(**members: Any) -> PartRecord:
    return msgspec.structs.replace(PART, **members)


def piece(chunk: int, which: int, **members: Any) -> PartRecord:
    coded = [list(pieces) for pieces in CODED]
    coded[chunk][which] = msgspec.structs.replace(coded[chunk][which], **members)
    return change(coded=coded)


def test_a_true_table_comes_back() -> None:
    part = decode(PART)
    assert part == PART
    assert part.lengths == [8192, 8192, 8187] and part.data_files == [LIVE, STILL]
    assert part.digests == [D[0], D[1], D[3]] and list(part.pieces(2)) == CODED[2]


LONG = [CODED[2][0], *[Piece("delta", 1, D[3], 0, 4096 * i) for i in range(3, MAX_CHAIN + 4)]]


@pytest.mark.parametrize(
    "part",
    [
        change(file="model.safetensors"),
        change(chunks=[Chunk("raw", 1, D[0])]),
        change(size=-1),
        change(size=4 * 8192),
        change(size=2 * 8192),
        change(size=1 << 60),
        change(chunk_size=0),
        change(chunk_size=1 << 40),
        change(files=[]),
        change(files=[Shared(LIVE), Shared(LIVE)]),
        change(files=[Shared(LIVE), Shared(STILL, -1)]),
        change(files=[Shared(LIVE), Shared(STILL), Shared(f"model.{OLD}.coded")]),
        change(files=[Shared(LIVE), Shared(f"other.{OLD}.still")]),
        change(coded=[]),
        change(coded=CODED[:2]),
        change(coded=[*CODED, CODED[0]]),
        change(coded=[*CODED[:2], []]),
        change(coded=[*CODED[:2], LONG]),
        change(coded=[*CODED[:2], CODED[2][::-1]]),
        piece(0, 0, codec="delta"),
        piece(0, 0, codec="raw"),
        piece(0, 0, codec="nonsense"),
        piece(2, 1, codec="zstd"),
        piece(0, 0, stored=0),
        piece(0, 0, stored=-4096),
        piece(0, 0, stored=8193),
        piece(1, 0, stored=8191),
        piece(0, 0, file=2),
        piece(0, 0, file=-1),
        piece(0, 0, offset=-4096),
        piece(0, 0, offset=4095),
        piece(0, 0, offset=0),
        piece(0, 0, offset=1 << 40),
        piece(0, 0, digest=D[7]),
    ],
)
def test_a_table_that_can_not_be_true_is_refused(part: PartRecord) -> None:
    files = {name: FILES.get(name, FileRecord(50000, "")) for name in part.data_files}
    with pytest.raises(CorruptCheckpointError) as caught:
        decode(part, files)
    assert (caught.value.step, caught.value.part) == (7, "model")


@pytest.mark.parametrize("name", [f"model.{OLD}.coded", f"a-b.{OLD}.still", f"model.rank-00003.{OLD}.still"])
def test_names_of_coded_files(name: str) -> None:
    part, *of, attempt, suffix = name.split(".")
    rank = 3 if of else None
    assert names.coded_file(part, attempt, f".{suffix}", rank) == name
    assert names.coded_of(name) == (part, rank) and names.is_data_file(name)


@pytest.mark.parametrize(
    "name",
    ["model.coded", f"model.{OLD}", f"model.{OLD}.zst", f".{OLD}.coded", f"../model.{OLD}.coded", "model..coded",
     f"model.{OLD}.coded.coded", f"model.{OLD.upper()}.coded", f"mo/del.{OLD}.coded", "",
     f"model.rank-3.{OLD}.coded", "model.rank-00003.coded", f"model.00003.{OLD}.coded"],
)  # fmt: skip
def test_other_names_are_of_no_coded_file(name: str) -> None:
    assert names.coded_of(name) is None and not names.is_data_file(name)
