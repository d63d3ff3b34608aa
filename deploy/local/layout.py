"""Where the cluster keeps its things: the run folder, the data of the servers, and passwords.

All files of the run folder are readable by their owner only and replaced atomically, so that a reader never sees half
of one and a process killed while writing leaves the old one.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets as randomness
import shutil
import stat
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Self

from deploy.local import ClusterError

if TYPE_CHECKING:
    from deploy.local.servers import Account

CHECKOUT = Path(__file__).resolve().parents[2]

HOST = "127.0.0.1"

# sun_path holds 108 bytes on Linux and 104 on macOS, and supervisord first binds a name with its process id appended.
LONGEST_SOCKET_PATH = 92


class Name(NamedTuple):
    """A process's name taken apart: `shard1-replica-2` is the second replica of shard 1, `redis` the first of all."""

    shard: int
    kind: str
    number: int

    @classmethod
    def of(cls, name: str) -> Self:
        """Take `name` apart."""
        shard, whole = 0, name
        if name.startswith("shard"):
            number, _, whole = name.removeprefix("shard").partition("-")
            shard = int(number)
        kind, _, number = whole.rpartition("-") if whole[-1].isdigit() else (whole, "", "1")
        return cls(shard, kind, int(number))


@dataclass(frozen=True, slots=True)
class Layout:
    """The paths of one cluster.

    `root` is the run folder (`.cluster`), `state` holds what the servers themselves write and must be able to reach: it
    lies in `root`, except for root (the user) when an unprivileged account could not enter there.
    """

    root: Path
    state: Path

    @classmethod
    def of(cls, directory: Path, account: Account | None) -> Self:
        """Choose the folders for the cluster of `directory`; creates nothing.

        `account` is the unprivileged account the servers run as, or None when they run as the caller.
        """
        root = directory.expanduser().resolve()
        if account is None or _open_to_everyone(root.parent):
            return cls(root, root / "state")
        name = hashlib.sha256(os.fsencode(root)).hexdigest()[:12]
        return cls(root, Path("/var/tmp") / f"scaleout-{name}")  # noqa: S108 - created 0711, ownership checked below

    @property
    def cluster(self) -> Path:
        """Addresses and process ids, for people and tests; exists while the cluster runs."""
        return self.root / "cluster.json"

    @property
    def programs(self) -> Path:
        """What the supervisor runs: arguments, environment, log and address of each process."""
        return self.root / "programs.json"

    @property
    def pids(self) -> Path:
        """Process ids with their creation times, to recognise leftovers."""
        return self.root / "pids.json"

    @property
    def environment(self) -> Path:
        """The environment of our processes, for commands typed in a plain shell."""
        return self.root / "env.json"

    @property
    def secrets(self) -> Path:
        """The generated passwords."""
        return self.root / "secrets.json"

    @property
    def ports(self) -> Path:
        """The ports of the last start, kept when they are still free."""
        return self.root / "ports.json"

    @property
    def lock(self) -> Path:
        """Held (flock) while the cluster starts, runs or stops."""
        return self.root / "lock"

    @property
    def supervisor_config(self) -> Path:
        """The supervisord.conf of this cluster."""
        return self.root / "supervisord.conf"

    @property
    def socket(self) -> Path:
        """The supervisor's XML-RPC socket; in a short folder of its own when the run folder's path is too long."""
        inside = self.root / "supervisor.sock"
        if len(os.fsencode(inside)) <= LONGEST_SOCKET_PATH:
            return inside
        name = hashlib.sha256(os.fsencode(self.root)).hexdigest()[:12]
        return Path("/tmp") / f"scaleout-{os.getuid()}-{name}" / "supervisor.sock"  # noqa: S108 - 0700, checked

    @property
    def logs(self) -> Path:
        """One log a process."""
        return self.root / "logs"

    @property
    def storage(self) -> Path:
        """Object storage as a folder."""
        return self.root / "storage"

    @property
    def ready(self) -> Path:
        """Files by which processes without a port say that they are ready."""
        return self.root / "ready"

    @property
    def temporary(self) -> Path:
        """Where our processes put what they forget again; what those who are killed leave goes with the next start."""
        return self.root / "tmp"

    @property
    def nginx(self) -> Path:
        """NGINX's prefix: its configuration and its process id."""
        return self.root / "nginx"

    @property
    def nginx_temp(self) -> Path:
        """Where NGINX's workers put bodies that do not fit into memory."""
        return self.state / "nginx"

    @property
    def data(self) -> Path:
        """The folder that belongs to the servers' account: databases and Redis' append-only file."""
        return self.state / "data"

    @property
    def seeded(self) -> Path:
        """Marks that seeding was finished; lies with the data, so that it goes with the data."""
        return self.state / "seeded"

    @property
    def migrated(self) -> Path:
        """Holds the fingerprint of the migrations that the data has been through; lies with the data too."""
        return self.state / "migrated"

    def create_root(self) -> None:
        """Make the run folder itself, where the lock lies.

        Raises:
            ClusterError: it cannot be written.
        """
        try:
            self.root.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ClusterError(_cannot_write(error, self.root)) from error
        if not os.access(self.root, os.W_OK):
            raise ClusterError(_cannot_write(PermissionError(13, "Permission denied"), self.root))

    def create(self, account: Account | None) -> None:
        """Make the folders and hand those of the servers to `account`.

        Raises:
            ClusterError: a folder cannot be written, or a folder of the same name belongs to someone else.
        """
        outside = self.state.parent != self.root
        if outside and not self.secrets.exists():
            # The run folder was deleted by hand: without its passwords the data outside can never be opened again.
            remove_tree(self.state)
        try:
            # 0711: the servers' account must pass through to its data, everything else in here is 0600 or 0700.
            self.root.chmod(0o711 if account else 0o700)
            _own_folder(self.state, 0o711 if account else 0o700)
            for folder in (self.logs, self.storage, self.ready, self.nginx):
                _own_folder(folder, 0o700)
            if self.socket.parent != self.root:
                _own_folder(self.socket.parent, 0o700)
            for folder in (self.data, self.nginx_temp):
                folder.mkdir(mode=0o700, exist_ok=True)
                give(folder, account)
        except OSError as error:
            raise ClusterError(_cannot_write(error, self.root)) from error
        (self.root / ".gitignore").write_text("*\n")

    def tidy(self) -> None:
        """Empty the folder for temporary files, once nobody runs who could have one open."""
        remove_tree(self.temporary)
        _own_folder(self.temporary, 0o700)

    def wipe(self) -> None:
        """Remove the run folder and all data."""
        remove_tree(self.state)
        if self.socket.parent != self.root:
            remove_tree(self.socket.parent)
        remove_tree(self.root)


