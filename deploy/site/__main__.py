"""Builds the site of the docs into `site/`: `python -m deploy.site [FOLDER]`.

The pages stay as people read them in the repository, and this makes of them what a site needs: README becomes the first
page, and every file of the project that a page links to or names becomes a page of its own. Nothing is loaded from
another host, and a link that leads nowhere stops the build.
"""

import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from posixpath import normpath, relpath

from rich.console import Console

CHECKOUT = Path(__file__).parents[2]
CONFIG = Path(__file__).with_name("zensical.toml")
# `make prove` writes it.
PROOFS = "proofs.md"
# Where the project's own files are in the site, below its root.
SOURCES = "source"
LANGUAGES = {".py": "python", ".json": "json", ".yml": "yaml", ".yaml": "yaml", ".toml": "toml", ".tf": "hcl"}
PICTURES = {".svg", ".png"}
LINK = re.compile(r"(?<=\]\()([^)#\s]+)(#[^)\s]*)?(?=\))")
# `app/scaling/cache.py` and `tests/api/test_orders.py::test_…` in running text, if not a link already.
NAMED = re.compile(r"(?<!\[)`((?:app|workers|deploy|migrations|tests|loadtests)/[\w/.-]+\.\w+)((?:::\w+)?)`(?!\])")
FENCE = re.compile(r"^```.*?^```", re.DOTALL | re.MULTILINE)
console = Console(stderr=True)


class Staging:
    """The folder from which the site is built: pages with their links turned, and the sources that they name."""

    def __init__(self, folder: Path) -> None:
        self._docs = folder / "docs"

    def fill(self) -> None:
        """Copy the docs, then turn every page."""
        shutil.copytree(CHECKOUT / "docs", self._docs)
        if not (self._docs / PROOFS).exists():
            (self._docs / PROOFS).write_text("# Proofs\n\nNobody has run `make prove` here yet.\n", encoding="utf-8")
        for page in sorted((CHECKOUT / "docs").rglob("*.md")):
            self._turn(page, str(page.relative_to(CHECKOUT / "docs")))
        self._turn(CHECKOUT / "README.md", "index.md")

    def _turn(self, page: Path, name: str) -> None:
        """Write a page of the repository under its name in the site."""
        here = str(page.parent.relative_to(CHECKOUT))
        text = page.read_text(encoding="utf-8")

        def turned(part: str) -> str:
            part = LINK.sub(lambda link: self._target(here, name, link[1]) + (link[2] or ""), part)
            return NAMED.sub(lambda found: self._named(name, found[1], found[2]), part)

        # What stands in a fence is code, also where it looks like a link.
        fences = [(found.start(), found.end()) for found in FENCE.finditer(text)]
        made, at = [], 0
        for start, end in fences:
            made += [turned(text[at:start]), text[start:end]]
            at = end
        (self._docs / name).write_text("".join([*made, turned(text[at:])]), encoding="utf-8")

    def _target(self, here: str, name: str, link: str) -> str:
        """Return where a link of a page leads in the site; one that leads nowhere stays, and the build refuses it."""
        if re.match(r"[a-z]+:", link):
            return link
        path = normpath(f"{here}/{link}")
        if path == "README.md":
            return relpath("index.md", str(Path(name).parent))
        if path.startswith("docs/"):
            return relpath(path.removeprefix("docs/"), str(Path(name).parent))
        return relpath(self._source(path), str(Path(name).parent)) if (CHECKOUT / path).is_file() else link

    def _named(self, name: str, path: str, test: str) -> str:
        if not (CHECKOUT / path).is_file() or Path(path).suffix in PICTURES:
            return f"`{path}{test}`"
        return f"[`{path}{test}`]({relpath(self._source(path), str(Path(name).parent))})"

    def _source(self, path: str) -> str:
        """Put a file of the project into the site, as a picture or as a page that shows it; return its name there."""
        file = CHECKOUT / path
        name = f"{SOURCES}/{path}" if file.suffix in PICTURES else f"{SOURCES}/{path}.md"
        target = self._docs / name
        if not target.exists():
            target.parent.mkdir(parents=True, exist_ok=True)
            if file.suffix in PICTURES:
                shutil.copyfile(file, target)
            else:
                # Not found by a search for words of the docs, and more backquotes than any file has itself.
                head = f"---\nsearch:\n  exclude: true\nhide: [toc]\n---\n\n# {path}\n\n"
                language = LANGUAGES.get(file.suffix, "text")
                target.write_text(
                    f"{head}``````{language}\n{file.read_text(encoding='utf-8')}``````\n", encoding="utf-8"
                )
        return name


def build(target: Path) -> int:
    """Build the site into a folder, which is replaced; return 0, or what the generator returned."""
    with tempfile.TemporaryDirectory(prefix="site-") as folder:
        staged = Path(folder)
        Staging(staged).fill()
        shutil.copyfile(CONFIG, staged / CONFIG.name)
        command = [sys.executable, "-m", "zensical", "build", "--strict", "--config-file", CONFIG.name]
        done = subprocess.run(  # noqa: S603  # our own interpreter and words
            command, cwd=staged, check=False, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        if done.returncode:
            # The last of it is the generator's own traceback for "there were warnings"; colours it has always.
            said = re.sub(r"\x1b\[[\d;]*m", "", done.stdout).partition("Traceback")[0]
            console.print(said, markup=False, highlight=False, soft_wrap=True)
            return done.returncode
        shutil.rmtree(target, ignore_errors=True)
        shutil.copytree(staged / "site", target)
    return 0


def main() -> None:
    """Build, and say where it is."""
    target = Path(sys.argv[1]) if len(sys.argv) > 1 else CHECKOUT / "site"
    code = build(target)
    if code:
        sys.exit(code)
    console.print(f"The site is in {target}; open {target / 'index.html'}")


if __name__ == "__main__":
    main()
