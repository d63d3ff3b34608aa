"""Every table of the service under one `metadata`, for whoever needs them all: the migrations and their check."""

from app.domain.catalog import tables as _catalog
from app.domain.orders import tables as _orders
from app.domain.payments import attempts as _payments
from app.domain.profiles import tables as _profiles
from app.domain.reports import tables as _reports
from app.domain.sessions import tables as _sessions
from app.scaling import idempotency as _idempotency
from app.scaling import mover as _mover
from app.scaling import outbox as _outbox
from app.scaling import tally as _tally
from app.scaling.database import metadata

ROOMS = (_catalog, _orders, _payments, _profiles, _reports, _sessions, _idempotency, _mover, _outbox, _tally)

__all__ = ["ROOMS", "metadata"]
