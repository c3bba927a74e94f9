import string

import pytest
from hypothesis import given
from hypothesis import strategies as st

from asyncckpt.format import names


@given(st.integers(0, 10**19 - 1))
def test_a_step_name_gives_its_step_back(step: int) -> None:
    assert names.parse_step(names.step_name(step)) == step


@given(st.integers(0, 10**19 - 1), st.integers(0, 10**19 - 1))
def test_steps_have_names_of_their_own(a: int, b: int) -> None:
    assert (names.step_name(a) == names.step_name(b)) == (a == b)


@given(st.text() | st.from_regex(r"step-[0-9]{1,25}\n?") | st.from_regex(r"\Astep-\d{8}\Z"))
def test_only_what_step_name_gives_is_a_step(name: str) -> None:
    step = names.parse_step(name)
    assert step is None or names.step_name(step) == name


@pytest.mark.parametrize(
    "name",
    [
        "step-1",
        "step-000000001",
        "step-00000001\n",
        "step-0000000١",
        " step-00000001",
        "step--0000001",
        "STEP-00000001",
    ],
)
def test_other_spellings_of_a_step_are_foreign(name: str) -> None:
    assert names.parse_step(name) is None


@given(st.text(max_size=70) | st.text(string.ascii_letters + string.digits + "-_./\\\n", max_size=70))
def test_no_part_leaves_its_folder(part: str) -> None:
    if names.is_part(part):
        file = names.image_file(part)
        assert names.is_data_file(file)
        assert "/" not in file and "\\" not in file and "\0" not in file and not file.startswith((".", "-"))
        assert len(file.encode()) <= 255 and file != names.RECORD


@pytest.mark.parametrize(
    "name", ["", ".", "..", "../x.safetensors", "a/b.safetensors", ".safetensors", "x.bin", "-.safetensors"]
)
def test_what_is_no_data_file(name: str) -> None:
    assert not names.is_data_file(name)


@pytest.mark.parametrize("name", [names.MANIFEST, names.REWINDS])
def test_temporaries_are_known_and_never_the_same(name: str) -> None:
    made = {names.temporary(name) for _ in range(100)}
    assert len(made) == 100
    assert all(names.is_temporary(t) and not names.is_data_file(t) and names.parse_step(t) is None for t in made)
    assert not names.is_temporary(name)


def test_attempts_are_known_and_never_the_same() -> None:
    made = {names.new_attempt() for _ in range(100)}
    assert len(made) == 100
    assert all(map(names.is_attempt, made))
    assert not names.is_attempt("0123456789AB") and not names.is_attempt("0123456789ab\n")
