"""Addresses in a registry: registry.example.com:5000/models/fashion_mnist:4@sha256:..."""

import re
from dataclasses import dataclass

from service.delivery.errors import DeliveryError

HOST = r"(?:[A-Za-z0-9](?:[A-Za-z0-9.-]*[A-Za-z0-9])?|\[[0-9A-Fa-f:.]+\])(?::[0-9]{1,5})?"
PATH = r"[a-z0-9]+(?:(?:\.|_|__|-+)[a-z0-9]+)*"
REFERENCE = re.compile(
    rf"(?P<host>{HOST})/(?P<path>{PATH}(?:/{PATH})*)(?::(?P<tag>[A-Za-z0-9_][A-Za-z0-9_.-]{{0,127}}))?"
    r"(?:@(?P<digest>sha256:[0-9a-f]{64}))?"
)
FORM = "<registry>/<path>[:<tag>][@sha256:<64 hexadecimal digits>], the path in lower case"


@dataclass(frozen=True)
class Reference:
    """A repository of a registry, and a manifest in it."""

    host: str
    path: str
    tag: str = ""
    digest: str = ""
    """Digest of the manifest; it takes precedence over the tag."""

    @classmethod
    def parse(cls, text: str) -> "Reference":
        """The reference that a text names. Raises DeliveryError when it is invalid or has no registry."""
        match = REFERENCE.fullmatch(text.removeprefix("oci://"))
        if not match:
            raise DeliveryError(f"reference is {text!r}; allowed: {FORM}")
        host = match["host"]
        if not ({".", ":"} & {*host}) and host != "localhost":  # docker's rule for registries and paths
            raise DeliveryError(f"registry is {host!r}; allowed: a name with a dot or a port, or localhost")
        return cls(host, match["path"], match["tag"] or "", match["digest"] or "")

    @property
    def selector(self) -> str:
        """The digest of the manifest, or its tag if there is no digest."""
        return self.digest or self.tag

    def __str__(self) -> str:
        tag, digest = f":{self.tag}" if self.tag else "", f"@{self.digest}" if self.digest else ""
        return f"{self.host}/{self.path}{tag}{digest}"
