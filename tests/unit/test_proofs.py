"""The table of proofs: it goes on where it was cut off, and forgets what was proved of other contents."""

from pathlib import Path

import pytest
import sabotages
from proofs import PROVED, SURVIVES, Proofs
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


def table(tree: Path) -> Proofs:
    return Proofs(tree / "proofs.md", [Claim("It works.", ("it.py",), (TEST,))], marks())


@pytest.mark.sabotage("tests/proofs.py", "outcomes = self._read() | ", "outcomes = ")
def test_a_run_that_was_cut_off_goes_on_where_it_was(tree: Path) -> None:
    one, other = marks()
    table(tree).note(one, PROVED)
    assert [table(tree).holds(mark) for mark in (one, other)] == [True, False]
    table(tree).note(other, SURVIVES)
    assert [table(tree).holds(mark) for mark in (one, other)] == [True, False]
    rows = [line for line in (tree / "proofs.md").read_text().splitlines() if "::" in line]
    assert rows[0].startswith(f"| It works. | `{TEST}` | `it.py`: `` a \\| b `` → nothing | proved | ")
    assert "1 of 2 are proved" in (tree / "proofs.md").read_text()


@pytest.mark.sabotage("tests/proofs.py", "(PROVED, sabotage.contents)", "(PROVED, outcome.contents)")
@pytest.mark.parametrize("changed", ["it.py", "tests/test_it.py"])
def test_what_was_proved_of_other_contents_is_tried_again(tree: Path, changed: str) -> None:
    one, _ = marks()
    table(tree).note(one, PROVED)
    with (tree / changed).open("a") as file:
        file.write("# another line\n")
    assert not table(tree).holds(marks()[0])


@pytest.mark.sabotage("tests/proofs.py", "outcome.contents != each.contents", "False")
def test_the_table_shows_nothing_as_proved_that_was_proved_of_other_contents(tree: Path) -> None:
    one, other = marks()
    table(tree).note(one, PROVED)
    with (tree / "it.py").open("a") as file:
        file.write("# another line\n")
    table(tree).note(other, PROVED)
    assert "1 of 2 are proved" in (tree / "proofs.md").read_text()
    assert (tree / "proofs.md").read_text().count("| not tried yet | - | - |") == 1
