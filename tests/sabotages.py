"""What there is to prove: the claims of `docs/claims.md`, the tests that prove them, and what takes each feature out.

A sabotage is the mark beside a test, `sabotage(path, take_out, put)`: one exact piece of text and what replaces it.
(PYTEST_DONT_REWRITE: nothing is asserted here.)
"""

import contextlib
import hashlib
import io
import re
import sys
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
CLAIMS = ROOT / "docs" / "claims.md"
# Who asks for one of these talks to the processes of a cluster; whoever asks for `cluster` alone, to its servers.
CLIENTS = {"client", "new_customer"}


@dataclass(frozen=True)
class Sabotage:
    """The smallest change that takes the feature of one test out.

    Attributes:
        test: as pytest names it, without parameters.
        path: the file that is changed.
        take_out: a piece of text that stands there once.
        put: what replaces it.
        database: the engine that the test is about.
        servers: whether the test uses the servers of the whole run's cluster.
        processes: whether it talks to that cluster's processes, which must then run the changed code too.
    """

    test: str
    path: str
    take_out: str
    put: str
    database: str = "postgresql"
    servers: bool = False
    processes: bool = False

    @property
    def module(self) -> str:
        """The file of the test."""
        return self.test.partition("::")[0]

    @cached_property
    def contents(self) -> str:
        """Eight characters that change with the test's file, the file that is changed, and the change.

        As they are when it is first asked: what is proved is proved of these, whatever is written meanwhile.
        """
        files = [(ROOT / name).read_bytes() for name in (self.module, self.path)]
        return hashlib.sha256(b"\0".join([*files, self.take_out.encode(), self.put.encode()])).hexdigest()[:8]

    def problem(self) -> str | None:
        """Return why it cannot be applied, or None."""
        file = ROOT / self.path
        if not file.is_file():
            return f"{self.test}: {self.path} is gone"
        count = file.read_text(encoding="utf-8").count(self.take_out)
        return None if count == 1 else f"{self.test}: what it takes out stands {count} times in {self.path}, not once"

    def apply(self, tree: Path) -> None:
        """Change a copy."""
        file = tree / self.path
        file.write_text(file.read_text(encoding="utf-8").replace(self.take_out, self.put), encoding="utf-8")


class Collector:
    """A pytest plugin that only looks: which tests there are, and what takes their features out."""

    def __init__(self) -> None:
        self.tests: set[str] = set()
        self.sabotages: list[Sabotage] = []

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        """Read the marks of every test; parameters of one test count as one."""
        for item in items:
            test = item.nodeid.partition("[")[0]
            if test not in self.tests:
                engine = {"database": "mariadb"} if item.get_closest_marker("mariadb") else {}
                fixtures = set(getattr(item, "fixturenames", ()))
                uses = {"servers": "cluster" in fixtures, "processes": bool(CLIENTS & fixtures)}
                marks = list(item.iter_markers("sabotage"))
                self.sabotages += [Sabotage(test, *mark.args, **mark.kwargs, **engine, **uses) for mark in marks]
            self.tests.add(test)


@dataclass(frozen=True)
class Claim:
    """One row of docs/claims.md: what is claimed, the files that do it, the tests that prove it."""

    text: str
    code: tuple[str, ...]
    tests: tuple[str, ...]


def read_claims() -> list[Claim]:
    """Return the rows of the table."""
    rows = [line.strip("|").split("|") for line in CLAIMS.read_text(encoding="utf-8").splitlines() if "::" in line]
    return [
        Claim(text.strip(), tuple(re.findall(r"`([^`]+)`", code)), tuple(re.findall(r"`([^`]+)`", proof)))
        for text, code, proof, *_ in rows
    ]


def look() -> Collector:
    """Collect all tests without running one."""
    collector, said = Collector(), io.StringIO()
    with contextlib.redirect_stdout(said):
        code = pytest.main(["--collect-only", "-qq", str(ROOT / "tests")], plugins=[collector])
    if code:
        sys.exit(f"{said.getvalue()}\nThe tests cannot be collected.")
    return collector


def problems(claims: list[Claim], found: Collector) -> list[str]:
    """Return every claim without its file, test or sabotage, and every sabotage that no longer fits."""
    with_sabotage = {sabotage.test for sabotage in found.sabotages}
    said = [problem for sabotage in found.sabotages if (problem := sabotage.problem())]
    for claim in claims:
        said += [f"“{claim.text}”: {path} is gone" for path in claim.code if not (ROOT / path).exists()]
        said += [f"“{claim.text}”: {test} is gone" for test in claim.tests if test not in found.tests]
        if not with_sabotage.intersection(claim.tests):
            said.append(f"“{claim.text}”: none of its tests has a sabotage")
    return said
