"""What deploy/kubernetes says of the server is so: settings, ports, paths, times, names of metrics, generated files."""

import json
import os
import re
import shutil
import subprocess
import sys
import urllib.request
from pathlib import Path
from urllib.parse import urlsplit

import promql_parser
import pytest
import yaml
from manifests import BUILDS, KUBERNETES, OVERLAYS, TARGETS, Object, Pod, objects, of_kind, pods, settings
from processes import MODELS, ROOT, SMALL, serving
from prometheus import alerts, promtool
from prometheus_client import CollectorRegistry
from registries import registry

from deploy.kubernetes.prometheus_rules import WRITTEN, prometheus_rules
from deploy.kubernetes.tools import KUBECTL
from export.bundle import SCHEMA_VERSION, Bundle, BundleError, load_bundle
from service.catalogue import scan
from service.config import Settings
from service.delivery.push import push
from service.delivery.reference import Reference
from service.limits import Limits
from service.metrics import Metrics
from service.pb import steering_pb2 as pb
from service.profiles import ProfileFolder
from service.server import METHODS, SERVICES
from training.fields import read

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
def test_the_message_limit_fits_a_full_call_of_ordinary_images_and_little_more(
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
def test_a_stopping_pod_has_time_to_answer_accepted_calls(target: str, monkeypatch: pytest.MonkeyPatch) -> None:
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
        before = {mount["name"] for init in pod.spec.get("initContainers", ()) for mount in init["volumeMounts"]}
        assert {mount["name"] for mount in mounts.values()} | before == volumes
        of_server = settings_of(pod, found, monkeypatch)
        for path in (
            of_server.profiles_dir,
            of_server.client_limits,
            of_server.tls_certificate,
            of_server.tls_key,
            of_server.repository,
        ):
            if path is None or (path == of_server.repository and str(path) not in mounts):
                continue  # /models is in the image, /mnt/models is mounted by KServe
            (mount,) = (mount for folder, mount in mounts.items() if path.is_relative_to(folder))
            assert mount["readOnly"]
        assert of_server.repository == Path("/mnt/models" if "kserve" in target else "/models")


def test_the_gateway_routes_every_call_but_those_that_change_models() -> None:
    (route,) = of_kind(objects("components/gateway"), "GRPCRoute")
    methods = [match["method"] for rule in route["spec"]["rules"] for match in rule["matches"]]
    routed = {name for name in METHODS for m in methods if name.startswith(f"/{m['service']}/{m.get('method', '')}")}
    assert {name.rpartition("/")[2] for name in set(METHODS) - routed} == {
        "RepositoryModelLoad", "RepositoryModelUnload",
    }  # fmt: skip
    assert {m["service"] for m in methods} == set(SERVICES)


def test_the_example_of_limits_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    found = objects("components/client-limits")
    (pod,) = pods(found)
    of_server = settings_of(pod, found, monkeypatch)
    (example,) = (each for each in of_kind(found, "ConfigMap") if each["metadata"]["name"] == "steervit-client-limits")
    limits = read(Limits, json.loads(example["data"][of_server.client_limits.name]), ValueError)
    for limit in (limits.default, *limits.clients.values()):
        assert of_server.max_images <= limit.images_in_flight < of_server.max_queue


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
        for each in of_kind(found, "NetworkPolicy")
        for rule in each["spec"].get("ingress", ()) for port in rule["ports"]
    ]  # fmt: skip
    named += [pod.server[probe]["httpGet"]["port"] for probe in ("startupProbe", "readinessProbe", "livenessProbe")]
    assert set(named) <= ports
    for each in of_kind(found, "HorizontalPodAutoscaler"):
        of_target = {key: each["spec"]["scaleTargetRef"][key] for key in ("kind", "name")}
        (deployment,) = of_kind(found, "Deployment")
        assert of_target == {"kind": "Deployment", "name": deployment["metadata"]["name"]}
        assert "replicas" not in deployment["spec"]
    for each in of_kind(found, "ScaledObject"):
        (deployment,) = of_kind(found, "Deployment")
        assert each["spec"]["scaleTargetRef"] == {"name": deployment["metadata"]["name"]}
        assert "replicas" not in deployment["spec"]