@dataclass(frozen=True, slots=True, repr=False)
class Secrets:
    """The passwords of one cluster: letters, digits, `-` and `_`, so that no file or URL needs to quote them."""

    superuser: str
    owner: str
    replication: str
    redis: str
    application: str

    @classmethod
    def load(cls, layout: Layout) -> Self:
        """Read the passwords of `layout`, or make them at the first start.

        Raises:
            ClusterError: the file is damaged, or is gone while the data that it opens is still there.
        """
        if layout.secrets.exists():
            try:
                return cls(**read_json(layout.secrets))
            except (ClusterError, TypeError) as error:
                raise ClusterError(
                    f"{layout.secrets} is damaged. `scaleout down --wipe` removes this cluster and its data."
                ) from error
        if (layout.data / "primary").exists():
            raise ClusterError(
                f"{layout.secrets} is gone, the data cannot be opened without it. `scaleout down --wipe` removes all."
            )
        made = cls(*(randomness.token_urlsafe(24) for _ in cls.__slots__))
        write_json(layout.secrets, {name: getattr(made, name) for name in cls.__slots__})
        return made


def give(path: Path, account: Account | None) -> None:
    """Hand `path` to the servers' account, when there is one."""
    if account:
        os.chown(path, account.uid, account.gid)


def write_private(path: Path, text: str, account: Account | None = None) -> None:
    """Replace `path` by `text` in one step, readable by its owner (or `account`) only."""
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    with suppress(FileNotFoundError):
        draft.unlink()
    descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "w") as file:
        file.write(text)
    give(draft, account)
    draft.replace(path)


def write_json(path: Path, value: Any) -> None:
    """`write_private` for a value that JSON can hold."""
    write_private(path, json.dumps(value, indent=1) + "\n")


def read_json(path: Path) -> Any:
    """The value of a JSON file of ours.

    Raises:
        FileNotFoundError: there is none.
        ClusterError: it is damaged; the text says how to get a whole one.
    """
    try:
        return json.loads(path.read_bytes())
    except ValueError as error:
        raise _damaged(path) from error


def read_environment(path: Path) -> dict[str, str]:
    """The environment that `write_json` has kept in a file; raises as `read_json` does."""
    found = read_json(path)
    if not isinstance(found, dict) or not all(isinstance(value, str) for value in found.values()):
        raise _damaged(path)
    return found


def remove_tree(path: Path) -> None:
    """Remove a folder of ours, present or not; never follows a link."""
    if path.is_symlink():
        raise ClusterError(f"{path} is a link where a folder of the cluster should be. Remove it by hand.")
    with suppress(FileNotFoundError):
        shutil.rmtree(path)


def _damaged(path: Path) -> ClusterError:
    return ClusterError(f"{path} is damaged. `scaleout down` and then `make run` or `scaleout up` write it anew.")


def _cannot_write(error: OSError, folder: Path) -> str:
    return f"Cannot write {error.filename or folder}: {error.strerror}. Start in a folder that you may write."


def _own_folder(path: Path, mode: int) -> None:
    """Make `path`, or make sure that it is a real folder of the caller's: others may write to its parent."""
    path.mkdir(mode=mode, exist_ok=True)
    found = path.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid():
        raise ClusterError(f"{path} belongs to someone else. Remove it, or start in another folder.")
    path.chmod(mode)


def _open_to_everyone(folder: Path) -> bool:
    """Whether any account may pass through `folder`; parts that do not exist yet will be made so."""
    return all(not part.exists() or part.stat().st_mode & stat.S_IXOTH for part in (folder, *folder.parents))
