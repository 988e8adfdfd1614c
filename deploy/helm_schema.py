"""values.schema.json of the chart, with the server's settings and limits by client: python -m deploy.helm_schema"""

import json
from itertools import combinations
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from service.config import Settings
from service.limits import Limits

WRITTEN = Path(__file__).parent / "helm" / "values.schema.json"
OF_THE_CHART = {
    "repository", "profiles_dir", "host", "port", "metrics_port", "provider", "tls_certificate", "tls_key",
    "tls_client_ca", "otlp_endpoint", "revision", "client_limits",
}  # fmt: skip
"""Settings that the chart makes of its other values, or of the paths and ports in its templates."""
Schema = dict[str, Any]


def section(**properties: Schema) -> Schema:
    """An object with these fields alone."""
    return {"type": "object", "additionalProperties": False, "properties": properties}


def text(pattern: str = "") -> Schema:
    return {"type": "string", **({"pattern": pattern} if pattern else {})}


def settings() -> Schema:
    """Without defaults: files/settings.env has others than the server for some."""
    fields = Settings.model_json_schema()["properties"]
    return section(
        **{
            name: {key: value for key, value in field.items() if key not in ("default", "title")}
            for name, field in fields.items()
            if name not in OF_THE_CHART
        }
    )


def schema() -> Schema:
    flag = {"type": "boolean"}
    count = {"type": "integer", "minimum": 1}
    port = {**count, "maximum": 65535}
    anything = {"type": "object"}
    strings = {"type": "object", "additionalProperties": {"type": "string"}}
    objects = {"type": "array", "items": anything}
    limits = TypeAdapter(Limits).json_schema(ref_template="#/definitions/{model}")
    definitions = limits.pop("$defs")
    claim = {
        **section(size=text(r"^[0-9]+[KMGTPE]i?$"), storageClassName=text()),
        "dependencies": {"storageClassName": ["size"]},
    }
    given = {"claim": {"minProperties": 1}, "pull": {"properties": {"reference": {"minLength": 1}}},
             "volume": {"minProperties": 1}}  # fmt: skip
    one_way = [{"not": {"properties": dict(two)}} for two in combinations(given.items(), 2)]
    name = text(r"^([a-z0-9]([-a-z0-9]*[a-z0-9])?)?$")
    pull = section(
        reference=text(r"^$|^[\w-]+://.|^[^\s:@]+(:[0-9]+/[^\s:@]+)?(:[\w.-]+)?@sha256:[0-9a-f]{64}$"),
        digest=text(r"^([0-9a-f]{16})?$"),
        image=text(r"^\S*$"),
        registrySecret=name,
        storeSecret=name,
        to=objects,
        port=port,
    ) | {"if": given["pull"], "then": {"properties": {"to": {"minItems": 1}}}}
    gateway = section(
        enabled=flag, parentRefs=objects, hostnames={"type": "array", "items": text()}, namespace=name
    ) | {"if": {"properties": {"enabled": {"const": True}}}, "then": {"properties": {"parentRefs": {"minItems": 1}}}}
    of_chart = section(
        fullnameOverride={**text(r"^$|^([a-z][-a-z0-9]*)?steervit([-a-z0-9]*[a-z0-9])?$"), "maxLength": 50},
        image=section(
            repository=text(r"^[^\s:@]+(:[0-9]+/[^\s:@]+)?$"),
            tag=text(r"^[\w.-]*$"),
            digest=text(r"^(sha256:[0-9a-f]{64})?$"),
        ),
        replicas=count,
        settings=settings(),
        env={"type": "array", "items": {**anything, "required": ["name"]}},
        resources=section(requests=anything, limits=anything),
        podSpec={**anything, "propertyNames": {"not": {"const": "containers"}}},
        podAnnotations=strings,
        models={**section(claim=claim, pull=pull, volume=anything), "allOf": one_way},
        profiles={**section(), "patternProperties": {r"^[\w-][\w.-]*\.json$": text()}},
        clientLimits=limits,
        gateway=gateway,
        tls=section(secretName=name, clientCA=flag),
        gpu=section(enabled=flag, resource=text(r"^[\w.-]+/[\w.-]+$"), spare=flag),
        autoscaling=section(
            by={"enum": ["none", "adapter", "keda"]}, minReplicas=count, maxReplicas=count,
            prometheus=text(r"^https?://[^\s/]+"),
        ),
        monitoring=section(podMonitor=flag, rules=flag, dashboards=flag, labels=strings),
        tracing=section(service=name, namespace=name, port=port),
        networkPolicy=section(scrapersNamespace=name, egress=objects),
    )  # fmt: skip
    of_chart["properties"]["global"] = anything  # Helm adds it to the values of a chart that another one includes
    head = {"$schema": "http://json-schema.org/draft-07/schema#", "title": "Values of the chart steervit"}
    return {**head, **of_chart, "definitions": definitions}


def written() -> str:
    return json.dumps(schema(), indent=2) + "\n"


if __name__ == "__main__":
    WRITTEN.write_text(written())
