"""The local cluster does what `make run` promises: what dies comes back, what is stopped stays down, nothing is left.

A cluster of its own, servers and NGINX only, in a temporary folder: these tests end processes that others rely on.
"""

import asyncio
import json
import socket
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from urllib.parse import urlsplit

import asyncpg
import psutil
import pytest

from deploy.local import ClusterError, leftovers
from deploy.local.cluster import Cluster
from deploy.local.layout import remove_tree
from deploy.local.ports import Claims, port_is_free
from deploy.local.programs import Sizes


@pytest.fixture(scope="module")
def servers() -> Iterator[Cluster]:
    with tempfile.TemporaryDirectory(prefix="scaleout-test-") as folder:
        made = Cluster(Path(folder) / "a folder", sizes=Sizes(replicas=1, kinds=("primary", "replica", "redis")))
        made.up()
        yield made
        made.down(wipe=True)


def until(condition: Callable[[], bool], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "the awaited condition did not come"
        time.sleep(0.02)


def ask(url: str, statement: str) -> object:
    async def once() -> object:
        connection = await asyncpg.connect(url)
        try:
            return await connection.fetchval(statement)
        finally:
            await connection.close()

    return asyncio.run(once())


def stand_still(cluster: Cluster, name: str) -> list[psutil.Process]:
    """Let a process and its children stand still, the parent first so that it starts no more; return all of them."""
    parent = psutil.Process(cluster.process(name).pid)
    parent.suspend()
    until(lambda: parent.status() == psutil.STATUS_STOPPED)
    family = [parent, *parent.children(recursive=True)]
    for process in family:
        process.suspend()
    return family


def address(cluster: Cluster, name: str) -> str:
    found = cluster.process(name).address
    assert found
    return found


@pytest.mark.sabotage("deploy/local/supervision.py", '"kind": entry["kind"],', '"kind": "process",')
def test_everything_is_ready_and_listed(servers: Cluster) -> None:
    assert servers.status() == {"primary": "ready", "replica-1": "ready", "redis": "ready"}
    listed = json.loads(servers.layout.cluster.read_text())
    assert [process["kind"] for process in listed["processes"]] == ["primary", "replica", "redis"]
    assert all(psutil.pid_exists(process["pid"]) for process in listed["processes"])


@pytest.mark.sabotage("deploy/local/supervision.py", '"autorestart": RestartUnconditionally', '"autorestart": False')
def test_a_killed_primary_comes_back_with_what_it_acknowledged_and_its_replica_follows(servers: Cluster) -> None:
    url = address(servers, "primary")
    ask(url, "CREATE TABLE kept (n int)")
    ask(url, "INSERT INTO kept VALUES (7)")
    killed = servers.kill("primary")
    until(lambda: servers.process("primary").pid not in {None, killed})
    until(lambda: servers.status()["primary"] == "ready")
    assert ask(url, "SELECT n FROM kept") == 7
    ask(url, "INSERT INTO kept VALUES (8)")
    until(lambda: ask(address(servers, "replica-1"), "SELECT count(*) FROM kept") == 2)
    assert servers.process("primary").restarts == 1


@pytest.mark.sabotage("deploy/local/cluster.py", "        self._control.stop(name)\n", "        self.kill(name)\n")
def test_a_stopped_process_stays_down_until_it_is_started(servers: Cluster) -> None:
    before = servers.process("redis").restarts
    servers.stop("redis")
    assert servers.status()["redis"] == "stopped"
    assert servers.process("redis").pid is None
    with pytest.raises(ClusterError, match="scaleout start redis"):
        servers.kill("redis")
    servers.start("redis")
    assert servers.status()["redis"] == "ready"
    assert servers.process("redis").restarts == before


@pytest.mark.sabotage("deploy/local/start.py", "[lock, *self.claims.descriptors]", "[lock]")
def test_the_port_of_a_process_that_is_down_is_given_to_nobody_else(servers: Cluster) -> None:
    port = urlsplit(address(servers, "redis")).port or 0
    servers.stop("redis")
    claims = Claims()
    try:
        assert port_is_free(port)
        assert not claims.take(port)
    finally:
        claims.release()
        servers.start("redis")


def test_a_process_that_has_just_died_can_be_stopped(servers: Cluster) -> None:
    servers.kill("redis")
    servers.stop("redis")
    assert servers.process("redis").pid is None
    servers.start("redis")


@pytest.mark.sabotage("deploy/local/supervision.py", "leftovers.wake(self.pid)", "pass")
def test_a_server_that_stands_still_is_stopped_and_leaves_no_child_standing(servers: Cluster) -> None:
    family = stand_still(servers, "primary")
    try:
        servers.stop("primary")
        assert [process for process in family if leftovers.lives(process)] == []
    finally:
        leftovers.end([process for process in family if leftovers.lives(process)], hurry=True)
        servers.start("primary")


def test_an_unknown_name_is_answered_with_the_names(servers: Cluster) -> None:
    with pytest.raises(ClusterError, match=r"There are: primary, replica-1, redis"):
        servers.stop("postgres")


@pytest.mark.sabotage("deploy/local/leftovers.py", "fcntl.LOCK_EX | fcntl.LOCK_NB", "fcntl.LOCK_SH | fcntl.LOCK_NB")
def test_a_second_start_beside_the_first_says_so_and_harms_nothing(servers: Cluster) -> None:
    with pytest.raises(ClusterError, match="already runs in"):
        Cluster(servers.layout.root).up()
    assert set(servers.status().values()) == {"ready"}


@pytest.mark.sabotage("deploy/local/cluster.py", "durable: bool = True", "durable: bool = False")
def test_what_is_acknowledged_is_on_the_disk(servers: Cluster) -> None:
    for name in ("primary", "replica-1"):
        assert (ask(address(servers, name), "SHOW fsync"), ask(address(servers, name), "SHOW synchronous_commit")) == (
            "on",
            "on",
        )


def test_the_database_is_owned_by_a_role_without_power_over_the_server(servers: Cluster) -> None:
    url = servers.environment["DATABASE_URL"]
    assert ask(url, "SELECT rolsuper OR rolcreaterole OR rolreplication FROM pg_roles WHERE rolname = user") is False
    assert ask(url, "SHOW statement_timeout") == "10s"
    assert ask(url, "SHOW idle_in_transaction_session_timeout") == "15s"
    with pytest.raises(asyncpg.InvalidPasswordError):
        ask(url.replace(":" + str(urlsplit(url).password), ":wrong"), "SELECT 1")


def test_no_password_shows_in_a_process_list_or_a_log(servers: Cluster) -> None:
    passwords = [*json.loads(servers.layout.secrets.read_text()).values()]
    shown = [" ".join(psutil.Process(process.pid).cmdline()) for process in servers.processes]
    shown += [log.read_text() for log in servers.layout.logs.iterdir()]
    assert not [text for text in shown for password in passwords if password in text]


def test_a_replica_that_was_away_too_long_is_cloned_anew(servers: Cluster) -> None:
    servers.down()
    # The slot is what the primary keeps the replica's log for; without it the replica cannot go on from where it was.
    remove_tree(servers.layout.data / "primary" / "pg_replslot" / "replica_1")
    servers.up()
    assert ask(address(servers, "replica-1"), "SELECT pg_is_in_recovery()") is True


@pytest.mark.sabotage(
    path="deploy/local/start.py",
    take_out="leftovers.end_all(self.layout, data_folders(self.layout), self.progress.say)",
    put="pass",
)
def test_a_start_after_a_kill_of_the_supervisor_ends_the_orphans_and_finds_the_data() -> None:
    with tempfile.TemporaryDirectory(prefix="scaleout-test-") as folder:
        made = Cluster(Path(folder) / "c", sizes=Sizes(kinds=("primary", "redis")))
        supervisor = made.up()
        orphans = [process.pid for process in made.processes]
        running = leftovers.recorded(made.layout)
        ask(address(made, "primary"), "CREATE TABLE kept (n int)")
        supervisor.kill()
        supervisor.wait()
        again = Cluster(Path(folder) / "c", sizes=Sizes(kinds=("primary", "redis")))
        try:
            again.up()
            assert not {process.pid for process in again.processes} & set(orphans)
            assert ask(address(again, "primary"), "SELECT count(*) FROM kept") == 0
        finally:
            leftovers.end([process for process in running if leftovers.lives(process)])
            pids = [process.pid for process in again.processes]
            again.down(wipe=True)
        assert not [pid for pid in pids if pid and psutil.pid_exists(pid)]
        assert not again.layout.root.exists()
        assert not again.layout.state.exists()


@pytest.mark.sabotage(
    path="deploy/local/supervision.py",
    take_out='orphaned or not (self.options.folder / "programs.json").exists()',
    put="orphaned",
)
def test_a_cluster_whose_folder_is_deleted_ends_by_itself() -> None:
    with tempfile.TemporaryDirectory(prefix="scaleout-test-") as folder:
        made = Cluster(Path(folder) / "c", sizes=Sizes(kinds=("redis",)))
        supervisor = made.up()
        (made.layout.programs).unlink()
        assert supervisor.wait(timeout=20) == 0
        made.layout.wipe()


@pytest.mark.sabotage("deploy/local/start.py", "if not port_is_free(wanted):", "if False:")
def test_a_port_in_use_is_named_with_the_way_out() -> None:
    with tempfile.TemporaryDirectory(prefix="scaleout-test-") as folder, socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen(1)
        port = other.getsockname()[1]
        made = Cluster(Path(folder) / "c", port=port, sizes=Sizes(kinds=("nginx",)))
        with pytest.raises(ClusterError, match=rf"Port {port} is in use by .*PORT={port + 1} make run"):
            made.up()
        assert not made.running
        made.down(wipe=True)


@pytest.mark.sabotage("deploy/local/readiness.py", ', *(f"  {line}" for line in lines)])', "])")
def test_a_server_that_cannot_start_is_reported_with_its_log_and_nothing_is_left() -> None:
    with tempfile.TemporaryDirectory(prefix="scaleout-test-") as folder:
        broken = Path(folder) / "redis-server"
        broken.write_text("#!/bin/sh\necho 'no such luck'; exit 1\n")
        Path(folder).chmod(0o755)
        broken.chmod(0o755)
        made = Cluster(
            Path(folder) / "c",
            sizes=Sizes(kinds=("redis",)),
            environment={"SCALEOUT_REDIS_SERVER": str(broken)},
        )
        with pytest.raises(ClusterError, match=r"redis ended 3 times while starting(.|\n)*no such luck"):
            made.up()
        assert not made.running
        made.down(wipe=True)


@pytest.mark.sabotage("deploy/local/start.py", "_check_settings(self.plan.environment())", "pass")
def test_a_setting_that_only_the_service_reads_is_refused_before_any_server_starts() -> None:
    with tempfile.TemporaryDirectory(prefix="scaleout-test-") as folder:
        made = Cluster(Path(folder) / "c", environment={"RATE_LIMIT_FREE": "many", "EVENTS_STREAMS": "0"})
        with pytest.raises(ClusterError, match=r"RATE_LIMIT_FREE: must look like 100/hour(.|\n)*EVENTS_STREAMS: "):
            made.up()
        assert not made.layout.supervisor_config.exists()
        made.down(wipe=True)


class TestNginx:
    """The whole cluster's NGINX: what it answers without asking an instance."""

    @pytest.mark.sabotage("deploy/nginx/nginx.conf.template", "error_page 414 /-/problem/414;", "")
    @pytest.mark.parametrize(
        ("request_text", "status", "code"),
        [
            ("nonsense\r\n\r\n", 400, "bad_request"),
            ("GET / HTTP/1.1\r\n\r\n", 400, "bad_request"),
            ("GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n", 404, "not_found"),
            ("GET //metrics/ HTTP/1.1\r\nHost: x\r\n\r\n", 404, "not_found"),
            ("TRACE / HTTP/1.1\r\nHost: x\r\n\r\n", 405, "method_not_allowed"),
            ("POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 1000000\r\n\r\n", 413, "payload_too_large"),
            (f"GET /{'x' * 9000} HTTP/1.1\r\nHost: x\r\n\r\n", 414, "uri_too_long"),
            (f"GET / HTTP/1.1\r\nHost: x\r\nX-A: {'x' * 9000}\r\n\r\n", 431, "headers_too_large"),
        ],
        ids=lambda value: str(value)[:20].strip(),
    )
    def test_its_own_errors_are_problem_documents(
        self, cluster: Cluster, request_text: str, status: int, code: str
    ) -> None:
        head, body = exchange(cluster.url, request_text)
        problem = json.loads(body)
        assert head.startswith(f"HTTP/1.1 {status}")
        assert "content-type: application/problem+json" in head.lower()
        assert set(problem) == {"type", "title", "status", "detail", "code", "request_id"}
        assert (problem["status"], problem["code"]) == (status, code)
        assert f"x-request-id: {problem['request_id']}" in head.lower()

    def test_a_sane_request_id_is_kept_and_any_other_replaced(self, cluster: Cluster) -> None:
        for sent, kept in (("my-request.0001", True), ("short", False), ('"><script>alert(1)', False)):
            head, _ = exchange(cluster.url, f"GET /metrics HTTP/1.1\r\nHost: x\r\nX-Request-ID: {sent}\r\n\r\n")
            assert (f"X-Request-ID: {sent}" in head) is kept

    @pytest.mark.sabotage(
        path="deploy/nginx/nginx.conf.template",
        take_out="proxy_next_upstream error timeout;",
        put="proxy_next_upstream off;",
    )
    def test_an_instance_that_is_down_is_not_noticed_behind_it(self, cluster: Cluster) -> None:
        cluster.stop("api-1")
        try:
            for _ in range(6):
                head, _ = exchange(cluster.url, "GET /health/ready HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
                assert head.startswith("HTTP/1.1 200")
        finally:
            cluster.start("api-1")


def exchange(url: str, request_text: str) -> tuple[str, str]:
    """Send bytes as they are and return the head and the body of the answer."""
    parts = urlsplit(url)
    with socket.create_connection((parts.hostname, parts.port), timeout=10) as connection:
        connection.sendall(request_text.encode())
        answer = b""
        while b"\r\n\r\n" not in answer or not complete(answer):
            received = connection.recv(65536)
            if not received:
                break
            answer += received
    head, _, body = answer.decode().partition("\r\n\r\n")
    return head, body


def complete(answer: bytes) -> bool:
    head, _, body = answer.partition(b"\r\n\r\n")
    length = next(line for line in head.lower().split(b"\r\n") if line.startswith(b"content-length"))
    return len(body) >= int(length.partition(b":")[2])
