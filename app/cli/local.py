"""The commands of the local cluster: start it, look at it, break it, mend it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

import typer

from app.cli.answers import FOLDER, cluster_errors

if TYPE_CHECKING:
    from deploy.local.cluster import Cluster

Name = Annotated[
    str, typer.Argument(help="A process, as `scaleout status` names it: api-1, primary, redis, …", show_default=False)
]
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


commands = typer.Typer()


@commands.command(rich_help_panel="Local cluster")
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
    with cluster_errors():
        from deploy.local import terminal  # noqa: PLC0415 - see the module's docstring, here and below
        from deploy.local.cluster import Cluster  # noqa: PLC0415
        from deploy.local.programs import Sizes  # noqa: PLC0415

        sizes = Sizes(instances=instances, workers=workers, relays=relays, replicas=replicas, shards=shards)
        code = terminal.up(Cluster(FOLDER, port=port, sizes=sizes, reload=reload, database=database), detach=detach)
    raise typer.Exit(code)


@commands.command(rich_help_panel="Local cluster")
def down(*, wipe: Annotated[bool, typer.Option("--wipe", help="Remove all data too.")] = False) -> None:
    """Stop the cluster; its data stays for the next start."""
    with cluster_errors():
        from deploy.local import terminal  # noqa: PLC0415

        terminal.down(_cluster(), wipe=wipe)


@commands.command(rich_help_panel="Local cluster")
def status(*, as_json: Annotated[bool, typer.Option("--json", help="For programs.")] = False) -> None:
    """Show every process; the exit code is 0 only when all are ready."""
    with cluster_errors():
        from deploy.local import terminal  # noqa: PLC0415

        code = terminal.status(_cluster(), as_json=as_json)
    raise typer.Exit(code)


@commands.command(rich_help_panel="Local cluster")
def stop(name: Name) -> None:
    """Stop one process and keep it down, to see how the others take it."""
    with cluster_errors():
        _cluster().stop(name)
    typer.echo(f"{name} is down until: scaleout start {name}")


@commands.command(rich_help_panel="Local cluster")
def start(name: Name) -> None:
    """Start a stopped process again and wait until it is ready."""
    with cluster_errors():
        cluster = _cluster()
        cluster.start(name)
        typer.echo(f"{name} is ready (process {cluster.process(name).pid})")


@commands.command(rich_help_panel="Local cluster")
def rollout() -> None:
    """Replace every API instance, one after the other, without a failed request."""
    with cluster_errors():
        _cluster().roll_out(lambda name: typer.echo(f"{name} is replaced and ready"))


@commands.command(rich_help_panel="Local cluster")
def demo() -> None:
    """Start a cluster, send it clients, break one thing after the other, and show which promises were kept."""
    with cluster_errors():
        from deploy.chaos import demo as demonstration  # noqa: PLC0415

        code = demonstration.run()
    raise typer.Exit(code)


@commands.command(rich_help_panel="Local cluster")
def logs(
    name: Name,
    *,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on until Ctrl-C.")] = False,
    lines: Annotated[int, typer.Option("--lines", "-n", min=0, help="How many of the last lines.")] = 50,
) -> None:
    """Show the log of one process."""
    with cluster_errors():
        from deploy.local import terminal  # noqa: PLC0415

        terminal.logs(_cluster(), name, lines=lines, follow=follow)


def _cluster() -> Cluster:
    from deploy.local.cluster import Cluster  # noqa: PLC0415

    return Cluster(FOLDER)
