"""The command line `scaleout`: the local cluster, the database, and the four processes that the service consists of.

It only translates: options into arguments, errors into one sentence and an exit code. Nothing heavy is imported before
a command needs it, so that `scaleout --help` answers at once and an instance does not carry what only a laptop needs.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Annotated, Literal, NoReturn
from uuid import UUID

import typer

if TYPE_CHECKING:
    from deploy.local.cluster import Cluster

# Where the cluster lives: in the directory that the command is typed in, as Git does with .git.
FOLDER = Path(".cluster")

Name = Annotated[
    str, typer.Argument(help="A process, as `scaleout status` names it: api-1, primary, redis, …", show_default=False)
]
Reload = Annotated[bool, typer.Option("--reload", help="Restart when the code changes, for people who work on it.")]

cli = typer.Typer(
    name="scaleout",
    help="A profile and order service that scales horizontally: run it here, look at it, break it.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)


# Each shard of the local cluster is two servers; a laptop has room for a few.
MOST_SHARDS = 4


def _number_of_shards(value: object) -> int:
    """Read `--shards`. A list in the environment is the setting SHARDS of a real deployment and says nothing here."""
    text = str(value).strip()
    if text.startswith("["):
        return 1
    if not text.isdecimal() or not 1 <= int(text) <= MOST_SHARDS:
        raise typer.BadParameter(f"must be a number from 1 to {MOST_SHARDS}")
    return int(text)


letters = typer.Typer(help="Tasks that were given up: look at them, send them once more.", no_args_is_help=True)
cli.add_typer(letters, name="dead-letters", rich_help_panel="Operations")
shards = typer.Typer(help="Where profiles are: look at the map, move parts of it.", no_args_is_help=True)
cli.add_typer(shards, name="shards", rich_help_panel="Operations")
Letter = Annotated[UUID, typer.Argument(help="A dead letter's id, as `scaleout dead-letters list` shows it.")]


@cli.command(rich_help_panel="Local cluster")
def up(
    *,
    detach: Annotated[bool, typer.Option("--detach", "-d", help="Return when everything is ready.")] = False,
    port: Annotated[int, typer.Option(envvar="PORT", min=1, max=65535, help="The port of NGINX.")] = 8000,
    instances: Annotated[int, typer.Option(envvar="INSTANCES", min=1, max=16, help="API processes.")] = 2,
    workers: Annotated[int, typer.Option(envvar="WORKERS", min=1, max=16, help="Worker processes.")] = 1,
    relays: Annotated[int, typer.Option(envvar="RELAYS", min=1, max=8, help="Outbox relays.")] = 1,
    replicas: Annotated[int, typer.Option(envvar="REPLICAS", min=0, max=8, help="Streaming replicas.")] = 2,
    shards: Annotated[
        int, typer.Option(envvar="SHARDS", parser=_number_of_shards, metavar="N", help="Primaries with replicas.")
    ] = 1,
    reload: Annotated[bool, typer.Option("--reload", envvar="RELOAD", help="Restart when the code changes.")] = False,
    database: Annotated[
        Literal["postgresql", "mariadb"], typer.Option(envvar="DATABASE", help="MariaDB must be on the machine.")
    ] = "postgresql",
) -> None:
    """Start the whole cluster on this machine; Ctrl-C stops it."""
    with _cluster_errors():
        from deploy.local import terminal  # noqa: PLC0415 - see the module's docstring, here and below
        from deploy.local.cluster import Cluster  # noqa: PLC0415
        from deploy.local.programs import Sizes  # noqa: PLC0415

        sizes = Sizes(instances=instances, workers=workers, relays=relays, replicas=replicas, shards=shards)
        code = terminal.up(Cluster(FOLDER, port=port, sizes=sizes, reload=reload, database=database), detach=detach)
    raise typer.Exit(code)


@cli.command(rich_help_panel="Local cluster")
def down(*, wipe: Annotated[bool, typer.Option("--wipe", help="Remove all data too.")] = False) -> None:
    """Stop the cluster; its data stays for the next start."""
    with _cluster_errors():
        from deploy.local import terminal  # noqa: PLC0415

        terminal.down(_cluster(), wipe=wipe)


@cli.command(rich_help_panel="Local cluster")
def status(*, as_json: Annotated[bool, typer.Option("--json", help="For programs.")] = False) -> None:
    """Show every process; the exit code is 0 only when all are ready."""
    with _cluster_errors():
        from deploy.local import terminal  # noqa: PLC0415

        code = terminal.status(_cluster(), as_json=as_json)
    raise typer.Exit(code)


@cli.command(rich_help_panel="Local cluster")
def stop(name: Name) -> None:
    """Stop one process and keep it down, to see how the others take it."""
    with _cluster_errors():
        _cluster().stop(name)
    typer.echo(f"{name} is down until: scaleout start {name}")


@cli.command(rich_help_panel="Local cluster")
def start(name: Name) -> None:
    """Start a stopped process again and wait until it is ready."""
    with _cluster_errors():
        cluster = _cluster()
        cluster.start(name)
        typer.echo(f"{name} is ready (process {cluster.process(name).pid})")


@cli.command(rich_help_panel="Local cluster")
def rollout() -> None:
    """Replace every API instance, one after the other, without a failed request."""
    with _cluster_errors():
        _cluster().roll_out(lambda name: typer.echo(f"{name} is replaced and ready"))


@cli.command(rich_help_panel="Local cluster")
def demo() -> None:
    """Start a cluster, send it clients, break one thing after the other, and show which promises were kept."""
    with _cluster_errors():
        from deploy.chaos import demo as demonstration  # noqa: PLC0415

        code = demonstration.run()
    raise typer.Exit(code)


@cli.command(rich_help_panel="Local cluster")
def logs(
    name: Name,
    *,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on until Ctrl-C.")] = False,
    lines: Annotated[int, typer.Option("--lines", "-n", min=0, help="How many of the last lines.")] = 50,
) -> None:
    """Show the log of one process."""
    with _cluster_errors():
        from deploy.local import terminal  # noqa: PLC0415

        terminal.logs(_cluster(), name, lines=lines, follow=follow)


@cli.command(rich_help_panel="Database")
def migrate(
    *,
    check: Annotated[
        bool, typer.Option("--check", help="Only compare the migrations with the models, on an empty database.")
    ] = False,
) -> None:
    """Bring every shard's tables up to date; the running cluster's, unless the environment names a database."""
    with _cluster_errors(), _settings_errors():
        from migrations import runner  # noqa: PLC0415

        if check:
            differences = _compare_on_an_empty_database()
            for difference in differences:
                typer.echo(difference, err=True)
            if differences:
                _fail("Models and migrations differ: write a migration for the lines above.")
            typer.echo("Models and migrations agree.")
            return
        from app.core.settings import load_settings  # noqa: PLC0415

        _use_the_running_cluster()
        runner.upgrade(load_settings())
        typer.echo(f"Every shard has the tables of migration {runner.head()}.")


@cli.command(rich_help_panel="Database")
def seed() -> None:
    """Fill in the demonstration data; what is there already stays."""
    with _cluster_errors(), _settings_errors():
        from app import seed as seeding  # noqa: PLC0415
        from app.core.errors import Unavailable  # noqa: PLC0415

        _use_the_running_cluster()
        try:
            seeding.run()
        except Unavailable as error:
            _fail(error.detail)


@cli.command(rich_help_panel="Operations")
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
        with _cluster_errors():
            from deploy.k8s import connections  # noqa: PLC0415

            raise typer.Exit(connections.check(overlay))
    with _operating() as operations:
        raise typer.Exit(operations.check(instances, surge, workers, relays))


@cli.command(rich_help_panel="Operations")
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
    with _cluster_errors():
        from deploy.capacity import report  # noqa: PLC0415

        code = report.tell(rps, hit_rate, read_share, order_share, allowed=connections, pooler=pooler, as_json=as_json)
    raise typer.Exit(code)


@letters.command("list")
def list_letters(
    *, everything: Annotated[bool, typer.Option("--all", help="Show those that were replayed, too.")] = False
) -> None:
    """List the tasks that were given up, newest first."""
    with _operating() as operations:
        raise typer.Exit(operations.list_dead_letters(everything=everything))


@letters.command("show")
def show_letter(letter: Letter) -> None:
    """Show one dead letter with its error."""
    with _operating() as operations:
        raise typer.Exit(operations.show_dead_letter(letter))


@letters.command("replay")
def replay_letters(
    letter: Annotated[UUID | None, typer.Argument(help="A dead letter's id.", show_default=False)] = None,
    *,
    everything: Annotated[bool, typer.Option("--all", help="Every one that is open.")] = False,
) -> None:
    """Send a task once more, with all its tries, after its cause is mended."""
    if (letter is None) is not everything:
        _fail("Name one dead letter, or say --all.")
    with _operating() as operations:
        raise typer.Exit(operations.replay_dead_letters(letter))


@shards.command("list")
def list_shards() -> None:
    """Show which shard holds which of the 1024 logical shards."""
    with _operating() as operations:
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
        _fail(str(error))
    with _operating() as operations:
        raise typer.Exit(operations.move_shards(first, last, to))


@cli.command("run", rich_help_panel="Operations")
def run_chore(
    chore: Annotated[str, typer.Argument(help="sweep_directory, reconcile_payments, purge, …", show_default=False)],
) -> None:
    """Run one chore of the scheduler now, for cron and Kubernetes CronJobs; never beside another run of it."""
    with _operating() as operations:
        raise typer.Exit(operations.run_chore(chore))


@cli.command("consume-events", rich_help_panel="Operations")
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
    with _operating() as operations:
        raise typer.Exit(operations.consume_events(group, name, claim_after, from_start=from_start))


@cli.command(rich_help_panel="Operations")
def reconcile(
    *, hours: Annotated[float, typer.Option(min=0, help="Compare payments that moved in so many hours.")] = 26.0
) -> None:
    """Compare our payments with the provider's, to the cent; the exit code is 1 if any differs."""
    with _operating() as operations:
        raise typer.Exit(operations.reconcile(hours))


