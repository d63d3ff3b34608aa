"""NGINX for the cluster: the template that Compose uses too, filled in for this machine.

Only `${NAME}` in capitals is ours, as with `envsubst`; NGINX's own variables have no braces.
"""

from __future__ import annotations

import re
from grp import getgrgid
from typing import TYPE_CHECKING

from deploy.local.layout import CHECKOUT, HOST, write_private

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from deploy.local.layout import Layout
    from deploy.local.servers import Account

TEMPLATE = CHECKOUT / "deploy" / "nginx" / "nginx.conf.template"


def render(template: str, values: Mapping[str, str]) -> str:
    """Fill `values` into a template; raises KeyError naming a variable that has none."""
    return re.sub(r"\$\{([A-Z_]+)\}", lambda found: values[found[1]], template)


def prepare(layout: Layout, port: int, upstream_ports: Sequence[int], account: Account | None) -> Path:
    """Write the configuration for NGINX on `port` before instances on `upstream_ports`, and return its file.

    Its workers run as `account`, when there is one.
    """
    configuration = layout.nginx / "nginx.conf"
    upstream = [f"server {HOST}:{each} max_fails=3 fail_timeout=2s;" for each in upstream_ports]
    values = {
        "NGINX_USER": "",
        "NGINX_WORKERS": "auto",
        "NGINX_LISTEN": f"{HOST}:{port}",
        "NGINX_PID": "nginx.pid",
        "NGINX_TEMP": _quoted(layout.nginx_temp),
        "NGINX_RESOLVER": "",
        # An upstream group needs a member; `down` makes it answer 502 like one without a living member.
        "NGINX_UPSTREAM": "\n        ".join(upstream or [f"server {HOST}:1 down;"]),
        "NGINX_REAL_IP": "",
        "NGINX_TLS": "",
        "NGINX_STORAGE": "",
    }
    if account:
        values["NGINX_USER"] = f"user {account.name} {getgrgid(account.gid).gr_name};"
    write_private(configuration, render(TEMPLATE.read_text(), values))
    return configuration


def _quoted(path: Path) -> str:
    """A path inside double quotes in NGINX's syntax, which knows backslash escapes; `$` cannot be escaped there."""
    return str(path).replace("\\", "\\\\").replace('"', '\\"')
