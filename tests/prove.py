"""Proves the proofs: takes each feature out, as its test declares, and expects the test to fail.

    python tests/prove.py              what `docs/proofs.md` does not show as proved for the tests and code of now
    python tests/prove.py --again      everything
    python tests/prove.py NAME         only the tests whose name contains NAME
    python tests/prove.py --check      only whether every claim's file and test are there, and every sabotage fits

All runs are in copies of the tree as it was at the start: a test that fails because it is in a copy is not taken for
one that fails without its feature. The tests of a module run as they are first, together, on a cluster that stays up.
Those that need only servers run on it too when their features are out, one after the other: those that fail then, and
pass again right afterwards as they are, together, have failed for the sabotage. All others, also those that pass there
because the code is the cluster's own processes', get a cluster that runs the changed code.
Modules are proved side by side, as many as the setting JOBS says, each by a process with a cluster of its own. One that
is told to end, also by Ctrl-C, ends its clusters, and those of its tests end by themselves.
"""

import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from itertools import groupby
from pathlib import Path

import conftest
from proofs import BROKEN, PROVED, SURVIVES, Proofs
from runner import Run, Runner
from sabotages import ROOT, Sabotage, look, problems, read_claims

from deploy.local import ClusterError
from deploy.local.cluster import Cluster

TABLE = ROOT / "docs" / "proofs.md"
# What waits for ever without its feature has failed, a unit test sooner than others. It bounds only what is sabotaged.
HANGS, UNIT_HANGS = 400.0, 60.0  # seconds
# A test that waits for what is taken out waits in vain: at most so long, which is ample on a machine that does nothing
# else. Where it must pass again afterwards, as quickly as before, what it took and some more is enough.
PATIENCE, LITTLE_PATIENCE = 20.0, 5.0  # seconds
# What pytest loads by itself is half of the start of a run: this is what all need, and the others those who name it.
PLUGIN, OTHERS = "pytest_asyncio.plugin", {"schemathesis": ("_hypothesis_pytestplugin", "schemathesis.pytest.plugin")}
# How a person, a terminal that closes, and a machine that stops end a run.
ENDS = (signal.SIGINT, signal.SIGHUP, signal.SIGTERM)
# Two at once keep two cores busy: one waits while the other works. More than these take more memory than laptops have.
JOBS = min(os.cpu_count() or 1, 4)


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
def sabotaged(sabotage: Sabotage, tree: Path) -> Iterator[Path]:
    """Yield a copy of a tree whose feature is taken out."""
    with tempfile.TemporaryDirectory(prefix="prove-") as folder:
        copy = Path(folder) / "tree"
        shutil.copytree(tree, copy, symlinks=True)
        sabotage.apply(copy)
        yield copy


class Bench:
    """Runs tests on one engine, of a tree and of changed copies of it.

    Its cluster starts when it is first needed, and stays until `close`.
    """

    def __init__(self, tree: Path, database: str, runner: Runner) -> None:
        self._tree = tree
        self._database = database
        self._runner = runner
        self._cluster: Cluster | None = None
        self._stack = ExitStack()

    def close(self) -> None:
        """Stop the cluster and forget it."""
        self._cluster = None
        self._stack.close()

    def run(
        self,
        tree: Path,
        tests: list[str],
        *,
        standing: bool,
        patience: float | None = None,
        hangs: float | None = None,
    ) -> Run:
        """Run tests of a tree, on the standing cluster or on one of their own, with their own or another patience."""
        environment = os.environ | {
            "PYTHONPATH": str(tree),
            "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
            "TEST_DATABASE": self._database,
            "TEST_CLUSTER": str(self._folder()) if standing else "",
        }
        environment |= {"TEST_PATIENCE": str(patience)} if patience else {}
        modules = {tree / test.partition("::")[0] for test in tests}
        texts = [module.read_text(encoding="utf-8") for module in modules]
        plugins = [PLUGIN, *(name for word in OTHERS for name in OTHERS[word] if any(word in text for text in texts))]
        loaded = [part for plugin in ("no:cacheprovider", *plugins) for part in ("-p", plugin)]
        return self._runner.run(tree, ["-q", "--no-header", *loaded, *tests], environment, hangs)

    def _folder(self) -> Path:
        if self._cluster is None:
            folder = Path(self._stack.enter_context(tempfile.TemporaryDirectory(prefix="prove-cluster-"))) / "c"
            self._cluster = Cluster(folder, environment=conftest.ENVIRONMENT, database=self._database, durable=False)
            self._cluster.up()
            self._stack.callback(self._cluster.down, wipe=True)
        return self._cluster.layout.root

    def passing(self, sabotages: list[Sabotage]) -> dict[str, float]:
        """Return those of the tests that pass as they are, with the seconds they take; tell of the others."""
        standing = any(sabotage.servers for sabotage in sabotages)
        tests = list(dict.fromkeys(sabotage.test for sabotage in sabotages))
        took = self.run(self._tree, tests, standing=standing).took
        for test in tests:
            if test not in took:
                alone = self.run(self._tree, [test], standing=standing)
                took |= alone.took
                if not alone.took:
                    print(alone.said)
        return took

    def fails_here(self, sabotage: Sabotage, patience: float) -> bool:
        """Return whether the test fails on the standing cluster when its feature is taken out."""
        with sabotaged(sabotage, self._tree) as tree:
            return self.run(tree, [sabotage.test], standing=True, patience=patience, hangs=HANGS).passed is False

    def fails_alone(self, sabotage: Sabotage) -> bool:
        """Return whether the test fails on what it starts itself when its feature is out; tell of it if it does not."""
        hangs = UNIT_HANGS if sabotage.module.startswith("tests/unit/") else HANGS
        with sabotaged(sabotage, self._tree) as tree:
            run = self.run(tree, [sabotage.test], standing=False, patience=PATIENCE, hangs=hangs)
        if run.passed is not False:
            print(run.said)
        return run.passed is False

    def fail_without(self, sabotages: list[Sabotage], took: dict[str, float]) -> Iterator[tuple[Sabotage, bool]]:
        """Yield of each of a module's sabotages whether its test, which took so long as it is, fails with it."""
        patience = {test: min(LITTLE_PATIENCE + 2 * seconds, PATIENCE) for test, seconds in took.items()}
        here = [each for each in sabotages if each.servers and not each.processes]
        failed = [each for each in here if self.fails_here(each, patience[each.test])]
        tests = list(dict.fromkeys(each.test for each in failed))
        again: dict[str, float] = {}
        if tests:
            again = self.run(self._tree, tests, standing=True, patience=max(patience[test] for test in tests)).took
        if len(again) < len(tests):
            self.close()  # it was left in a state in which nothing can be told
        # Had the machine become slower meanwhile, the little patience could be what failed them.
        as_before = {test for test, seconds in again.items() if seconds <= took[test] + LITTLE_PATIENCE}
        for each in sabotages:
            yield each, (each in failed and each.test in as_before) or self.fails_alone(each)


