"""A client of steering.v1, for Python and for the command line.

python -m service.client predict --profile Shirt deploy/samples/Shirt/*.png
python -m service.client profiles
"""

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import grpc
import numpy as np
from numpy.typing import NDArray

from service.pb import steering_pb2 as pb
from service.pb.steering_pb2_grpc import SteeringServiceStub
from training.steering import Terms


class Client:
    """Blocking calls over one channel. Failed calls raise grpc.RpcError with a status and a sentence."""

    def __init__(self, address: str = "127.0.0.1:8001", timeout: float = 30.0):
        """timeout: seconds a call."""
        self._channel = grpc.insecure_channel(
            address, [("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1)]
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
        answer: pb.PredictResponse = self._stub.Predict(request, timeout=self._timeout)
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


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m service.client", description="Ask a running server.")
    commands = parser.add_subparsers(dest="command", required=True)
    predict = commands.add_parser("predict", help="classify image files")
    predict.add_argument("images", nargs="+", type=Path, help="JPEG, PNG, WebP, BMP or GIF files")
    predict.add_argument("--profile", default="", help="steering profile, such as a class name (default: no steering)")
    predict.add_argument("--strength", type=float, help="0: no steering, 1: the profile as it is (default)")
    predict.add_argument("--top-k", type=int, default=0, help="classes to return (default 5)")
    profiles = commands.add_parser("profiles", help="list the steering profiles and what they were measured to do")
    for command in (predict, profiles):
        command.add_argument("--address", default="127.0.0.1:8001", help="host:port (default %(default)s)")
        command.add_argument("--model", default="", help="needed when several models are served")
        command.add_argument("--version", default="", help="default: the version that is served")
    options = parser.parse_args(arguments)
    try:
        with Client(options.address) as client:
            if options.command == "profiles":
                print(profiles_table(list(client.profiles(options.model, options.version))))
                return 0
            images = [path.read_bytes() for path in options.images]
            answer = client.predict(
                images, options.profile, None, options.strength, options.top_k, options.model, options.version
            )
            print(predict_table([str(path) for path in options.images], answer))
    except OSError as error:
        print(f"{error.filename}: {error.strerror}", file=sys.stderr)
        return 1
    except grpc.RpcError as error:
        print(f"{error.code().name}: {error.details()}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
