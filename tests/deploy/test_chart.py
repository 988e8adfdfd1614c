"""The Helm chart makes the objects that kustomize makes of deploy/kubernetes, and refuses wrong values."""

import json
import os
import re
import subprocess
import tomllib
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml
from manifests import KUBERNETES, TARGETS, Object, objects, of_kind
from processes import ROOT

from deploy.helm_schema import OF_THE_CHART, WRITTEN, written
from deploy.kubernetes.tools import HELM, KUBECTL
from service.config import Settings

CHART = ROOT / "deploy" / "helm"
OF_HELM = {
    *(f"app.kubernetes.io/{name}" for name in ("instance", "version", "managed-by")),
    *("helm.sh/chart", "helm.sh/resource-policy", "checksum/settings"),
}
"""Labels and annotations by Helm's conventions; the name is a label of every object of the chart."""
Values = dict[str, Any]

CPU = {"image": {"tag": "cpu"}}
MODELS = {"models": {"claim": {"size": "10Gi"}}}
MONITORING = {"monitoring": {"podMonitor": True, "rules": True, "dashboards": True}}
ADAPTER = {"autoscaling": {"by": "adapter"}}
GPU = {"gpu": {"enabled": True}}
NO_SPARE = {"gpu": {"enabled": True, "spare": False}}
PROFILES = {"profiles": {"example.json": (KUBERNETES / "components" / "profiles" / "example.json").read_text()}}
TLS = {"tls": {"secretName": "steervit-tls"}}
TRACING = {"tracing": {"service": "otel-collector"}}
REGISTRY = {"image": {"repository": "registry.example.com/steervit"}}
LIMITS = {"clientLimits": json.loads((KUBERNETES / "components" / "client-limits" / "limits.json").read_text())}
GATEWAY = {
    "gateway": {
        "enabled": True,
        "parentRefs": [{"name": "gateway", "namespace": "envoy-gateway-system"}],
        "hostnames": ["steervit.example.com"],
    }
}
PULL = {
    "models": {
        "pull": {
            "reference": f"registry.example.com/models/fashion_mnist:3@sha256:{'0' * 64}",
            "to": [{"ipBlock": {"cidr": "203.0.113.10/32"}}],
        }
    }
}
MODEL_IMAGE = {"reference": f"registry.example.com/models/fashion_mnist:3-image@sha256:{'0' * 64}"}
NOT_IN_THE_CHART = {
    "overlays/kserve": "KServe makes its own objects",
    "components/kserve-keda": "KServe makes its own objects",
    "overlays/canary": "Services of a release choose its own pods alone, so another one cannot be its canary",
}
"""Why not."""
VALUES: dict[str, Values] = {
    "base": {},
    "overlays/cpu": REGISTRY | MODELS | MONITORING | ADAPTER,
    "overlays/gpu": REGISTRY | GPU | MODELS | MONITORING | ADAPTER,
    "components/autoscaling": CPU | ADAPTER,
    "components/client-limits": CPU | LIMITS,
    "components/gateway": CPU | GATEWAY,
    "components/gpu": CPU | GPU,
    "components/gpu-no-spare": CPU | NO_SPARE,
    "components/keda": CPU | {"autoscaling": {"by": "keda"}},
    "components/model-image": CPU | {"models": {"volume": {"image": MODEL_IMAGE | {"pullPolicy": "IfNotPresent"}}}},
    "components/model-pull": CPU | PULL,
    "components/model-pvc": CPU | MODELS,
    "components/monitoring": CPU | MONITORING,
    "components/profiles": CPU | PROFILES,
    "components/tls": CPU | TLS,
    "components/tracing": CPU | TRACING,
    "everything": CPU | MODELS | MONITORING | ADAPTER | NO_SPARE | PROFILES | LIMITS | GATEWAY | TLS | TRACING,
}
"""What makes the chart into each target of kustomize."""


def helm(values: Values, name: str = "steervit") -> "subprocess.CompletedProcess[str]":
    command = [HELM, "template", name, CHART, "--namespace", "steervit", "--values", "-"]
    return subprocess.run(command, input=json.dumps(values), capture_output=True, text=True, timeout=60)