@pytest.mark.parametrize("target", TARGETS)
def test_services_say_http2_without_tls_unless_the_server_has_a_certificate(target: str) -> None:
    found = objects(target)
    for each in of_kind(found, "Service"):
        (port,) = each["spec"]["ports"]
        tls = any("STEERVIT_TLS_CERTIFICATE" in settings(pod, found) for pod in pods(found))
        assert port.get("appProtocol") == (None if tls else "kubernetes.io/h2c")


@pytest.mark.parametrize("target", TARGETS)
def test_a_rollout_keeps_the_whole_capacity_unless_no_gpu_is_spare(target: str) -> None:
    found = objects(target)
    strategies = [each["spec"]["strategy"]["rollingUpdate"] for each in of_kind(found, "Deployment")]
    strategies += [
        each["spec"]["predictor"]["deploymentStrategy"]["rollingUpdate"] for each in of_kind(found, "InferenceService")
    ]
    in_place = target in ("components/gpu-no-spare", "everything")
    assert strategies == [{"maxSurge": 0, "maxUnavailable": 1} if in_place else {"maxSurge": 1, "maxUnavailable": 0}]


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
    with serving(MODELS, "--host", "127.0.0.1", "--provider", "cpu") as server:
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


def triggers(target: str) -> list[tuple[str, float]]:
    """Query and threshold of each metric of KEDA, or of KServe through KEDA."""
    (each,) = of_kind(objects(target), "ScaledObject", "InferenceService")
    if each["kind"] == "ScaledObject":
        return [(one["metadata"]["query"], float(one["metadata"]["threshold"])) for one in each["spec"]["triggers"]]
    metrics = [metric["external"] for metric in each["spec"]["predictor"]["autoScaling"]["metrics"]]
    return [(one["metric"]["query"], float(one["target"]["value"])) for one in metrics]


@pytest.mark.parametrize(
    ("target", "pod"), [("components/keda", "steervit"), ("components/kserve-keda", "fashion-mnist-predictor")]
)
def test_keda_asks_for_as_many_pods_as_the_autoscaler(target: str, pod: str, tmp_path: Path) -> None:
    """The autoscaler multiplies mean / target by the number of pods; KEDA divides the sum by its threshold."""
    (autoscaler,) = of_kind(objects("components/autoscaling"), "HorizontalPodAutoscaler")
    targets = [metric["pods"]["target"]["averageValue"] for metric in autoscaler["spec"]["metrics"]]
    assert [threshold for _, threshold in triggers(target)] == [
        float(value.removesuffix("m")) / (1000 if value.endswith("m") else 1) for value in targets
    ]
    # A pod whose calls wait for 0.1 s and whose second model is in brownout, an idle one, and two of other workloads.
    names = [f"{pod}-7d8f-{name}" for name in "ab"]
    busy, idle = (f'{{namespace="steervit",pod="{name}"' for name in names)
    foreign = [f'{{namespace="steervit",pod="{pod}-canary-7d8f-a"', f'{{namespace="other",pod="{names[0]}"']
    series = {
        f"steervit_queue_duration_seconds_sum{busy}}}": "0+30x20",
        f"steervit_queue_duration_seconds_count{busy}}}": "0+300x20",
        f"steervit_queue_duration_seconds_sum{idle}}}": "0x20",
        f"steervit_queue_duration_seconds_count{idle}}}": "0x20",
        f"steervit_requests_in_flight{busy}}}": "24x20",
        f"steervit_requests_in_flight{idle}}}": "8x20",
        f'steervit_brownout_level{busy},model="one"}}': "0x20",
        f'steervit_brownout_level{busy},model="two"}}': "0.5x20",
        f'steervit_brownout_level{idle},model="one"}}': "0x20",
    }
    for labels in foreign:
        series |= {f"{name}{labels}}}": "0+1000x20" for name in {key.partition("{")[0] for key in series}}
    by_pod = [(0.1, 0.0), (24, 8), (0.5, 0.0)]
    rules = yaml.safe_load(ADAPTER.read_text())["rules"]["custom"]
    cases = []
    for (query, _), rule, values in zip(triggers(target), rules, by_pod, strict=True):
        cases.append({"expr": query, "eval_time": "4m", "exp_samples": [{"labels": "{}", "value": sum(values)}]})
        of_adapter = rule["metricsQuery"].replace(
            "<<.LabelMatchers>>", f'namespace="steervit",pod=~"{"|".join(names)}"'
        )
        samples = [{"labels": f'{{pod="{name}"}}', "value": value} for name, value in zip(names, values, strict=True)]
        cases.append({"expr": of_adapter.replace("<<.GroupBy>>", "pod"), "eval_time": "4m", "exp_samples": samples})
    test = {
        "interval": "15s",
        "input_series": [{"series": name, "values": values} for name, values in series.items()],
        "promql_expr_test": cases,
    }
    (tmp_path / "test.yaml").write_text(yaml.safe_dump({"tests": [test]}))
    promtool("test", "rules", str(tmp_path / "test.yaml"))


