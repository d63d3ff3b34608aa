"""What people do by hand on the command line, next to a running service: each is one short process of its own.

Every function opens its own `Resources`, prints what it found for a person, and returns an exit code.
"""

import asyncio
import signal
from collections.abc import Awaitable, Callable
from datetime import timedelta
from uuid import UUID

import typer

from app.core import context, wire
from app.core.errors import ServiceError
from app.core.settings import load_settings
from app.core.telemetry import configure_logging
from app.domain.payments.reconciliation import ON_ITS_WAY
from app.domain.payments.reconciliation import reconcile as compare
from app.scaling import budget, dialect
from app.scaling.deadletters import DeadLetter
from app.scaling.live_map import ranges_in_words
from app.scaling.mover import Mover
from app.scaling.redis_link import RedisDown
from app.wiring import Resources, open_resources
from workers.consumer import Consumer, Event, UnknownSchema
from workers.task import Outcome
from workers.tasks import CHORES
from workers.tasks.upkeep import attend

DONE, FOUND_SOMETHING, MISUSED = 0, 1, 2
SAID = {
    Outcome.DONE: "done.",
    Outcome.DROPPED: "somebody else is at it.",
    Outcome.DEFERRED: "a dependency did not answer; run it again later.",
}
SHOWN = 100  # characters of an error in a list; `show` has all of it


def reconcile(hours: float) -> int:
    """Compare the payments that moved in the last `hours`, print each that differs; 1 if any does."""

    async def work(resources: Resources) -> int:
        found = await compare(resources.database, resources.payments, period=timedelta(hours=hours))
        for each in found.differences:
            typer.echo(f"order {each.attempt.order_id}: {each.words}")
        minutes = ON_ITS_WAY.seconds // 60
        typer.echo(
            f"{found.compared} payments compared, {len(found.differences)} differ. "
            f"Those of the last {minutes} minutes may still be moving and are left out."
        )
        return FOUND_SOMETHING if found.differences else DONE

    return _with_resources(work)


def check(instances: int, surge: int, workers: int, relays: int) -> int:
    """Print what each server allows and what a fleet of that size may open on it; 1 if anything does not fit."""
    settings = load_settings()
    fleet = budget.Fleet(instances, surge, workers * settings.workers.concurrency, relays)
    try:
        servers = asyncio.run(budget.ask(settings.database))
    except dialect.ERRORS as error:
        typer.echo(f"A server does not answer ({type(error).__name__}); nothing can be said without it.", err=True)
        return FOUND_SOMETHING
    each = budget.most_of_a_process(settings.database)
    wrong: list[str] = []
    for name, limits in servers:
        typer.echo(f"{name}: {fleet.processes} x {each} = {fleet.processes * each} of {limits.connections} connections")
        wrong += budget.misfits(name, limits, fleet, settings.database)
    if settings.database.pooler == "transaction":
        typer.echo(f"PgBouncer: max_client_conn must be at least {fleet.processes * each * len(servers)}.")
    for sentence in wrong:
        typer.echo(sentence, err=True)
    return FOUND_SOMETHING if wrong else DONE


def run_chore(name: str) -> int:
    """Run one chore now; 1 if a dependency kept it from its end, 0 too if somebody else is at it."""
    chores = {chore.name.partition(".")[2]: chore for chore in CHORES}
    if name not in chores:
        typer.echo(f"There is no chore {name!r}; use one of: {', '.join(sorted(chores))}.", err=True)
        return MISUSED

    async def work(resources: Resources) -> int:
        outcome = await attend(chores[name], resources)
        typer.echo(f"{name}: {SAID[outcome]}")
        return FOUND_SOMETHING if outcome is Outcome.DEFERRED else DONE

    return _with_resources(work)


