"""python -m service.playground --server 127.0.0.1:8001      (without --server: it starts one with deploy/models)"""

import argparse
import contextlib
import socket
import sys
from collections.abc import Sequence
from pathlib import Path

import grpc

from service.client import AsyncClient
from service.demo import MODELS, SAMPLES, running_server
from training.terminal import HelpFormatter

PROG = "python -m service.playground"
MISSING = "the playground needs the package {}, which is not installed: pip install -e '.[playground]'"


def main(arguments: Sequence[str], prog: str = PROG) -> int:
    """Serve the page until SIGINT or SIGTERM; returns the exit status: 0, or 1 with the reason on standard error.

    arguments: those after the program's name, prog. Exits with 2 on wrong ones, as argparse does.
    """
    options = parser(prog).parse_args(arguments)
    if (options.tls_certificate is None) != (options.tls_key is None):  # gRPC ends the process
        parser(prog).error("--tls-certificate and --tls-key belong together; allowed: both or none")
    if options.samples and not options.samples.is_dir():
        parser(prog).error(f"--samples is {options.samples}; allowed: a folder")
    samples = options.samples or (SAMPLES if SAMPLES.is_dir() else None)
    try:
        from service.playground.app import serve

        with contextlib.ExitStack() as until_the_end:
            listener = until_the_end.enter_context(_listener(options.host, options.port))
            address = options.server
            if not address:
                address = until_the_end.enter_context(running_server("--repository", str(MODELS)))
            serve(listener, AsyncClient(address, 15.0, _credentials(options)), address, options.model, samples)
    except ModuleNotFoundError as error:
        print(MISSING.format(error.name), file=sys.stderr)
        return 1
    except (OSError, RuntimeError) as error:
        print(error, file=sys.stderr)
        return 1
    return 0


def parser(prog: str = PROG) -> argparse.ArgumentParser:
    """The parser of the command line. prog: what a user types."""
    parser = argparse.ArgumentParser(
        prog=prog,
        description="A web page to try steering: one image with and without it.",
        formatter_class=HelpFormatter,
    )
    parser.add_argument(
        "--server", metavar="HOST:PORT", help="a running server (default: one is started, with the models of the demo)"
    )
    parser.add_argument("--model", default="", help="needed when the server has several")
    parser.add_argument("--host", default="127.0.0.1", help="where the page is served (default %(default)s)")
    parser.add_argument("--port", type=int, default=8003, help="0: a free one (default %(default)s)")
    parser.add_argument("--samples", type=Path, help="folder of images, by label or not (default: those of the demo)")
    parser.add_argument("--tls-ca", type=Path, help="PEM file with the server's authority: connect with TLS")
    parser.add_argument("--tls-certificate", type=Path, help="PEM file with a certificate of yours, with --tls-key")
    parser.add_argument("--tls-key", type=Path, help="PEM file with its key")
    return parser


def _credentials(options: argparse.Namespace) -> grpc.ChannelCredentials | None:
    files = (options.tls_ca, options.tls_key, options.tls_certificate)
    if not any(files):
        return None
    return grpc.ssl_channel_credentials(*(path.read_bytes() if path else None for path in files))


def _listener(host: str, port: int) -> socket.socket:
    """A listening socket. Raises OSError."""
    try:
        return socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except (OSError, OverflowError) as error:
        raise OSError(
            f"--port is {port}: cannot bind {host}:{port}: {getattr(error, 'strerror', None) or error}"
        ) from error


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