def rendered(values: Values, name: str = "steervit") -> list[Object]:
    done = helm(values, name)
    assert done.returncode == 0, done.stderr
    return [found for found in yaml.load_all(done.stdout, yaml.CSafeLoader) if found]


def pod_spec(found: list[Object]) -> Any:
    (deployment,) = of_kind(found, "Deployment")
    return deployment["spec"]["template"]["spec"]


def by_name(found: list[Object]) -> dict[tuple[str, str], Object]:
    named = {(each["kind"], each["metadata"]["name"]): each for each in found}
    assert len(named) == len(found)
    return named


def compared(found: list[Object], conventions: set[str]) -> dict[tuple[str, str], Object]:
    """Without these labels and annotations, and with lists whose order means nothing in one order."""

    def cleaned(value: Any) -> Any:
        if not isinstance(value, dict):
            return [cleaned(part) for part in value] if isinstance(value, list) else value
        kept = {key: cleaned(part) for key, part in value.items() if key not in conventions}
        for key in ("labels", "annotations"):
            if kept.get(key) == {}:
                del kept[key]
        return kept

    for each in found:
        if "limits.json" in each.get("data", {}):
            each["data"]["limits.json"] = json.loads(each["data"]["limits.json"])
        each["metadata"].get("labels", {}).pop("app.kubernetes.io/name", None)
        if each["kind"] == "Deployment":
            spec = each["spec"]["template"]["spec"]
            for owner, key in ((spec, "volumes"), (spec["containers"][0], "volumeMounts")):
                owner.get(key, []).sort(key=lambda one: one["name"])
    return by_name([cleaned(each) for each in found])


def of_kustomize(target: str) -> dict[tuple[str, str], Object]:
    """Without the hash in the name of the settings, and the namespace, which Helm makes by itself."""
    text = re.sub(r"steervit-settings-\w+", "steervit-settings", yaml.safe_dump_all(objects(target)))
    found = [each for each in yaml.load_all(text, yaml.CSafeLoader) if each["kind"] != "Namespace"]
    return compared(found, set())


def of_helm(values: Values) -> dict[tuple[str, str], Object]:
    return compared(rendered(values), OF_HELM)


def test_every_target_of_kustomize_is_one_of_the_chart_or_is_left_out() -> None:
    assert set(TARGETS) == VALUES.keys() | NOT_IN_THE_CHART.keys()


@pytest.mark.parametrize("target", VALUES)
def test_the_chart_makes_the_objects_of_kustomize(target: str) -> None:
    expected, found = of_kustomize(target), of_helm(VALUES[target])
    assert found.keys() == expected.keys()
    for name, each in expected.items():
        assert found[name] == each, name


def test_releases_side_by_side_share_no_name_and_no_pod() -> None:
    first = rendered(VALUES["everything"])
    second = rendered(VALUES["everything"] | {"autoscaling": {"by": "keda"}}, "canary")
    assert not by_name(first).keys() & by_name(second).keys()
    (deployment,) = of_kind(second, "Deployment")
    selector = deployment["spec"]["selector"]["matchLabels"]
    assert deployment["metadata"]["name"] == "canary-steervit"
    (first_deployment,) = of_kind(first, "Deployment")
    assert not selector.items() <= first_deployment["spec"]["template"]["metadata"]["labels"].items()
    for each in of_kind(second, "Service"):
        assert each["spec"]["selector"] == selector
    for each in of_kind(second, "PodDisruptionBudget", "PodMonitor"):
        assert each["spec"]["selector"]["matchLabels"] == selector
    (policy,) = of_kind(second, "NetworkPolicy")
    assert policy["spec"]["podSelector"]["matchLabels"] == selector
    spec = pod_spec(second)
    assert spec["serviceAccountName"] == "canary-steervit"
    assert {spread["labelSelector"]["matchLabels"] == selector for spread in spec["topologySpreadConstraints"]} == {
        True
    }
    (scaled,) = of_kind(second, "ScaledObject")
    assert scaled["spec"]["scaleTargetRef"]["name"] == "canary-steervit"
    for trigger in scaled["spec"]["triggers"]:
        (pods,) = set(re.findall(r'pod=~"([^"]*)"', trigger["metadata"]["query"]))
        assert re.fullmatch(pods, "canary-steervit-6f5b9c-x2x4z")
        assert not re.fullmatch(pods, "steervit-6f5b9c-x2x4z")
    (route,) = of_kind(second, "GRPCRoute")
    assert route["spec"]["rules"][0]["backendRefs"] == [{"name": "canary-steervit", "port": 8001}]
    names = {source["configMapRef"]["name"] for source in spec["containers"][0]["envFrom"]}
    names |= {volume["configMap"]["name"] for volume in spec["volumes"] if "configMap" in volume}
    assert names <= {each["metadata"]["name"] for each in of_kind(second, "ConfigMap")}


