"""The table `docs/proofs.md`: of every sabotage what came of it the last time, and when.

It is written after each one, so a run that is cut off goes on where it was. A row stands for the contents of the
test's file and of the one that is changed: when either is another one, the row says so, and is tried again.
(PYTEST_DONT_REWRITE: nothing is asserted here.)
"""

import re
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

from sabotages import Claim, Sabotage

PROVED = "proved"
SURVIVES = "**survives**"
BROKEN = "**does not pass as it is**"
UNTRIED = "not tried yet"
OUT_OF_DATE = "out of date"
WIDTH = 60  # characters of a piece of code, enough to know it by
HEAD = """# Proofs

What came of each sabotage: *{proved}* means that the test passed as it is and failed without the feature,
*{out_of_date}* that the file of the test or of the code has changed since that date (*contents* are the first
characters of a hash of both). `make prove` writes this table as it goes and tries what is not proved of the code of
now, `make prove AGAIN=1` everything; `make check` says how many are not. What is claimed is in [claims](claims.md).
{count} of {total} are proved.

| claim | test | taken out → put instead | result | date | contents |
|---|---|---|---|---|---|
"""


@dataclass(frozen=True)
class Outcome:
    """What came of a sabotage: the words of the table, the day, and the contents it was tried on."""

    result: str
    date: str
    contents: str


def of_today(sabotage: Sabotage, result: str) -> Outcome:
    """Return the outcome of a sabotage that was just tried."""
    return Outcome(result, datetime.now(UTC).date().isoformat(), sabotage.contents)


class Proofs:
    """The table at `path`, about these claims and sabotages."""

    def __init__(self, path: Path, claims: list[Claim], sabotages: list[Sabotage]) -> None:
        self._path = path
        self._claims = {test: claim.text for claim in reversed(claims) for test in claim.tests}
        self._sabotages = sorted(sabotages, key=lambda sabotage: (sabotage.test, _change(sabotage)))

    def unproved(self) -> list[Sabotage]:
        """Return those that are not proved for what test and code are now."""
        outcomes = self._read()
        return [each for each in self._sabotages if _as_of_now(each, outcomes).result != PROVED]

    def note(self, sabotage: Sabotage, result: str) -> None:
        """Write down what came of one."""
        self._write(self._read() | {_key(sabotage): of_today(sabotage, result)})

    def refresh(self) -> None:
        """Write down which rows are out of date, and those that are new."""
        self._write(self._read())

    def _write(self, outcomes: dict[tuple[str, str], Outcome]) -> None:
        rows, proved = [], 0
        for each in self._sabotages:
            outcome = _as_of_now(each, outcomes)
            proved += outcome.result == PROVED
            cells = (self._claims.get(each.test, "-"), *_key(each), outcome.result, outcome.date, outcome.contents)
            rows.append(f"| {' | '.join(cells)} |\n")
        head = HEAD.format(proved=PROVED, out_of_date=OUT_OF_DATE, count=proved, total=len(rows))
        text = head + "".join(rows)
        whole = self._path.with_suffix(".new")
        whole.write_text(text, encoding="utf-8")
        whole.replace(self._path)

    def _read(self) -> dict[tuple[str, str], Outcome]:
        """Return what stands in the table, by test and change."""
        if not self._path.exists():
            return {}
        lines = self._path.read_text(encoding="utf-8").splitlines()
        rows = [re.split(r"(?<!\\)\|", line.strip("|")) for line in lines if "::" in line]
        cells = [[cell.strip() for cell in row] for row in rows]
        return {(test, change): Outcome(*outcome) for _claim, test, change, *outcome in cells}


def _as_of_now(sabotage: Sabotage, outcomes: dict[tuple[str, str], Outcome]) -> Outcome:
    """Return what came of one, as far as that is still so."""
    outcome = outcomes.get(_key(sabotage), Outcome(UNTRIED, "-", "-"))
    same = outcome.contents == sabotage.contents or outcome.result == UNTRIED
    return outcome if same else replace(outcome, result=OUT_OF_DATE)


def _key(sabotage: Sabotage) -> tuple[str, str]:
    return f"`{sabotage.test}`", _change(sabotage)


def _change(sabotage: Sabotage) -> str:
    """Return the change as a cell: the file, and the beginnings of what goes and of what comes."""
    gone, put = (_code(text) for text in (sabotage.take_out, sabotage.put))
    return f"`{sabotage.path}`: {gone} → {put}"


def _code(text: str) -> str:
    """Return a piece of code in one line of a cell."""
    line = " ".join(text.split())
    line = line if len(line) <= WIDTH else f"{line[: WIDTH - 2]} …"
    return f"`` {line} ``".replace("|", "\\|") if line else "nothing"
