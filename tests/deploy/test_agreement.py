"""What deploy/kubernetes says of the server is so: settings, ports, paths, times, names of metrics, generated files."""

import os
import re
import shutil
import urllib.request
from pathlib import Path
from urllib.parse import urlsplit

import promql_parser
import pytest
import yaml
from manifests import KUBERNETES, OVERLAYS, TARGETS, Object, Pod, objects, of_kind, pods, settings
from processes import MODELS, ROOT, start_server, stop_server
from prometheus import alerts
from prometheus_client import CollectorRegistry

from deploy.kubernetes.prometheus_rules import WRITTEN, prometheus_rules
from export.bundle import SCHEMA_VERSION, Bundle, BundleError
from service.catalogue import scan
from service.config import Settings
from service.metrics import Metrics
from service.pb import steering_pb2 as pb
from service.profiles import ProfileFolder

ADAPTER = KUBERNETES / "components" / "autoscaling" / "adapter.yaml"


def settings_of(pod: Pod, found: list[Object], monkeypatch: pytest.MonkeyPatch) -> Settings:
    for name in [name for name in os.environ if name.startswith("STEERVIT_")]:
        monkeypatch.delenv(name)
    for name, value in settings(pod, found).items():
        monkeypatch.setenv(name, value)
    return Settings()


def metric_names(expression: str) -> set[str]:
    """Of what an expression reads. Raises ValueError when it is no PromQL."""
    promql_parser.parse(expression)
    return set(re.findall(r"\b(?:[a-z_]+:)?steervit_\w+(?::\w+)?", re.sub(r'"[^"]*"|\{[^}]*\}', "", expression)))


def metrics_of_the_server() -> set[str]:
    registry = CollectorRegistry()
    Metrics(registry, 0)
    suffixes = {"counter": ("_total",), "gauge": ("",), "histogram": ("_bucket", "_count", "_sum")}
    return {family.name + suffix for family in registry.collect() for suffix in suffixes[family.type]}


