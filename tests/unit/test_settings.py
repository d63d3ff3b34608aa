"""Settings: each bad value is refused by the name of its variable, all of them at once, and no secret is shown."""

import json
from collections.abc import Callable

import pytest
from pydantic import ValidationError

from app.core.settings import SettingsError, environment_names, load_settings

GOOD = {
    "SECRET_KEY": "k" * 64,
    "DATABASE_URL": "postgresql://scaleout:hush-database@db:5432/scaleout",
    "REPLICA_URLS": "postgresql://scaleout:hush-replica@r1/scaleout, postgresql://scaleout:hush-replica@r2/scaleout",
    "REDIS_URL": "redis://:hush-redis@redis:6379/0",
    "STORAGE_URL": "file:///var/lib/scaleout",
    "PAYMENT_URL": "http://payments",
    "SMTP_URL": "smtp://shop:hush-mail@mail",
}


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Set exactly these variables over the good ones; None leaves one out."""
    for name in environment_names():
        monkeypatch.delenv(name, raising=False)

    def put(**changes: str | None) -> None:
        for name, value in (GOOD | changes).items():
            if value is None:
                monkeypatch.delenv(name, raising=False)
            else:
                monkeypatch.setenv(name, value)

    return put


def shard(first: int, last: int, primary: str = "postgresql://u:hush-shard@db/x") -> dict[str, object]:
    return {"primary": primary, "first": first, "last": last}


def test_the_environment_is_read_into_nested_frozen_settings(environment: Callable[..., None]) -> None:
    environment(RATE_LIMIT_FREE="7/hour", ADMIN_ALLOW="10.0.0.0/8,192.0.2.1", INSTANCE="api-7")
    settings = load_settings()
    assert settings.rates.free == "7/hour"
    assert [str(network) for network in settings.service.admin_allow] == ["10.0.0.0/8", "192.0.2.1/32"]
    assert settings.service.instance == "api-7"
    (only,) = settings.database.shards
    assert (only.first, only.last, len(only.replicas)) == (0, 1023, 2)
    with pytest.raises(ValidationError, match="frozen"):
        settings.service.instance = "other"  # type: ignore[misc]  # what is refused here


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("SECRET_KEY", "too short"), ("SECRET_KEY", None), ("DATABASE_URL", "oracle://u:p@h/d"), ("DATABASE_URL", None),
        ("DATABASE_URL", "postgresql:///no-host"), ("REPLICA_URLS", "http://r1"), ("REDIS_URL", None),
        ("REDIS_URL", "http://h"), ("REDIS_URL", "redis://"), ("REDIS_URL", "redis://[::1"), ("DATABASE_URL", "postgresql://[::1"),
        ("REDIS_BROKER_URL", "amqp://h"),
        ("STORAGE_URL", "ftp://h"), ("STORAGE_URL", "s3://"), ("PAYMENT_URL", "payments:80"), ("SMTP_URL", "mail"),
        ("RATE_LIMIT_FREE", "100"), ("RATE_LIMIT_FREE", "0/hour"), ("RATE_LIMIT_FREE", "100/fortnight"),
        ("RATE_LIMIT_FREE", "-1/hour"), ("ADMIN_ALLOW", "localhost"), ("REQUEST_DEADLINE", "0"),
        ("REQUEST_DEADLINE", "soon"), ("BODY_LIMIT", "12"), ("LOG_LEVEL", "loud"), ("INSTANCE", "a b"),
        ("DATABASE_POOL_SIZE", "0"), ("DATABASE_POOL_TIMEOUT", "-1"), ("REDIS_TIMEOUT", "x"),
        ("SESSION_IDLE", "1"), ("WORKER_RELAY_BATCH", "0"), ("RATE_LIMIT_INSTANCES", "0"), ("PUBLIC_URL", "shop"),
    ],
)  # fmt: skip
def test_a_bad_value_is_refused_by_name(environment: Callable[..., None], name: str, value: str | None) -> None:
    environment(**{name: value})
    with pytest.raises(SettingsError) as refusal:
        load_settings()
    (line,) = str(refusal.value).splitlines()
    assert line.partition(":")[0].partition("[")[0] == name


@pytest.mark.sabotage(
    path="app/core/settings.py",
    take_out="            problems += [_describe(group, problem)",
    put="            problems = [_describe(group, problem)",
)
def test_all_bad_values_are_named_at_once(environment: Callable[..., None]) -> None:
    environment(SECRET_KEY="short", SMTP_URL="x", RATE_LIMIT_PRO="x", REQUEST_DEADLINE="x", DATABASE_CORES="x")
    with pytest.raises(SettingsError) as refusal:
        load_settings()
    named = {line.partition(":")[0] for line in str(refusal.value).splitlines()}
    assert named == {"SECRET_KEY", "SMTP_URL", "RATE_LIMIT_PRO", "REQUEST_DEADLINE", "DATABASE_CORES"}


@pytest.mark.sabotage(
    path="app/core/settings.py",
    take_out="        problems.append(_NO_DATABASE)\n    if not problems:\n        problems",
    put="        problems += [] if problems else [_NO_DATABASE]\n    if not problems:\n        problems",
)
def test_all_that_is_missing_is_named_at_once(environment: Callable[..., None]) -> None:
    environment(**dict.fromkeys(GOOD))
    with pytest.raises(SettingsError) as refusal:
        load_settings()
    named = {line.partition(":")[0] for line in str(refusal.value).splitlines()}
    assert named == GOOD.keys() - {"REPLICA_URLS"}


def test_an_empty_variable_counts_as_not_set(environment: Callable[..., None]) -> None:
    environment(RATE_LIMIT_FREE="", SHARDS="")
    assert load_settings().rates.free == "100/hour"


@pytest.mark.sabotage(
    path="app/core/settings.py", take_out="primary: DatabaseUrl = Field(repr=False)", put="primary: DatabaseUrl"
)
def test_printed_settings_show_no_secret(environment: Callable[..., None]) -> None:
    environment(SHARDS=json.dumps([shard(0, 1023)]))
    settings = load_settings()
    shown = f"{settings!r} {settings.database.shards!r}"
    assert "hush" not in shown
    assert GOOD["SECRET_KEY"] not in shown


@pytest.mark.parametrize(
    "changes",
    [
        {"SECRET_KEY": "hush"}, {"DATABASE_URL": "oracle://u:hush@h/d"}, {"REPLICA_URLS": "oracle://u:hush@h/d"},
        {"REDIS_URL": "http://:hush@h"}, {"SMTP_URL": "imap://u:hush@h"}, {"SHARDS": '[{"primary": "hush'},
        {"SHARDS": json.dumps([shard(0, 1023, "oracle://u:hush@h/d")])}, {"SHARDS": json.dumps([shard(0, 9)])},
    ],
)  # fmt: skip
def test_a_refusal_never_shows_the_value_of_a_secret(environment: Callable[..., None], changes: dict[str, str]) -> None:
    environment(**changes)
    with pytest.raises(SettingsError) as refusal:
        load_settings()
    assert "hush" not in str(refusal.value)


@pytest.mark.parametrize(
    ("ranges", "said"),
    [
        ([(0, 1022)], "nobody holds the logical shards from 1023"),
        ([(1, 1023)], "logical shard 0 must be held by exactly one"),
        ([(0, 511), (511, 1023)], "logical shard 512 must be held by exactly one"),
        ([(0, 511), (513, 1023)], "logical shard 512 must be held by exactly one"),
        ([(0, 1024)], "SHARDS[0][last]"),
        ([(512, 100), (0, 511)], "logical shard 512"),
    ],
)
def test_shards_that_overlap_or_leave_a_gap_are_refused(
    environment: Callable[..., None], ranges: list[tuple[int, int]], said: str
) -> None:
    environment(SHARDS=json.dumps([shard(*each) for each in ranges]))
    with pytest.raises(SettingsError) as refusal:
        load_settings()
    assert str(refusal.value).startswith("SHARDS")
    assert said in str(refusal.value)


@pytest.mark.parametrize("value", ["{", "{}", "3", '[{"primary": 1}]', '[{"unknown": 1}]'])
def test_shards_that_are_not_a_list_of_shards_are_refused_by_name(environment: Callable[..., None], value: str) -> None:
    environment(SHARDS=value)
    with pytest.raises(SettingsError) as refusal:
        load_settings()
    assert all(line.startswith("SHARDS") for line in str(refusal.value).splitlines())


def test_the_pool_follows_the_database_servers_cores_unless_set(environment: Callable[..., None]) -> None:
    environment(DATABASE_CORES="8", DATABASE_SPINDLES="1")
    assert load_settings().database.connections == 17
    environment(DATABASE_POOL_SIZE="4")
    assert load_settings().database.connections == 4


@pytest.mark.sabotage(
    path="app/core/settings.py",
    take_out='if len({url.startswith("postgresql:") for url in urls}) > 1:',
    put="if False:",
)
def test_servers_of_two_engines_are_refused(environment: Callable[..., None]) -> None:
    environment(DATABASE_URL="mariadb://u:p@db/x", REPLICA_URLS="mysql://u:p@r1/x")
    assert load_settings().database.shards[0].replicas == ("mysql://u:p@r1/x",)
    environment(DATABASE_URL="mariadb://u:p@db/x", REPLICA_URLS="postgresql://u:p@r1/x")
    with pytest.raises(SettingsError, match="REPLICA_URLS: names servers of two engines"):
        load_settings()


@pytest.mark.parametrize(
    "settings",
    [{"DATABASE_URL": "mariadb://u:p@db/x"}, {"SHARDS": json.dumps([shard(0, 1023)])}],
    ids=["another engine", "shards of our own"],
)
def test_citus_is_refused_where_it_cannot_be(environment: Callable[..., None], settings: dict[str, str]) -> None:
    environment(DATABASE_SPREAD="citus")
    assert load_settings().database.spread == "citus"
    environment(DATABASE_SPREAD="citus", **settings)
    with pytest.raises(SettingsError, match="DATABASE_SPREAD: Citus spreads one PostgreSQL database itself"):
        load_settings()
