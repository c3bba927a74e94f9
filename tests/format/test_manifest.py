import hashlib
import math
from pathlib import Path
from typing import Any

import msgspec
import pytest
from support.checkpoints import commit

from asyncckpt.errors import CorruptCheckpointError
from asyncckpt.format import names
from asyncckpt.format.manifest import (
    Chunk,
    FileRecord,
    Manifest,
    PartRecord,
    PrepareRecord,
    Rewind,
    Rewinds,
    decode_manifest,
    decode_record,
    decode_rewinds,
    digest,
    digest_of_chunks,
    encode,
)
from asyncckpt.storage.local import LocalStorage

ATTEMPT = "0123456789ab"
CHUNKS = [Chunk("raw", 4096, digest(b"a")), Chunk("raw", 100, digest(b"b"))]
FILE = FileRecord(4196, digest_of_chunks(c.digest for c in CHUNKS))
PART = PartRecord(msgspec.Raw(b"null"), "model.safetensors", 4196, 4096, CHUNKS)


def change(record: Any, **members: Any) -> Any:
    return msgspec.structs.replace(record, **members)


def make(parts: dict[str, PartRecord] | None = None, file: FileRecord = FILE, **members: Any) -> tuple[Manifest, bytes]:
    """A manifest and its prepare record, the digests true, whatever else was changed."""
    record = encode(change(PrepareRecord(7, ATTEMPT, 0, {"model": PART} if parts is None else parts), **members))
    files = {names.RECORD: FileRecord(len(record), digest(record)), "model.safetensors": file}
    return Manifest(7, ATTEMPT, 1, 1, ["model"], files, "now"), record


GOOD, GOOD_RECORD = make()


def test_round_trip() -> None:
    assert decode_manifest(encode(GOOD), 7) == GOOD
    record = decode_record(GOOD_RECORD, GOOD)
    assert record.parts.keys() == {"model"}
    assert bytes(record.parts["model"].tree) == b"null"
    assert GOOD.size == 4196 + len(GOOD_RECORD)


@pytest.mark.parametrize(
    "members",
    [
        {"step": 8},
        {"attempt": "../etc"},
        {"attempt": ""},
        {"attempt": ATTEMPT.upper()},
        {"world": 0},
        {"files": {}},
        {"files": {"model.safetensors": FILE}},
        {"files": GOOD.files | {"../model.safetensors": FILE}},
        {"files": GOOD.files | {"/etc/passwd": FILE}},
        {"files": GOOD.files | {"manifest.json": FILE}},
        {"files": GOOD.files | {"model.safetensors": FileRecord(-1, "")}},
        {"files": GOOD.files | {names.RECORD: FileRecord(1 << 50, "")}},
        {"parts": ["../model"]},
        {"parts": [""]},
        {"omitted": ["../model"]},
        {"omitted": ["model"]},
        {"exports": ["model-bf16"]},
    ],
)
def test_a_manifest_that_contradicts_its_place_or_the_grammar_is_refused(members: dict[str, Any]) -> None:
    with pytest.raises(CorruptCheckpointError):
        decode_manifest(encode(change(GOOD, **members)), 7)


@pytest.mark.parametrize(
    "part",
    [
        change(PART, file=None),
        change(PART, file=None, chunks=[]),
        change(PART, file="state.json"),
        change(PART, file="other.safetensors"),
        change(PART, file="../model.safetensors"),
        change(PART, size=0, chunks=[]),
        change(PART, size=-1),
        change(PART, size=4197),
        change(PART, size=1 << 60),
        change(PART, chunk_size=0),
        change(PART, chunk_size=-4096),
        change(PART, chunk_size=1 << 31),
        change(PART, chunks=CHUNKS[:1]),
        change(PART, chunks=[*CHUNKS, CHUNKS[1]]),
        change(PART, chunks=CHUNKS[::-1]),
        change(PART, chunks=[Chunk("zstd", 4096, CHUNKS[0].digest), CHUNKS[1]]),
        change(PART, chunks=[Chunk("raw", 4096, digest(b"c")), CHUNKS[1]]),
        change(PART, chunks=[Chunk("raw", -1, CHUNKS[0].digest), CHUNKS[1]]),
    ],
)
def test_a_chunk_table_that_does_not_add_up_is_refused(part: PartRecord) -> None:
    manifest, record = make({"model": part})
    with pytest.raises(CorruptCheckpointError):
        decode_record(record, manifest)


