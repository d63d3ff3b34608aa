"""How the URL of a Redis is read: one server, a master behind sentinels, or a cluster, by its scheme alone.

    redis://[[user]:password@]host[:port][/database]                       one server; rediss:// over TLS
    redis+sentinel://[[user]:password@]host[:port][,host[:port]…]/name     the master that the sentinels name
    redis+cluster://[[user]:password@]host[:port][,host[:port]…]           a cluster, found through any of the hosts

User and password are those of the servers that hold the data. What cannot be read raises a ValueError that shows the
form and never the value.
"""

from dataclasses import dataclass, field
from enum import Enum
from urllib.parse import unquote, urlsplit

FORMS = "redis://[:password@]host:port/database, redis+sentinel://host:port,host:port/name or redis+cluster://host:port"
_PORT, _SENTINEL_PORT = 6379, 26379


class Deployment(Enum):
    """How a Redis is run."""

    SERVER = "server"
    SENTINEL = "sentinel"
    CLUSTER = "cluster"


_SCHEMES = {
    "redis": Deployment.SERVER,
    "rediss": Deployment.SERVER,
    "redis+sentinel": Deployment.SENTINEL,
    "redis+cluster": Deployment.CLUSTER,
}


@dataclass(frozen=True, slots=True)
class RedisAddress:
    """Where a Redis is.

    Attributes:
        deployment: how it is run.
        hosts: (host, port) of the server, of the sentinels, or of some nodes of the cluster.
        username: of the servers; None for the default user.
        password: of the servers; None where they ask for none.
        database: number; always 0 on a cluster.
        service: what the sentinels call the master; empty without sentinels.
        tls: whether connections are encrypted.
    """

    deployment: Deployment
    hosts: tuple[tuple[str, int], ...]
    username: str | None = None
    password: str | None = field(default=None, repr=False)
    database: int = 0
    service: str = ""
    tls: bool = False

    @classmethod
    def parse(cls, url: str) -> "RedisAddress":
        """Read a URL.

        Raises:
            ValueError: if it has none of the forms above.
        """
        parts = urlsplit(url)
        deployment = _SCHEMES.get(parts.scheme)
        credentials, _, hosts = parts.netloc.rpartition("@")
        username, _, password = credentials.partition(":")
        path = parts.path.strip("/")
        if deployment is None or not hosts:
            raise ValueError(f"must be {FORMS}")
        named = deployment is Deployment.SENTINEL
        if named != (bool(path) and not path.isdecimal()) or (
            deployment is Deployment.CLUSTER and path not in {"", "0"}
        ):
            raise ValueError(f"must be {FORMS}")
        default = _SENTINEL_PORT if named else _PORT
        found = tuple(_host(host, default) for host in hosts.split(","))
        if deployment is Deployment.SERVER and len(found) != 1:
            raise ValueError(f"names several hosts: must be {FORMS}")
        return cls(
            deployment,
            found,
            unquote(username) or None,
            unquote(password) or None,
            0 if named else int(path or 0),
            path if named else "",
            parts.scheme == "rediss",
        )


def _host(text: str, default: int) -> tuple[str, int]:
    parts = urlsplit(f"//{text}")
    if not parts.hostname:
        raise ValueError(f"must be {FORMS}")
    try:
        return parts.hostname, parts.port or default
    except ValueError as error:
        raise ValueError(f"has a port that is no port: must be {FORMS}") from error
