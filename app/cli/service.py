"""The commands of the service itself: its tables, its demonstration data, and the four processes it consists of."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Annotated

import typer

from app.cli.answers import cluster_errors, fail, settings_errors, use_the_running_cluster

Reload = Annotated[bool, typer.Option("--reload", help="Restart when the code changes, for people who work on it.")]
APP = Path(__file__).parents[1]

commands = typer.Typer()


@commands.command(rich_help_panel="Database")
def migrate(
    *,
    check: Annotated[
        bool, typer.Option("--check", help="Only compare the migrations with the models, on an empty database.")
    ] = False,
) -> None:
    """Bring every shard's tables up to date; the running cluster's, unless the environment names a database."""
    with cluster_errors(), settings_errors():
        from migrations import runner  # noqa: PLC0415

        if check:
            differences = _compare_on_an_empty_database()
            for difference in differences:
                typer.echo(difference, err=True)
            if differences:
                fail("Models and migrations differ: write a migration for the lines above.")
            typer.echo("Models and migrations agree.")
            return
        from app.core.settings import load_settings  # noqa: PLC0415

        use_the_running_cluster()
        runner.upgrade(load_settings())
        typer.echo(f"Every shard has the tables of migration {runner.head()}.")


@commands.command(rich_help_panel="Database")
def seed() -> None:
    """Fill in the demonstration data; what is there already stays."""
    with cluster_errors(), settings_errors():
        from app import seed as seeding  # noqa: PLC0415
        from app.core.errors import Unavailable  # noqa: PLC0415

        use_the_running_cluster()
        try:
            seeding.run()
        except Unavailable as error:
            fail(error.detail)


@commands.command(rich_help_panel="Processes")
def api(
    *,
    host: Annotated[str, typer.Option(help="The address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535, help="The port to listen on.")] = 8000,
    reload: Reload = False,
) -> None:
    """Run one instance of the API."""
    with settings_errors():
        from app.core.settings import load_settings  # noqa: PLC0415

        # Read before anything is imported that takes time; uvicorn would print a traceback for a bad one.
        settings = load_settings()
        from app.api import serving  # noqa: PLC0415

        serving.serve(
            host=host,
            port=port,
            settings=settings.service,
            reload=str(APP) if reload else None,
        )


@commands.command(rich_help_panel="Processes")
def worker(*, reload: Reload = False) -> None:
    """Run one worker, which does the tasks that events ask for."""
    _reloading("worker", reload=reload)
    with settings_errors():
        from app.core.settings import load_settings  # noqa: PLC0415
        from workers.metrics import share  # noqa: PLC0415

        share(load_settings().service.metrics_port)
        from workers.main import run_worker  # noqa: PLC0415

        run_worker()


@commands.command(rich_help_panel="Processes")
def relay(*, reload: Reload = False) -> None:
    """Run one relay, which takes events from the outbox to the workers."""
    _reloading("relay", reload=reload)
    with settings_errors():
        from workers.relay import run  # noqa: PLC0415

        run()


@commands.command(rich_help_panel="Processes")
def scheduler(*, reload: Reload = False) -> None:
    """Run the scheduler, which starts what has to happen at a time; one in all."""
    _reloading("scheduler", reload=reload)
    with settings_errors():
        from workers.schedule import run  # noqa: PLC0415

        run()


def _compare_on_an_empty_database() -> list[str]:
    from deploy.local.cluster import Cluster  # noqa: PLC0415
    from deploy.local.programs import Sizes  # noqa: PLC0415
    from migrations import runner  # noqa: PLC0415

    with tempfile.TemporaryDirectory(prefix="scaleout-check-") as folder:
        cluster = Cluster(Path(folder) / "cluster", sizes=Sizes(kinds=("primary",)), durable=False)
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

    target = f"{sys.executable} -m app.cli {command}"
    run_process(APP, APP.parent / "workers", target=target, target_type="command", watch_filter=PythonFilter())
    raise typer.Exit
