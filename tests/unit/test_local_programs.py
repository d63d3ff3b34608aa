"""What the local cluster runs and prints: names, environment, NGINX's template and the requests to try."""

import os
import re
import subprocess
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from app.cli import cli
from app.cli.local import _number_of_shards
from app.core.settings import environment_names
from deploy.local import leftovers, tour
from deploy.local.layout import Layout, Secrets, write_json
from deploy.local.nginx import TEMPLATE, render
from deploy.local.postgres import Postgres
from deploy.local.programs import KINDS, Plan, Sizes, kind_of, port_names
from deploy.local.servers import Binaries, Tools


@pytest.fixture
def layout(tmp_path: Path) -> Layout:
    made = Layout(tmp_path / "with space", tmp_path / "with space" / "state")
    made.create_root()
    made.create(None)
    return made


def plan(layout: Layout, user_environment: dict[str, str]) -> Plan:
    names = Sizes(instances=3, replicas=1).names()
    ports = {name: 20_000 + number for number, name in enumerate([*port_names(names), "nginx"])}
    secrets, binaries = Secrets.load(layout), Binaries(Path("/pg"), Path("/redis"), Path("/nginx"))
    return Plan(
        layout,
        secrets,
        binaries,
        Postgres(layout, secrets, binaries, Tools(None), ports),
        ports,
        names,
        user_environment,
    )


def test_sizes_name_every_process_of_every_kind() -> None:
    names = Sizes(instances=3, workers=2, relays=1, replicas=0).names()
    assert [name for name in names if kind_of(name) == "api"] == ["api-1", "api-2", "api-3"]
    assert {kind_of(name) for name in names} == set(KINDS) - {"replica"}


def test_the_users_settings_go_along_but_the_clusters_addresses_win(layout: Layout) -> None:
    environment = plan(
        layout, {"REGION": "moon", "RATE_LIMIT_FREE": "5/hour", "DATABASE_URL": "postgresql://elsewhere/x"}
    ).environment()
    assert environment["REGION"] == "moon"
    assert environment["RATE_LIMIT_FREE"] == "5/hour"
    assert environment["DATABASE_URL"].startswith("postgresql://scaleout:")
    assert environment["STORAGE_URL"].endswith("/with%20space/storage")


def test_no_command_line_holds_a_password(layout: Layout) -> None:
    made = plan(layout, {})
    secrets = [getattr(made.secrets, name) for name in Secrets.__slots__]
    for name in made.names:
        arguments = " ".join(made.program(name).arguments)
        assert not [secret for secret in secrets if secret in arguments], name


def test_every_instance_is_behind_nginx(layout: Layout) -> None:
    made = plan(layout, {})
    made.program("nginx")
    configuration = (layout.nginx / "nginx.conf").read_text()
    for name in ("api-1", "api-2", "api-3"):
        assert f"server 127.0.0.1:{made.ports[name]} " in configuration
    assert not re.findall(r"\$\{[A-Z_]+\}", configuration)


def test_the_template_says_all_of_its_variables_in_its_head() -> None:
    text = TEMPLATE.read_text()
    used = set(re.findall(r"\$\{([A-Z_]+)\}", text))
    assert used == set(re.findall(r"^#   ([A-Z_]+)  ", text, flags=re.MULTILINE))
    with pytest.raises(KeyError, match="NGINX_USER"):
        render(text, {})


def test_the_printed_requests_are_valid_in_bash() -> None:
    lines = [line for stop in tour.stops("http://127.0.0.1:8000", "http://127.0.0.1:8025") for line in stop.lines]
    checked = subprocess.run(["bash", "-n"], input="\n".join(lines), text=True, capture_output=True, check=False)  # noqa: S607
    assert (checked.returncode, checked.stderr) == (0, "")


def test_the_printed_way_to_take_a_value_out_of_an_answer_works() -> None:
    define = tour.stops("http://127.0.0.1:8000", "http://127.0.0.1:8025")[0].lines[1]
    script = define + """\nprintf '{"items": [{"id": "one", "sku": "x"}, {"id":"two"}]}' | first id"""
    assert subprocess.run(["bash", "-c", script], text=True, capture_output=True, check=True).stdout == "one\n"  # noqa: S603, S607


def test_a_process_id_that_belongs_to_someone_else_by_now_is_left_alone(layout: Layout) -> None:
    write_json(layout.pids, [{"name": "redis", "pid": os.getpid(), "created": 1.0}])
    assert leftovers.recorded(layout) == []


def test_the_lock_is_held_once(layout: Layout) -> None:
    lock = leftovers.Lock.take(layout)
    assert lock is not None
    assert leftovers.is_held(layout)
    lock.release()
    assert not leftovers.is_held(layout)


def test_a_second_shard_has_servers_and_names_of_its_own() -> None:
    names = Sizes(replicas=2, shards=3, kinds=("primary", "replica")).names()
    assert names[:3] == ["primary", "shard1-primary", "shard2-primary"]
    assert names[3:] == ["replica-1", "replica-2", "shard1-replica-1", "shard2-replica-1"]
    assert {kind_of(name) for name in names} == {"primary", "replica"}


def test_shards_is_a_number_here_and_the_list_of_a_deployment_says_nothing() -> None:
    assert [_number_of_shards(value) for value in ("2", 1, '[{"primary": "postgresql://h/d"}]')] == [2, 1, 1]
    for value in ("0", "9", "two"):
        with pytest.raises(typer.BadParameter):
            _number_of_shards(value)


@pytest.mark.sabotage("app/cli/answers.py", '    elif "SECRET_KEY" not in os.environ:', "    elif False:")
def test_a_command_that_finds_no_service_says_how_to_get_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in environment_names():
        monkeypatch.delenv(name, raising=False)
    result = CliRunner().invoke(cli, ["run", "purge"])
    assert result.exit_code == 1
    (line,) = result.stderr.splitlines()
    assert line.startswith(f"No cluster runs in {tmp_path}/.cluster. `make run` or `scaleout up` starts one")


@pytest.mark.sabotage("deploy/local/layout.py", "        raise _damaged(path) from error", "        raise")
@pytest.mark.parametrize("kept", ['{"DATABASE_URL": "postg', "[]", '{"DATABASE_URL": 1}'])
def test_a_damaged_environment_is_named_with_the_way_to_a_whole_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kept: str
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("DATABASE_URL", raising=False)
    (tmp_path / ".cluster").mkdir()
    (tmp_path / ".cluster" / "env.json").write_text(kept)
    for command in (["run", "purge"], ["migrate"]):
        result = CliRunner().invoke(cli, command)
        assert (result.exit_code, result.exception.__class__) == (1, SystemExit)
        (line,) = result.stderr.splitlines()
        assert (
            line == ".cluster/env.json is damaged. `scaleout down` and then `make run` or `scaleout up` write it anew."
        )