@cli.command(rich_help_panel="Processes")
def api(
    *,
    host: Annotated[str, typer.Option(help="The address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535, help="The port to listen on.")] = 8000,
    reload: Reload = False,
) -> None:
    """Run one instance of the API."""
    with _settings_errors():
        from app.core.settings import load_settings  # noqa: PLC0415

        # Read before anything is imported that takes time; uvicorn would print a traceback for a bad one.
        settings = load_settings()
        from app.api import serving  # noqa: PLC0415

        serving.serve(
            host=host,
            port=port,
            settings=settings.service,
            reload=str(Path(__file__).parent) if reload else None,
        )


@cli.command(rich_help_panel="Processes")
def worker(*, reload: Reload = False) -> None:
    """Run one worker, which does the tasks that events ask for."""
    _reloading("worker", reload=reload)
    with _settings_errors():
        from app.core.settings import load_settings  # noqa: PLC0415
        from workers.metrics import share  # noqa: PLC0415

        share(load_settings().service.metrics_port)
        from workers.main import run_worker  # noqa: PLC0415

        run_worker()


@cli.command(rich_help_panel="Processes")
def relay(*, reload: Reload = False) -> None:
    """Run one relay, which takes events from the outbox to the workers."""
    _reloading("relay", reload=reload)
    with _settings_errors():
        from workers.relay import run  # noqa: PLC0415

        run()


@cli.command(rich_help_panel="Processes")
def scheduler(*, reload: Reload = False) -> None:
    """Run the scheduler, which starts what has to happen at a time; one in all."""
    _reloading("scheduler", reload=reload)
    with _settings_errors():
        from workers.schedule import run  # noqa: PLC0415

        run()


def main() -> None:
    """Run the command line."""
    cli()


def _cluster() -> Cluster:
    from deploy.local.cluster import Cluster  # noqa: PLC0415

    return Cluster(FOLDER)


def _use_the_running_cluster() -> None:
    """Take the running cluster's environment for what this shell does not set itself."""
    if "DATABASE_URL" in os.environ:
        return
    stored = FOLDER / "env.json"
    if stored.exists():
        for name, value in json.loads(stored.read_bytes()).items():
            os.environ.setdefault(name, value)
    elif "SECRET_KEY" not in os.environ:  # no service can do without, so none is meant
        _fail(
            f"No cluster runs in {FOLDER.absolute()}. `make run` or `scaleout up` starts one; "
            "for another service set DATABASE_URL and its other settings."
        )


def _compare_on_an_empty_database() -> list[str]:
    from deploy.local.cluster import Cluster  # noqa: PLC0415
    from deploy.local.programs import Sizes  # noqa: PLC0415
    from migrations import runner  # noqa: PLC0415

    with tempfile.TemporaryDirectory(prefix="scaleout-check-") as folder:
        cluster = Cluster(Path(folder) / "cluster", sizes=Sizes(kinds=("primary",)))
        cluster.up()
        try:
            return runner.check(cluster.environment["DATABASE_URL"])
        finally:
            cluster.down(wipe=True)


def _reloading(command: str, *, reload: bool) -> None:
    """Run `command` in a child that is started anew at every change of the code, and never return; or do nothing."""
    if not reload:
        return
    from watchfiles import PythonFilter, run_process  # noqa: PLC0415

    checkout = Path(__file__).parents[1]
    target = f"{sys.executable} -m app.cli {command}"
    run_process(
        checkout / "app", checkout / "workers", target=target, target_type="command", watch_filter=PythonFilter()
    )
    raise typer.Exit


@contextmanager
def _cluster_errors() -> Iterator[None]:
    """Say what is wrong with the cluster in a sentence, without a traceback."""
    from app.core.errors import ServiceError  # noqa: PLC0415
    from deploy.local import ClusterError  # noqa: PLC0415

    try:
        yield
    except ClusterError as error:
        _fail(str(error))
    except ServiceError as error:
        _fail(error.detail)
    except ModuleNotFoundError as error:
        _fail(f"The Python package {error.name} is not installed here; `make setup` installs all.")
    except OSError as error:
        # A full disk, a folder that may not be written: the system's words name it best.
        _fail(f"{error.filename or 'The system'}: {error.strerror or error}")


@contextmanager
def _operating() -> Iterator[ModuleType]:
    """Yield the room of operations, set to the running cluster unless the environment names another service."""
    with _settings_errors():
        from app import operations  # noqa: PLC0415

        _use_the_running_cluster()
        yield operations


@contextmanager
def _settings_errors() -> Iterator[None]:
    """Name each bad setting, without a traceback."""
    from app.core.settings import SettingsError  # noqa: PLC0415

    try:
        yield
    except SettingsError as error:
        typer.echo(f"These settings keep it from starting:\n{error}", err=True)
        raise typer.Exit(2) from error


def _fail(message: str) -> NoReturn:
    typer.echo(message, err=True)
    raise typer.Exit(1)


if __name__ == "__main__":
    main()
