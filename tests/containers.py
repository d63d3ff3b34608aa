"""The tests' cluster with its databases and its Redis in containers: `make test SERVICES=containers`.

The servers are those of `docker-compose.yml`, with its images, settings and start scripts; everything else runs as it
always does. A test cannot tell the difference: it stops, starts and freezes a server by its name. The engine must be
on this machine, as a frozen server is one whose processes are stopped. (PYTEST_DONT_REWRITE: nothing is asserted here.)
"""

import asyncio
import os
import socket
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from uuid import uuid4

import pytest
from testcontainers.compose import DockerCompose
from testcontainers.core.docker_client import DockerClient

from app.core.settings import load_settings
from deploy.local.cluster import Cluster
from deploy.local.programs import KINDS, Process, Sizes
from migrations import runner

CHECKOUT = Path(__file__).parents[1]
DATABASES = ("primary", "replica-1", "replica-2")
SERVERS = (*DATABASES, "redis")


@dataclass(frozen=True)
class Servers:
    """The running containers."""

    compose: DockerCompose
    addresses: Mapping[str, str]

    def pid(self, name: str) -> int | None:
        """The id of a server's first process on this machine; None while it is down."""
        found = [each for each in self.compose.get_containers() if each.Service == name]
        if not found:
            return None
        container = DockerClient().client.containers.get(found[0].ID)
        return int(container.attrs["State"]["Pid"])

    def do(self, *words: str) -> None:
        """Run a command of Compose.

        Raises:
            subprocess.CalledProcessError: it failed; Docker's words are its output.
        """
        self.compose._run_command([*self.compose.compose_command_property, *words])


class ContainedCluster(Cluster):
    """A cluster of local processes on servers in containers."""

    def __init__(self, directory: Path, servers: Servers, environment: Mapping[str, str]) -> None:
        """Describe the cluster; the servers run already."""
        self.servers = servers
        kinds = tuple(kind for kind in KINDS if kind not in {"primary", "replica", "redis"})
        super().__init__(directory, sizes=Sizes(kinds=kinds), environment=environment)

    def process(self, name: str) -> Process:
        """One process as it is now, a server's too."""
        if name not in SERVERS:
            return super().process(name)
        pid = self.servers.pid(name)
        state = "running" if pid else "stopped"
        kind = name.partition("-")[0]
        return Process(name, kind, pid, self.servers.addresses[name], log="", state=state, restarts=0)

    def stop(self, name: str) -> None:
        """Stop a process and keep it down."""
        if name not in SERVERS:
            super().stop(name)
        else:
            self.servers.do("stop", name)

    def start(self, name: str) -> None:
        """Start a process and return when it is ready."""
        if name not in SERVERS:
            super().start(name)
        else:
            self.servers.do("up", "--detach", "--wait", "--no-deps", "--no-recreate", name)


@contextmanager
def contained_cluster(folder: Path, environment: Mapping[str, str]) -> Iterator[ContainedCluster]:
    """Start servers in containers and a cluster on them, and remove all of it afterwards."""
    with running_servers() as servers, ExitStack() as stack:
        owners = {name: servers.addresses[f"{name}/owner"] for name in DATABASES}
        addresses = {
            "DATABASE_URL": owners["primary"],
            "REPLICA_URLS": f"{owners['replica-1']},{owners['replica-2']}",
            "REDIS_URL": servers.addresses["redis"],
        }
        cluster = ContainedCluster(folder, servers, {**environment, **addresses})
        with pytest.MonkeyPatch.context() as patched:
            for name, value in (addresses | _elsewhere(folder)).items():
                patched.setenv(name, value)
            asyncio.run(asyncio.to_thread(runner.upgrade, load_settings()))
        stack.callback(cluster.down, wipe=True)
        cluster.up()
        yield cluster


def _elsewhere(folder: Path) -> dict[str, str]:
    """Return what settings ask for that migrations do not use."""
    return {
        "SECRET_KEY": "0" * 64,
        "STORAGE_URL": folder.as_uri(),
        "PAYMENT_URL": "http://127.0.0.1:1",
        "SMTP_URL": "smtp://127.0.0.1:1",
    }


@contextmanager
def running_servers() -> Iterator[Servers]:
    """Start a primary, two replicas and a Redis on free ports of 127.0.0.1, and remove them with their data."""
    with ExitStack() as stack:
        held = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in SERVERS]
        ports = {name: server.getsockname()[1] for name, server in zip(SERVERS, held, strict=True)}
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("COMPOSE_PROJECT_NAME", f"scaleout-test-{uuid4().hex[:8]}")
        for name, port in ports.items():
            patched.setenv(f"{name.upper().replace('-', '_')}_PORT", str(port))
        files = ["docker-compose.yml", str(Path("tests") / "containers.yaml")]
        compose = DockerCompose(str(CHECKOUT), files, services=list(SERVERS))
        try:
            compose.start()
            yield Servers(compose, _addresses(compose, ports))
        finally:
            # All of it: the servers' passwords and volumes too.
            compose.services = None
            compose.stop()


def _addresses(compose: DockerCompose, ports: Mapping[str, int]) -> dict[str, str]:
    """Return the superuser's URL of each database, the owner's as `name/owner`, and Redis's."""
    superuser, owner = (_secret(compose, "primary", name) for name in ("superuser", "owner"))
    redis = _secret(compose, "redis", "password.conf").removeprefix("requirepass ")
    found = {"redis": f"redis://:{redis}@127.0.0.1:{ports['redis']}/0"}
    for name in DATABASES:
        found[name] = f"postgresql://postgres:{superuser}@127.0.0.1:{ports[name]}/scaleout"
        found[f"{name}/owner"] = f"postgresql://scaleout:{owner}@127.0.0.1:{ports[name]}/scaleout"
    return found


def _secret(compose: DockerCompose, service: str, name: str) -> str:
    said, _, _ = compose.exec_in_container(["cat", f"/run/secrets/{name}"], service)
    return said.strip()


def wanted() -> bool:
    """Whether this run of the tests is to use containers."""
    return os.environ.get("TEST_SERVICES") == "containers"