def test_keda_scales_between_the_same_limits_at_the_same_pace_as_the_autoscaler() -> None:
    (autoscaler,) = of_kind(objects("components/autoscaling"), "HorizontalPodAutoscaler")
    (scaled,) = of_kind(objects("components/keda"), "ScaledObject")
    expected = autoscaler["spec"]
    spec = scaled["spec"]
    assert (spec["minReplicaCount"], spec["maxReplicaCount"]) == (expected["minReplicas"], expected["maxReplicas"])
    assert spec["advanced"]["horizontalPodAutoscalerConfig"]["behavior"] == expected["behavior"]
    assert all(one["metadata"]["ignoreNullValues"] == "false" for one in spec["triggers"]), (
        "no data is no reason to shrink"
    )


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


def test_a_server_that_is_still_starting_does_not_count_as_down() -> None:
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


@pytest.mark.parametrize("target", OVERLAYS)
def test_a_component_in_the_comments_of_an_overlay_is_one_line_that_can_be_uncommented(target: str) -> None:
    text = (KUBERNETES / target / "kustomization.yaml").read_text()
    on = yaml.safe_load(re.sub(r"^( +)# (?=- )", r"\1", text, flags=re.M)).get("components", [])
    in_list = re.findall(r"components/([\w-]+)", text.partition("\ncomponents:")[2])
    assert on == [f"../../components/{name}" for name in in_list]
    for name in in_list:
        assert (KUBERNETES / "components" / name / "kustomization.yaml").is_file()


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


def test_a_bundle_copied_as_documented_appears_only_when_complete(tmp_path: Path) -> None:
    commands = (KUBERNETES / "README.md").read_text()
    assert "models:/models/.incoming/fashion_mnist\n" in commands
    assert "mv /models/.incoming/fashion_mnist /models\n" in commands
    shutil.copytree(MODELS / "fashion_mnist", tmp_path / ".incoming" / "fashion_mnist")
    with pytest.raises(BundleError):
        scan(tmp_path)
    shutil.move(tmp_path / ".incoming" / "fashion_mnist", tmp_path)
    assert set(scan(tmp_path)) == {"fashion_mnist"}


def test_pods_call_nobody_but_the_collector_of_their_traces_and_the_registry_of_their_model() -> None:
    for target in TARGETS:
        found = objects(target)
        (pod,) = pods(found)
        endpoint = urlsplit(settings(pod, found).get("STEERVIT_OTLP_ENDPOINT", ""))
        pulling = [p for p in of_kind(found, "NetworkPolicy") if p["metadata"]["name"].startswith("steervit-pull")]
        assert len(pulling) == len(pod.spec.get("initContainers", ())), target
        for policy in pulling:
            registry, names = policy["spec"]["egress"]
            assert registry == {"to": [{"ipBlock": {"cidr": "203.0.113.10/32"}}], "ports": [{"port": 443}]}
            assert [port["port"] for port in names["ports"]] == [53, 53]
            (to,) = names["to"]
            assert to["podSelector"]["matchLabels"] == {"k8s-app": "kube-dns"}
        for policy in (each for each in of_kind(found, "NetworkPolicy") if each not in pulling):
            let_out = {
                (to["namespaceSelector"]["matchLabels"]["kubernetes.io/metadata.name"], port["port"])
                for rule in policy["spec"]["egress"] for to in rule["to"] for port in rule["ports"]
            }  # fmt: skip
            collector = {((endpoint.hostname or "").rpartition(".")[2], endpoint.port), ("kube-system", 53)}
            assert let_out == (collector if endpoint.port else set()), target


