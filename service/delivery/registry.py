"""A client for registries of the OCI Distribution Specification 1.1: uploads and downloads blobs and manifests.

https://github.com/opencontainers/distribution-spec/blob/main/spec.md; tokens: https://distribution.github.io/
distribution/spec/auth/token/. Proxies and additional authorities come from the environment (https_proxy, no_proxy,
SSL_CERT_FILE).
"""

import base64
import hashlib
import http.client
import json
import re
import ssl
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from email.message import Message
from typing import IO, Any, NamedTuple
from urllib.parse import urlencode, urljoin, urlsplit

from service.delivery.credentials import IDENTITY, credentials
from service.delivery.errors import DeliveryError, Interrupted, retried
from service.delivery.reference import Reference

TIMEOUT = 60.0
"""Seconds without receiving a byte."""
CHUNK = 1 << 20
LONGEST_MANIFEST = 4 << 20
"""Bytes; registries accept no larger ones."""
LONGEST_ANSWER = 1 << 20
"""Bytes of a token response or an error."""
BUSY = {408, 429, 500, 502, 503, 504}
MANIFEST = "application/vnd.oci.image.manifest.v1+json"
INDEX = "application/vnd.oci.image.index.v1+json"
API_HOSTS = {"docker.io": "registry-1.docker.io"}


class Document(NamedTuple):
    """A manifest in a registry."""

    content: bytes
    digest: str

    @property
    def value(self) -> Any:
        """Its JSON value. Raises DeliveryError."""
        try:
            return json.loads(self.content)
        except (ValueError, RecursionError) as error:
            raise DeliveryError(f"manifest {self.digest} is not JSON: {error}") from error


def digest_of(content: bytes) -> str:
    """A digest in the form of registries: sha256:<64 hexadecimal digits>."""
    return f"sha256:{hashlib.sha256(content).hexdigest()}"


