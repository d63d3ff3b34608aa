"""The manifests of an overlay, built as `kubectl apply -k` would build them, for whoever checks or simulates them.

Nothing here talks to a cluster. kubectl comes with the development packages, so that a check never depends on what a
machine happens to have.
"""

import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import yaml

HERE = Path(__file__).parent
# Every overlay, by its folder's name.
OVERLAYS = tuple(sorted(path.parent.name for path in HERE.glob("overlays/*/kustomization.yaml")))

Manifest = dict[str, Any]


class ManifestError(Exception):
    """An overlay cannot be built, or lacks what it must have; the message is for a person."""


@cache
def build(overlay: str) -> tuple[Manifest, ...]:
    """Return the manifests of an overlay. They are shared: do not change them.

    Raises:
        ManifestError: there is no such overlay, or kubectl refuses it.
    """
    if overlay not in OVERLAYS:
        raise ManifestError(f"There is no overlay {overlay!r}; use one of: {', '.join(OVERLAYS)}.")
    kubectl = Path(sys.executable).with_name("kubectl")
    if not kubectl.exists():
        raise ManifestError("kubectl is not installed here; `make setup` installs it.")
    command = [str(kubectl), "kustomize", str(HERE / "overlays" / overlay)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)  # noqa: S603 - our own words
    if done.returncode:
        raise ManifestError(done.stderr.strip())
    return tuple(yaml.safe_load_all(done.stdout))


def of_kind(overlay: str, *kinds: str) -> list[Manifest]:
    """Return the overlay's manifests of these kinds."""
    return [manifest for manifest in build(overlay) if manifest["kind"] in kinds]


def named(overlay: str, kind: str, name: str) -> Manifest:
    """Return the one manifest of this kind and name; a generated name counts without its hash.

    Raises:
        ManifestError: there is none.
    """
    for manifest in of_kind(overlay, kind):
        found = manifest["metadata"]["name"]
        if found == name or (kind == "ConfigMap" and found.rpartition("-")[0] == name):
            return manifest
    raise ManifestError(f"Overlay {overlay} has no {kind} named {name}.")


def pod_of(manifest: Manifest) -> Manifest | None:
    """Return the template (`metadata`, `spec`) of the pods that a manifest makes, or None if it makes none."""
    spec = manifest.get("spec", {})
    template: Manifest | None = spec.get("jobTemplate", {"spec": spec})["spec"].get("template")
    return template if manifest["kind"] in {"Deployment", "StatefulSet", "Job", "CronJob"} else None
