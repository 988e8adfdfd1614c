"""Credentials for registries as `docker login` and Kubernetes Secrets store them: config.json in ~/.docker or
$DOCKER_CONFIG."""

import base64
import binascii
import json
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any, NamedTuple

from service.delivery.errors import DeliveryError

IDENTITY = "<token>"
"""The user name that marks the secret as an identity token, which is exchanged for others."""
NAMES = {"docker.io": ("docker.io", "index.docker.io", "registry-1.docker.io")}
"""Hosts of the same registry."""


class Credentials(NamedTuple):
    """The credentials for a registry."""

    user: str
    secret: str


def credentials(host: str) -> Credentials | None:
    """The credentials for a registry, or None. host: with its port, as in references.

    Raises DeliveryError when the configuration cannot be read, or a credential helper fails.
    """
    folder = os.environ.get("DOCKER_CONFIG") or os.path.expanduser("~/.docker")
    path = Path(folder) / "config.json"
    try:
        value = json.loads(path.read_bytes())
        entries = {_host(name): entry for name, entry in value.get("auths", {}).items()}
        helpers = {_host(name): helper for name, helper in value.get("credHelpers", {}).items()}
        store = value.get("credsStore")
    except FileNotFoundError:
        return None
    except (OSError, ValueError, AttributeError) as error:
        raise DeliveryError(f"{path}: {error}; allowed: docker's config.json") from error
    for name in NAMES.get(host, (host,)):
        if found := _entry(path, name, entries.get(name)):
            return found
        if helper := helpers.get(name) or store:
            key = "https://index.docker.io/v1/" if name == "index.docker.io" else name
            if found := _ask(path, str(helper), key):
                return found
    return None


def _host(name: str) -> str:
    """The host of an entry, whose name may be a URL."""
    return name.partition("://")[2].partition("/")[0] or name.partition("/")[0]


def _entry(path: Path, name: str, entry: Any) -> Credentials | None:
    if not isinstance(entry, dict):
        return None
    if token := entry.get("identitytoken"):
        return Credentials(IDENTITY, str(token))
    if not (auth := entry.get("auth")):
        return Credentials(entry["username"], entry["password"]) if {"username", "password"} <= entry.keys() else None
    try:
        user, colon, secret = base64.b64decode(auth).decode().partition(":")
    except (ValueError, TypeError, binascii.Error) as error:
        raise DeliveryError(f"{path}: auth of {name} is not base64; allowed: that of user:password") from error
    if not colon:
        raise DeliveryError(f"{path}: auth of {name} has no colon; allowed: base64 of user:password")
    return Credentials(user, secret.rstrip("\0"))


def _ask(path: Path, helper: str, key: str) -> Credentials | None:
    """The credentials for a registry from docker-credential-<helper>."""
    program = shutil.which(f"docker-credential-{helper}") if re.fullmatch(r"[\w.-]+", helper) else None
    if program is None:
        raise DeliveryError(f"{path}: credential helper is {helper!r}; allowed: docker-credential-... in PATH")
    done = subprocess.run([program, "get"], input=key, capture_output=True, text=True, timeout=60)
    if done.returncode:
        if "not found" in done.stdout:  # "credentials not found in native keychain"
            return None
        raise DeliveryError(f"{program} failed for {key}: {(done.stderr or done.stdout).strip()[:200]}")
    try:
        value = json.loads(done.stdout)
        return Credentials(value["Username"], value["Secret"])
    except (ValueError, KeyError, TypeError) as error:
        raise DeliveryError(f"{program} did not answer {key} with JSON of Username and Secret") from error
