"""deploy/alerts -> components/monitoring/prometheusrules.yaml: python -m deploy.kubernetes.prometheus_rules

kustomize can put a file into a ConfigMap, but not into a field of another object. So the objects are written, and
tests/deploy sees that they say what deploy/alerts says.
"""

from pathlib import Path

import yaml

ALERTS = Path(__file__).parents[1] / "alerts"
WRITTEN = Path(__file__).parent / "components" / "monitoring" / "prometheusrules.yaml"
HEAD = "# Written from deploy/alerts by `make manifests`: change the rules there.\n"


class Dumper(yaml.SafeDumper):
    """Expressions of several lines stay readable."""


def _text(dumper: yaml.SafeDumper, value: str) -> yaml.ScalarNode:
    return dumper.represent_scalar("tag:yaml.org,2002:str", value, "|" if "\n" in value else None)


Dumper.add_representer(str, _text)


def prometheus_rules() -> str:
    """An object of the Prometheus operator for each file."""
    rules = [
        {
            "apiVersion": "monitoring.coreos.com/v1",
            "kind": "PrometheusRule",
            "metadata": {"name": f"steervit-{name}"},
            "spec": yaml.safe_load((ALERTS / f"{name}.yaml").read_text()),
        }
        for name in ("recording", "slo", "alerts")
    ]
    return HEAD + yaml.dump_all(rules, Dumper=Dumper, sort_keys=False, width=120, allow_unicode=True)


if __name__ == "__main__":
    WRITTEN.write_text(prometheus_rules())
