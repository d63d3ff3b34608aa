"""The database servers of one shard, whichever engine they are of: names, ports, folders.

Each engine's room says how its servers are made, started and asked. A data folder is built beside its place and renamed
when it is complete, so a start that was killed half-way is simply done again.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar, Self

from deploy.local import ClusterError
from deploy.local.layout import HOST, Layout, Secrets, remove_tree

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from deploy.local.servers import Binaries, Tools

OWNER = "scaleout"  # of the database of this name: what our processes sign in as


@dataclass(frozen=True)
class Databases(ABC):
    """The database servers of one shard of a cluster; `ports` maps `primary`, `replica-N` and so on to their ports.

    Those that are not `durable` leave it to the kernel when their data goes to the disk: a process that is killed loses
    nothing by that, a machine that loses its power loses all.
    """

    layout: Layout
    secrets: Secrets
    binaries: Binaries
    tools: Tools
    ports: Mapping[str, int]
    shard: int = 0
    durable: bool = True

    title: ClassVar[str]
    scheme: ClassVar[str]
    superuser: ClassVar[str]
    stop_signal: ClassVar[str]

    @property
    def primary(self) -> str:
        """The name of the shard's primary."""
        return f"shard{self.shard}-primary" if self.shard else "primary"

    def of_shard(self, shard: int) -> Self:
        """The servers of another shard of the same cluster."""
        return replace(self, shard=shard)

    def address(self, name: str, role: str = "") -> str:
        """The URL of the server `name` for the superuser, or for `OWNER`."""
        user, password = (OWNER, self.secrets.owner) if role == OWNER else (self.superuser, self.secrets.superuser)
        return f"{self.scheme}://{user}:{password}@{HOST}:{self.ports[name]}/{OWNER}"

    def address_of_primary(self, role: str) -> str:
        """The URL of the shard's primary."""
        return self.address(self.primary, role)

    @abstractmethod
    def arguments(self, name: str) -> list[str]:
        """The command line of the server `name`; it holds no password."""

    @abstractmethod
    def prepare_primary(self) -> None:
        """Make the primary's data folder if there is none, and state its settings.

        Raises:
            ClusterError: a tool failed, or the data is of something else.
        """

    @abstractmethod
    def state_roles(self, replicas: Sequence[str]) -> None:
        """Make roles and database as they should be on the running primary, for these replicas and no others."""

    @abstractmethod
    def prepare_replica(self, name: str) -> None:
        """Make what the replica `name` needs to follow the running primary.

        Raises:
            ClusterError: a tool failed.
        """

    @abstractmethod
    def streams_to(self, replicas: Sequence[str]) -> bool:
        """Whether the primary sends its log to all `replicas` now."""

    def _data(self, name: str) -> Path:
        return self.layout.data / name

    def _draft(self, name: str) -> Path:
        draft = self.layout.data / f"{name}.part"
        remove_tree(draft)
        return draft

    def _refuse(self, data: Path) -> ClusterError:
        return ClusterError(
            f"The data in {data} is not {self.title}'s. `scaleout down --wipe` removes it, or start with the database "
            "that wrote it."
        )
