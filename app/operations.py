"""What people do by hand on the command line, next to a running service: each is one short process of its own.

Every function opens its own `Resources`, prints what it found for a person, and returns an exit code.
"""

import asyncio
from collections.abc import Awaitable, Callable
from datetime import timedelta

import typer

from app.core import context
from app.core.errors import ServiceError
from app.core.settings import load_settings
from app.core.telemetry import configure_logging
from app.domain.payments.reconciliation import ON_ITS_WAY
from app.domain.payments.reconciliation import reconcile as compare
from app.wiring import Resources, open_resources

DONE, FOUND_SOMETHING = 0, 1


def reconcile(hours: float) -> int:
    """Compare the payments that moved in the last `hours`, print each that differs; 1 if any does."""

    async def work(resources: Resources) -> int:
        found = await compare(resources.database, resources.payments, period=timedelta(hours=hours))
        for each in found.differences:
            typer.echo(f"order {each.attempt.order_id}: {each.words}")
        minutes = ON_ITS_WAY.seconds // 60
        typer.echo(
            f"{found.compared} payments compared, {len(found.differences)} differ. "
            f"Those of the last {minutes} minutes may still be moving and are left out."
        )
        return FOUND_SOMETHING if found.differences else DONE

    return _with_resources(work)


def _with_resources(work: Callable[[Resources], Awaitable[int]]) -> int:
    """Run `work` with resources of its own; an error of the service is one sentence and exit code 1."""
    settings = load_settings()
    configure_logging(settings.service.model_copy(update={"log_level": "error"}), "cli")

    async def run() -> int:
        async with open_resources(settings) as resources:
            with context.working(context.Work(request_id=context.new_request_id())):
                try:
                    return await work(resources)
                except ServiceError as error:
                    typer.echo(error.detail, err=True)
                    return FOUND_SOMETHING

    return asyncio.run(run())
