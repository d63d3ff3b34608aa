"""redis-py's way to Redis, for what is rare: locks, streams, upkeep. Short timeouts, a breaker, and one error.

What nearly every request asks goes through `pipe.py`. redis-py's defaults wait and retry for seconds; a request must
not. Here a call has a quarter of a second, and once a few calls in a row have failed the breaker refuses the next ones
at once, so that a dead Redis costs next to nothing.
"""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from redis.asyncio import BlockingConnectionPool, Connection, Redis, RedisCluster, Sentinel, SSLConnection
from redis.asyncio.cluster import ClusterNode
from redis.asyncio.retry import Retry
from redis.asyncio.sentinel import SentinelConnectionPool
from redis.backoff import NoBackoff
from redis.exceptions import (
    LockError,
    MasterDownError,
    NoScriptError,
    OutOfMemoryError,
    ReadOnlyError,
    RedisError,
    ResponseError,
)

from app.core import tracing
from app.core.addresses import Deployment
from app.core.settings import RedisSettings
from app.core.telemetry import REDIS_FAILURES
from app.scaling.outbound import Breaker, Refused

# Replies that say that Redis cannot serve now, not that we asked for something wrong.
REFUSALS = (OutOfMemoryError, ReadOnlyError, MasterDownError)


class RedisDown(Exception):
    """Redis did not answer in time or refuses. Each user of Redis says what it does then."""


class RedisFull(RedisDown):
    """Redis has no memory left for what was to be written; it still answers, deletes and announces."""


class RedisLink:
    """One Redis, whatever its deployment, for one process.

    Args:
        settings: where it is and how long a call may take.
    """

    def __init__(self, settings: RedisSettings) -> None:
        self.client: Any = _client(settings)
        # A second: long enough that a dead Redis is asked once a second, short enough to come back unnoticed.
        self.breaker = Breaker("redis", failures=3, reset_after=1.0)

    async def stop(self) -> None:
        """Close all connections."""
        await self.client.aclose()
        if isinstance(self.client, RedisCluster):
            return
        pool = self.client.connection_pool
        await pool.disconnect()  # a pool that was handed in stays open otherwise
        if isinstance(pool, SentinelConnectionPool):
            for sentinel in pool.sentinel_manager.sentinels:
                await sentinel.aclose()

    @asynccontextmanager
    async def calling(self, purpose: str) -> AsyncIterator[Any]:
        """Yield the client for one call or one pipeline.

        Args:
            purpose: what for, as a label of the metric of failures.

        Raises:
            RedisDown: if Redis is down, slow, out of memory, or the breaker is open.
        """
        leaf = tracing.leaf("redis", purpose)
        try:
            async with self.breaker.guard(RedisDown):
                try:
                    yield self.client
                except NoScriptError:
                    raise
                except (RedisError, OSError, TimeoutError) as error:
                    if isinstance(error, ResponseError | LockError) and not _refuses(error):
                        raise  # our own mistake in a command: hiding it would hide a bug
                    REDIS_FAILURES.labels(purpose).inc()
                    raise RedisDown(type(error).__name__) from error
        except Refused as error:
            raise RedisDown("refused by the breaker") from error
        finally:
            if leaf is not None:
                leaf.end()


def _client(settings: RedisSettings) -> Any:
    """Return redis-py's client of the deployment; their commands are the same, their classes are not related."""
    address = settings.address
    common: dict[str, Any] = {
        "username": address.username,
        "password": address.password,
        "socket_timeout": settings.timeout,
        "socket_connect_timeout": settings.timeout,
        # One more try at once: it replaces a pooled connection that a restart of Redis has cut.
        "retry": Retry(NoBackoff(), 1),
        "protocol": 3,
    }
    if address.deployment is Deployment.CLUSTER:
        nodes = [ClusterNode(*host) for host in address.hosts]
        return RedisCluster(startup_nodes=nodes, max_connections=settings.connections, ssl=address.tls, **common)
    if address.deployment is Deployment.SENTINEL:
        sentinel = Sentinel(  # type: ignore[no-untyped-call]  # redis leaves it untyped
            list(address.hosts),
            sentinel_kwargs={name: common[name] for name in ("socket_timeout", "socket_connect_timeout")},
        )
        return sentinel.master_for(address.service, max_connections=settings.connections, **common)
    ((host, port),) = address.hosts
    return Redis(
        connection_pool=BlockingConnectionPool(
            connection_class=SSLConnection if address.tls else Connection,
            host=host,
            port=port,
            db=address.database,
            max_connections=settings.connections,
            timeout=settings.timeout,  # waiting for a free connection counts like waiting for an answer
            **common,
        )
    )


def _refuses(error: RedisError) -> bool:
    # Inside a script the server's own error is only part of the text.
    return isinstance(error, REFUSALS) or any(code in str(error) for code in ("OOM command", "READONLY"))
