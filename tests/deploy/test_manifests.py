"""Every manifest of every overlay: built as `kubectl apply -k` would, valid by Kubernetes' own schemas, within policy.

The kinds of operators (Gateway API, Prometheus, KEDA, VPA, External Secrets) have no schema in kubernetes-validate;
`FOREIGN` lists them, so that a misspelt kind cannot pass as one of them.
"""

import json
import re
from collections.abc import Iterator
from functools import cache
from itertools import pairwise
from pathlib import Path
from urllib.parse import urlsplit

import kubernetes_validate
import pytest
import yaml
from celery.schedules import crontab_parser

from app.api import serving
from app.core.settings import ServiceSettings, environment_names, load_settings
from deploy.k8s.manifests import OVERLAYS, Manifest, build, named, of_kind, pod_of
from workers.schedule import SCHEDULE
from workers.tasks import CHORES, TASKS

CHECKOUT = Path(__file__).parents[2]
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
MONITORING = {"matchLabels": {"kubernetes.io/metadata.name": "monitoring"}}


def names(overlay: str, kind: str) -> set[str]:
    """The names of the manifests of a kind."""
    return {manifest["metadata"]["name"] for manifest in of_kind(overlay, kind)}


def pods(overlay: str, *kinds: str) -> Iterator[tuple[str, Manifest]]:
    """The name and the pod's specification of everything that runs, or of these kinds."""
    for manifest in of_kind(overlay, *kinds) if kinds else build(overlay):
        if template := pod_of(manifest):
            yield manifest["metadata"]["name"], template["spec"]


def labels(overlay: str, *kinds: str) -> dict[str, dict[str, str]]:
    """The labels of the pods of everything that runs, or of these kinds, by its name."""
    made = ((manifest["metadata"]["name"], pod_of(manifest)) for manifest in build(overlay))
    listed = {manifest["metadata"]["name"] for manifest in of_kind(overlay, *kinds)} if kinds else None
    return {
        name: template["metadata"]["labels"]
        for name, template in made
        if template and (listed is None or name in listed)
    }


def selects(selector: Manifest, having: dict[str, str]) -> bool:
    """Whether a label selector matches these labels."""
    expressions = selector.get("matchExpressions", [])
    assert all(expression["operator"] == "In" for expression in expressions)
    return selector.get("matchLabels", {}).items() <= having.items() and all(
        having.get(expression["key"]) in expression["values"] for expression in expressions
    )


def environment(overlay: str, monkeypatch: pytest.MonkeyPatch) -> ServiceSettings:
    """The settings that a process of the overlay reads, with secrets of the right shape."""
    secrets = {
        "DATABASE_URL": "postgresql://scaleout:secret@primary:5432/scaleout",
        "REDIS_URL": "redis://redis:6379/0",
        "SECRET_KEY": "0" * 32,
    }
    for name in environment_names():
        monkeypatch.delenv(name, raising=False)
    for name, value in (secrets | named(overlay, "ConfigMap", "settings")["data"]).items():
        monkeypatch.setenv(name, value)
    return load_settings().service


def senders(overlay: str, having: dict[str, str], port: str) -> list[Manifest]:
    """Who may send to the port of this name of pods with these labels."""
    return [
        source
        for policy in of_kind(overlay, "NetworkPolicy")
        if selects(policy["spec"]["podSelector"], having)
        for rule in policy["spec"].get("ingress", [])
        if {"port": port} in rule.get("ports", [])
        for source in rule["from"]
    ]


def test_the_overlays_of_the_design_are_there() -> None:
    assert {"local", "production", *REGIONS} <= set(OVERLAYS)


@cache
def validate(manifest: str) -> None:
    """Hold one manifest, as JSON, to its schema. Most are the same in many overlays; a schema takes long to be read."""
    kubernetes_validate.validate(json.loads(manifest), KUBERNETES, strict=True)


