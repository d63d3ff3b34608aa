"""The table `docs/proofs.md`: of every sabotage what came of it the last time, and when.

It is written after each one, so a run that is cut off goes on where it was. A row stands for the contents of the
test's file and of the one that is changed: when either is another one, the row is forgotten, and tried again.
(PYTEST_DONT_REWRITE: nothing is asserted here.)
"""

import re
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from sabotages import Claim, Sabotage

PROVED = "proved"
SURVIVES = "**survives**"
BROKEN = "**does not pass as it is**"
UNTRIED = "not tried yet"
WIDTH = 60  # characters of a piece of code, enough to know it by
HEAD = """# Proofs

What came of each sabotage: *{proved}* means that the test passed as it is and failed without the feature. `make prove`
writes this table as it goes, and tries again what has not been proved, or whose test or code has changed since
(*contents* are the first characters of a hash of both); `make prove AGAIN=1` tries everything. What is claimed is in
[claims](claims.md). {count} of {total} are proved.

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

    def holds(self, sabotage: Sabotage) -> bool:
        """Return whether it is proved for what test and code are now."""
        outcome = self._read().get(_key(sabotage))
        wanted = (PROVED, sabotage.contents)
        return outcome is not None and (outcome.result, outcome.contents) == wanted

    def note(self, sabotage: Sabotage, result: str) -> None:
        """Write down what came of one."""
        outcomes = self._read() | {_key(sabotage): of_today(sabotage, result)}
        rows, proved = [], 0
        for each in self._sabotages:
            outcome = outcomes.get(_key(each))
            if outcome is None or outcome.contents != each.contents:
                outcome = Outcome(UNTRIED, "-", "-")
            proved += outcome.result == PROVED
            cells = (self._claims.get(each.test, "-"), *_key(each), outcome.result, outcome.date, outcome.contents)
            rows.append(f"| {' | '.join(cells)} |\n")
        text = HEAD.format(proved=PROVED, count=proved, total=len(rows)) + "".join(rows)
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
