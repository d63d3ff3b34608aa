"""Holds the locked packages against the database of known vulnerabilities, where that can be reached.

It ends with 0 if nothing is known, 1 if something is, and 3 if nobody can be asked: then nothing has been checked, and
it says so. What must be lived with goes into `ACCEPTED`, each with its reason.
"""

import subprocess
import sys
import tempfile
from pathlib import Path

import httpx

ROOT = Path(__file__).parents[1]
DATABASE = "https://api.osv.dev/v1/query"
NOBODY_THERE = 3
# Vulnerability -> why it does not concern this service. None is known.
ACCEPTED: dict[str, str] = {}


def reachable() -> bool:
    """Ask the database whether it answers at all."""
    try:
        return httpx.post(DATABASE, json={"package": {"name": "pip", "ecosystem": "PyPI"}}, timeout=10).is_success
    except httpx.TransportError:
        return False


def main() -> int:
    """Ask; returns the exit code."""
    if not reachable():
        print(f"{DATABASE} cannot be reached from here: NOTHING WAS CHECKED. Run make audit where it can.")
        return NOBODY_THERE
    with tempfile.TemporaryDirectory() as folder:
        locked = Path(folder) / "locked.txt"
        subprocess.run(
            [".venv/bin/uv", "export", "--frozen", "--quiet", "--no-emit-project", "--output-file", str(locked)],
            cwd=ROOT,
            check=True,
        )
        ignored = [argument for known in ACCEPTED for argument in ("--ignore-vuln", known)]
        audit = [".venv/bin/pip-audit", "--vulnerability-service", "osv", "--disable-pip", "--require-hashes"]
        return subprocess.run([*audit, *ignored, "--requirement", str(locked)], cwd=ROOT, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