def prove_room(bench: Bench, room: list[Sabotage], note: Callable[[Sabotage, str], None]) -> bool:
    """Run the tests of a module as they are and with their features taken out; note each, return whether all held."""
    took = bench.passing(room)
    broken = [sabotage for sabotage in room if sabotage.test not in took]
    for sabotage in broken:
        note(sabotage, BROKEN)
    held = not broken
    for sabotage, failed in bench.fail_without([each for each in room if each not in broken], took):
        note(sabotage, PROVED if failed else SURVIVES)
        held = held and failed
    return held


def prove(tree: Path, rooms: Iterator[list[Sabotage]], note: Callable[[Sabotage, str], None]) -> bool:
    """Prove one module after the other, and return whether all held; one without a cluster is left untried."""
    held = True
    with Runner() as runner:
        for database, of_engine in groupby(rooms, lambda room: room[0].database):
            bench = Bench(tree, database, runner)
            try:
                for room in of_engine:
                    try:
                        held = prove_room(bench, room, note) and held
                    except ClusterError as error:
                        print(f"{room[0].module}: {error}", flush=True)
                        bench.close()
                        held = False
            finally:
                bench.close()
    return held


def _place(sabotage: Sabotage) -> tuple[str, bool, bool, str]:
    """Return by what sabotages are gathered into rooms, and in which order: what takes longest is told last."""
    # A browser, many clusters of their own, or one that starts every time.
    long = sabotage.processes or sabotage.module.startswith(("tests/browser/", "tests/failure/"))
    return sabotage.database, long, sabotage.servers, sabotage.module


def prove_side_by_side(tree: Path, sabotages: list[Sabotage], proofs: Proofs, jobs: int) -> bool:
    """Share the modules of a tree among so many processes; return whether all held."""
    rooms = [list(room) for _, room in groupby(sorted(sabotages, key=_place), _place)]
    # Forked, because what was collected is here already.
    context = multiprocessing.get_context("fork")
    turn, given = context.Lock(), context.Value("i", 0)

    def next_rooms() -> Iterator[list[Sabotage]]:
        while True:
            with given:
                number, given.value = given.value, given.value + 1
            if number >= len(rooms):
                return
            yield rooms[number]

    def note(sabotage: Sabotage, result: str) -> None:
        with turn:
            proofs.note(sabotage, result)
            print(f"{result.strip('*')}  {sabotage.test}  without {sabotage.path}", flush=True)

    def work() -> None:
        sys.exit(not prove(tree, next_rooms(), note))

    workers = [context.Process(target=work) for _ in range(min(jobs, len(rooms)))]
    try:
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
    finally:
        for worker in workers:
            if worker.is_alive():
                worker.terminate()
                worker.join()
    return not any(worker.exitcode for worker in workers)


def _end(number: int, _frame: object) -> None:
    """End in order; what tells us so once more, as Ctrl-C does each process of a terminal, does not break that off."""
    for each in ENDS:
        signal.signal(each, lambda *_: None)
    sys.exit(128 + number)


def main(arguments: list[str]) -> int:
    """Check, then prove what is asked for."""
    names = [argument for argument in arguments if not argument.startswith("--")]
    claims, found = read_claims(), look()
    said = problems(claims, found)
    if said:
        print("\n".join(said))
        return 1
    proofs = Proofs(TABLE, claims, found.sabotages)
    # Asked of all, so that what each is of is known before the copy.
    unproved = proofs.unproved()
    if "--check" in arguments:
        if unproved:
            print(
                f"  {len(unproved)} of {len(found.sabotages)} are not proved of the code of now: make prove tries them"
            )
        return 0
    wanted = [sabotage for sabotage in found.sabotages if all(part in sabotage.test for part in names)]
    if not wanted:
        print("No test with a sabotage has that name.")
        return 1
    for number in ENDS:
        signal.signal(number, _end)
    proofs.refresh()
    wanted = wanted if names or "--again" in arguments else unproved
    try:
        with tempfile.TemporaryDirectory(prefix="prove-tree-") as folder:
            copy_tree(Path(folder))
            return 0 if prove_side_by_side(Path(folder), wanted, proofs, int(os.environ.get("JOBS", JOBS))) else 1
    except SystemExit:
        print("Ended; the next run goes on here.")
        raise


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
