"""deploy/kubernetes is what Kubernetes, the Prometheus operator and KServe know, and follows the rules of a scanner."""

import ast
import functools
import json
import os
import subprocess
from typing import Any

import kubernetes_validate
import pytest
import yaml
from cloudcoil.models.keda import v1alpha1 as keda
from cloudcoil.models.prometheus_operator import v1 as prometheus_operator
from jsonschema import Draft202012Validator, ValidationError
from manifests import BUILDS, KUBERNETES, TARGETS, Object, objects, of_kind, pods
from processes import ROOT

from deploy.kubernetes.tools import CHECKOV, KSERVE

VERSIONS = ("1.30", "1.37")
"""Of Kubernetes: the oldest (the first with the preStop sleep) and the newest that the schemas know."""
NEWER = {"components/model-image": "1.33"}
"""Of Kubernetes, the first that knows and admits what a target needs."""
RESTRICTED = {
    "configMap",
    "csi",
    "downwardAPI",
    "emptyDir",
    "ephemeral",
    "persistentVolumeClaim",
    "projected",
    "secret",
}
"""Kinds of volumes that the pod security policy `restricted` admits in every version."""
OPERATORS = {"monitoring.coreos.com/v1": prometheus_operator, "keda.sh/v1alpha1": keda}
"""Models of their objects, by apiVersion."""
CUSTOM = {*OPERATORS, "serving.kserve.io/v1alpha1", "serving.kserve.io/v1beta1", "gateway.networking.k8s.io/v1"}
OF_GATEWAYS: dict[str, Object] = json.loads((ROOT / "tests" / "deploy" / "gateway_schemas.json").read_text())
"""By kind: the schemas in the CRDs of the Gateway API 1.6.1 and Envoy Gateway 1.9.0, without descriptions and without
larger fields that are not used here. An unknown field is an error, as it is for kubectl."""


def unknown_to_kserve(value: Any, model: str, path: str = "") -> list[str]:
    """Fields that a model of KServe's client does not have. Those of Kubernetes' own types are not looked at."""
    if model.startswith("list["):
        return [error for part in value for error in unknown_to_kserve(part, model[5:-1], f"{path}[]")]
    fields = _kserve_models().get(model)
    if fields is None:
        return []
    return [
        error
        for key, part in value.items()
        for error in (unknown_to_kserve(part, fields[key], f"{path}.{key}") if key in fields else [f"{path}.{key}"])
    ]


@functools.cache
def _kserve_models() -> dict[str, dict[str, str]]:
    """The type of each field, by class and field, from the source: importing it would need all that KServe needs."""
    models = {}
    for path in (KSERVE / "kserve" / "models").glob("v1*.py"):
        (cls,) = (node for node in ast.parse(path.read_text()).body if isinstance(node, ast.ClassDef))
        tables = {
            node.targets[0].id: ast.literal_eval(node.value)
            for node in cls.body
            if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name)
        }
        models[cls.name] = {name: tables["openapi_types"][key] for key, name in tables["attribute_map"].items()}
    return models


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("target", TARGETS)
def test_objects_fit_the_schemas_of_kubernetes(target: str, version: str) -> None:
    found, version = objects(target), max(version, NEWER.get(target, version))
    for each in [*(each for each in found if each["apiVersion"] not in CUSTOM), *(p.to_object() for p in pods(found))]:
        try:
            kubernetes_validate.validate(each, version, strict=True)
        except kubernetes_validate.ValidationError as error:
            pytest.fail(f"{each['kind']} {each['metadata']['name']}: {'.'.join(map(str, error.path))}: {error.message}")


@pytest.mark.parametrize("target", TARGETS)
def test_the_policy_of_the_namespace_admits_every_volume(target: str) -> None:
    """Image volumes from Kubernetes 1.33 on (kubernetes/kubernetes#130394), two versions after the API has them."""
    admitted = RESTRICTED | ({"image"} if NEWER.get(target, VERSIONS[0]) >= "1.33" else set())
    for pod in pods(objects(target)):
        assert {kind for volume in pod.spec.get("volumes", ()) for kind in volume} - {"name"} <= admitted


