"""Redis for the cluster: its settings, and the one question whether it answers.

Sessions and the broker's messages must survive a restart, so everything is appended to a file; when memory is full a
write is refused rather than something silently dropped.
"""

from __future__ import annotations

import socket
from typing import TYPE_CHECKING

from deploy.local.layout import HOST, Layout, Secrets, give, write_private

if TYPE_CHECKING:
    from pathlib import Path

    from deploy.local.servers import Account

SETTINGS = """\
bind 127.0.0.1
port {port}
protected-mode yes
requirepass {password}
daemonize no
logfile ""
dir "{folder}"
appendonly yes
# At most one second of writes is lost when the machine dies, none when Redis does.
appendfsync everysec
save ""
maxmemory 256mb
# The broker's messages and the sessions live here: refusing a write is honest, evicting one is not.
maxmemory-policy noeviction
"""

# Redis answers a PING in microseconds; a second means that it is not there.
ANSWER_SECONDS = 1.0


def prepare(layout: Layout, secrets: Secrets, port: int, account: Account | None) -> Path:
    """Write the settings and return their file, which is the only argument the server needs."""
    folder = layout.data / "redis"
    folder.mkdir(mode=0o700, exist_ok=True)
    give(folder, account)
    settings = folder / "redis.conf"
    quoted = str(folder).replace("\\", "\\\\").replace('"', '\\"')
    write_private(settings, SETTINGS.format(port=port, password=secrets.redis, folder=quoted), account)
    return settings


def address(secrets: Secrets, port: int) -> str:
    """The URL of the server, database 0."""
    return f"redis://:{secrets.redis}@{HOST}:{port}/0"


def is_ready(secrets: Secrets, port: int) -> bool:
    """Whether the server has read its file and answers."""
    try:
        with socket.create_connection((HOST, port), timeout=ANSWER_SECONDS) as connection:
            connection.sendall(f"AUTH {secrets.redis}\r\nPING\r\n".encode())
            with connection.makefile("rb") as answers:
                return answers.readline() == b"+OK\r\n" and answers.readline() == b"+PONG\r\n"
    except OSError:
        return False
