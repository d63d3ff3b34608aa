"""The command line `scaleout`: the local cluster, the database, and the four processes that the service consists of.

It only translates: options into arguments, errors into one sentence and an exit code. Nothing heavy is imported before
a command needs it, so that `scaleout --help` answers at once and an instance does not carry what only a laptop needs.
"""

import typer

from app.cli import local, operations, service

cli = typer.Typer(
    name="scaleout",
    help="A profile and order service that scales horizontally: run it here, look at it, break it.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)
for room in (local, operations, service):
    cli.add_typer(room.commands)


def main() -> None:
    """Run the command line."""
    cli()
