"""The site of the docs: each pattern says the same six things, links lead somewhere, nothing comes from afar."""

import importlib.util
import re
from pathlib import Path

import pytest
import typer

from app.cli import cli
from deploy.site.__main__ import CONFIG, PROOFS, build

CHECKOUT = Path(__file__).parents[2]
DOCS = CHECKOUT / "docs"
PATTERNS = sorted((DOCS / "patterns").glob("*.md"))
PARTS = ("Problem", "Code", "Proof", "Limits", "When not to")
# A drawing in the text, or a picture.
PICTURE = re.compile(r"^```\n(?=.*[─│├└═►]|app/)|^!\[", re.MULTILINE)


@pytest.mark.sabotage("docs/patterns/cache.md", "**When not to.**", "")
@pytest.mark.parametrize("page", PATTERNS, ids=lambda page: page.stem)
def test_a_pattern_says_problem_picture_code_proof_limits_and_when_not_to(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    places = [text.find(f"**{part}.**") for part in PARTS]
    assert -1 not in places, dict(zip(PARTS, places, strict=True))
    assert PICTURE.search(text)
    # What it names as code and as proof is there.
    for part in ("Code", "Proof"):
        paragraph = text[text.index(f"**{part}.**") :].partition("\n\n")[0]
        named = re.findall(r"`((?:app|workers|deploy|tests|migrations)/[\w/.]+)", paragraph)
        assert named
        assert [path for path in named if not (CHECKOUT / path).exists()] == []


@pytest.mark.sabotage("deploy/site/zensical.toml", '      "patterns/queries.md",\n', "")
def test_every_page_is_in_the_navigation() -> None:
    pages = {str(page.relative_to(DOCS)) for page in DOCS.rglob("*.md")}
    assert set(re.findall(r'"([\w/-]+\.md)"', CONFIG.read_text())) == pages | {"index.md", PROOFS}


def test_every_link_and_picture_of_the_docs_leads_somewhere() -> None:
    for page in [CHECKOUT / "README.md", *DOCS.rglob("*.md")]:
        text = re.sub(r"(?ms)^```.*?^```", "", page.read_text(encoding="utf-8"))
        for link in re.findall(r"\]\(([^)#\s]+)", text):
            known = re.match(r"https?:", link) or link.endswith(PROOFS) or (page.parent / link).exists()
            assert known, (page.name, link)


@pytest.mark.sabotage("Makefile", "\nload-compare: $(STAMP)", "\ncompare: $(STAMP)")
def test_every_command_that_readme_and_docs_name_is_there() -> None:
    makefiles = [CHECKOUT / "Makefile", *(CHECKOUT / "deploy").rglob("*.mk")]
    rules = [
        line for file in makefiles for line in re.findall(r"^([a-z][a-z -]*):(?!=)", file.read_text(), re.MULTILINE)
    ]
    targets = {target for line in rules for target in line.split()}
    commands = set(typer.main.get_group(cli).commands)
    found = 0
    for page in [CHECKOUT / "README.md", *DOCS.rglob("*.md")]:
        text = page.read_text(encoding="utf-8")
        named = re.findall(r"(?:`|^\$ |^)make ([a-z][a-z-]*)", text, re.MULTILINE)
        assert set(named) <= targets, (page.name, set(named) - targets)
        asked = re.findall(r"(?:`|^\$ |bin/)scaleout ([a-z][a-z-]*)", text, re.MULTILINE)
        assert set(asked) <= commands, (page.name, set(asked) - commands)
        modules = re.findall(r"python -m ((?:app|workers|deploy|loadtests)[\w.]*)", text)
        for module in modules:
            file = CHECKOUT / module.replace(".", "/")
            assert file.with_suffix(".py").is_file() or (file / "__main__.py").is_file(), (page.name, module)
        found += len(named) + len(asked) + len(modules)
    assert found > 100


@pytest.mark.skipif(importlib.util.find_spec("zensical") is None, reason="make docs installs Zensical")
def test_the_site_is_built_without_a_warning_and_loads_nothing_from_another_host(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "site"
    assert build(target) == 0, capfd.readouterr().err
    for page in [target / "index.html", target / "patterns" / "cache.html", target / "api.html"]:
        text = page.read_text(encoding="utf-8")
        assert re.findall(r"""(?:src|href)=["']?(?:https?:)?//[^"' >]+\.(?:js|css|woff2?|png|svg)""", text) == []
        assert "fonts.g" not in text
        for link in re.findall(r"""(?:src|href)=["']?([^"'#?> ]+)""", text):
            assert re.match(r"[a-z]+:", link) or (page.parent / link).exists(), (page.name, link)
    cache = (target / "patterns" / "cache.html").read_text(encoding="utf-8")
    assert "source/app/scaling/tally.py.html" in cache
