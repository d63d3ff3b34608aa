"""The one composition root: what a process needs, opened in order and closed in reverse.

API, worker, relay, command line and tests all open their `Resources` here and pass them on; nothing else builds a
client, a pool or a service.
"""

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass

from app.core.settings import Settings
from app.core.signing import Signer
from app.domain.catalog.service import Catalog, add_views
from app.domain.orders.following import Following
from app.domain.orders.invoicing import Invoices
from app.domain.orders.mail import Mail
from app.domain.orders.service import Orders
from app.domain.payments.service import Payments
from app.domain.profiles.avatars import Avatars
from app.domain.profiles.directory import Directory
from app.domain.profiles.passwords import Passwords
from app.domain.profiles.service import Profiles
from app.domain.reports.export import SalesExport
from app.domain.reports.jobs import Jobs
from app.domain.reports.recommendations import Recommendations
from app.domain.reports.service import Reports
from app.domain.sessions.admission import Admissions
from app.domain.sessions.service import Sessions
from app.scaling.cache import Cache
from app.scaling.database import Database
from app.scaling.deadletters import DeadLetters
from app.scaling.events import EventStream
from app.scaling.lifecycle import Lifecycle
from app.scaling.locks import Locks
from app.scaling.near import Near
from app.scaling.paging import Cursors
from app.scaling.pipe import Pipe
from app.scaling.positions import Positions
from app.scaling.pulse import Pulse
from app.scaling.ratelimit import RateLimiter
from app.scaling.redis_link import RedisLink
from app.scaling.runs import Runs
from app.scaling.storage import Storage
from app.scaling.tally import Tally


@dataclass(frozen=True, slots=True)
class Resources:
    """Everything that a process works with; one for a process, all of it bounded."""

    settings: Settings
    lifecycle: Lifecycle
    database: Database
    redis: RedisLink
    pipe: Pipe
    near: Near
    positions: Positions
    cache: Cache
    limiter: RateLimiter
    storage: Storage
    locks: Locks
    runs: Runs
    dead_letters: DeadLetters
    events: EventStream
    tokens: Signer
    directory: Directory
    passwords: Passwords
    profiles: Profiles
    avatars: Avatars
    sessions: Sessions
    admissions: Admissions
    catalog: Catalog
    views: Tally
    orders: Orders
    following: Following
    payments: Payments
    invoices: Invoices
    mail: Mail
    reports: Reports
    jobs: Jobs
    sales_export: SalesExport
    recommendations: Recommendations


@asynccontextmanager
async def open_resources(settings: Settings) -> AsyncIterator[Resources]:
    """Open the resources of a process for the block. A dependency that is down is no reason not to open."""
    async with AsyncExitStack() as stack:
        secret = settings.service.secret
        redis = RedisLink(settings.redis)
        stack.push_async_callback(redis.stop)
        pipe = Pipe(settings.redis.address, settings.redis.timeout)
        await pipe.start()
        stack.push_async_callback(pipe.stop)
        values = pipe
        if settings.redis.cache_url is not None:
            values = Pipe(settings.redis.cache_address, settings.redis.timeout)
            await values.start()
            stack.push_async_callback(values.stop)
        near = Near(pipe, settings.cache)
        await near.start()
        stack.push_async_callback(near.stop)
        positions = Positions(pipe, near, settings.database)
        database = Database(settings.database, positions)
        stack.push_async_callback(database.stop)
        await database.start()
        passwords = Passwords(settings.sessions)
        stack.callback(passwords.stop)
        payments = Payments(settings.payments)
        stack.push_async_callback(payments.stop)

        cache = Cache(values, near)
        stack.push_async_callback(cache.stop)
        cursors = Cursors(secret)
        storage = Storage(settings.storage, secret, settings.service.public_url, settings.service.region)
        directory = Directory(database, secret)
        profiles = Profiles(database, directory, cache, cursors, passwords)
        views = Tally("product_views", pipe, database, add_views)
        stack.push_async_callback(views.stop)
        catalog = Catalog(database, cache, cursors, views)
        invoices = Invoices(database, storage)
        limiter = RateLimiter(pipe, settings.rates.instances)
        admissions = Admissions(pipe, values, near, limiter, settings)
        await admissions.start()
        stack.push_async_callback(admissions.stop)
        lifecycle = Lifecycle(settings.service.ready_file)
        events = EventStream(redis, lifecycle.draining)
        stack.push_async_callback(events.stop)
        jobs = Jobs(database, storage)
        orders = Orders(database, catalog, storage, cursors)
        yield Resources(
            settings=settings,
            lifecycle=lifecycle,
            database=database,
            redis=redis,
            pipe=pipe,
            near=near,
            positions=positions,
            cache=cache,
            limiter=limiter,
            storage=storage,
            locks=Locks(redis),
            runs=Runs(pipe),
            dead_letters=DeadLetters(database, cursors),
            events=events,
            tokens=Signer(secret, "consistency token"),
            directory=directory,
            passwords=passwords,
            profiles=profiles,
            avatars=Avatars(database, storage, profiles),
            sessions=Sessions(database, pipe, near, positions, known=profiles, settings=settings.sessions),
            admissions=admissions,
            catalog=catalog,
            views=views,
            orders=orders,
            following=Following(orders, events),
            payments=payments,
            invoices=invoices,
            mail=Mail(settings.mail, database, invoices),
            reports=Reports(database),
            jobs=jobs,
            sales_export=SalesExport(database, storage, jobs),
            recommendations=Recommendations(database, cache, catalog),
        )


def pulse_of(resources: Resources, role: str) -> Pulse:
    """Return what tells the console of this process, which is an `api`, a `relay` or a `worker`."""
    service = resources.settings.service
    return Pulse(role, service, resources.pipe, resources.database, resources.lifecycle)


@asynccontextmanager
async def beating(resources: Resources, role: str) -> AsyncIterator[None]:
    """Tell the console of this process inside the block, unless the settings have none."""
    if not resources.settings.console.enabled:
        yield
        return
    async with pulse_of(resources, role).beating():
        yield
