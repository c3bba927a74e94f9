import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from asyncckpt.errors import CorruptCheckpointError
from asyncckpt.format.manifest import Rewind, Rewinds
from asyncckpt.format.seal import VERSION, seal, unseal

RECORD = Rewinds([Rewind(step=3, sequence=7)])
SEALED = seal(RECORD)


def refused(data: bytes) -> bool:
    try:
        unseal(data, Rewinds, "it")
    except CorruptCheckpointError:
        return True
    return False


@given(st.lists(st.builds(Rewind, step=st.integers(0, 2**60), sequence=st.integers(0, 2**60))))
def test_round_trip(rewinds: list[Rewind]) -> None:
    record = Rewinds(rewinds)
    assert unseal(seal(record), Rewinds, "it") == record


def test_a_sealed_record_is_one_line_of_json() -> None:
    assert SEALED.endswith(b"\n") and SEALED.count(b"\n") == 1
    assert msgspec.json.decode(SEALED)["rewinds"] == [{"step": 3, "sequence": 7}]


def test_every_change_of_every_byte_is_found() -> None:
    for position, byte in enumerate(SEALED):
        for mask in (1, 2, 4, 8, 16, 32, 64, 128, 0xFF, byte or 1):
            data = bytearray(SEALED)
            data[position] ^= mask
            assert refused(bytes(data)), (position, mask)


def test_truncation_at_every_length_is_found() -> None:
    assert all(refused(SEALED[:length]) for length in range(len(SEALED)))


@given(st.binary(min_size=1, max_size=8), st.integers(0, len(SEALED)))
def test_added_bytes_are_found(extra: bytes, position: int) -> None:
    changed = SEALED[:position] + extra + SEALED[position:]
    assert changed == SEALED or refused(changed)


@given(st.binary(max_size=300))
def test_bytes_that_nobody_sealed_are_refused(data: bytes) -> None:
    assert refused(data)


class Newer(msgspec.Struct):
    format: int


@pytest.mark.parametrize("version", [VERSION + 1, VERSION - 1, -1, 2**70])
def test_another_format_is_named(version: int) -> None:
    with pytest.raises(CorruptCheckpointError, match=r"format|not a valid record"):
        unseal(seal(Newer(version)), Rewinds, "it")


class Text(msgspec.Struct):
    format: str


class Wrong(msgspec.Struct):
    rewinds: object
    format: int = VERSION


@pytest.mark.parametrize("record", [Text("1"), Wrong(3), Wrong([{"step": "x", "sequence": 1}])])
def test_a_good_seal_on_wrong_members_is_refused(record: msgspec.Struct) -> None:
    assert refused(seal(record))
