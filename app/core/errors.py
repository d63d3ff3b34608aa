"""The one error tree. Only the HTTP edge turns a kind into a status, only the worker turns it into a retry.

    ServiceError
    ├── Invalid               the input breaks a rule; names the fields
    ├── Unauthenticated       no valid session where one is needed
    ├── Forbidden             a valid session without the right
    ├── NotFound              no such thing, or none that this caller may know of
    ├── Conflict              the state of the thing forbids it
    ├── PreconditionFailed    the caller's version is not the current one
    ├── PreconditionRequired  the caller named no version
    ├── TooLarge              a body past its bound
    ├── RateLimited           too many requests in the window
    ├── TimedOut              the deadline passed
    └── Unavailable           a dependency is down or full; the same call may work later

Each error carries a stable `code` that clients branch on and a `detail` for people. Neither ever holds SQL, a host
name, a secret or personal data.
"""

from dataclasses import dataclass
from enum import Enum


class Kind(Enum):
    """What went wrong, independent of any protocol."""

    INVALID = "invalid"
    UNAUTHENTICATED = "unauthenticated"
    FORBIDDEN = "forbidden"
    NOT_FOUND = "not_found"
    CONFLICT = "conflict"
    PRECONDITION_FAILED = "precondition_failed"
    PRECONDITION_REQUIRED = "precondition_required"
    TOO_LARGE = "too_large"
    RATE_LIMITED = "rate_limited"
    TIMED_OUT = "timed_out"
    UNAVAILABLE = "unavailable"


@dataclass(frozen=True, slots=True)
class FieldError:
    """One broken field: `pointer` is a JSON pointer into the body, or `query/name`, `header/Name`, `path/name`."""

    pointer: str
    detail: str


class ServiceError(Exception):
    """The root: catch it to catch everything that this service says on purpose.

    Args:
        detail: one sentence for a person, saying what to do.
        code: the stable name of the error; each subclass has a default.
        fields: the broken fields, for `Invalid`.
        retry_after: seconds after which a repeat makes sense, for `RateLimited` and `Unavailable`.
    """

    kind: Kind
    default_code: str

    def __init__(
        self,
        detail: str,
        *,
        code: str | None = None,
        fields: tuple[FieldError, ...] = (),
        retry_after: int | None = None,
    ) -> None:
        super().__init__(detail)
        self.detail = detail
        self.code = code or self.default_code
        self.fields = fields
        self.retry_after = retry_after


class Invalid(ServiceError):
    """The input breaks a rule; `fields` names each one."""

    kind = Kind.INVALID
    default_code = "invalid"

    @classmethod
    def field(cls, pointer: str, detail: str, *, code: str | None = None) -> "Invalid":
        """The common case of one broken field."""
        return cls(detail, code=code, fields=(FieldError(pointer, detail),))


class Unauthenticated(ServiceError):
    """No valid session where one is needed."""

    kind = Kind.UNAUTHENTICATED
    default_code = "unauthenticated"


class Forbidden(ServiceError):
    """A valid session without the right."""

    kind = Kind.FORBIDDEN
    default_code = "forbidden"


class NotFound(ServiceError):
    """No such thing, or none that this caller may know of."""

    kind = Kind.NOT_FOUND
    default_code = "not_found"


class Conflict(ServiceError):
    """The state of the thing forbids it."""

    kind = Kind.CONFLICT
    default_code = "conflict"


class PreconditionFailed(ServiceError):
    """The caller's version is not the current one."""

    kind = Kind.PRECONDITION_FAILED
    default_code = "version_mismatch"


class PreconditionRequired(ServiceError):
    """The caller named no version where one is needed."""

    kind = Kind.PRECONDITION_REQUIRED
    default_code = "precondition_required"


class TooLarge(ServiceError):
    """A body past its bound."""

    kind = Kind.TOO_LARGE
    default_code = "payload_too_large"


class RateLimited(ServiceError):
    """Too many requests in the window; `retry_after` says when the next one fits."""

    kind = Kind.RATE_LIMITED
    default_code = "rate_limited"


class TimedOut(ServiceError):
    """The deadline passed before the answer was there."""

    kind = Kind.TIMED_OUT
    default_code = "deadline_exceeded"


class Unavailable(ServiceError):
    """A dependency is down or full; the same call may work after `retry_after` seconds."""

    kind = Kind.UNAVAILABLE
    default_code = "unavailable"

    def __init__(self, detail: str, *, code: str | None = None, retry_after: int = 1) -> None:
        super().__init__(detail, code=code, retry_after=retry_after)