@pytest.mark.sabotage("deploy/k8s/base/api.yaml", "terminationGracePeriodSeconds:", "terminationGraceSeconds:")
@pytest.mark.parametrize("overlay", OVERLAYS)
def test_every_manifest_is_valid(overlay: str) -> None:
    for manifest in build(overlay):
        if manifest["kind"] not in FOREIGN:
            validate(json.dumps(manifest))


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_no_two_manifests_have_one_name_and_all_share_the_namespace(overlay: str) -> None:
    seen = [(manifest["kind"], manifest["metadata"]["name"]) for manifest in build(overlay)]
    assert len(seen) == len(set(seen))
    for manifest in build(overlay):
        if manifest["kind"] != "Namespace":
            assert manifest["metadata"]["namespace"] == "scaleout"


@pytest.mark.sabotage("deploy/k8s/base/api.yaml", "runAsNonRoot: true", "runAsNonRoot: false")
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


@pytest.mark.sabotage("deploy/k8s/base/api.yaml", "path: /health/live,", "path: /health/ready,")
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
    for name, pod in pods(overlay, "Deployment", "StatefulSet"):
        assert {"startupProbe", "readinessProbe"} <= pod["containers"][0].keys(), name


@pytest.mark.sabotage(
    "deploy/k8s/base/worker.yaml", "terminationGracePeriodSeconds: 180", "terminationGracePeriodSeconds: 90"
)
@pytest.mark.parametrize("overlay", OVERLAYS)
def test_a_pod_has_longer_to_end_than_its_work_takes(overlay: str, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = environment(overlay, monkeypatch)
    # What an instance needs once it is told; NGINX's worker_shutdown_timeout is the same 20 s as the second part.
    instance = settings.drain_seconds + serving._FINISH
    work = {"api": instance, "nginx": serving._FINISH, "relay": serving._FINISH}
    # No request and no task is cut off, however long a task may take, when there is one pod less.
    work["worker"] = max(task.longest for task in TASKS)
    for name, pod in pods(overlay, "Deployment"):
        lifecycle = pod["containers"][0].get("lifecycle", {})
        pause = lifecycle.get("preStop", {}).get("sleep", {}).get("seconds", 0)
        assert name != "api" or pause > 0
        assert pod["terminationGracePeriodSeconds"] > pause + work[name], name


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


@pytest.mark.sabotage("deploy/k8s/base/autoscaling.yaml", "  minReplicas: 3\n", "  minReplicas: 1\n")
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


@pytest.mark.sabotage(
    "deploy/k8s/components/monitoring/adapter.yaml",
    "name: {as: outbox_oldest_message_seconds}",
    "name: {as: outbox_oldest_seconds}",
)
@pytest.mark.parametrize("overlay", ["production", "us-east"])
def test_the_adapter_makes_exactly_the_metrics_that_autoscalers_ask_for(overlay: str) -> None:
    asked: dict[str, set[str]] = {"Pods": set(), "External": set()}
    for scaler in of_kind(overlay, "HorizontalPodAutoscaler"):
        for metric in scaler["spec"]["metrics"]:
            if metric["type"] in asked:
                asked[metric["type"]].add(metric[metric["type"].lower()]["metric"]["name"])
    rules = yaml.safe_load(named(overlay, "ConfigMap", "prometheus-adapter-values")["data"]["values.yaml"])["rules"]
    assert rules["default"] is False
    assert {rule["name"]["as"] for rule in rules["custom"]} == asked["Pods"]
    assert {rule["name"]["as"] for rule in rules["external"]} == asked["External"]
    for rule in rules["external"]:
        # Only the namespace's own: the series carry the label, and the query asks for it.
        assert rule["resources"]["overrides"] == {"namespace": {"resource": "namespace"}}
        assert "<<.LabelMatchers>>" in rule["metricsQuery"]


def test_keda_asks_prometheus_what_the_adapter_asks_it() -> None:
    rules = yaml.safe_load(named("production", "ConfigMap", "prometheus-adapter-values")["data"]["values.yaml"])[
        "rules"
    ]
    asked = {
        rule["metricsQuery"]
        .replace("<<.Series>>", rule["seriesQuery"].partition("{")[0])
        .replace("<<.LabelMatchers>>", 'namespace="scaleout"')
        for rule in rules["external"]
    }
    (scaled,) = of_kind("production-keda", "ScaledObject")
    assert {trigger["metadata"]["query"] for trigger in scaled["spec"]["triggers"]} == asked
    (worker,) = (
        one["spec"] for one in of_kind("production", "HorizontalPodAutoscaler") if one["metadata"]["name"] == "worker"
    )
    assert (scaled["spec"]["minReplicaCount"], scaled["spec"]["maxReplicaCount"]) == (
        worker["minReplicas"],
        worker["maxReplicas"],
    )


@pytest.mark.sabotage(
    "deploy/k8s/base/network.yaml", "operator: In, values: [relay, worker]", "operator: In, values: []"
)
@pytest.mark.parametrize("overlay", ["production", *REGIONS])
def test_prometheus_reaches_every_process_that_has_metrics(overlay: str) -> None:
    having, specs = labels(overlay, "Deployment"), dict(pods(overlay, "Deployment"))
    reached = set()
    for monitor in of_kind(overlay, "ServiceMonitor", "PodMonitor"):
        spec = monitor["spec"]
        (endpoint,) = spec.get("endpoints") or spec["podMetricsEndpoints"]
        for name in specs:
            if not selects(spec["selector"], having[name]):
                continue
            reached.add(name)
            container = specs[name]["containers"][0]
            (port,) = (one["containerPort"] for one in container["ports"] if one["name"] == endpoint["port"])
            variables = {one["name"]: one.get("value") for one in container["env"]}
            assert variables.get("METRICS_PORT") == (None if name == "api" else str(port))
            assert {"namespaceSelector": MONITORING} in senders(overlay, having[name], endpoint["port"]), name
    assert reached == specs.keys() - {"nginx"}
    # A ServiceMonitor finds pods through a Service of that port.
    (service,) = (one["spec"] for one in of_kind(overlay, "Service") if one["metadata"]["name"] == "api")
    assert [port["name"] for port in service["ports"]] == ["http"]


@pytest.mark.sabotage(
    "deploy/k8s/components/tracing/network.yaml", "values: [api, worker, relay]", "values: [api, worker]"
)
@pytest.mark.parametrize("overlay", ["production", *REGIONS])
def test_every_process_that_traces_may_reach_the_collector(overlay: str) -> None:
    collector = urlsplit(named(overlay, "ConfigMap", "settings")["data"]["OTEL_EXPORTER_OTLP_ENDPOINT"])
    namespace = (collector.hostname or "").partition(".")[2]
    rule = {
        "to": [{"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": namespace}}}],
        "ports": [{"port": collector.port}],
    }
    for name, having in labels(overlay, "Deployment").items():
        allowed = [
            each
            for policy in of_kind(overlay, "NetworkPolicy")
            if selects(policy["spec"]["podSelector"], having)
            for each in policy["spec"].get("egress", [])
        ]
        assert (rule in allowed) == (name != "nginx"), name


