"""How Redis URLs are read: each form, and what is none."""

import pytest
from conftest import settings_from

from app.core.addresses import Deployment, RedisAddress
from app.core.settings import SettingsError

REST = {
    "SECRET_KEY": "0123456789abcdef" * 4,
    "DATABASE_URL": "postgresql://nobody@127.0.0.1:1/none",
    "STORAGE_URL": "file:///tmp/none",
    "PAYMENT_URL": "http://127.0.0.1:1",
    "SMTP_URL": "smtp://127.0.0.1:1",
}


@pytest.mark.parametrize(
    ("url", "address"),
    [
        ("redis://cache", RedisAddress(Deployment.SERVER, (("cache", 6379),))),
        (
            "rediss://ada:p%40ss@cache:1/3",
            RedisAddress(Deployment.SERVER, (("cache", 1),), "ada", "p@ss", 3, tls=True),
        ),
        (
            "redis+sentinel://:secret@a,b:2/shop",
            RedisAddress(Deployment.SENTINEL, (("a", 26379), ("b", 2)), None, "secret", service="shop"),
        ),
        ("redis+cluster://a:1,b:2,[::1]:3", RedisAddress(Deployment.CLUSTER, (("a", 1), ("b", 2), ("::1", 3)))),
    ],
)
def test_each_form_is_read(url: str, address: RedisAddress) -> None:
    assert RedisAddress.parse(url) == address


@pytest.mark.parametrize(
    "url",
    [
        "http://cache",
        "redis://",
        "redis://a,b",
        "redis://cache/shop",
        "redis+sentinel://a",
        "redis+sentinel://a/0",
        "redis+cluster://a/1",
        "redis://cache:port",
        "redis+cluster://a,,b",
    ],
)
def test_what_has_none_of_the_forms_is_refused_and_not_shown(url: str) -> None:
    with pytest.raises(ValueError, match="must be") as refused:
        RedisAddress.parse(url.replace("://", "://:hunter2@", 1))
    assert "hunter2" not in str(refused.value)


@pytest.mark.sabotage(
    path="app/core/settings.py",
    take_out="if redis.broker_url is None and redis.address.deployment is not Deployment.SERVER:",
    put="if False:",
)
def test_a_cluster_needs_a_broker_of_its_own() -> None:
    with pytest.raises(SettingsError, match="REDIS_BROKER_URL: is missing"):
        settings_from({**REST, "REDIS_URL": "redis+cluster://a:1"})
    with pytest.raises(SettingsError, match="REDIS_BROKER_URL: must be redis://"):
        settings_from({**REST, "REDIS_URL": "redis://a", "REDIS_BROKER_URL": "redis+cluster://a:1"})
    chosen = settings_from({**REST, "REDIS_URL": "redis+cluster://a:1", "REDIS_BROKER_URL": "redis://b"})
    assert chosen.redis.broker == "redis://b"