def test_values_that_kustomize_leaves_to_patches() -> None:
    found = rendered(
        {
            "image": {"digest": "sha256:" + "0" * 64, "tag": "ignored"},
            "settings": {"max_pixels": 60_000_000, "jpeg_draft": True, "drain_seconds": 60.5, "graph": "masked.fp32"},
            "env": [{"name": "OTEL_TRACES_SAMPLER", "value": "always_off"}],
            "gpu": {"enabled": True, "resource": "nvidia.com/mig-1g.10gb"},
            "resources": {"limits": {"cpu": "6"}},
            "podSpec": {
                "runtimeClassName": "nvidia",
                "volumes": [{"name": "mine", "emptyDir": {}}],
                "tolerations": [{"key": "batch", "operator": "Exists"}],
            },
            "podAnnotations": {"mine": "yes"},
            "models": {"volume": {"image": {"reference": "registry.example.com/models:1"}}},
            "networkPolicy": {"egress": [{"ports": [{"port": 443}]}]},
        }
    )
    spec = pod_spec(found)
    (server,) = spec["containers"]
    assert server["image"] == "steervit@sha256:" + "0" * 64
    assert server["resources"] == {
        "limits": {"cpu": "6", "nvidia.com/mig-1g.10gb": "1"}, "requests": {"nvidia.com/mig-1g.10gb": "1"},
    }  # fmt: skip
    assert [entry["name"] for entry in server["env"]] == ["CUDA_CACHE_PATH", "OTEL_TRACES_SAMPLER"]
    assert spec["runtimeClassName"] == "nvidia"
    assert [volume["name"] for volume in spec["volumes"]] == ["models", "cuda-cache", "mine"]
    assert [toleration["key"] for toleration in spec["tolerations"]] == ["nvidia.com/gpu", "batch"]
    assert spec["terminationGracePeriodSeconds"] == 81, "10 + 1 + 60.5 + 9"
    (settings,) = of_kind(found, "ConfigMap")
    assert settings["data"].items() >= {
        "STEERVIT_MAX_PIXELS": "60000000", "STEERVIT_JPEG_DRAFT": "true", "STEERVIT_GRAPH": "masked.fp32",
        "STEERVIT_PROVIDER": "cuda",
    }.items()  # fmt: skip
    assert "STEERVIT_MODEL_CONTROL" not in settings["data"], "an image does not change"
    Settings.model_validate({name.removeprefix("STEERVIT_").lower(): value for name, value in settings["data"].items()})
    (policy,) = of_kind(found, "NetworkPolicy")
    assert [port["port"] for rule in policy["spec"]["egress"] for port in rule["ports"]] == [443, 53, 53]
    for each in found:
        kubernetes_validate.validate(each, "1.37", strict=True)


