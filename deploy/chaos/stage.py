"""The stage: a whole local cluster whose servers and instances are reached through doors, and a bucket beside it.

Everything that depends on something reaches it through a door: NGINX its instances, instances, relay and workers their
databases, Redis, payment provider, mail server and bucket. Whoever looks at the outcome goes around the doors.
"""

import asyncio
import random
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from urllib.parse import urlsplit

from deploy.chaos.doors import Door
from deploy.local import ClusterError
from deploy.local.cluster import Cluster
from deploy.local.layout import CHECKOUT, HOST
from deploy.local.start import Progress

INSTANCES = ("api-1", "api-2")
REPLICAS = ("replica-1", "replica-2")
BUCKET = "storage"
DOORS = (*INSTANCES, "primary", *REPLICAS, "redis", "payments", "smtp")

# Clients here are a few and ask without a pause, which a limit would only cut off. What was lost comes again soon, so
# that a run shows it: 5 s instead of a minute. Passwords cost little to hash, as hashing is not what is looked at.
ENVIRONMENT = {
    "RATE_LIMIT_ANONYMOUS": "1000000/minute",
    "RATE_LIMIT_SIGN_IN": "1000000/minute",
    "RATE_LIMIT_FREE": "1000000/hour",
    "RATE_LIMIT_ENTERPRISE": "1000000/hour",
    "WORKER_STALE_AFTER": "10",
    "SESSION_HASH_MEMORY": "1024",
    "SESSION_HASH_PASSES": "1",
}
NAME = "scaleout"  # of the bucket
CREDENTIALS = {
    "AWS_ALLOW_HTTP": "true",
    "AWS_REGION": "us-east-1",
    "AWS_ACCESS_KEY_ID": "chaos",
    "AWS_SECRET_ACCESS_KEY": "chaos",
}


@dataclass(frozen=True)
class Stage:
    """A running cluster with its doors by name; `bucket` is the server of its object storage, if it has one."""

    cluster: Cluster
    doors: Mapping[str, Door]
    bucket: subprocess.Popen[bytes] | None

    def pid(self, name: str) -> int | None:
        """Return the id of a process; None while it is down."""
        if name == BUCKET:
            return self.bucket.pid if self.bucket else None
        return self.cluster.process(name).pid

    def address(self, name: str) -> str:
        """Return where a process itself is, around its door."""
        return self.cluster.process(name).address or ""


@asynccontextmanager
async def open_stage(
    folder: Path, *, chance: random.Random, bucket: bool = True, progress: Progress | None = None
) -> AsyncIterator[Stage]:
    """Run a cluster in `folder` for the block, and remove it afterwards.

    Args:
        folder: is made, and gone in the end.
        chance: decides which connections doors cut.
        bucket: keep objects in a bucket instead of a folder, so that the storage can fail; needs the package moto.
        progress: is told of the start.

    Raises:
        ClusterError: it does not start; the text says why.
    """
    async with AsyncExitStack() as opened:
        ports: dict[str, int] = {}

        def port_of(name: str) -> int:
            if name not in ports:
                ports[name] = urlsplit(cluster.process(name).address or "").port or 0
            return ports[name]

        doors: dict[str, Door] = {}
        for name in (*DOORS, *([BUCKET] if bucket else [])):
            doors[name] = await Door(partial(port_of, name), chance).open()
            opened.callback(doors[name].close)
        environment, server = dict(ENVIRONMENT), None
        if bucket:
            server, ports[BUCKET] = opened.enter_context(_bucket())
            environment |= CREDENTIALS | {"AWS_ENDPOINT_URL": f"http://{HOST}:{doors[BUCKET].port}"}
        cluster = Cluster(
            folder,
            environment=environment,
            doors={name: doors[name].port for name in DOORS},
            storage=f"s3://{NAME}" if bucket else None,
        )
        opened.push_async_callback(asyncio.to_thread, cluster.down, wipe=True)
        starting = asyncio.create_task(asyncio.to_thread(cluster.up, progress))
        try:
            await asyncio.shield(starting)
        except asyncio.CancelledError:
            # A thread cannot be interrupted, and what is half started cannot be stopped: it is stopped once it is up.
            await asyncio.wait({starting})
            raise
        yield Stage(cluster, doors, server)


@contextmanager
def _bucket() -> Iterator[tuple[subprocess.Popen[bytes], int]]:
    """Run an S3 server with an empty bucket; yields its process and port."""
    process = subprocess.Popen(  # noqa: S603 - arguments are ours
        [sys.executable, "-m", "deploy.chaos.bucket", NAME],
        cwd=CHECKOUT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,  # a line for each request
    )
    try:
        said = process.stdout.readline() if process.stdout else b""
        if not said:
            raise ClusterError(f"The bucket does not start. python -m deploy.chaos.bucket {NAME} says why.")
        yield process, int(said)
    finally:
        process.kill()  # also one that is stopped
        process.communicate()
