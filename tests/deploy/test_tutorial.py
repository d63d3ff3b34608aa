"""The tutorial, done: its blocks are applied to a copy of the project, and the tests that it ends with run there."""

import ast
import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

CHECKOUT = Path(__file__).parents[2]
PAGE = CHECKOUT / "docs" / "tutorial.md"
COPIED = ("app", "workers", "migrations", "deploy", "loadtests", "tests", "pyproject.toml")
BLOCK = re.compile(r"^`([\w/.]+)`\n\n```(\w+)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
# A cluster of its own and four tests; on a busy machine many times what it takes alone.
PATIENCE = 240


@dataclass(frozen=True)
class Block:
    """A block of the page: a whole file, or a change of one."""

    kind: str
    path: str
    text: str

    def apply(self, tree: Path) -> None:
        """Do to a copy of the project what the block says."""
        file = tree / self.path
        if self.kind != "diff":
            assert not file.exists(), f"{self.path} is there already"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(self.text, encoding="utf-8")
            return
        lines = self.text.splitlines(keepends=True)
        assert {line[0] for line in lines} <= set("+- "), self.text
        before = "".join(line[1:] for line in lines if line[0] != "+")
        after = "".join(line[1:] for line in lines if line[0] != "-")
        text = file.read_text(encoding="utf-8")
        assert text.count(before) == 1, f"{self.path} has these lines {text.count(before)} times:\n{before}"
        file.write_text(text.replace(before, after), encoding="utf-8")


def blocks() -> list[Block]:
    """Return the blocks in their order, the migration with the next free number, as the page says."""
    numbers = sorted(path.name[:4] for path in (CHECKOUT / "migrations" / "versions").glob("[0-9]*.py"))
    following = f"{int(numbers[-1]) + 1:04}"
    found = []
    for path, kind, text in BLOCK.findall(PAGE.read_text(encoding="utf-8")):
        before = numbers[-1] if path.startswith("migrations/") else "0009"
        path_now, text_now = (_numbered(part, before, following) for part in (path, text))
        found.append(Block(kind, path_now, text_now))
    return found


def _numbered(text: str, before: str, following: str) -> str:
    """Return a text of the page with the numbers of now, both at once: what 0009 becomes may be 0010."""
    return following.join(part.replace("0009", before) for part in text.split("0010"))


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A copy of the project with the tutorial done."""
    made = tmp_path / "project"
    for name in COPIED:
        source = CHECKOUT / name
        if source.is_dir():
            shutil.copytree(source, made / name, ignore=shutil.ignore_patterns("__pycache__", "results"))
        else:
            shutil.copyfile(source, made / name)
    for block in blocks():
        block.apply(made)
    return made


def test_what_the_tutorial_writes_is_in_the_projects_style(tree: Path) -> None:
    written = sorted({block.path for block in blocks()})
    for command in (["check"], ["format", "--check"]):
        done = subprocess.run(  # noqa: S603  # our own interpreter
            [sys.executable, "-m", "ruff", *command, "--no-cache", *written],
            cwd=tree,
            check=False,
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert done.returncode == 0, done.stdout


def test_the_tutorials_sabotages_fit_what_it_writes(tree: Path) -> None:
    (test,) = (block for block in blocks() if block.path.startswith("tests/"))
    marks = re.findall(r"@pytest\.mark\.sabotage\(\s*(.*?),?\s*\)\n(?=@pytest|async def|def)", test.text, re.DOTALL)
    assert len(marks) == test.text.count("@pytest.mark.sabotage(") == 4
    for mark in marks:
        path, take_out, _ = ast.literal_eval(f"({mark},)")
        assert (tree / path).read_text(encoding="utf-8").count(take_out) == 1, mark


@pytest.mark.postgresql("its migration puts up a fence, and one engine shows it")
@pytest.mark.sabotage("docs/tutorial.md", "+    reviews.router,\n", "")
def test_the_tutorial_works_as_it_is_written(tree: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("COV", "PYTEST"))}
    done = subprocess.run(  # our own interpreter
        [sys.executable, "-m", "pytest", "-q", "--no-header", "-p", "no:cacheprovider", "tests/api/test_reviews.py"],
        cwd=tree,
        env=environment | {"PYTHONPATH": str(tree)},
        check=False,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )
    assert done.returncode == 0, done.stdout[-6000:]
    assert "4 passed" in done.stdout
