"""What a machine on AWS runs at its start, filled in as Terraform fills it in, for tests without Terraform."""

import re
import shlex
from itertools import pairwise
from pathlib import Path

CHECKOUT = Path(__file__).parents[2]
TEMPLATE = CHECKOUT / "deploy" / "terraform" / "modules" / "service" / "machine.sh.tftpl"
NGINX = CHECKOUT / "deploy" / "nginx" / "nginx.conf.template"

# Of files in memory (`--tmpfs /tmp`, and NGINX's configuration), which count as the container's.
TEMPORARY_MEGABYTES = 17


def script(role: str) -> str:
    """The script of a role, `api` or `worker`, with stand-ins for what only an account knows.

    Of Terraform's template language it reads what the file uses: `${name}`, `$${` for itself, and one `%{ if }` with
    an `%{ else }` at the ends of their lines.
    """
    text = TEMPLATE.read_text()
    head, api, worker, tail = re.split(r"^%\{ (?:if|else|endif)[^}]*\}\n", text, flags=re.MULTILINE)
    values = {
        "image": "registry.example/scaleout@sha256:0",
        "nginx": "nginx@sha256:0",
        "proxies": "10.20.0.0/16",
        "read_write": "--read-only",
        "settings": "REGION=us-east-1",
        "template": NGINX.read_text(),
    }
    whole = head + (api if role == "api" else worker) + tail
    # One pass: what a value brings along, such as the template's own `${NGINX_USER}`, is not looked at again.
    return re.sub(r"\$\$\{|\$\{(\w+)\}", lambda found: values.get(found[1], found[1]) if found[1] else "${", whole)


def options(command: str) -> dict[str, list[str]]:
    """The options of one `docker run` or `start` command line: each name with its values."""
    found: dict[str, list[str]] = {}
    words = shlex.split(command)
    for name, value in pairwise(words):
        if name.startswith("--"):
            found.setdefault(name, []).append(value)
    return found
