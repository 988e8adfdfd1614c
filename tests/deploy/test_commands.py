"""The kubectl commands of the documentation: their flags are kubectl's, their names those of the manifests."""

import os
import re
import subprocess
from pathlib import Path

import pytest
from documented import commands
from manifests import ROOT, objects, of_kind, pods, settings

from deploy.kubernetes.tools import KUBECTL
from service.config import Settings

NOWHERE = """
apiVersion: v1
kind: Config
clusters: [{name: nowhere, cluster: {server: "http://127.0.0.1:9"}}]
contexts: [{name: nowhere, context: {cluster: nowhere}}]
current-context: nowhere
"""
OF_KUBECTL = [command for command in commands() if command.program == "kubectl"]
KINDS = {
    "deployment": "Deployment", "service": "Service", "configmap": "ConfigMap", "hpa": "HorizontalPodAutoscaler",
    "networkpolicy": "NetworkPolicy", "podmonitor": "PodMonitor", "secret": "Secret",
}  # fmt: skip
OTHERS = {("Service", "prometheus-operated"), ("Secret", "steervit-tls")}
"""Of the Prometheus operator; made by the user, and mounted."""


@pytest.mark.parametrize("line", sorted({command.text for command in OF_KUBECTL}), ids=lambda line: line[:60])
def test_kubectl_knows_the_command_and_its_flags(line: str, tmp_path: Path) -> None:
    """It gets as far as to ask the cluster, which is not there."""
    (tmp_path / "config").write_text(NOWHERE)
    environment = {
        "PATH": f"{KUBECTL.parent}:{os.environ['PATH']}", "HOME": str(tmp_path), "KUBECONFIG": str(tmp_path / "config"),
        "POD": "steervit-1", "MODEL": "fashion_mnist", "VERSION": "3",
    }  # fmt: skip
    line = re.sub(r" \| .*| > [\w.]+$|&$", "", line)
    done = subprocess.run(["bash", "-c", line], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60)
    assert re.search(r"127\.0\.0\.1:9\b.*refused", done.stderr), done.stderr


def test_what_the_commands_name_is_in_the_manifests() -> None:
    found = objects("everything")
    there = {(each["kind"], each["metadata"]["name"]) for each in found} | OTHERS
    (namespace,) = of_kind(found, "Namespace")
    (pod,) = pods(found)
    for command in OF_KUBECTL:
        for kind, name in re.findall(rf"\b({'|'.join(KINDS)})[/ ]([a-z][\w-]+)", command.text):
            assert (KINDS[kind], name) in there, command.text
        for label, value in re.findall(r"-l (app[\w./]+)=(\w+)", command.text):
            assert pod.labels[label] == value
        assert set(re.findall(r" -n (\S+)", command.text)) <= {namespace["metadata"]["name"], "monitoring"}
        for folder in re.findall(r"-k (\S+)", command.text):
            assert (ROOT / folder / "kustomization.yaml").is_file()


def test_settings_in_the_commands_are_settings_and_folders_those_of_the_pods() -> None:
    found = objects("everything")
    (pod,) = pods(found)
    of_pod = settings(pod, found)
    folders = {of_pod["STEERVIT_REPOSITORY"], of_pod["STEERVIT_PROFILES_DIR"]}
    for command in OF_KUBECTL:
        for name, value in re.findall(r"\bSTEERVIT_(\w+)=(\S+)", command.text):
            Settings.model_validate({"repository": "/models", name.lower(): value})
        for path in re.findall(r"(?<=[ \"])(/models|/etc/steervit/\w+)", command.text):
            assert path in folders
