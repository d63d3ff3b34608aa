"""Every cell of the failure table, on a whole cluster with clients: what they see, the way back, what is left.

By itself it plays the cells of `QUICK` and a short storm of seeded faults, in which the history of all clients is held
to what can have happened; `make test-failure` sets `FAILURE_TABLE=all STORM_SECONDS=60` for all cells and a long storm.
With a number, `FAILURE_TABLE=5` plays each fifth of the other cells, too.
"""

import os
import random
from collections.abc import AsyncIterator

import pytest

from deploy.chaos.demo import Act, Screen, Voices
from deploy.chaos.faults import CELLS, Fault, Kind, Target
from deploy.chaos.load import Load
from deploy.chaos.play import Play, opened
from deploy.chaos.stage import Stage, open_stage

pytestmark = pytest.mark.postgresql("what breaks is the same; MariaDB's servers have tests of their own")

STORM_SECONDS = float(os.environ.get("STORM_SECONDS", "12"))
STORM_SEED = int(os.environ.get("STORM_SEED", "7"))
# One of each way to break, on what hurts most.
QUICK = (
    Fault(Target.PRIMARY, Kind.STOPPED),
    Fault(Target.REDIS, Kind.KILLED),
    Fault(Target.WORKER, Kind.KILLED),
    Fault(Target.INSTANCE, Kind.CUT),
    Fault(Target.PAYMENTS, Kind.SILENT),
)
SECONDS = 3.0  # of each: longer than every watcher, breaker and retry of a request, which is what shall be met
# Milliseconds. The service answers within its deadline of 10 s, and for one that hangs NGINX does within 15 s.
SLOWEST = {Target.INSTANCE: 18_000.0}
USUAL_SLOWEST = 14_000.0


def cells(wanted: str) -> tuple[Fault, ...]:
    """Return the cells to play."""
    if wanted in {"", "all"}:
        return CELLS if wanted else QUICK
    return (*QUICK, *[cell for cell in CELLS if cell not in QUICK][:: int(wanted)])


@pytest.fixture(scope="module")
async def stage(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Stage]:
    async with open_stage(tmp_path_factory.mktemp("stage") / "c", chance=random.Random(1)) as made:
        yield made


@pytest.fixture(scope="module")
async def play(stage: Stage) -> AsyncIterator[Play]:
    async with opened(stage, Load(stage.cluster.url, random.Random(2))) as begun:
        yield begun


class Overpromised(Fault):
    """A fault of which more is promised than can be kept."""

    @property
    def writes_may(self) -> frozenset[int]:
        """Nothing but success."""
        return frozenset()


@pytest.mark.sabotage(
    path="app/scaling/cache.py",
    take_out='        except RedisDown:\n            span.description = "bypass"\n',
    put="        except ZeroDivisionError:\n",
)
@pytest.mark.parametrize("fault", cells(os.environ.get("FAILURE_TABLE", "")), ids=lambda f: f.name)
async def test_the_service_keeps_its_promises_while_it_lasts_and_comes_back_by_itself(play: Play, fault: Fault) -> None:
    played = await play.fault(fault, SECONDS)
    assert played.problems == []
    assert max(played.reads.slowest, played.writes.slowest) < SLOWEST.get(fault.target, USUAL_SLOWEST)


@pytest.mark.sabotage(
    path="app/domain/profiles/service.py",
    take_out="profiles.c.profile_id == profile_id, profiles.c.version == version,",
    put="profiles.c.profile_id == profile_id,",
)
async def test_clients_see_nothing_impossible_while_faults_come_and_go(play: Play) -> None:
    storm = await play.storm(random.Random(STORM_SEED), STORM_SECONDS)
    assert storm.problems == [], f"STORM_SEED={STORM_SEED}: {[str(each.fault) for each in storm.faults]}"


@pytest.mark.sabotage("deploy/chaos/demo.py", '"Broken" if played.problems else "Kept"', '"Kept"')
async def test_a_demonstration_shows_a_promise_that_was_broken(
    stage: Stage, play: Play, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("deploy.chaos.demo.SECONDS", SECONDS)
    with Screen(play, Voices(stage)) as screen:
        await screen.watch(Act(Overpromised(Target.PRIMARY, Kind.STOPPED), "no write is refused"))
    told = capsys.readouterr().out
    assert "The primary stopped: no write is refused" in told
    assert "Broken. refused: " in told
    ((_, played),) = screen.played
    assert played.problems
    assert all(" writes got 50" in problem for problem in played.problems)