class Registry:
    """A repository of a registry."""

    def __init__(self, reference: Reference, plain_http: bool = False, actions: str = "pull"):
        """plain_http: without TLS, as always for registries on this machine (localhost, 127.0.0.1, ::1).

        actions: the permissions to request tokens for: `pull`, or `pull,push`.
        """
        self.reference, self._plain_http, self._actions = reference, plain_http, actions
        self._authorization = ""
        host = API_HOSTS.get(reference.host, reference.host)
        scheme = "http" if plain_http or _loopback(f"//{host}") else "https"
        self._base = f"{scheme}://{host}/v2/{reference.path}/"
        self._opener = urllib.request.build_opener(_Redirects(self._check))

    def manifest(self, selector: str) -> Document | None:
        """The manifest with a tag or a digest, or None. Raises DeliveryError when its content does not have the
        digest."""
        return retried(lambda: self._manifest(selector))

    def _manifest(self, selector: str) -> Document | None:
        headers = {"Accept": f"{MANIFEST}, {INDEX}"}
        with self._ask("GET", f"manifests/{selector}", headers, missing=True) as answer:
            if answer is None:
                return None
            content = _read(answer, LONGEST_MANIFEST, "a manifest")
        document = Document(content, digest_of(content))
        if ":" in selector and selector != document.digest:
            raise DeliveryError(f"{self._base}manifests/{selector} has the digest {document.digest}")
        return document

    def put_manifest(self, selector: str, content: bytes, media_type: str) -> str:
        """Write a manifest under a tag or its digest. Returns its digest."""

        def put() -> str:
            with self._ask("PUT", f"manifests/{selector}", {"Content-Type": media_type}, lambda: content):
                return digest_of(content)

        return retried(put)

    def blob(self, digest: str, start: int = 0) -> Iterator[bytes]:
        """The content from byte `start` on, as it arrives. It is not checked here. Raises Interrupted."""
        headers = {"Range": f"bytes={start}-"} if start else {}
        with self._ask("GET", f"blobs/{digest}", headers) as answer:
            assert answer is not None
            skip = 0 if answer.status == http.client.PARTIAL_CONTENT else start
            while part := _part(answer):
                yield part[skip:]
                skip = max(0, skip - len(part))

    def has_blob(self, digest: str) -> bool:
        """Whether the repository has a blob."""

        def ask() -> bool:
            with self._ask("HEAD", f"blobs/{digest}", missing=True) as answer:
                return answer is not None

        return retried(ask)

    def put_blob(self, digest: str, size: int, opened: Callable[[], IO[bytes]]) -> None:
        """Upload a blob. opened: opens the content, once for each attempt. size: bytes."""

        def put() -> None:
            with self._ask("POST", "blobs/uploads/", body=lambda: b"") as answer:
                assert answer is not None
                place = urljoin(answer.url, answer.headers.get("Location", ""))
            url = f"{place}{'&' if urlsplit(place).query else '?'}{urlencode({'digest': digest})}"
            headers = {"Content-Type": "application/octet-stream", "Content-Length": str(size)}
            with self._ask("PUT", url, headers, opened):
                pass

        retried(put)

    @contextmanager
    def _ask(
        self,
        method: str,
        path: str,
        headers: Mapping[str, str] | None = None,
        body: Callable[[], bytes | IO[bytes]] | None = None,
        missing: bool = False,
    ) -> Iterator[http.client.HTTPResponse | None]:
        """The answer to a request, with a token if the registry requires one. path: relative to the repository, or a
        full URL.

        missing: return None for an answer of 404. Raises Interrupted, or DeliveryError with the registry's own message.
        """
        url = urljoin(self._base, path)
        self._check(url)
        ours = urlsplit(url).netloc == urlsplit(self._base).netloc  # uploads may go to a store on another host
        for last in (False, True):
            data = body() if body else None
            try:
                request = urllib.request.Request(url, data, dict(headers or {}), method=method)
                if self._authorization and ours:
                    request.add_unredirected_header("Authorization", self._authorization)
                with _open(self._opener, request) as answer:
                    yield answer
                return
            except urllib.error.HTTPError as error:
                with error:
                    if error.code == 401 and not last and ours:
                        self._authorize(error.headers)
                        continue
                    if error.code == 404 and missing:
                        yield None
                        return
                    raise _refusal(method, url, error) from error
            finally:
                if data is not None and not isinstance(data, bytes):
                    data.close()

    def _authorize(self, headers: Message) -> None:
        """Set the authorization header that a refused request lacked."""
        host = self.reference.host
        challenges = headers.get_all("WWW-Authenticate") or []
        known = credentials(host)
        kinds = {text.partition(" ")[0].lower(): text for text in challenges}
        if "bearer" in kinds:
            fields = dict(re.findall(r'(\w+)="([^"]*)"', kinds["bearer"]))
            self._authorization = f"Bearer {self._token(fields)}"
        elif "basic" in kinds and known:
            self._authorization = _basic(*known)
        else:
            raise DeliveryError(f"{host} asks for credentials; allowed: `docker login {host}`, or $DOCKER_CONFIG")

    def _token(self, fields: Mapping[str, str]) -> str:
        realm = fields.get("realm", "")
        self._check(realm)
        scope = fields.get("scope", "")
        if not scope or not {*self._actions.split(",")} <= {*re.split("[:,]", scope)}:  # one token for all requests
            scope = f"repository:{self.reference.path}:{self._actions}"
        asked = {"service": fields.get("service", ""), "scope": scope}
        known = credentials(self.reference.host)
        if known and known.user == IDENTITY:
            asked |= {"grant_type": "refresh_token", "refresh_token": known.secret, "client_id": "steervit"}
            request = urllib.request.Request(realm, urlencode(asked).encode())
        else:
            request = urllib.request.Request(f"{realm}{'&' if '?' in realm else '?'}{urlencode(asked)}")
            if known:
                request.add_unredirected_header("Authorization", _basic(*known))
        try:
            with _open(self._opener, request) as answer:
                value = json.loads(_read(answer, LONGEST_ANSWER, "a token"))
            token = value.get("token") or value["access_token"]
        except urllib.error.HTTPError as error:
            with error:
                raise _refusal("GET", realm, error) from error
        except (ValueError, KeyError, AttributeError) as error:
            raise DeliveryError(f"{realm} answered without a token") from error
        return str(token)

    def _check(self, url: str) -> None:
        """Raise DeliveryError unless a request may go to this URL."""
        if urlsplit(url).scheme == "https":
            return
        if urlsplit(url).scheme != "http" or not (self._plain_http or _loopback(url)):
            raise DeliveryError(f"{self.reference.host} leads to {url!r}; allowed: https, or http with --plain-http")