@pytest.mark.parametrize(
    "members", [{"step": 8}, {"attempt": "0123456789ac"}, {"parts": {}}, {"parts": {"other": PART}}]
)
def test_a_record_of_another_attempt_is_refused(members: dict[str, Any]) -> None:
    manifest, record = make(**members)
    with pytest.raises(CorruptCheckpointError):
        decode_record(record, manifest)


@pytest.mark.parametrize("file", [change(FILE, size=4195), change(FILE, digest=digest(b""))])
def test_a_file_that_the_manifest_does_not_vouch_for_is_refused(file: FileRecord) -> None:
    manifest, record = make(file=file)
    with pytest.raises(CorruptCheckpointError):
        decode_record(record, manifest)


def test_a_file_that_no_part_uses_is_refused() -> None:
    manifest, record = make({"model": PartRecord(msgspec.Raw(b"null"))})
    with pytest.raises(CorruptCheckpointError):
        decode_record(record, manifest)


@pytest.mark.parametrize(
    ("parts", "why"),
    [
        ({"model": PART, "note": PartRecord(msgspec.Raw(b"null"), size=1)}, "no file"),
        ({"model": PART, "note": PartRecord(msgspec.Raw(b"null"), chunks=CHUNKS)}, "no file"),
        ({"model": PartRecord(msgspec.Raw(b"null")), "note": PART}, "bears the name"),
    ],
)
def test_a_part_with_the_file_of_another_or_chunks_of_none_is_refused(parts: dict[str, PartRecord], why: str) -> None:
    manifest, record = make(parts)
    with pytest.raises(CorruptCheckpointError, match=why):
        decode_record(record, change(manifest, parts=["model", "note"]))


def test_a_record_that_differs_in_any_byte_is_refused() -> None:
    for position in range(len(GOOD_RECORD)):
        data = bytearray(GOOD_RECORD)
        data[position] ^= 1
        with pytest.raises(CorruptCheckpointError):
            decode_record(bytes(data), GOOD)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_metric_that_is_not_finite_spoils_no_checkpoint(value: float) -> None:
    read = decode_manifest(encode(change(GOOD, metrics={"loss": value, "accuracy": 0.5})), 7)
    assert read.metrics == {"loss": None, "accuracy": 0.5}


def test_a_manifest_is_complete_unless_it_says_what_was_left_out() -> None:
    older = encode(GOOD).replace(b'"omitted":[],', b"")
    body = older[: older.rindex(b',"sha256":"')]
    older = body + b',"sha256":"' + hashlib.sha256(body).hexdigest().encode() + b'"}\n'
    assert decode_manifest(older, 7) == GOOD and GOOD.complete
    partial = change(GOOD, parts=["model"], omitted=["optimizer"])
    assert not decode_manifest(encode(partial), 7).complete


def test_an_export_is_a_part_that_nothing_is_resumed_from() -> None:
    manifest = change(GOOD, parts=["model", "model-bf16"], exports=["model-bf16"])
    assert decode_manifest(encode(manifest), 7).resumable == ["model"]


def test_rewinds_cover_later_steps_up_to_their_sequence() -> None:
    rewinds = Rewinds([Rewind(step=5, sequence=10)])
    assert decode_rewinds(encode(rewinds)) == rewinds
    for step, sequence, covered in [(6, 10, True), (6, 11, False), (5, 10, False), (4, 1, False), (99, 1, True)]:
        assert rewinds.covers(change(GOOD, step=step, sequence=sequence)) is covered
    assert rewinds.sequence == 10 and Rewinds().sequence == 0
    assert not Rewinds().covers(GOOD)


def test_the_digests_of_a_written_checkpoint_are_those_of_its_files(tmp_path: Path) -> None:
    manifest = commit(LocalStorage(str(tmp_path)), 7)
    folder = tmp_path / names.step_name(7) / manifest.attempt
    assert manifest.size == sum(path.stat().st_size for path in folder.iterdir())
    assert decode_record((folder / names.RECORD).read_bytes(), manifest).step == 7


def test_a_whole_record_that_is_not_the_committed_one_is_refused() -> None:
    """Same size, a good seal, the same attempt: only the digest in the manifest tells."""
    _, other = make({"model": change(PART, tree=msgspec.Raw(b"true"))})
    assert len(other) == len(GOOD_RECORD) and other != GOOD_RECORD
    with pytest.raises(CorruptCheckpointError):
        decode_record(other, GOOD)
