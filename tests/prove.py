"""Proves the proofs: takes each feature out, as its test declares, and expects the test to fail.

    python tests/prove.py              every claim of docs/claims.md: its test as it is, then with its sabotage
    python tests/prove.py NAME         only the tests whose name contains NAME
    python tests/prove.py --check      only whether every claim's file and test are there, and every sabotage fits

A sabotage is the mark beside the test: `sabotage(path, take_out, put)`, one exact piece of text and what replaces it.
It is applied to a copy of the tree, so a run that is cut off leaves nothing behind.
"""

import contextlib
import io
import os
import re
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
CLAIMS = ROOT / "docs" / "claims.md"
FAILED = 1  # pytest's exit code for failed tests; any other says that the run itself went wrong


@dataclass(frozen=True)
class Sabotage:
    """The smallest change that takes the feature of one test out; `database` is the engine that the test is about."""

    test: str
    path: str
    take_out: str
    put: str
    database: str = "postgresql"

    def problem(self) -> str | None:
        """Return why it cannot be applied, or None."""
        file = ROOT / self.path
        if not file.is_file():
            return f"{self.test}: {self.path} is gone"
        count = file.read_text(encoding="utf-8").count(self.take_out)
        return None if count == 1 else f"{self.test}: what it takes out stands {count} times in {self.path}, not once"

    def apply(self, tree: Path) -> None:
        """Change the copy."""
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
                self.sabotages += [
                    Sabotage(test, *mark.args, **mark.kwargs, **engine) for mark in item.iter_markers("sabotage")
                ]
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


def copy_tree(into: Path) -> None:
    """Copy what Git knows or would know."""
    listed = subprocess.run(  # fixed arguments
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],  # noqa: S607
        cwd=ROOT,
        check=True,
        capture_output=True,
        text=True,
    ).stdout.splitlines()
    for name in listed:
        if (ROOT / name).is_file():
            (into / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, into / name)


def run(tree: Path, tests: list[str], database: str) -> tuple[int, str]:
    """Run tests of a tree; return pytest's exit code and the end of what it printed."""
    environment = os.environ | {"PYTHONPATH": str(tree), "TEST_DATABASE": database}
    done = subprocess.run(  # noqa: S603  # our own interpreter and test names
        [sys.executable, "-m", "pytest", "-q", "--no-header", "-p", "no:cacheprovider", *tests],
        cwd=tree,
        env=environment,
        check=False,
        capture_output=True,
        text=True,
    )
    return done.returncode, done.stdout[-3000:]


def prove(sabotages: list[Sabotage]) -> bool:
    """Run every test as it is and with its feature taken out; print a line each, and return whether all held."""
    for database in sorted({sabotage.database for sabotage in sabotages}):
        tests = sorted({sabotage.test for sabotage in sabotages if sabotage.database == database})
        code, output = run(ROOT, tests, database)
        if code:
            print(output)
            print(f"As it is, not every test passes on {database}; nothing can be proved.")
            return False
    held = True
    for sabotage in sabotages:
        with tempfile.TemporaryDirectory(prefix="prove-") as folder:
            tree = Path(folder)
            copy_tree(tree)
            sabotage.apply(tree)
            code, output = run(tree, [sabotage.test], sabotage.database)
        fails = code == FAILED
        held = held and fails
        print(f"{'proved' if fails else 'NOT PROVED'}  {sabotage.test}  without {sabotage.path}", flush=True)
        if not fails:
            print(output)
    return held


def main(arguments: list[str]) -> int:
    """Check, then prove what is asked for."""
    claims, found = read_claims(), look()
    said = problems(claims, found)
    if said:
        print("\n".join(said))
        return 1
    if "--check" in arguments:
        return 0
    wanted = [sabotage for sabotage in found.sabotages if all(part in sabotage.test for part in arguments)]
    if not wanted:
        print("No test with a sabotage has that name.")
        return 1
    return 0 if prove(wanted) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