class _Redirects(urllib.request.HTTPRedirectHandler):
    """Follows redirects to blob stores on other hosts, if allowed, without the registry's token."""

    def __init__(self, check: Callable[[str], None]):
        self._check = check

    def redirect_request(
        self, req: urllib.request.Request, fp: IO[bytes], code: int, msg: str, headers: Message, newurl: str
    ) -> urllib.request.Request | None:
        self._check(newurl)
        return super().redirect_request(req, fp, code, msg, headers, newurl)  # type: ignore[arg-type]


@contextmanager
def _open(opener: urllib.request.OpenerDirector, request: urllib.request.Request) -> Iterator[http.client.HTTPResponse]:
    """Raises HTTPError, and Interrupted when there is no answer."""
    try:
        answer = opener.open(request, timeout=TIMEOUT)
    except urllib.error.HTTPError:
        raise
    except (OSError, http.client.HTTPException) as error:
        reason = getattr(error, "reason", None) or error
        text = f"{request.get_method()} {_address(request.full_url)}: {reason}"
        if isinstance(reason, ssl.SSLError) and not isinstance(reason, ssl.SSLEOFError):
            raise DeliveryError(f"{text}; more authorities: SSL_CERT_FILE; without TLS: --plain-http") from error
        raise Interrupted(text) from error
    with answer:
        yield answer


def _part(answer: http.client.HTTPResponse) -> bytes:
    try:
        return answer.read1(CHUNK)  # as it arrives: the content received before a connection breaks is not lost
    except (OSError, http.client.HTTPException) as error:
        raise Interrupted(f"GET {_address(answer.url)}: {type(error).__name__}: {error}") from error


def _read(answer: http.client.HTTPResponse, most: int, what: str) -> bytes:
    try:
        content = answer.read(most + 1)
    except (OSError, http.client.HTTPException) as error:
        raise Interrupted(f"GET {_address(answer.url)}: {type(error).__name__}: {error}") from error
    if len(content) > most:
        raise DeliveryError(f"{answer.url} has more than {most} bytes; allowed for {what}: {most}")
    return content


def _refusal(method: str, url: str, error: urllib.error.HTTPError) -> DeliveryError:
    """The error for a refused request, with the registry's message."""
    try:
        first = json.loads(error.read(LONGEST_ANSWER))["errors"][0]
        reason = f"{first.get('code', '')} {first.get('message', '')}".strip()
    except (OSError, ValueError, LookupError, TypeError, AttributeError, http.client.HTTPException):
        reason = str(error.reason)
    kind = Interrupted if error.code in BUSY else DeliveryError
    return kind(f"{method} {_address(url)}: {error.code} {reason[:200]}")


def _address(url: str) -> str:
    """The URL without its signature, which is a secret."""
    return urlsplit(url)._replace(query="").geturl()


def _basic(user: str, secret: str) -> str:
    return f"Basic {base64.b64encode(f'{user}:{secret}'.encode()).decode()}"


def _loopback(url: str) -> bool:
    return urlsplit(url).hostname in ("localhost", "127.0.0.1", "::1")
