"""A client of steering.v1, for Python and for the command line.

python -m service.client predict --profile Shirt deploy/samples/Shirt/*.png      (compare, explain: likewise)
python -m service.client profiles
"""

import argparse
import asyncio
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import grpc
import numpy as np
from numpy.typing import NDArray

from service.load import Load, run
from service.pb import steering_pb2 as pb
from service.pb.steering_pb2_grpc import SteeringServiceStub
from training.steering import Terms


class Client:
    """Blocking calls over one channel. Failed calls raise grpc.RpcError with a status and a sentence."""

    def __init__(
        self,
        address: str = "127.0.0.1:8001",
        timeout: float = 30.0,
        credentials: grpc.ChannelCredentials | None = None,
    ):
        """timeout: seconds a call. credentials: grpc.ssl_channel_credentials(...) for a server with TLS."""
        options = [("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1)]
        self._channel = (
            grpc.secure_channel(address, credentials, options)
            if credentials
            else grpc.insecure_channel(address, options)
        )
        self._stub = SteeringServiceStub(self._channel)  # type: ignore[no-untyped-call]
        self._timeout = timeout

    def predict(
        self,
        images: Sequence[bytes | NDArray[np.uint8]],
        profile: str = "",
        terms: Terms | None = None,
        strength: float | None = None,
        top_k: int = 0,
        model: str = "",
        version: str = "",
    ) -> pb.PredictResponse:
        """images: encoded files, or uint8 arrays (height, width, channels) of the model's own size."""
        request = pb.PredictRequest(model=model, version=version, top_k=top_k)
        _fill(request, images, profile, terms, strength)
        answer: pb.PredictResponse = self._stub.Predict(request, timeout=self._timeout)
        return answer

    def compare(
        self,
        images: Sequence[bytes | NDArray[np.uint8]],
        profile: str = "",
        terms: Terms | None = None,
        strength: float | None = None,
        top_k: int = 0,
        model: str = "",
        version: str = "",
    ) -> pb.CompareResponse:
        """The images unsteered and steered, side by side."""
        request = pb.CompareRequest(model=model, version=version, top_k=top_k)
        _fill(request, images, profile, terms, strength)
        answer: pb.CompareResponse = self._stub.Compare(request, timeout=self._timeout)
        return answer

    def explain(
        self,
        images: Sequence[bytes | NDArray[np.uint8]],
        profile: str = "",
        terms: Terms | None = None,
        strength: float | None = None,
        latents: int = 0,
        model: str = "",
        version: str = "",
    ) -> pb.ExplainResponse:
        """Which latents are active, and what each does to the gates. latents: of each site; 0: ten."""
        request = pb.ExplainRequest(model=model, version=version, latents=latents)
        _fill(request, images, profile, terms, strength)
        answer: pb.ExplainResponse = self._stub.Explain(request, timeout=self._timeout)
        return answer

    def profiles(self, model: str = "", version: str = "") -> Iterator[pb.Profile]:
        """All profiles, by name."""
        request = pb.ListProfilesRequest(model=model, version=version)
        while True:
            page: pb.ListProfilesResponse = self._stub.ListProfiles(request, timeout=self._timeout)
            yield from page.profiles
            if not page.next_page_token:
                return
            request.page_token = page.next_page_token

    def close(self) -> None:
        self._channel.close()

    def __enter__(self) -> "Client":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _fill(
    request: pb.PredictRequest | pb.CompareRequest | pb.ExplainRequest,
    images: Sequence[bytes | NDArray[np.uint8]],
    profile: str,
    terms: Terms | None,
    strength: float | None,
) -> None:
    for image in images:
        if isinstance(image, bytes):
            request.images.add(encoded=image)
        else:
            request.images.add(pixels=np.ascontiguousarray(image, np.uint8).tobytes())
    request.steering.profile = profile
    for site, of_site in (terms or {}).items():
        for term in of_site:
            request.steering.terms.add(site=site, latent=term.latent, scale=term.scale, shift=term.shift)
    if strength is not None:
        request.steering.strength = strength


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns as wide as they need to be; all but the first are aligned to the right."""
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]

    def line(cells: Sequence[str]) -> str:
        first = cells[0].ljust(widths[0])
        return "  ".join(
            [first, *(cell.rjust(width) for cell, width in zip(cells[1:], widths[1:], strict=True))]
        ).rstrip()

    return "\n".join([line(header), "  ".join("-" * width for width in widths), *(line(row) for row in rows)])


def predict_table(names: Sequence[str], answer: pb.PredictResponse) -> str:
    rows = []
    for name, prediction in zip(names, answer.predictions, strict=True):
        best, *others = prediction.classes
        second = f"{others[0].label} {others[0].probability:.2f}" if others else ""
        kept = sum(sum(block.kept) for block in prediction.head_mask)
        total = sum(len(block.kept) for block in prediction.head_mask)
        heads = f"{kept}/{total}"
        compute = f"{prediction.compute_fraction:.3f}"
        rows.append(
            [name, best.label, f"{best.probability:.2f}", second, heads, f"{prediction.head_usage:.2f}", compute]
        )
    shown = table(["image", "class", "p", "then", "heads", "usage", "compute"], rows)
    receipt = answer.receipt
    steering = f"profile {receipt.profile}" if receipt.profile else "inline terms or none"
    return (
        f"{shown}\n\nmodel {receipt.model} version {receipt.version} "
        f"({receipt.graph}, bundle {receipt.bundle_digest}), {steering}, steering {receipt.steering_digest}\n"
        f"queue {receipt.queue_seconds * 1000:.1f} ms, inference {receipt.inference_seconds * 1000:.1f} ms"
    )


def compare_table(names: Sequence[str], answer: pb.CompareResponse) -> str:
    rows = []
    for name, found in zip(names, answer.comparisons, strict=True):
        before, after = found.unsteered, found.steered
        opened = sum(change.opened for change in found.head_changes)
        labels = [f"{p.classes[0].label} {p.classes[0].probability:.2f}" for p in (before, after)]
        rows.append(
            [
                name, *labels, "" if found.same_label else "other",
                f"{before.head_usage:.2f} -> {after.head_usage:.2f}",
                f"{before.compute_fraction:.3f} -> {after.compute_fraction:.3f}",
                f"+{opened} -{len(found.head_changes) - opened}",
            ]
        )  # fmt: skip
    return table(["image", "unsteered", "steered", "label", "head usage", "compute", "heads"], rows)


def explain_table(names: Sequence[str], answer: pb.ExplainResponse) -> str:
    """Of each image and site: the gates, and the latents with what they do to each gate."""
    parts = []
    for name, found in zip(names, answer.explanations, strict=True):
        best = found.prediction.classes[0]
        parts.append(f"{name}: {best.label} {best.probability:.2f}, head usage {found.prediction.head_usage:.2f}")
        for site in found.sites:
            heads = [f"head {index}" for index in range(len(site.gate_logits))]
            rows = [
                ["unsteered gate", "", "", *(f"{v:+.2f}" for v in site.unsteered_gate_logits)],
                ["gate", "", "", *(f"{v:+.2f}" for v in site.gate_logits)],
            ]
            for latent in site.latents:
                changed = f"{latent.steered_value:.2f}" if latent.steered_value != latent.value else ""
                effects = [f"{v:+.2f}" for v in latent.gate_effects]
                rows.append([f"latent {latent.latent}", f"{latent.value:.2f}", changed, *effects])
            parts.append(f"\nblock {site.block}, {site.active_latents} latents active")
            parts.append(table(["", "value", "steered", *heads], rows))
        parts.append("")
    return "\n".join(parts).rstrip()


def profiles_table(profiles: Sequence[pb.Profile]) -> str:
    def change(before: float, after: float) -> str:
        return f"{before:.3f} -> {after:.3f}"

    rows = [
        [
            p.name, p.strategy, str(p.terms), change(p.before.recall, p.after.recall),
            change(p.before.precision, p.after.precision), change(p.before.head_usage, p.after.head_usage),
            change(p.before.compute_fraction, p.after.compute_fraction), p.steering_digest,
        ]
        for p in profiles
    ]  # fmt: skip
    return table(["profile", "strategy", "terms", "recall", "precision", "head usage", "compute", "digest"], rows)


def _credentials(options: argparse.Namespace) -> grpc.ChannelCredentials | None:
    files = (options.tls_ca, options.tls_key, options.tls_certificate)
    if not any(files):
        return None
    return grpc.ssl_channel_credentials(*(path.read_bytes() if path else None for path in files))


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m service.client", description="Ask a running server.")
    commands = parser.add_subparsers(dest="command", required=True)
    of_images = {
        "predict": commands.add_parser("predict", help="classify image files"),
        "compare": commands.add_parser("compare", help="classify them without and with steering, side by side"),
        "explain": commands.add_parser("explain", help="classify them, and tell what drives the gates"),
        "load": commands.add_parser("load", help="send them again and again, and tell rate and latencies"),
    }
    for name, command in of_images.items():
        command.add_argument("images", nargs="+", type=Path, help="JPEG, PNG, WebP, BMP or GIF files")
        several = "; several, with commas between, are taken in turn" if name == "load" else ""
        command.add_argument(
            "--profile", default="", help=f"steering profile, such as a class name (default: none){several}"
        )
    for name in ("predict", "compare", "explain"):
        of_images[name].add_argument("--strength", type=float, help="0: no steering, 1: the profile as it is (default)")
    of_images["predict"].add_argument("--top-k", type=int, default=0, help="classes to return (default 5)")
    of_images["explain"].add_argument("--latents", type=int, default=0, help="latents of each site (default 10)")
    load_options = of_images["load"].add_argument
    load_options("--concurrency", type=int, default=16, help="calls at a time (default %(default)s)")
    load_options("--seconds", type=float, default=10.0, help="for how long (default %(default)s)")
    load_options("--images-per-call", type=int, default=1, help="(default %(default)s)")
    load_options("--json", action="store_true", help="the report as JSON")
    profiles = commands.add_parser("profiles", help="list the steering profiles and what they were measured to do")
    for command in (*of_images.values(), profiles):
        command.add_argument("--address", default="127.0.0.1:8001", help="host:port (default %(default)s)")
        command.add_argument("--tls-ca", type=Path, help="PEM file with the server's authority: connect with TLS")
        command.add_argument(
            "--tls-certificate", type=Path, help="PEM file with a certificate of yours, with --tls-key"
        )
        command.add_argument("--tls-key", type=Path, help="PEM file with its key")
        command.add_argument("--model", default="", help="needed when several models are served")
        command.add_argument("--version", default="", help="default: the version that is served")
    options = parser.parse_args(arguments)
    try:
        with Client(options.address, credentials=_credentials(options)) as client:
            if options.command == "profiles":
                print(profiles_table(list(client.profiles(options.model, options.version))))
                return 0
            names = [str(path) for path in options.images]
            images = [path.read_bytes() for path in options.images]
            if options.command == "load":
                load = Load(
                    options.concurrency, options.seconds, options.images_per_call, tuple(options.profile.split(",")),
                    options.model, options.version,
                )  # fmt: skip
                report = asyncio.run(run(options.address, images, load, credentials=_credentials(options)))
                print(report.to_json() if options.json else f"{report}")
                return 0 if report.calls else 1
            asked = {"profile": options.profile, "strength": options.strength}
            of_model = {"model": options.model, "version": options.version}
            if options.command == "compare":
                print(compare_table(names, client.compare(images, **asked, **of_model)))
            elif options.command == "explain":
                print(explain_table(names, client.explain(images, latents=options.latents, **asked, **of_model)))
            else:
                print(predict_table(names, client.predict(images, top_k=options.top_k, **asked, **of_model)))
    except OSError as error:
        print(f"{error.filename}: {error.strerror}", file=sys.stderr)
        return 1
    except grpc.RpcError as error:
        print(f"{error.code().name}: {error.details()}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
