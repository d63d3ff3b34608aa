"""Every manifest of every overlay: built as `kubectl apply -k` would, valid by Kubernetes' own schemas, within policy.

The kinds of operators (Gateway API, Prometheus, KEDA, VPA, External Secrets) have no schema in kubernetes-validate;
`FOREIGN` lists them, so that a misspelt kind cannot pass as one of them.
"""

import re
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

CHECKOUT = Path(__file__).parents[2]
K8S = CHECKOUT / "deploy" / "k8s"
OVERLAYS = sorted(path.parent.name for path in K8S.glob("overlays/*/kustomization.yaml"))
REGIONS = ("us-east", "us-west", "eu-west", "asia-southeast")
# The oldest release that is still supported; a newer one accepts what it accepts.
KUBERNETES = "1.35"
FOREIGN = {
    "Gateway",
    "HTTPRoute",
    "PodMonitor",
    "ServiceMonitor",
    "PrometheusRule",
    "ScaledObject",
    "VerticalPodAutoscaler",
    "ExternalSecret",
}
# What an instance takes to drain: uvicorn's limit in app/cli.py. NGINX's worker_shutdown_timeout is the same.
DRAIN_SECONDS = 20

Manifest = dict[str, Any]


@cache
def built(overlay: str) -> tuple[Manifest, ...]:
    """The manifests of an overlay, by the kubectl of the virtual environment."""
    kubectl = Path(sys.executable).with_name("kubectl")
    command = [str(kubectl), "kustomize", str(K8S / "overlays" / overlay)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)  # noqa: S603 - ours
    assert done.returncode == 0, done.stderr
    return tuple(yaml.safe_load_all(done.stdout))


def of_kind(overlay: str, *kinds: str) -> list[Manifest]:
    """The manifests of these kinds."""
    return [manifest for manifest in built(overlay) if manifest["kind"] in kinds]


def names(overlay: str, kind: str) -> set[str]:
    """The names of the manifests of a kind."""
    return {manifest["metadata"]["name"] for manifest in of_kind(overlay, kind)}


def pods(overlay: str) -> list[tuple[str, Manifest]]:
    """The name and the pod's specification of everything that runs."""
    return [
        (manifest["metadata"]["name"], manifest["spec"]["template"]["spec"])
        for manifest in of_kind(overlay, "Deployment", "StatefulSet", "Job")
    ]


def labels(overlay: str, kind: str) -> dict[str, dict[str, str]]:
    """The labels of the pods of everything of a kind, by its name."""
    return {
        manifest["metadata"]["name"]: manifest["spec"]["template"]["metadata"]["labels"]
        for manifest in of_kind(overlay, kind)
    }


def selects(selector: Manifest, having: dict[str, str]) -> bool:
    """Whether a label selector matches these labels."""
    expressions = selector.get("matchExpressions", [])
    assert all(expression["operator"] == "In" for expression in expressions)
    return selector.get("matchLabels", {}).items() <= having.items() and all(
        having.get(expression["key"]) in expression["values"] for expression in expressions
    )