def test_a_model_of_a_store_is_pinned_by_the_bundles_digest_and_pulled_by_an_image_that_reads_stores() -> None:
    pull = {
        "reference": "s3://bucket/fashion_mnist/3", "digest": "0123456789012345", "storeSecret": "aws",
        "image": "registry.example.com/steervit:0.1.0-delivery", "to": [{"ipBlock": {"cidr": "0.0.0.0/0"}}],
    }  # fmt: skip
    more = {"initContainers": [{"name": "mine", "image": "mine"}]}
    spec = pod_spec(rendered({"models": {"pull": pull}, "gpu": {"enabled": True}, "podSpec": more}))
    first, second = spec["initContainers"]
    assert first["image"] == pull["image"]
    assert first["command"][-2:] == ["--digest", pull["digest"]]
    assert second == more["initContainers"][0]
    assert spec["containers"][0]["image"].endswith("-cuda")
    (credentials,) = (volume for volume in spec["volumes"] if volume["name"] == "credentials")
    assert [source["secret"]["name"] for source in credentials["projected"]["sources"]] == ["steervit-registry", "aws"]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"settings": {"max_batchs": 16}}, "max_batchs"),
        ({"settings": {"max_batch": 5000}}, "max_batch"),
        ({"settings": {"graph": "compact"}}, "graph"),
        ({"settings": {"port": 9000}}, "port"),
        ({"replica": 3}, "replica"),
        ({"replicas": 0}, "replicas"),
        ({"gpu": {"enabled": "yes"}}, "gpu/enabled"),
        ({"autoscaling": {"by": "hpa"}}, "autoscaling/by"),
        ({"models": {"claim": {"size": "10Gi"}, "volume": {"emptyDir": {}}}}, "models"),
        ({"models": {"claim": {"storageClassName": "fast"}}}, "claim"),
        ({"models": PULL["models"] | {"volume": {"emptyDir": {}}}}, "models"),
        ({"models": {"pull": {"reference": "registry.example.com/models/mine:3"}}}, "reference"),
        ({"models": {"pull": {"reference": "s3://bucket/mine/3"}}}, "pull/to"),
        ({"gateway": {"enabled": True}}, "gateway/parentRefs"),
        ({"clientLimits": {"clients": {"shop": {"images_per_minute": 5}}}}, "images_per_minute"),
        ({"fullnameOverride": "vision"}, "fullnameOverride"),
        ({"podSpec": {"containers": []}}, "containers"),
        ({"profiles": {"mine.yaml": "{}"}}, "profiles"),
        ({"image": {"digest": "sha256:1234"}}, "digest"),
    ],
)
def test_wrong_values_are_refused_with_their_name(values: Values, message: str) -> None:
    done = helm(values)
    assert done.returncode != 0
    assert "values don't meet the specifications of the schema" in done.stderr
    assert message in done.stderr.partition("schema")[2]


def test_the_schema_is_that_of_the_servers_settings() -> None:
    assert WRITTEN.read_text() == written(), "`make manifests` was not run after a change of the settings"
    assert set(Settings.model_fields) > OF_THE_CHART


def test_the_chart_has_the_projects_version_and_no_complaint_of_helm() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    chart = yaml.safe_load((CHART / "Chart.yaml").read_text())
    assert {chart["version"], chart["appVersion"]} == {project["version"]}
    done = subprocess.run([HELM, "lint", "--strict", CHART], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout


def test_a_package_of_the_chart_contains_the_files_that_are_links(tmp_path: Path) -> None:
    subprocess.run([HELM, "package", CHART, "--destination", tmp_path], check=True, capture_output=True, timeout=60)
    (package,) = tmp_path.glob("*.tgz")
    command = [HELM, "template", "steervit", package, "--namespace", "steervit", "--values", "-"]
    done = subprocess.run(
        command, input=json.dumps(VALUES["everything"]), capture_output=True, text=True, check=True, timeout=60
    )
    assert list(yaml.load_all(done.stdout, yaml.CSafeLoader)) == list(
        yaml.load_all(helm(VALUES["everything"]).stdout, yaml.CSafeLoader)
    )


def test_the_readmes_values_and_its_patch_ask_for_the_same_mig_slice(tmp_path: Path) -> None:
    blocks = re.findall(r"```yaml\n(.*?)```", (KUBERNETES / "README.md").read_text(), re.DOTALL)
    values, patch = (yaml.safe_load(block) for block in blocks)
    folder = Path(os.path.relpath(KUBERNETES, tmp_path))
    overlay = {"resources": [f"{folder}/base"], "components": [f"{folder}/components/gpu"], **patch}
    (tmp_path / "kustomization.yaml").write_text(yaml.safe_dump(overlay))
    built = subprocess.run([KUBECTL, "kustomize", tmp_path], capture_output=True, text=True, check=True, timeout=60)
    of_patch = pod_spec(list(yaml.load_all(built.stdout, yaml.CSafeLoader)))
    of_values = pod_spec(rendered(values))
    for spec in (of_patch, of_values):
        assert spec["runtimeClassName"] == "nvidia"
        assert spec["containers"][0]["resources"]["limits"]["nvidia.com/mig-1g.10gb"] == "1"
    assert of_patch["containers"][0]["resources"] == of_values["containers"][0]["resources"]
