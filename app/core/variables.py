"""What an environment variable may hold: addresses, limits, networks, secrets; each says what it must look like.

A `Group` is read from the variables of one environment, which need not be this process's own. Only the form is looked
at, nobody is asked: whether a server answers there is for the start to find out.
"""

from collections.abc import Mapping
from contextvars import ContextVar
from os import environ
from typing import Annotated, Self
from urllib.parse import urlsplit

from pydantic import AfterValidator, BeforeValidator, SecretStr
from pydantic.networks import IPvAnyNetwork
from pydantic_settings import (
    BaseSettings,
    EnvSettingsSource,
    NoDecode,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
)

from app.core.addresses import Deployment, RedisAddress

SHORTEST_SECRET = 32  # characters; 64 hex digits are 256 bits
# pydantic-settings makes its sources itself and knows only this process's environment.
_environment: ContextVar[Mapping[str, str]] = ContextVar("environment", default=environ)


class _Environment(EnvSettingsSource):
    def _load_env_vars(self) -> Mapping[str, str | None]:
        return {name.lower(): value for name, value in _environment.get().items() if value}


class Group(BaseSettings):
    """Settings that belong together, frozen; what the environment leaves out or empty has its default."""

    model_config = SettingsConfigDict(frozen=True, extra="ignore", env_ignore_empty=True)

    @classmethod
    def read(cls, environment: Mapping[str, str]) -> Self:
        """Read them from an environment; raises as pydantic-settings does."""
        before = _environment.set(environment)
        try:
            return cls()
        finally:
            _environment.reset(before)

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,  # noqa: ARG003  # it and those below: the library's signature
        dotenv_settings: PydanticBaseSettingsSource,  # noqa: ARG003
        file_secret_settings: PydanticBaseSettingsSource,  # noqa: ARG003
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Return what they are read from: what was given by name, then the environment."""
        return init_settings, _Environment(settings_cls)


def _split(value: object) -> object:
    return tuple(part.strip() for part in value.split(",") if part.strip()) if isinstance(value, str) else value


def address(*schemes: str) -> AfterValidator:
    """Return what refuses a URL of another scheme, or one without a host."""

    def check(value: str) -> str:
        parts = urlsplit(value)
        if parts.scheme not in schemes:
            raise ValueError(f"must start with {' or '.join(f'{scheme}://' for scheme in schemes)}")
        if parts.scheme != "file" and not parts.hostname:
            raise ValueError("names no host")
        return value

    return AfterValidator(check)


def _limit(value: str) -> str:
    # The one syntax that slowapi documents; parsing proper happens where limits are used.
    amount, slash, period = value.partition("/")
    if not (slash and amount.isdecimal() and int(amount) > 0 and period in {"second", "minute", "hour", "day"}):
        raise ValueError("must look like 100/hour (second, minute, hour or day)")
    return value


def _long_enough(value: SecretStr) -> SecretStr:
    if len(value.get_secret_value()) < SHORTEST_SECRET:
        raise ValueError(f"must have at least {SHORTEST_SECRET} characters (openssl rand -hex 32)")
    return value


def _redis(value: SecretStr) -> SecretStr:
    RedisAddress.parse(value.get_secret_value())
    return value


def _broker(value: SecretStr) -> SecretStr:
    # Celery's transport knows neither our sentinels nor clusters.
    if RedisAddress.parse(value.get_secret_value()).deployment is not Deployment.SERVER:
        raise ValueError("must be redis://[:password@]host:port/database")
    return value


def _of_this_machine(value: str) -> str:
    if urlsplit(value).hostname != "127.0.0.1":
        raise ValueError("must lead to 127.0.0.1: what breaks processes exists only on one's own machine")
    return value


Split = BeforeValidator(_split)
Secret = Annotated[SecretStr, AfterValidator(_long_enough)]
OwnUrl = Annotated[str, address("http"), AfterValidator(_of_this_machine)]
RedisUrl = Annotated[SecretStr, AfterValidator(_redis)]
BrokerUrl = Annotated[SecretStr, AfterValidator(_broker)]
DatabaseUrl = Annotated[str, address("postgresql", "mariadb", "mysql")]
Limit = Annotated[str, AfterValidator(_limit)]
Networks = Annotated[tuple[IPvAnyNetwork, ...], NoDecode, Split]
