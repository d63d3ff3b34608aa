"""The servers of a bench: a small cluster of its own, in a folder that is gone afterwards, whose limits never bite.

Each bench starts the instances that it measures itself, with the settings and on the core that it wants; the cluster's
own instance has seeded the database and is stopped.
"""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console

from deploy.local.cluster import Cluster
from deploy.local.programs import Sizes

NO_LIMIT = "1000000000/minute"
ENVIRONMENT = {
    "RATE_LIMIT_ENTERPRISE": NO_LIMIT,
    "RATE_LIMIT_SIGN_IN": NO_LIMIT,
    # Nothing here pays or mails, but no process starts without knowing where to.
    "PAYMENT_URL": "http://127.0.0.1:1",
    "SMTP_URL": "smtp://127.0.0.1:1",
}


@contextmanager
def servers(*, replicas: int) -> Iterator[tuple[Cluster, Path]]:
    """Start a primary, so many replicas and a Redis, and end them with the block.

    Yields:
        The cluster, and a folder for whatever else the bench writes.
    """
    Console().print("Starting the servers …")
    sizes = Sizes(instances=1, replicas=replicas, kinds=("api", "primary", "redis", "replica"))
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        cluster = Cluster(Path(folder) / "cluster", environment=ENVIRONMENT, sizes=sizes)
        try:
            cluster.up()
            cluster.stop("api-1")
            yield cluster, Path(folder)
        finally:
            cluster.down(wipe=True)