@pytest.mark.parametrize("target", TARGETS)
def test_settings_are_settings_of_the_server_and_their_values_are_allowed(
    target: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = objects(target)
    for pod in pods(found):
        assert set(settings(pod, found)) <= {f"STEERVIT_{name.upper()}" for name in Settings.model_fields}
        of_server = settings_of(pod, found, monkeypatch)
        ports = {port["name"]: port["containerPort"] for port in pod.server["ports"]}
        assert ports == {"grpc": of_server.port, "metrics": of_server.metrics_port}
        assert of_server.host == "0.0.0.0"
        assert of_server.max_connection_age_seconds > 0
        assert not pod.spec["enableServiceLinks"], "a Service named steervit would set STEERVIT_PORT"


@pytest.mark.parametrize("target", ["base", *OVERLAYS])
def test_a_message_may_hold_a_full_call_of_ordinary_images_and_little_more(
    target: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a message can do to the memory grows with its size: SECURITY.md."""
    found = objects(target)
    for pod in pods(found):
        of_server = settings_of(pod, found, monkeypatch)
        image = pb.Image(pixels=bytes(224 * 224 * 3))
        largest = pb.PredictRequest(images=[image] * of_server.max_images).ByteSize()
        assert largest < of_server.max_message_mb * 2**20 < 1.2 * largest


@pytest.mark.parametrize("target", TARGETS)
def test_a_pod_that_is_told_to_stop_has_time_to_answer_what_it_accepted(
    target: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = objects(target)
    for pod in pods(found):
        sleep = pod.server["lifecycle"]["preStop"]["sleep"]["seconds"]
        of_server = settings_of(pod, found, monkeypatch)
        assert sleep >= 5, "the news that a pod leaves takes seconds to spread"
        needed = sleep + of_server.drain_delay_seconds + of_server.drain_seconds
        assert pod.spec["terminationGracePeriodSeconds"] >= needed + 5


@pytest.mark.parametrize("target", TARGETS)
def test_folders_that_settings_name_are_mounted_read_only_or_are_in_the_image(
    target: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = objects(target)
    for pod in pods(found):
        volumes = {volume["name"] for volume in pod.spec.get("volumes", ())}
        mounts = {mount["mountPath"]: mount for mount in pod.server.get("volumeMounts", ())}
        assert {mount["name"] for mount in mounts.values()} == volumes
        of_server = settings_of(pod, found, monkeypatch)
        for path in (of_server.profiles_dir, of_server.tls_certificate, of_server.tls_key, of_server.repository):
            if path is None or (path == of_server.repository and str(path) not in mounts):
                continue  # /models is in the image, /mnt/models is mounted by KServe
            (mount,) = (mount for folder, mount in mounts.items() if path.is_relative_to(folder))
            assert mount["readOnly"]
        assert of_server.repository == Path("/mnt/models" if target == "overlays/kserve" else "/models")


@pytest.mark.parametrize("target", TARGETS)
def test_selectors_choose_the_servers_pods_and_ports_go_by_names_that_these_have(target: str) -> None:
    found = objects(target)
    (pod,) = pods(found)
    ports = {port["name"] for port in pod.server["ports"]}
    selectors = [each["spec"]["selector"] for each in of_kind(found, "Service")]
    selectors += [
        each["spec"]["selector"]["matchLabels"]
        for each in of_kind(found, "Deployment", "PodDisruptionBudget", "PodMonitor")
    ]
    selectors += [each["spec"]["podSelector"]["matchLabels"] for each in of_kind(found, "NetworkPolicy")]
    selectors += [spread["labelSelector"]["matchLabels"] for spread in pod.spec.get("topologySpreadConstraints", ())]
    for selector in selectors:
        assert selector.items() <= pod.labels.items()
    named = [port["targetPort"] for each in of_kind(found, "Service") for port in each["spec"]["ports"]]
    named += [end["port"] for each in of_kind(found, "PodMonitor") for end in each["spec"]["podMetricsEndpoints"]]
    named += [
        port["port"]
        for each in of_kind(found, "NetworkPolicy") for rule in each["spec"]["ingress"] for port in rule["ports"]
    ]  # fmt: skip
    named += [pod.server[probe]["httpGet"]["port"] for probe in ("startupProbe", "readinessProbe", "livenessProbe")]
    assert set(named) <= ports
    for each in of_kind(found, "HorizontalPodAutoscaler"):
        of_target = {key: each["spec"]["scaleTargetRef"][key] for key in ("kind", "name")}
        (deployment,) = of_kind(found, "Deployment")
        assert of_target == {"kind": "Deployment", "name": deployment["metadata"]["name"]}
        assert "replicas" not in deployment["spec"]


@pytest.mark.parametrize("target", [*OVERLAYS, "components/profiles"])
def test_a_server_with_these_settings_answers_the_probes_and_the_scrape(
    target: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = objects(target)
    (pod,) = pods(found)
    settings_of(pod, found, monkeypatch)  # sets the environment
    for each in of_kind(found, "ConfigMap"):
        if each["metadata"]["name"] == "steervit-profiles":
            for name, text in each["data"].items():
                (tmp_path / name).write_text(text)
            monkeypatch.setenv("STEERVIT_PROFILES_DIR", str(tmp_path))
    # What is other here than in a pod: no GPU, another interface, and where the models lie.
    server = start_server(MODELS, "--host", "127.0.0.1", "--provider", "cpu")
    try:
        probes = {probe: pod.server[probe]["httpGet"]["path"] for probe in ("startupProbe", "readinessProbe")}
        assert probes == {"startupProbe": "/livez", "readinessProbe": "/readyz"}
        assert pod.server["livenessProbe"]["httpGet"]["path"] == "/livez"
        for path in ("readyz", "livez"):
            assert server.page(path) == "OK\n"
        for each in of_kind(found, "PodMonitor"):
            for end in each["spec"]["podMetricsEndpoints"]:
                with urllib.request.urlopen(server.metrics_url.replace("/metrics", end["path"]), timeout=10) as answer:
                    assert b"steervit_images_total" in answer.read()
        if "STEERVIT_PROFILES_DIR" in settings(pod, found):
            assert server.count("steervit_images_total", profile="example") == 0
            assert 'profile="example"' in server.page()
    finally:
        assert stop_server(server) == 0


def test_the_autoscaler_asks_for_metrics_that_the_adapter_makes_of_metrics_that_the_server_has() -> None:
    rules = yaml.safe_load(ADAPTER.read_text())["rules"]["custom"]
    (autoscaler,) = of_kind(objects("components/autoscaling"), "HorizontalPodAutoscaler")
    asked = {metric["pods"]["metric"]["name"] for metric in autoscaler["spec"]["metrics"]}
    assert asked == {rule["name"]["as"] for rule in rules}
    for rule in rules:
        query = (
            rule["metricsQuery"]
            .replace("<<.LabelMatchers>>", 'namespace="a",pod=~"b|c"')
            .replace("<<.GroupBy>>", "pod")
        )
        for expression in (query, rule["seriesQuery"]):
            names = metric_names(expression)
            assert names
            assert names <= metrics_of_the_server()


def test_rules_and_dashboards_in_the_cluster_are_those_of_deploy() -> None:
    assert WRITTEN.read_text() == prometheus_rules(), "`make manifests` was not run after a change of deploy/alerts"
    found = objects("components/monitoring")
    groups = [group for each in of_kind(found, "PrometheusRule") for group in each["spec"]["groups"]]
    rules = [rule for group in groups for rule in group["rules"]]
    recorded = {rule["record"] for rule in rules if "record" in rule}
    assert len(recorded) < len(rules)
    for rule in rules:
        assert metric_names(rule["expr"]) <= metrics_of_the_server() | recorded, rule
    (dashboards,) = (each for each in of_kind(found, "ConfigMap") if each["metadata"]["name"] == "steervit-dashboards")
    assert dashboards["data"] == {
        name: (ROOT / "deploy" / "dashboards" / name).read_text() for name in ("service.json", "heads.json")
    }
    for each in of_kind(objects("everything"), "ConfigMap"):
        assert sum(map(len, each["data"].values())) < 2**20, "a ConfigMap holds 1 MiB"


def test_a_server_that_is_still_starting_is_no_target_that_is_down() -> None:
    waits = int(alerts()["SteervitTargetDown"]["for"].removesuffix("m")) * 60
    for target in OVERLAYS:
        (pod,) = pods(objects(target))
        probe = pod.server["startupProbe"]
        assert probe["periodSeconds"] * probe["failureThreshold"] < waits


def test_each_namespace_is_a_job_of_its_own_whose_name_the_rules_know() -> None:
    """Without a jobLabel the operator's label `job` is <namespace>/<name of the PodMonitor>."""
    (monitor,) = of_kind(objects("components/monitoring"), "PodMonitor")
    assert "jobLabel" not in monitor["spec"]
    assert not any(end.get("relabelings") for end in monitor["spec"]["podMetricsEndpoints"])
    assert re.fullmatch(".*steervit.*", monitor["metadata"]["name"])


@pytest.mark.parametrize("target", OVERLAYS)
def test_no_overlay_serves_the_example_of_a_profile(target: str) -> None:
    assert "steervit-profiles" not in {each["metadata"]["name"] for each in of_kind(objects(target), "ConfigMap")}


def test_the_example_of_a_profile_fits_the_committed_bundle(bundle: Bundle) -> None:
    folder = ProfileFolder(KUBERNETES / "components" / "profiles", Metrics(CollectorRegistry(), 0))
    assert folder.refresh([(bundle, "")])
    assert list(folder.of(bundle)) == ["example"]


def test_kserve_is_given_the_committed_bundle_under_the_format_that_the_runtime_serves(bundle: Bundle) -> None:
    found = objects("overlays/kserve")
    (runtime,), (service,) = of_kind(found, "ServingRuntime"), of_kind(found, "InferenceService")
    model = service["spec"]["predictor"]["model"]
    assert model["modelFormat"] == {"name": "steervit", "version": str(bundle.manifest.schema_version)}
    served = [(format_["name"], format_["version"]) for format_ in runtime["spec"]["supportedModelFormats"]]
    assert served == [("steervit", str(SCHEMA_VERSION)), ("steervit", str(SCHEMA_VERSION - 1))]
    assert [model["protocolVersion"]] == runtime["spec"]["protocolVersions"]
    assert model["storageUri"] == f"pvc://steervit-models/{bundle.manifest.name}/{bundle.manifest.version}"


def test_a_bundle_that_is_copied_as_the_readme_says_is_not_seen_before_it_is_whole(tmp_path: Path) -> None:
    commands = (KUBERNETES / "README.md").read_text()
    assert "models:/models/.incoming/fashion_mnist\n" in commands
    assert "mv /models/.incoming/fashion_mnist /models\n" in commands
    shutil.copytree(MODELS / "fashion_mnist", tmp_path / ".incoming" / "fashion_mnist")
    with pytest.raises(BundleError):
        scan(tmp_path)
    shutil.move(tmp_path / ".incoming" / "fashion_mnist", tmp_path)
    assert set(scan(tmp_path)) == {"fashion_mnist"}


def test_pods_call_nobody_but_the_collector_of_their_traces() -> None:
    for target in TARGETS:
        found = objects(target)
        (pod,) = pods(found)
        endpoint = urlsplit(settings(pod, found).get("STEERVIT_OTLP_ENDPOINT", ""))
        for policy in of_kind(found, "NetworkPolicy"):
            let_out = {
                (to["namespaceSelector"]["matchLabels"]["kubernetes.io/metadata.name"], port["port"])
                for rule in policy["spec"]["egress"] for to in rule["to"] for port in rule["ports"]
            }  # fmt: skip
            collector = {((endpoint.hostname or "").rpartition(".")[2], endpoint.port), ("kube-system", 53)}
            assert let_out == (collector if endpoint.port else set()), target


def test_the_readme_names_files_that_exist_and_every_component() -> None:
    readme = (KUBERNETES / "README.md").read_text()
    for folder in (*(KUBERNETES / "components").iterdir(), *(KUBERNETES / "overlays").iterdir()):
        assert f"`{folder.name}`" in readme
    for path in re.findall(r"deploy/[\w./-]+\w", readme):
        assert (ROOT / path).exists(), path
