"""Proves the proofs: takes each feature out, as its test declares, and expects the test to fail.

    python tests/prove.py              what `docs/proofs.md` does not show as proved for the tests and code of now
    python tests/prove.py --again      everything
    python tests/prove.py NAME         only the tests whose name contains NAME
    python tests/prove.py --check      only whether every claim's file and test are there, and every sabotage fits

A sabotage is applied to a copy of the tree, so a run that is cut off leaves nothing behind. The tests of a module run
as they are first, together, on a cluster that stays up. A test that needs only servers runs on it too when its feature
is out: fails it, and passes again right afterwards as it is, then the sabotage is what made it fail. All others, and
those that pass there because the code is the cluster's own processes', get a cluster that runs the changed code.
"""

import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from itertools import groupby
from pathlib import Path

import conftest
from proofs import BROKEN, PROVED, SURVIVES, Proofs
from sabotages import ROOT, Sabotage, look, problems, read_claims

from deploy.local.cluster import Cluster

TABLE = ROOT / "docs" / "proofs.md"
FAILED = 1  # pytest's exit code for failed tests; any other says that the run itself went wrong
# What waits for ever without its feature has failed, a unit test sooner than others. It bounds only what is sabotaged.
HANGS, UNIT_HANGS = 400.0, 60.0  # seconds
# A test that waits for what is taken out waits in vain: so long, which is ample on a machine that does nothing else.
PATIENCE = 20  # seconds
# What pytest loads by itself is half of the start of a run. Who needs more than the first of these names it.
PLUGIN, OTHERS = "pytest_asyncio.plugin", "schemathesis"


def copy_tree(into: Path) -> None:
    """Copy what Git knows or would know, with the bytecode of it that is there: starting is most of the work."""
    listed = subprocess.run(  # fixed arguments
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],  # noqa: S607
        cwd=ROOT,
        check=True,
        capture_output=True,
        text=True,
    ).stdout.splitlines()
    for name in listed:
        source, copy = ROOT / name, into / name
        if source.is_file():
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(source, copy)
            for compiled in (source.parent / "__pycache__").glob(f"{source.stem}.*.pyc"):
                (copy.parent / "__pycache__").mkdir(exist_ok=True)
                shutil.copy2(compiled, copy.parent / "__pycache__" / compiled.name)


@contextmanager
def sabotaged(sabotage: Sabotage) -> Iterator[Path]:
    """Yield a copy of the tree whose feature is taken out."""
    with tempfile.TemporaryDirectory(prefix="prove-") as folder:
        tree = Path(folder)
        copy_tree(tree)
        sabotage.apply(tree)
        yield tree


