"""The objects that kubectl builds from deploy/kubernetes: every overlay, every component on the base, and all
together."""

import copy
import functools
import os
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import yaml
from processes import ROOT

from deploy.kubernetes.tools import KUBECTL

KUBERNETES = ROOT / "deploy" / "kubernetes"
BUILDS = ROOT / "build" / "manifests"
COMPONENTS = tuple(sorted(folder.name for folder in (KUBERNETES / "components").iterdir()))
ON_BASE = tuple(name for name in COMPONENTS if not name.startswith("kserve"))
AFTER = {"gpu-no-spare": "gpu", "kserve-keda": "kserve"}
"""Components that change another one, by that one."""
TOGETHER = tuple(name for name in ON_BASE if name not in ("keda", "model-image", "model-pull"))
"""Of several autoscalers, and of several ways to the models, one."""
OVERLAYS = tuple(sorted(f"overlays/{folder.name}" for folder in (KUBERNETES / "overlays").iterdir()))
TARGETS = ("base", *OVERLAYS, *(f"components/{name}" for name in (*ON_BASE, "kserve-keda")), "everything")
KSERVE_OWN = {"model", "minReplicas", "maxReplicas", "scaleMetric", "scaleTarget", "autoScaling", "deploymentStrategy"}
"""Fields of a predictor that are not its pods'."""
Object = dict[str, Any]


@dataclass(frozen=True)
class Pod:
    """The pods of a workload."""

    owner: str
    labels: dict[str, str]
    spec: Object

    @property
    def server(self) -> Object:
        """The server's container."""
        return self.spec["containers"][0]

    def to_object(self) -> Object:
        metadata = {"name": self.owner, "namespace": "steervit", "labels": self.labels}
        return {"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": self.spec}


@functools.cache
def _rendered(target: str) -> str:
    if not KUBECTL.exists():
        raise RuntimeError(f"{KUBECTL} is missing; `make deploy-check` installs it")
    done = subprocess.run([KUBECTL, "kustomize", _folder(target)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, f"{target}: {done.stderr}"
    return done.stdout


def objects(target: str) -> list[Object]:
    """Of the base, an overlay, a component, or `everything`."""
    return [found for found in yaml.load_all(_rendered(target), yaml.CSafeLoader) if found]


def _folder(target: str) -> os.PathLike[str]:
    if target == "base" or target.startswith("overlays/"):
        return KUBERNETES / target
    components = list(TOGETHER) if target == "everything" else [target.removeprefix("components/")]
    for name in components:
        if name in AFTER and AFTER[name] not in components:
            components.insert(components.index(name), AFTER[name])
    folder = BUILDS / target
    folder.mkdir(parents=True, exist_ok=True)
    source = os.path.relpath(KUBERNETES, folder)
    kustomization = {
        "namespace": "steervit",
        "resources": [] if components[0] == "kserve" else [f"{source}/base"],
        "components": [f"{source}/components/{name}" for name in components],
        "images": [{"name": "steervit", "newTag": "cpu"}],
    }
    (folder / "kustomization.yaml").write_text(yaml.safe_dump(kustomization))
    return folder


def of_kind(found: list[Object], *kinds: str) -> list[Object]:
    return [each for each in found if each["kind"] in kinds]


def pods(found: list[Object]) -> Iterator[Pod]:
    for each in of_kind(found, "Deployment"):
        template = each["spec"]["template"]
        yield Pod(each["metadata"]["name"], template["metadata"]["labels"], template["spec"])
    for each in of_kind(found, "InferenceService"):
        predictor = each["spec"]["predictor"]
        (runtime,) = (r for r in found if r["metadata"]["name"] == predictor["model"]["runtime"])
        spec = {key: value for key, value in predictor.items() if key not in KSERVE_OWN}
        containers = copy.deepcopy(runtime["spec"]["containers"])
        yield Pod(each["metadata"]["name"], runtime["spec"]["labels"], {**spec, "containers": containers})


def settings(pod: Pod, found: list[Object]) -> dict[str, str]:
    """The STEERVIT_* environment of the server."""
    environment = {}
    for source in pod.server.get("envFrom", ()):
        (settings_map,) = (
            each for each in of_kind(found, "ConfigMap") if each["metadata"]["name"] == source["configMapRef"]["name"]
        )
        environment |= settings_map["data"]
    environment |= {entry["name"]: entry["value"] for entry in pod.server.get("env", ())}
    return {name: value for name, value in environment.items() if name.startswith("STEERVIT_")}
