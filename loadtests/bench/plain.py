"""Side b, what a user of FastAPI would write: one route, one GET from Redis, a `response_model`.

No session, no limit, no metrics, no log: it does less than the service and shows what the framework's own way costs.
"""

import os
from datetime import datetime
from uuid import UUID

import orjson
from fastapi import FastAPI, HTTPException
from pydantic import BaseModel
from redis.asyncio import BlockingConnectionPool, Redis

from loadtests.bench import KEY

app = FastAPI()
# As many connections as this service would have; whoever finds none free waits.
_pool = BlockingConnectionPool.from_url(os.environ["REDIS_URL"], protocol=3, max_connections=64, timeout=None)
_client = Redis(connection_pool=_pool)


class Profile(BaseModel):
    """The public view of a profile."""

    id: UUID
    name: str
    bio: str | None
    tier: str
    avatar_url: str | None
    version: int
    created_at: datetime
    updated_at: datetime


@app.get("/api/v1/profiles/{profile_id}", response_model=Profile)
async def profile(profile_id: UUID) -> dict[str, object]:
    """Return the profile that Redis holds."""
    raw = await _client.get(KEY)
    if raw is None:
        raise HTTPException(404, f"There is no profile {profile_id}.")
    found: dict[str, object] = orjson.loads(raw)
    return found