class Bench:
    """Runs tests on one engine, of any tree; its cluster starts when it is first needed and stays until `close`."""

    def __init__(self, database: str) -> None:
        self._database = database
        self._cluster: Cluster | None = None
        self._stack = ExitStack()

    def close(self) -> None:
        """Stop the cluster and forget it."""
        self._cluster = None
        self._stack.close()

    def run(
        self, tree: Path, tests: list[str], *, standing: bool, hangs: float | None = None
    ) -> tuple[bool | None, str]:
        """Run tests of a tree, on the standing cluster or on one of their own, until one fails or hangs.

        Returns:
            Whether all passed, None if the run itself went wrong; and the end of what pytest printed.
        """
        environment = os.environ | {
            "PYTHONPATH": str(tree),
            "TEST_DATABASE": self._database,
            "TEST_PATIENCE": str(PATIENCE),
            "TEST_CLUSTER": str(self._folder()) if standing else "",
        }
        modules = {test.partition("::")[0] for test in tests}
        few = not any(OTHERS in (tree / module).read_text(encoding="utf-8") for module in modules)
        environment |= {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"} if few else {}
        plugins = ["-p", "no:cacheprovider", *(["-p", PLUGIN] if few else [])]
        command = [sys.executable, "-m", "pytest", "-q", "-x", "--no-header", *plugins, *tests]
        with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as output:
            # Its own group, so that one that hangs takes along what it has started.
            process = subprocess.Popen(  # noqa: S603  # our own interpreter and test names
                command, cwd=tree, env=environment, stdout=output, stderr=output, start_new_session=True
            )
            try:
                code = process.wait(hangs)
            except subprocess.TimeoutExpired:
                code = FAILED
            finally:
                with suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
            output.seek(0)
            return {0: True, FAILED: False}.get(code), output.read()[-3000:]

    def _folder(self) -> Path:
        if self._cluster is None:
            folder = Path(self._stack.enter_context(tempfile.TemporaryDirectory(prefix="prove-cluster-"))) / "c"
            self._cluster = Cluster(folder, environment=conftest.ENVIRONMENT, database=self._database)
            self._cluster.up()
            self._stack.callback(self._cluster.down, wipe=True)
        return self._cluster.layout.root

    def passing(self, sabotages: list[Sabotage]) -> set[str]:
        """Return those of the tests that pass as they are; tell of the others."""
        standing = any(sabotage.servers for sabotage in sabotages)
        tests = list(dict.fromkeys(sabotage.test for sabotage in sabotages))
        if self.run(ROOT, tests, standing=standing)[0]:
            return set(tests)
        passed = set()
        for test in tests:
            passes, output = self.run(ROOT, [test], standing=standing)
            if passes:
                passed.add(test)
            else:
                print(output)
        return passed

    def fails_without(self, sabotage: Sabotage) -> bool:
        """Return whether the test fails when its feature is taken out; tell of it if it does not."""
        hangs = UNIT_HANGS if sabotage.module.startswith("tests/unit/") else HANGS
        with sabotaged(sabotage) as tree:
            if sabotage.servers and not sabotage.processes:
                passes, _ = self.run(tree, [sabotage.test], standing=True, hangs=hangs)
                if passes is False:
                    as_it_is, _ = self.run(ROOT, [sabotage.test], standing=True)
                    if as_it_is:
                        return True
                    self.close()  # it has left the cluster in a state in which nothing can be told
            passes, output = self.run(tree, [sabotage.test], standing=False, hangs=hangs)
        if passes is not False:
            print(output)
        return passes is False


def prove(sabotages: list[Sabotage], proofs: Proofs) -> bool:
    """Run every test as it is and with its feature taken out; print and write down each, return whether all held."""

    def room(sabotage: Sabotage) -> tuple[str, bool, bool, str]:
        # What takes longest is told last: many clusters of their own, or one that starts every time.
        long = sabotage.processes or sabotage.module.startswith("tests/failure/")
        return sabotage.database, long, sabotage.servers, sabotage.module

    held = True
    for database, of_engine in groupby(sorted(sabotages, key=room), lambda sabotage: sabotage.database):
        bench = Bench(database)
        try:
            for _, of_room in groupby(of_engine, room):
                together = list(of_room)
                passing = bench.passing(together)
                for sabotage in together:
                    result = BROKEN
                    if sabotage.test in passing:
                        result = PROVED if bench.fails_without(sabotage) else SURVIVES
                    held = held and result is PROVED
                    proofs.note(sabotage, result)
                    print(f"{result.strip('*')}  {sabotage.test}  without {sabotage.path}", flush=True)
        finally:
            bench.close()
    return held


def main(arguments: list[str]) -> int:
    """Check, then prove what is asked for."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("Ended; the next run goes on here."))
    names = [argument for argument in arguments if not argument.startswith("--")]
    claims, found = read_claims(), look()
    said = problems(claims, found)
    if said:
        print("\n".join(said))
        return 1
    if "--check" in arguments:
        return 0
    wanted = [sabotage for sabotage in found.sabotages if all(part in sabotage.test for part in names)]
    if not wanted:
        print("No test with a sabotage has that name.")
        return 1
    proofs = Proofs(TABLE, claims, found.sabotages)
    if not names and "--again" not in arguments:
        wanted = [sabotage for sabotage in wanted if not proofs.holds(sabotage)]
    return 0 if prove(wanted, proofs) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