def test_the_job_that_pulls_onto_the_volume_fits_the_schemas_and_the_claim() -> None:
    job = yaml.safe_load((KUBERNETES / "pull.yaml").read_text())
    for version in VERSIONS:
        kubernetes_validate.validate(job, version, strict=True)
    (claim,) = of_kind(objects("components/model-pvc"), "PersistentVolumeClaim")
    spec = job["spec"]["template"]["spec"]
    assert spec["volumes"][0]["persistentVolumeClaim"]["claimName"] == claim["metadata"]["name"]
    (pod,) = pods(objects("components/model-pull"))
    (pull,) = pod.spec["initContainers"]
    assert spec["containers"][0]["command"][:4] == pull["command"][:4]
    assert spec["securityContext"] == pod.spec["securityContext"]


@pytest.mark.parametrize("target", TARGETS)
def test_objects_of_the_prometheus_operator_and_of_keda_fit_their_schemas(target: str) -> None:
    for each in objects(target):
        if each["apiVersion"] in OPERATORS:
            model = getattr(OPERATORS[each["apiVersion"]], each["kind"]).model_validate(each)
            # The model passes over fields that it does not know, so they are lost on the way back.
            assert model.model_dump(mode="json", by_alias=True, exclude_unset=True) == each


@pytest.mark.parametrize("target", ["overlays/kserve", "components/kserve-keda"])
def test_objects_of_kserve_have_only_fields_that_its_client_knows(target: str) -> None:
    found = objects(target)
    models = {"InferenceService": "V1beta1InferenceService", "ServingRuntime": "V1alpha1ServingRuntime"}
    assert {each["kind"] for each in found} == set(models)
    for each in found:
        assert not unknown_to_kserve(each, models[each["kind"]], each["kind"])
    runtime = next(each for each in found if each["kind"] == "ServingRuntime")
    runtime["spec"]["securityContext"] = {}  # plausible, but wrong: pods have it, runtimes do not
    assert unknown_to_kserve(runtime, models["ServingRuntime"]) == [".spec.securityContext"]


def test_the_route_and_the_example_for_a_gateway_fit_the_schemas_of_their_resources() -> None:
    example = (KUBERNETES / "components" / "gateway" / "envoy-gateway.yaml").read_text()
    found = [*of_kind(objects("components/gateway"), "GRPCRoute"), *yaml.safe_load_all(example)]
    assert {each["kind"] for each in found} == set(OF_GATEWAYS)
    for each in found:
        Draft202012Validator(OF_GATEWAYS[each["kind"]]).validate(each)
    (route,) = of_kind(found, "GRPCRoute")
    for policy in of_kind(found, "SecurityPolicy", "BackendTrafficPolicy"):
        assert [target["name"] for target in policy["spec"]["targetRefs"]] == [route["metadata"]["name"]]
    route["spec"]["rules"][0]["timeouts"] = {"request": "5s"}  # plausible, but wrong: HTTPRoutes have it
    with pytest.raises(ValidationError, match="'timeouts' was unexpected"):
        Draft202012Validator(OF_GATEWAYS["GRPCRoute"]).validate(route)


def test_the_policy_scanner_finds_nothing_but_the_exceptions_that_have_a_reason() -> None:
    folder = BUILDS / "scanned"
    folder.mkdir(parents=True, exist_ok=True)
    for target in TARGETS:
        found: list[Object] = objects(target)
        scanned = [each for each in found if each["apiVersion"] not in CUSTOM]
        if not any(each["kind"] == "Deployment" for each in found):
            scanned += [pod.to_object() for pod in pods(found)]
        (folder / f"{target.replace('/', '-')}.yaml").write_text(yaml.dump_all(scanned, Dumper=yaml.CSafeDumper))
    done = subprocess.run(
        [CHECKOV, "--directory", folder, "--config-file", KUBERNETES / "checkov.yaml"],
        capture_output=True, text=True, timeout=120, env={**os.environ, "CKV_SKIP_PACKAGE_UPDATE_CHECK": "true"},
    )  # fmt: skip
    report = json.loads(done.stdout)
    findings = [f"{one['check_id']} {one['check_name']}: {one['file_path']} {one['resource']}"
                for one in report["results"]["failed_checks"]]  # fmt: skip
    assert not findings
    assert report["summary"]["passed"] > 50 * len(TARGETS), done.stderr
    assert done.returncode == 0
