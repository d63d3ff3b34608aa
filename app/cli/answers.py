"""What every command of `scaleout` says when it cannot go on, and which service it speaks to.

Whatever is wrong that a person can mend is one sentence and an exit code, never a traceback. A command speaks to the
service that its environment names, else to the cluster that runs in the directory where it is typed.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import NoReturn

import typer

# Where the cluster lives: in the directory that the command is typed in, as Git does with .git.
FOLDER = Path(".cluster")


def use_the_running_cluster() -> None:
    """Take the running cluster's environment for what this shell does not set itself."""
    if "DATABASE_URL" in os.environ:
        return
    stored = FOLDER / "env.json"
    if stored.exists():
        from deploy.local.layout import read_environment  # noqa: PLC0415 - see the package's docstring, here and below

        for name, value in read_environment(stored).items():
            os.environ.setdefault(name, value)
    elif "SECRET_KEY" not in os.environ:  # no service can do without, so none is meant
        fail(
            f"No cluster runs in {FOLDER.absolute()}. `make run` or `scaleout up` starts one; "
            "for another service set DATABASE_URL and its other settings."
        )


@contextmanager
def cluster_errors() -> Iterator[None]:
    """Say what is wrong with the cluster in a sentence, without a traceback."""
    from app.core.errors import ServiceError  # noqa: PLC0415
    from deploy.local import ClusterError  # noqa: PLC0415

    try:
        yield
    except ClusterError as error:
        fail(str(error))
    except ServiceError as error:
        fail(error.detail)
    except ModuleNotFoundError as error:
        fail(f"The Python package {error.name} is not installed here; `make setup` installs all.")
    except OSError as error:
        # A full disk, a folder that may not be written: the system's words name it best.
        fail(f"{error.filename or 'The system'}: {error.strerror or error}")


@contextmanager
def operating() -> Iterator[ModuleType]:
    """Yield the room of operations, set to the running cluster unless the environment names another service."""
    with settings_errors():
        from app import operations  # noqa: PLC0415

        with cluster_errors():
            use_the_running_cluster()
        yield operations


@contextmanager
def settings_errors() -> Iterator[None]:
    """Name each bad setting, without a traceback."""
    from app.core.settings import SettingsError  # noqa: PLC0415

    try:
        yield
    except SettingsError as error:
        typer.echo(f"These settings keep it from starting:\n{error}", err=True)
        raise typer.Exit(2) from error


def fail(message: str) -> NoReturn:
    """Say what is wrong, and end."""
    typer.echo(message, err=True)
    raise typer.Exit(1)
