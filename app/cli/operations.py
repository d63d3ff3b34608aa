"""The commands of those who run a service: what fits, what was given up, which shard holds whom, chores, events."""

from __future__ import annotations

from typing import Annotated
from uuid import UUID

import typer

from app.cli.answers import cluster_errors, fail, operating

commands = typer.Typer()
letters = typer.Typer(help="Tasks that were given up: look at them, send them once more.", no_args_is_help=True)
commands.add_typer(letters, name="dead-letters", rich_help_panel="Operations")
shards = typer.Typer(help="Where profiles are: look at the map, move parts of it.", no_args_is_help=True)
commands.add_typer(shards, name="shards", rich_help_panel="Operations")
Letter = Annotated[UUID, typer.Argument(help="A dead letter's id, as `scaleout dead-letters list` shows it.")]


@commands.command(rich_help_panel="Operations")
def check(
    *,
    instances: Annotated[int, typer.Option(envvar="INSTANCES", min=1, help="API processes.")] = 2,
    surge: Annotated[int, typer.Option(min=0, help="New instances beside the old ones in a roll-out.")] = 1,
    workers: Annotated[int, typer.Option(envvar="WORKERS", min=0, help="Worker processes.")] = 1,
    relays: Annotated[int, typer.Option(envvar="RELAYS", min=0, help="Outbox relays.")] = 1,
    overlay: Annotated[
        str | None, typer.Option(help="Ask the manifests of deploy/k8s/overlays/OVERLAY instead: all at their maximum.")
    ] = None,
) -> None:
    """Ask every database server whether a fleet of this size fits its connections; the exit code is 1 if not."""
    if overlay is not None:
        with cluster_errors():
            from deploy.k8s import connections  # noqa: PLC0415

            raise typer.Exit(connections.check(overlay))
    with operating() as operations:
        raise typer.Exit(operations.check(instances, surge, workers, relays))


@commands.command(rich_help_panel="Operations")
def plan(
    *,
    rps: Annotated[float, typer.Option(help="Requests a second at the peak.")],
    hit_rate: Annotated[float, typer.Option(help="Share of the reads that the cache answers.")] = 0.7,
    read_share: Annotated[float, typer.Option(help="Share of the requests that read.")] = 0.9,
    order_share: Annotated[float, typer.Option(help="Share of the writes that place an order.")] = 0.1,
    connections: Annotated[int, typer.Option(help="What each database server allows.")] = 1515,
    pooler: Annotated[bool, typer.Option("--pooler", help="PgBouncer stands before each database server.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="For programs.")] = False,
) -> None:
    """Say how much of everything a load takes, what it costs a month, and why: from what was measured."""
    with cluster_errors():
        from deploy.capacity import report  # noqa: PLC0415

        code = report.tell(rps, hit_rate, read_share, order_share, allowed=connections, pooler=pooler, as_json=as_json)
    raise typer.Exit(code)


@letters.command("list")
def list_letters(
    *, everything: Annotated[bool, typer.Option("--all", help="Show those that were replayed, too.")] = False
) -> None:
    """List the tasks that were given up, newest first."""
    with operating() as operations:
        raise typer.Exit(operations.list_dead_letters(everything=everything))


@letters.command("show")
def show_letter(letter: Letter) -> None:
    """Show one dead letter with its error."""
    with operating() as operations:
        raise typer.Exit(operations.show_dead_letter(letter))


@letters.command("replay")
def replay_letters(
    letter: Annotated[UUID | None, typer.Argument(help="A dead letter's id.", show_default=False)] = None,
    *,
    everything: Annotated[bool, typer.Option("--all", help="Every one that is open.")] = False,
) -> None:
    """Send a task once more, with all its tries, after its cause is mended."""
    if (letter is None) is not everything:
        fail("Name one dead letter, or say --all.")
    with operating() as operations:
        raise typer.Exit(operations.replay_dead_letters(letter))


@shards.command("list")
def list_shards() -> None:
    """Show which shard holds which of the 1024 logical shards."""
    with operating() as operations:
        raise typer.Exit(operations.list_shards())


@shards.command("move")
def move_shards(
    place: Annotated[str, typer.Argument(metavar="RANGE", help="Logical shards, like 512-767.", show_default=False)],
    *,
    to: Annotated[int, typer.Option(help="The shard that takes them, counted from 0.")],
) -> None:
    """Move logical shards to another shard while everything goes on; cut off, run it again and it goes on."""
    from app.scaling.sharding import parse_range  # noqa: PLC0415

    try:
        first, last = parse_range(place)
    except ValueError as error:
        fail(str(error))
    with operating() as operations:
        raise typer.Exit(operations.move_shards(first, last, to))


@commands.command("run", rich_help_panel="Operations")
def run_chore(
    chore: Annotated[str, typer.Argument(help="sweep_directory, reconcile_payments, purge, …", show_default=False)],
) -> None:
    """Run one chore of the scheduler now, for cron and Kubernetes CronJobs; never beside another run of it."""
    with operating() as operations:
        raise typer.Exit(operations.run_chore(chore))


@commands.command("consume-events", rich_help_panel="Operations")
def consume_events(
    group: Annotated[str, typer.Argument(help="Whose events; each group gets all of them.", show_default=False)],
    *,
    name: Annotated[
        str | None, typer.Option(help="Of this consumer in the group; the host's name if not given.")
    ] = None,
    claim_after: Annotated[
        float, typer.Option(min=0.1, help="Seconds after which what a dead consumer held is taken over.")
    ] = 30.0,
    from_start: Annotated[
        bool, typer.Option("--from-start", help="A new group begins with the oldest event, not with the next.")
    ] = False,
) -> None:
    """Print events of orders and profiles as a consumer group gets them, one JSON object a line, until Ctrl-C."""
    with operating() as operations:
        raise typer.Exit(operations.consume_events(group, name, claim_after, from_start=from_start))


@commands.command(rich_help_panel="Operations")
def reconcile(
    *, hours: Annotated[float, typer.Option(min=0, help="Compare payments that moved in so many hours.")] = 26.0
) -> None:
    """Compare our payments with the provider's, to the cent; the exit code is 1 if any differs."""
    with operating() as operations:
        raise typer.Exit(operations.reconcile(hours))