@pytest.mark.parametrize("target", ["components/model-pull", "overlays/canary"])
def test_a_pod_pulls_the_model_that_its_manifest_pins_before_its_server_starts(target: str, tmp_path: Path) -> None:
    found = objects(target)
    (pod,) = pods(found)
    (pull,) = pod.spec["initContainers"]
    assert pull["image"] == pod.server["image"]
    environment = {entry["name"]: entry["value"] for entry in pull["env"]}
    assert Reference.parse(environment["MODEL"]).digest, "the manifest pins no digest"
    with registry(tmp_path) as own:
        small = SMALL / "small" / "1"
        environment["MODEL"] = str(push(small, Reference.parse(f"{own.host}/models/small")))
        places = {"$(MODEL)": environment["MODEL"], "/models": str(tmp_path / "models"), "python": sys.executable}
        command = [places.get(word, word) for word in pull["command"]]
        subprocess.run(command, check=True, cwd=ROOT, env=os.environ | environment, timeout=60)
    (image,) = pods(objects("components/model-image"))
    (volume,) = image.spec["volumes"]
    assert Reference.parse(volume["image"]["reference"]).digest
    assert load_bundle(tmp_path / "models" / "small" / "1").digest == load_bundle(small).digest


def test_the_model_is_set_as_the_components_say() -> None:
    """By the commented part of an overlay in each, and by the command."""

    def built(component: str) -> list[Object]:
        own = KUBERNETES / "components" / component / "kustomization.yaml"
        (commented,) = re.findall(r"^#   (?:patches|images):\n(?:#    .*\n)+", own.read_text(), re.M)
        folder = BUILDS / f"own-{component}"
        folder.mkdir(parents=True, exist_ok=True)
        source = os.path.relpath(KUBERNETES, folder)
        head = {"resources": [f"{source}/base"], "components": [f"{source}/components/{component}"]}
        said = yaml.safe_load(re.sub("^#  ", "", commented, flags=re.M).replace("sha256:...", f"sha256:{'1' * 64}"))
        (folder / "kustomization.yaml").write_text(yaml.safe_dump(head | said))
        done = subprocess.run([KUBECTL, "kustomize", folder], capture_output=True, text=True, check=True)
        return list(yaml.safe_load_all(done.stdout))

    found = built("model-pull")
    (deployment,) = of_kind(found, "Deployment")
    policies = {each["metadata"]["name"]: each["spec"]["egress"] for each in of_kind(found, "NetworkPolicy")}
    assert policies["steervit-pull"][0]["to"] == [{"ipBlock": {"cidr": "198.51.100.7/32"}}]
    at_once = ["--containers", "pull", "MODEL=other@sha256:DIGEST"]
    command = [KUBECTL, "set", "env", "--local", "-f", "-", *at_once, "-o", "yaml"]
    done = subprocess.run(command, input=yaml.safe_dump(deployment), capture_output=True, text=True, check=True)
    for each, model in ((deployment, "REFERENCE"), (yaml.safe_load(done.stdout), "other")):
        (pull,) = each["spec"]["template"]["spec"]["initContainers"]
        assert pull["env"][0] == {"name": "MODEL", "value": f"{model}@sha256:DIGEST"}
        assert len(pull["env"]) == 4
    (deployment,) = of_kind(built("model-image"), "Deployment")
    (volume,) = deployment["spec"]["template"]["spec"]["volumes"]
    assert volume["image"]["reference"] == f"registry.mine/models/mine@sha256:{'1' * 64}"


def test_a_pod_of_the_canary_gets_calls_and_is_told_from_the_others() -> None:
    found = objects("overlays/canary")
    (canary,), (stable,) = pods(found), pods(objects("overlays/cpu"))
    assert {each["kind"] for each in found} == {"ConfigMap", "Deployment", "NetworkPolicy"}
    (deployment,) = of_kind(found, "Deployment")
    assert deployment["metadata"]["name"] == "steervit-canary"
    assert not deployment["spec"]["selector"]["matchLabels"].items() <= stable.labels.items()
    for each in of_kind(objects("base"), "Service"):
        assert each["spec"]["selector"].items() <= canary.labels.items()


def test_the_readme_names_files_that_exist_and_every_component() -> None:
    readme = (KUBERNETES / "README.md").read_text()
    for folder in (*(KUBERNETES / "components").iterdir(), *(KUBERNETES / "overlays").iterdir()):
        assert f"`{folder.name}`" in readme
    for path in re.findall(r"(?:tests/)?deploy/[\w./-]+\w", readme):
        assert (ROOT / path).exists(), path
