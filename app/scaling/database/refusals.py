"""What a caller is told when a database does not do what was asked: one sentence, and a code that stays the same.

Readers and writers end in the same few words; which trouble deserves which of them is decided where it is met.
"""

from typing import NoReturn

from app.core.errors import TimedOut, Unavailable
from app.scaling import dialect
from app.scaling.dialect import Trouble


def refuse(error: Exception, *, alive: bool) -> NoReturn:
    """Turn what befell a transaction into an error for the caller, or raise it again if its statement is wrong.

    Args:
        error: what was raised.
        alive: whether the primary has answered its watcher since the transaction began.
    """
    match dialect.trouble(error):
        case None:
            raise error
        case Trouble.BUSY:
            message = "Somebody else changes the same thing right now; try again."
            raise Unavailable(message, code="database_busy") from error
        case Trouble.SLOW if alive:
            raise too_slow() from error
        case _:
            raise Unavailable("The database takes no writes right now; try again.", code="database_down") from error


def all_in_use() -> Unavailable:
    """Return the answer for a pool without a free connection."""
    return Unavailable("All connections to the database are in use; try again.", code="database_busy")


def too_slow() -> TimedOut:
    """Return the answer for a statement whose end nobody has seen."""
    return TimedOut("The database took too long; look before you repeat a change.", code="database_timeout")
