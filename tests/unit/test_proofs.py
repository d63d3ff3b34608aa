"""The table of proofs: it goes on where it was cut off, and forgets what was proved of other contents."""

from pathlib import Path

import pytest
import sabotages
from proofs import PROVED, SURVIVES, Proofs, of_today
from sabotages import Claim, Sabotage

TEST = "tests/test_it.py::test_it_works"


@pytest.fixture
def tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A project of one test and one file."""
    monkeypatch.setattr(sabotages, "ROOT", tmp_path)
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "test_it.py").write_text("def test_it_works(): ...\n")
    (tmp_path / "it.py").write_text("works = a | b\nfast = True\n")
    return tmp_path


def marks() -> list[Sabotage]:
    return [Sabotage(TEST, "it.py", "a | b", ""), Sabotage(TEST, "it.py", "fast = True", "fast = False")]


def unproved(tree: Path) -> list[str]:
    """Say what is taken out where that is not proved."""
    return [mark.take_out for mark in table(tree).unproved()]


def table(tree: Path) -> Proofs:
    return Proofs(tree / "proofs.md", [Claim("It works.", ("it.py",), (TEST,))], marks())


@pytest.mark.sabotage("tests/proofs.py", "self._read() | {", "{")
def test_a_run_that_was_cut_off_goes_on_where_it_was(tree: Path) -> None:
    one, other = marks()
    table(tree).note(one, PROVED)
    assert unproved(tree) == [other.take_out]
    table(tree).note(other, SURVIVES)
    assert unproved(tree) == [other.take_out]
    rows = [line for line in (tree / "proofs.md").read_text().splitlines() if "::" in line]
    assert rows[0].startswith(f"| It works. | `{TEST}` | `it.py`: `` a \\| b `` → nothing | proved | ")
    assert "1 of 2 are proved" in (tree / "proofs.md").read_text()


@pytest.mark.sabotage("tests/proofs.py", "outcome.contents == sabotage.contents", "True")
@pytest.mark.parametrize("changed", ["it.py", "tests/test_it.py"])
def test_what_was_proved_of_other_contents_is_tried_again(tree: Path, changed: str) -> None:
    for mark in marks():
        table(tree).note(mark, PROVED)
    assert unproved(tree) == []
    with (tree / changed).open("a") as file:
        file.write("# another line\n")
    assert unproved(tree) == [mark.take_out for mark in marks()]


@pytest.mark.sabotage("tests/proofs.py", "result=OUT_OF_DATE", "result=outcome.result")
def test_the_table_tells_what_was_proved_of_other_contents_and_when(tree: Path) -> None:
    one, other = marks()
    table(tree).note(one, PROVED)
    table(tree).refresh()
    assert "1 of 2 are proved" in (tree / "proofs.md").read_text()
    with (tree / "it.py").open("a") as file:
        file.write("# another line\n")
    table(tree).note(other, PROVED)
    told = (tree / "proofs.md").read_text()
    assert "1 of 2 are proved" in told
    assert told.count(f"| out of date | {of_today(one, PROVED).date} | {one.contents} |\n") == 1