def list_dead_letters(*, everything: bool) -> int:
    """Print the dead letters, newest first, one a line."""

    async def work(resources: Resources) -> int:
        cursor: str | None = None
        count = 0
        while True:
            page = await resources.dead_letters.listed(100, cursor, everything=everything)
            for letter in page.items:
                error = letter["error"].splitlines()[0][:SHOWN]
                typer.echo(f"{letter['id']}  {letter['created_at']:%Y-%m-%d %H:%M:%S}  {letter['task']}  {error}")
            count += len(page.items)
            cursor = page.next_cursor
            if cursor is None:
                break
        typer.echo(f"{count} dead letters.", err=True)
        return DONE

    return _with_resources(work)


def show_dead_letter(letter_id: UUID) -> int:
    """Print everything that is known of a dead letter."""

    async def work(resources: Resources) -> int:
        letter = await resources.dead_letters.get(letter_id)
        for name, value in letter.view().items():
            typer.echo(f"{name:12} {value}")
        return DONE

    return _with_resources(work)


def replay_dead_letters(letter_id: UUID | None) -> int:
    """Replay one dead letter, or every open one without an id."""

    def tell(letter: DeadLetter) -> None:
        typer.echo(f"{letter.id}  {letter.task} is sent once more.")

    async def work(resources: Resources) -> int:
        if letter_id is not None:
            tell(await resources.dead_letters.replay(letter_id))
        else:
            typer.echo(f"{await resources.dead_letters.replay_all(tell)} replayed.", err=True)
        return DONE

    return _with_resources(work)


def list_shards() -> int:
    """Print the shards with the logical shards that they hold, and the move that is under way."""

    async def work(resources: Resources) -> int:
        places = await resources.database.map.now()
        typer.echo(f"epoch {places.epoch}")
        for shard in resources.database.shards:
            typer.echo(f"shard {shard.number}: {ranges_in_words(places.held_by(shard.number))}")
        if places.move is not None:
            moving = ranges_in_words((places.move.place,))
            typer.echo(f"moving {moving} from {places.move.place.shard} to {places.move.target}: {places.move.phase}")
        return DONE

    return _with_resources(work)


def move_shards(first: int, last: int, target: int) -> int:
    """Move a range of logical shards to another shard, and say what happens."""

    async def work(resources: Resources) -> int:
        mover = Mover(resources.database, resources.settings.service.request_deadline, typer.echo)
        count = await mover.move(first, last, target)
        typer.echo(f"{count} logical shards moved." if count else f"Shard {target} holds all of them already.")
        return DONE

    return _with_resources(work)


def consume_events(group: str, name: str | None, claim_after: float, *, from_start: bool) -> int:
    """Print the events of the stream as one consumer of `group`, one JSON object a line, until SIGTERM or SIGINT."""

    async def show(event: Event) -> None:
        typer.echo(wire.encode(event.to_json()))

    async def work(resources: Resources) -> int:
        own = name or resources.settings.service.instance
        consumer = Consumer(resources.redis, group, own, show, claim_after=claim_after)
        stopping = asyncio.Event()
        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(number, stopping.set)
        try:
            await consumer.join(from_start=from_start)
            await consumer.serve(stopping)
        except RedisDown:
            typer.echo("Redis does not answer; is the cluster running?", err=True)
            return FOUND_SOMETHING
        except UnknownSchema as error:
            typer.echo(str(error), err=True)
            return FOUND_SOMETHING
        return DONE

    return _with_resources(work)


def _with_resources(work: Callable[[Resources], Awaitable[int]]) -> int:
    """Run `work` with resources of its own; an error of the service is one sentence and exit code 1."""
    settings = load_settings()
    configure_logging(settings.service.model_copy(update={"log_level": "error"}), "cli")

    async def run() -> int:
        async with open_resources(settings) as resources:
            with context.working(context.Work(request_id=context.new_request_id())):
                try:
                    return await work(resources)
                except ServiceError as error:
                    typer.echo(error.detail, err=True)
                    return FOUND_SOMETHING

    return asyncio.run(run())
