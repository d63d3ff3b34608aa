"""The connection to Redis: short timeouts, a breaker, and one error that every user of it has an answer to.

redis-py's defaults wait and retry for seconds; a request must not. Here a call has a quarter of a second, and once a
few calls in a row have failed the breaker refuses the next ones at once, so that a dead Redis costs next to nothing.
"""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from redis.asyncio import BlockingConnectionPool, Redis
from redis.asyncio.retry import Retry
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

from app.core.settings import RedisSettings
from app.core.telemetry import REDIS_FAILURES
from app.scaling.outbound import Breaker, Refused

# Replies that say that Redis cannot serve now, not that we asked for something wrong.
REFUSALS = (OutOfMemoryError, ReadOnlyError, MasterDownError)


class RedisDown(Exception):
    """Redis did not answer in time or refuses. Each user of Redis says what it does then."""


class RedisLink:
    """One Redis server for one process.

    Args:
        settings: where it is and how long a call may take.
    """

    def __init__(self, settings: RedisSettings) -> None:
        self.client: Redis = Redis(
            connection_pool=BlockingConnectionPool.from_url(
                settings.address,
                max_connections=settings.connections,
                timeout=settings.timeout,  # waiting for a free connection counts like waiting for an answer
                socket_timeout=settings.timeout,
                socket_connect_timeout=settings.timeout,
                # One more try at once: it replaces a pooled connection that a restart of Redis has cut.
                retry=Retry(NoBackoff(), 1),
                protocol=3,
            )
        )
        # A second: long enough that a dead Redis is asked once a second, short enough to come back unnoticed.
        self.breaker = Breaker("redis", failures=3, reset_after=1.0)

    async def stop(self) -> None:
        """Close all connections."""
        await self.client.aclose(close_connection_pool=True)  # a pool that was handed in stays open otherwise

    @asynccontextmanager
    async def calling(self, purpose: str) -> AsyncIterator[Any]:
        """Yield the client for one call or one pipeline.

        Args:
            purpose: what for, as a label of the metric of failures.

        Raises:
            RedisDown: if Redis is down, slow, out of memory, or the breaker is open.
        """
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


def _refuses(error: RedisError) -> bool:
    # Inside a script the server's own error is only part of the text.
    return isinstance(error, REFUSALS) or any(code in str(error) for code in ("OOM command", "READONLY"))