@pytest.mark.sabotage(
    "deploy/k8s/base/network.yaml",
    "  podSelector: {}\n  policyTypes: [Ingress, Egress]\n",
    "  podSelector: {}\n  policyTypes: [Ingress]\n",
)
@pytest.mark.parametrize("overlay", OVERLAYS)
def test_everything_is_denied_before_anything_is_allowed(overlay: str) -> None:
    policies = {policy["metadata"]["name"]: policy["spec"] for policy in of_kind(overlay, "NetworkPolicy")}
    assert policies["default-deny"] == {"podSelector": {}, "policyTypes": ["Ingress", "Egress"]}
    sources = senders(overlay, labels(overlay, "Deployment")["api"], "http")
    # Whoever reaches an instance could say in a header who the client is: NGINX may, and Prometheus has no reason to.
    assert sources == [
        {"podSelector": {"matchLabels": {"app.kubernetes.io/name": "nginx"}}},
        {"namespaceSelector": MONITORING},
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


@pytest.mark.sabotage(
    "deploy/k8s/overlays/eu-west/kustomization.yaml", "s3://scaleout-eu-west", "s3://scaleout-us-east"
)
def test_each_region_has_settings_and_secrets_of_its_own() -> None:
    found = {}
    for region in REGIONS:
        settings = named(region, "ConfigMap", "settings")["data"]
        (secret,) = of_kind(region, "ExternalSecret")
        assert settings["REGION"] == region
        assert secret["spec"]["dataFrom"] == [{"extract": {"key": f"scaleout/{region}"}}]
        found[settings["AWS_REGION"]] = settings["STORAGE_URL"]
    assert len(found) == len(set(found.values())) == len(REGIONS)


@pytest.mark.sabotage(
    path="deploy/k8s/overlays/eu-west/kustomization.yaml",
    take_out="[../../components/region, ../../components/secondary]",
    put="[../../components/region]",
)
def test_only_the_primary_region_migrates_and_works_on_the_outbox() -> None:
    for region in REGIONS:
        primary = region == "us-east"
        assert ("migrate" in names(region, "Job")) == primary
        assert bool(of_kind(region, "CronJob")) == primary
        for role in ("worker", "relay"):
            assert (role in names(region, "Deployment")) == primary
            assert (role in names(region, "HorizontalPodAutoscaler")) == (primary and role == "worker")


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_the_settings_of_an_overlay_are_accepted_and_none_is_misspelt(
    overlay: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert environment(overlay, monkeypatch).region == named(overlay, "ConfigMap", "settings")["data"]["REGION"]
    # Those that are not ours are the object storage's (obstore reads them) and the image's own entry's.
    unknown = named(overlay, "ConfigMap", "settings")["data"].keys() - environment_names()
    assert all(name.startswith("AWS_") or name == "SECRETS_DIR" for name in unknown), unknown


def minutes_of(schedule: str) -> list[int]:
    """The minutes of a day at which a schedule of cron is due every day."""
    minute, hour, *days = schedule.split()
    assert days == ["*", "*", "*"]
    return sorted(
        60 * each + past for each in crontab_parser(24).parse(hour) for past in crontab_parser(60).parse(minute)
    )


@pytest.mark.sabotage("deploy/k8s/base/chores/cronjobs.yaml", '"4,19,34,49 * * * *"', '"4,34 * * * *"')
@pytest.mark.parametrize("overlay", ["local", "production", "us-east"])
def test_cron_jobs_do_what_the_scheduler_does_elsewhere_as_often(overlay: str) -> None:
    seconds = {chore.name: chore.seconds for chore in CHORES}
    found = {}
    for job in of_kind(overlay, "CronJob"):
        spec = job["spec"]
        (container,) = spec["jobTemplate"]["spec"]["template"]["spec"]["containers"]
        run, chore = container["args"]
        assert (run, job["metadata"]["name"]) == ("run", chore.replace("_", "-"))
        due = minutes_of(spec["schedule"])
        # The same pause between any two runs, also over midnight.
        (pause,) = {60 * (later - earlier) for earlier, later in pairwise([*due, due[0] + 24 * 60])}
        found[f"upkeep.{chore}"] = float(pause)
        # The controller looks every 10 s; and a start that is as late as the next one is the next one.
        assert 10 < spec["startingDeadlineSeconds"] < pause
        assert spec["jobTemplate"]["spec"]["activeDeadlineSeconds"] > seconds[f"upkeep.{chore}"]
        assert spec["concurrencyPolicy"] == "Forbid"
        assert (spec["successfulJobsHistoryLimit"], spec["failedJobsHistoryLimit"]) == (1, 3)
    assert found == SCHEDULE
    # One or the other: both would do every chore twice, for nothing.
    assert not any("scheduler" in pod["containers"][0].get("args", []) for _, pod in pods(overlay))