def test_the_overlays_of_the_design_are_there() -> None:
    assert {"local", "production", *REGIONS} <= set(OVERLAYS)


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_every_manifest_is_valid(overlay: str) -> None:
    for manifest in built(overlay):
        if manifest["kind"] in FOREIGN:
            continue
        kubernetes_validate.validate(manifest, KUBERNETES, strict=True)


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_no_two_manifests_have_one_name_and_all_share_the_namespace(overlay: str) -> None:
    seen = [(manifest["kind"], manifest["metadata"]["name"]) for manifest in built(overlay)]
    assert len(seen) == len(set(seen))
    for manifest in built(overlay):
        if manifest["kind"] != "Namespace":
            assert manifest["metadata"]["namespace"] == "scaleout"


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_every_pod_meets_the_restricted_standard_and_holds_no_token(overlay: str) -> None:
    (namespace,) = of_kind(overlay, "Namespace")
    assert namespace["metadata"]["labels"]["pod-security.kubernetes.io/enforce"] == "restricted"
    for name, pod in pods(overlay):
        assert pod["automountServiceAccountToken"] is False, name
        assert pod["securityContext"]["runAsNonRoot"], name
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}, name
        assert not {"hostNetwork", "hostPID", "hostIPC"} & pod.keys(), name
        assert all("hostPath" not in volume for volume in pod.get("volumes", [])), name
        for container in pod["containers"]:
            assert container["securityContext"] == {
                "allowPrivilegeEscalation": False,
                "readOnlyRootFilesystem": True,
                "capabilities": {"drop": ["ALL"]},
            }, name


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_every_container_asks_for_what_it_needs_and_has_a_limit_of_memory_only(overlay: str) -> None:
    for name, pod in pods(overlay):
        for container in pod["containers"]:
            assert {"cpu", "memory"} <= container["resources"]["requests"].keys(), name
            assert container["resources"]["limits"].keys() == {"memory"}, name


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_no_image_is_left_to_chance(overlay: str) -> None:
    for name, pod in pods(overlay):
        for container in pod["containers"]:
            assert re.search(r"(:[^:/]+|@sha256:[0-9a-f]{64})$", container["image"]), name
            assert not container["image"].endswith(":latest"), name


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_instances_are_probed_as_they_should_be(overlay: str) -> None:
    (api,) = (pod["containers"][0] for name, pod in pods(overlay) if name == "api")
    paths = {probe: api[probe]["httpGet"]["path"] for probe in ("startupProbe", "readinessProbe", "livenessProbe")}
    assert paths == {
        "startupProbe": "/health/startup",
        "readinessProbe": "/health/ready",
        # Never one that asks a dependency: that would restart every instance when a database is down.
        "livenessProbe": "/health/live",
    }
    for name, pod in pods(overlay):
        if name not in {"migrate", "bucket"}:
            assert {"startupProbe", "readinessProbe"} <= pod["containers"][0].keys(), name


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_a_pod_has_longer_to_end_than_its_work_takes(overlay: str) -> None:
    for name, pod in pods(overlay):
        pause = pod["containers"][0].get("lifecycle", {}).get("preStop", {}).get("sleep", {}).get("seconds", 0)
        assert name != "api" or pause > 0
        if name in {"api", "nginx", "relay", "worker"}:
            assert pod["terminationGracePeriodSeconds"] > pause + DRAIN_SECONDS, name


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_what_has_more_than_one_pod_is_spread_and_has_a_budget(overlay: str) -> None:
    budgets = of_kind(overlay, "PodDisruptionBudget")
    assert all(budget["spec"]["unhealthyPodEvictionPolicy"] == "AlwaysAllow" for budget in budgets)
    found = labels(overlay, "Deployment")
    for deployment in of_kind(overlay, "Deployment"):
        name = deployment["metadata"]["name"]
        if deployment["spec"].get("replicas") == 1:
            continue
        assert deployment["spec"]["template"]["spec"]["topologySpreadConstraints"], name
        assert sum(selects(budget["spec"]["selector"], found[name]) for budget in budgets) == 1, name
    # A budget for what is not there would only mislead.
    for budget in budgets:
        assert any(selects(budget["spec"]["selector"], having) for having in found.values())


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_one_autoscaler_at_most_owns_the_number_of_pods_and_then_nobody_else_does(overlay: str) -> None:
    targets = [
        scaler["spec"]["scaleTargetRef"]["name"]
        for scaler in of_kind(overlay, "HorizontalPodAutoscaler", "ScaledObject")
    ]
    assert len(targets) == len(set(targets))
    assert "api" in targets
    for deployment in of_kind(overlay, "Deployment"):
        assert ("replicas" in deployment["spec"]) != (deployment["metadata"]["name"] in targets)


def test_instances_scale_on_cpu_memory_and_requests_up_fast_and_down_slowly() -> None:
    (api,) = (
        scaler for scaler in of_kind("production", "HorizontalPodAutoscaler") if scaler["metadata"]["name"] == "api"
    )
    assert (api["spec"]["minReplicas"], api["spec"]["maxReplicas"]) == (3, 50)
    resource = {
        metric["resource"]["name"]: metric["resource"]["target"]["averageUtilization"]
        for metric in api["spec"]["metrics"]
        if metric["type"] == "Resource"
    }
    assert resource == {"cpu": 70, "memory": 80}
    assert any(metric["type"] == "Pods" for metric in api["spec"]["metrics"])
    behavior = api["spec"]["behavior"]
    assert behavior["scaleUp"]["stabilizationWindowSeconds"] < behavior["scaleDown"]["stabilizationWindowSeconds"]


