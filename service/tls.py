"""The server's side of TLS: certificates from files that may be replaced while it runs."""

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
        """gRPC does not say what is wrong with them. Raises OSError that names the files."""
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
        """They look at the files at every new connection; files that do not fit together are passed over."""
        return grpc.dynamic_ssl_server_credentials(
            _configuration(self._current),
            self._fetch,  # type: ignore[arg-type]  # None is allowed: as before
            require_client_authentication=self._client_ca is not None,
        )

    def _fetch(self) -> grpc.ServerCertificateConfiguration | None:
        """None: as before."""
        try:
            found = self._read()
        except OSError as error:
            log.error("certificates stay as they are: %s", error)
            return None
        if found == self._current:
            return None
        self._current = found
        log.info("certificates were replaced")
        return _configuration(found)

    def _read(self) -> Files:
        client_ca = self._client_ca.read_bytes() if self._client_ca else None
        return self._certificate.read_bytes(), self._key.read_bytes(), client_ca


def _configuration(files: Files) -> grpc.ServerCertificateConfiguration:
    chain, key, client_ca = files
    return grpc.ssl_server_certificate_configuration([(key, chain)], client_ca)
