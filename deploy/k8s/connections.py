"""What an overlay may open on each database server, from its built manifests, against what it says that they allow.

Autoscalers go to their maximum in the very hour in which a refused connection hurts most, so the sum is made before
anything is applied: `scaleout check --overlay production`. The overlay says what it may use in its ConfigMap
`connections`; regions that share a primary divide it among them.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import typer

from app.core.settings import DatabaseSettings, WorkerSettings
from app.scaling.budget import Fleet, misfits, most_of_a_process
from app.scaling.dialect import Limits
from deploy.k8s.manifests import Manifest, ManifestError, named, of_kind, pod_of

if TYPE_CHECKING:
    from collections.abc import Mapping

FITS, DOES_NOT_FIT, MISUSED = 0, 1, 2


def check(overlay: str) -> int:
    """Print what the overlay's processes may open on one server, and what to change if that is too much.

    Returns:
        0 if it fits, 1 if not, 2 if the overlay cannot be read.
    """
    try:
        fleet, settings, allowed = fleet_of(overlay), settings_of(overlay), allowed_of(overlay)
    except ManifestError as error:
        typer.echo(str(error), err=True)
        return MISUSED
    each, server = most_of_a_process(settings), f"{overlay}, each server"
    typer.echo(f"{server}: {fleet.processes} x {each} = {fleet.processes * each} of {allowed} connections")
    wrong = misfits(server, Limits(allowed, ()), fleet, settings)
    for sentence in wrong:
        typer.echo(sentence, err=True)
    return DOES_NOT_FIT if wrong else FITS


def fleet_of(overlay: str) -> Fleet:
    """Return what runs when every autoscaler is at its maximum, a rollout is under way and every chore is due."""
    instances, surge = _at_most(overlay, "api")
    workers, more_workers = _at_most(overlay, "worker")
    relays, more_relays = _at_most(overlay, "relay")
    children = int(_setting(overlay, "WORKER_CONCURRENCY") or WorkerSettings.model_fields["concurrency"].default)
    ours = _image(named(overlay, "Deployment", "api"))
    once = [one for one in of_kind(overlay, "CronJob", "Job") if _image(one) == ours]
    return Fleet(
        instances=instances,
        surge=surge,
        worker_children=(workers + more_workers) * children,
        relays=relays + more_relays,
        chores=len(once),
    )


def settings_of(overlay: str) -> DatabaseSettings:
    """Return the settings of pools as the overlay's pods read them; what it does not set has its default."""
    fields = DatabaseSettings.model_fields
    # Each is given, so that nothing of it comes from the environment of whoever asks.
    given = {
        name: _setting(overlay, f"DATABASE_{name.upper()}") or fields[name].default
        for name in ("cores", "spindles", "pool_size", "pooler")
    }
    return DatabaseSettings.model_validate(given)


def allowed_of(overlay: str) -> int:
    """Return how many connections of each server are the overlay's.

    Raises:
        ManifestError: it does not say.
    """
    return int(named(overlay, "ConfigMap", "connections")["data"]["ALLOWED"])


def _setting(overlay: str, name: str) -> str | None:
    data: Mapping[str, str] = named(overlay, "ConfigMap", "settings")["data"]
    return data.get(name)


def _image(manifest: Manifest) -> str | None:
    pod = pod_of(manifest)
    return pod["spec"]["containers"][0]["image"] if pod else None


def _at_most(overlay: str, name: str) -> tuple[int, int]:
    """Return how many pods of a Deployment there may be, and how many more in a rollout; nothing if it is not there."""
    found = [one["spec"] for one in of_kind(overlay, "Deployment") if one["metadata"]["name"] == name]
    if not found:
        return 0, 0
    (spec,) = found
    bounds = [
        scaler["spec"].get("maxReplicas", scaler["spec"].get("maxReplicaCount"))
        for scaler in of_kind(overlay, "HorizontalPodAutoscaler", "ScaledObject")
        if scaler["spec"]["scaleTargetRef"]["name"] == name
    ]
    most = int(bounds[0] if bounds else spec["replicas"])
    surge = spec["strategy"]["rollingUpdate"]["maxSurge"]
    # Kubernetes rounds a share up.
    more = math.ceil(most * int(surge.removesuffix("%")) / 100) if isinstance(surge, str) else int(surge)
    return most, more