@pytest.mark.parametrize("overlay", ["production", *REGIONS])
def test_every_metric_that_an_autoscaler_asks_for_is_made_by_the_adapter(overlay: str) -> None:
    asked = set()
    for scaler in of_kind(overlay, "HorizontalPodAutoscaler"):
        for metric in scaler["spec"]["metrics"]:
            if metric["type"] in {"Pods", "External"}:
                asked.add(metric[metric["type"].lower()]["metric"]["name"])
    (adapter,) = (
        found for found in of_kind(overlay, "ConfigMap") if found["metadata"]["name"] == "prometheus-adapter-values"
    )
    rules = yaml.safe_load(adapter["data"]["values.yaml"])["rules"]
    assert asked <= {rule["name"]["as"] for kind in ("custom", "external") for rule in rules[kind]}


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_everything_is_denied_before_anything_is_allowed(overlay: str) -> None:
    policies = {policy["metadata"]["name"]: policy["spec"] for policy in of_kind(overlay, "NetworkPolicy")}
    assert policies["default-deny"] == {"podSelector": {}, "policyTypes": ["Ingress", "Egress"]}
    (api,) = (having for name, having in labels(overlay, "Deployment").items() if name == "api")
    sources = [
        source
        for spec in policies.values()
        if selects(spec["podSelector"], api)
        for rule in spec.get("ingress", [])
        for source in rule["from"]
    ]
    # Whoever reaches an instance could say in a header who the client is: NGINX may, and Prometheus has no reason to.
    assert sources == [
        {"podSelector": {"matchLabels": {"app.kubernetes.io/name": "nginx"}}},
        {"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "monitoring"}}},
    ]


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_a_changed_setting_is_a_new_name_and_so_a_rollout(overlay: str) -> None:
    settings = [name for name in names(overlay, "ConfigMap") if name.startswith("settings-")]
    assert len(settings) == 1
    for name, pod in pods(overlay):
        for source in pod["containers"][0].get("envFrom", []):
            if "configMapRef" in source:
                assert source["configMapRef"]["name"] == settings[0], name


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_secrets_are_files_and_none_is_written_down_but_the_laptops(overlay: str) -> None:
    assert (overlay == "local") == bool(of_kind(overlay, "Secret"))
    for settings in of_kind(overlay, "ConfigMap"):
        for setting in settings["data"]:
            assert not re.search(r"PASSWORD|SECRET_KEY|ACCESS_KEY|DATABASE_URL|REDIS_URL", setting)


def test_each_region_has_settings_and_secrets_of_its_own() -> None:
    found = {}
    for region in REGIONS:
        (settings,) = (manifest["data"] for manifest in of_kind(region, "ConfigMap") if "REGION" in manifest["data"])
        (secret,) = of_kind(region, "ExternalSecret")
        assert settings["REGION"] == region
        assert secret["spec"]["dataFrom"] == [{"extract": {"key": f"scaleout/{region}"}}]
        found[settings["AWS_REGION"]] = settings["STORAGE_URL"]
    assert len(found) == len(set(found.values())) == len(REGIONS)


def test_only_the_primary_region_migrates_and_works_on_the_outbox() -> None:
    for region in REGIONS:
        primary = region == "us-east"
        assert ("migrate" in names(region, "Job")) == primary
        for role in ("worker", "relay", "scheduler"):
            assert (role in names(region, "Deployment")) == primary


def test_all_pools_at_full_size_fit_into_what_the_primary_allows() -> None:
    (settings,) = (found["data"] for found in of_kind("production", "ConfigMap") if "REGION" in found["data"])
    pods_at_most = {
        scaler["metadata"]["name"]: scaler["spec"]["maxReplicas"]
        for scaler in of_kind("production", "HorizontalPodAutoscaler")
    }
    # A worker has two children (WORKER_CONCURRENCY), each with pools of its own; the relays are two.
    processes = pods_at_most["api"] + 2 * pods_at_most["worker"] + 2
    # Two pools on the primary: one that writes, and one for reads that no replica may serve.
    asked = processes * 2 * int(settings["DATABASE_POOL_SIZE"])
    database = (CHECKOUT / "deploy" / "terraform" / "modules" / "database" / "main.tf").read_text()
    allowed = [int(number) for number in re.findall(r'"max_connections"\s*= "(\d+)"', database)]
    assert allowed
    assert asked < min(allowed)
