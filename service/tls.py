"""TLS of the server: certificates from files that may be replaced while it runs."""

import logging
import ssl

import grpc

from service.config import Settings

log = logging.getLogger("steervit.tls")
Files = tuple[bytes, bytes, bytes | None]
"""Certificate chain, key, and the authorities of clients."""


class Certificates:
    """The server's certificate and key and, if they are set, the authorities of its clients."""

    def __init__(self, settings: Settings):
        """Raises OSError when a file cannot be read."""
        assert settings.tls_certificate
        assert settings.tls_key
        self._certificate, self._key, self._client_ca = (
            settings.tls_certificate, settings.tls_key, settings.tls_client_ca,
        )  # fmt: skip
        self._current = self._read()

    def check(self) -> None:
        """Raise OSError, with the names of the files, if they cannot be used: gRPC gives no reason."""
        files = f"--tls-certificate {self._certificate}, --tls-key {self._key}"
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        try:
            context.load_cert_chain(self._certificate, self._key, password=lambda: "")
            if self._client_ca:
                files = f"--tls-client-ca {self._client_ca}"
                context.load_verify_locations(self._client_ca)
        except ssl.SSLError as error:
            raise OSError(f"{files} cannot be used: {error}; allowed: PEM files that belong together") from error

    def credentials(self) -> grpc.ServerCredentials:
        """Credentials that read the files at every new connection; files that do not belong together are ignored."""
        return grpc.dynamic_ssl_server_credentials(
            _configuration(self._current),
            self._fetch,  # type: ignore[arg-type]  # None is allowed: unchanged
            require_client_authentication=self._client_ca is not None,
        )

    def expiry(self) -> dict[str, float]:
        """When the server's certificate and the first of its clients' authorities expire, as Unix times, by
        `certificate` and `client_ca`. Reads the current files, which new connections use. Empty if they cannot be
        read."""
        try:
            certificate = ssl._ssl._test_decode_cert(str(self._certificate))  # type: ignore[attr-defined]
            ends: dict[str, float] = {"certificate": ssl.cert_time_to_seconds(certificate["notAfter"])}
            if self._client_ca:
                authorities = ssl.create_default_context(cafile=self._client_ca).get_ca_certs()
                ends["client_ca"] = min(ssl.cert_time_to_seconds(str(each["notAfter"])) for each in authorities)
        except (OSError, ValueError):  # an ssl.SSLError is an OSError
            return {}
        return ends

    def _fetch(self) -> grpc.ServerCertificateConfiguration | None:
        """The current files; None if they are unchanged."""
        try:
            files = self._read()
        except OSError as error:
            log.error("certificates are unchanged: %s", error)
            return None
        if files == self._current:
            return None
        self._current = files
        log.info("certificates were replaced")
        return _configuration(files)

    def _read(self) -> Files:
        client_ca = self._client_ca.read_bytes() if self._client_ca else None
        return self._certificate.read_bytes(), self._key.read_bytes(), client_ca


def _configuration(files: Files) -> grpc.ServerCertificateConfiguration:
    chain, key, client_ca = files
    return grpc.ssl_server_certificate_configuration([(key, chain)], client_ca)
