"""python -m service.client predict --profile Shirt deploy/samples/Shirt/*.png      (compare, explain, load: likewise)

python -m service.client profiles
python -m service.client dial [--profile Shirt]
"""

import argparse
import asyncio
import os
import re
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import grpc

from export.arguments import with_names
from service.client import Asked, Client, unit
from service.client.load import Load, run
from service.client.tables import (
    compare_table,
    dial_plot,
    dial_table,
    explain_table,
    predict_table,
    profiles_table,
)
from service.pb import steering_pb2 as pb
from training.terminal import print_anything

IMAGES_PER_CALL, BYTES_PER_CALL = 64, 16 * 2**20
"""More files than this are sent in several calls; a single larger one in a call of its own."""
Answer = TypeVar("Answer", pb.PredictResponse, pb.CompareResponse, pb.ExplainResponse)


def _credentials(options: argparse.Namespace) -> grpc.ChannelCredentials | None:
    files = (options.tls_ca, options.tls_key, options.tls_certificate)
    if not any(files):
        return None
    return grpc.ssl_channel_credentials(*(path.read_bytes() if path else None for path in files))


def _parser() -> argparse.ArgumentParser:
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
        several: dict[str, Any] = {"action": "append"} if name == "load" else {"default": ""}
        turns = "; given several times, they are taken in turn, '' for the default" if name == "load" else ""
        command.add_argument(
            "--profile", **several,
            help=f"steering profile, such as a class name (default: that of the server, if it has one){turns}",
        )  # fmt: skip
        command.add_argument("--budget", type=float, help="compute fraction to spend on average (default: no budget)")
        if name in ("predict", "load"):
            command.add_argument(
                "--min-budget", type=float, help="what a busy server may lower it to (default: the server's setting)"
            )
    for name in ("predict", "compare", "explain"):
        of_images[name].add_argument("--strength", type=float, help="0: no steering, 1: the profile as it is (default)")
        for flag, what in (("--open", "run"), ("--closed", "do not run")):
            what = (
                f"units that {what} whatever their gates read: 2/h5,3/m0 is head 5 of block 2, MLP group 0 of block 3"
            )
            of_images[name].add_argument(flag, type=_units, default=[], metavar="UNITS", help=what)
    of_images["predict"].add_argument("--top-k", type=int, default=2, help="classes to show (default 2)")
    of_images["explain"].add_argument("--latents", type=int, default=0, help="latents of each site (default 10)")
    load_options = of_images["load"].add_argument
    load_options("--concurrency", type=int, default=16, help="calls at a time (default %(default)s)")
    load_options("--rate", type=float, default=0.0, help="calls a second, instead of --concurrency")
    load_options("--seconds", type=float, default=10.0, help="for how long (default %(default)s)")
    load_options("--images-per-call", type=int, default=1, help="(default %(default)s)")
    load_options("--within-ms", type=float, default=0.0, help="also show the share of all calls answered in that time")
    load_options("--json", action="store_true", help="the report as JSON")
    listed = commands.add_parser("profiles", help="list the steering profiles and what they were measured to do")
    dial = commands.add_parser("dial", help="show what budgets do: compute and accuracy, as they were measured")
    dial.add_argument("--profile", default="", help="under this profile (default: without steering)")
    for command in (*of_images.values(), listed, dial):
        command.add_argument("--address", default="127.0.0.1:8001", help="host:port (default %(default)s)")
        command.add_argument("--tls-ca", type=Path, help="PEM file with the server's authority: connect with TLS")
        command.add_argument(
            "--tls-certificate", type=Path, help="PEM file with a certificate of yours, with --tls-key"
        )
        command.add_argument("--tls-key", type=Path, help="PEM file with its key")
        command.add_argument("--timeout", type=float, default=30.0, help="seconds a call (default %(default)s)")
        command.add_argument("--model", default="", help="needed when several models are served")
        command.add_argument("--version", default="", help="default: the version that is served")
    return parser


def main(arguments: Sequence[str]) -> int:
    """Run a command; returns the exit status: 0, or 1 with the reason on standard error.

    arguments: those after the program's name. Exits with 2 on wrong ones, as argparse does.
    """
    print_anything()
    parser = _parser()
    options = parser.parse_args(with_names(arguments, "--profile"))
    if (options.tls_certificate is None) != (options.tls_key is None):  # gRPC ends the process
        parser.error("--tls-certificate and --tls-key belong together; allowed: both or none")
    for name in ("concurrency", "seconds", "images_per_call", "timeout"):
        if getattr(options, name, 1) <= 0:
            parser.error(f"--{name.replace('_', '-')} is {getattr(options, name)}; allowed: more than 0")
    if getattr(options, "rate", 0) < 0:
        parser.error(f"--rate is {options.rate}; allowed: 0 (by --concurrency) or more")
    try:
        status = _load(options) if options.command == "load" else _ask(options)
        sys.stdout.flush()
    except BrokenPipeError:  # the reader has closed the output
        _discard_output()
        return 1
    except OSError as error:
        print(f"{error.filename or 'standard output'}: {error.strerror}", file=sys.stderr)
        _discard_output()
        return 1
    except Refused as refused:
        print(refused, file=sys.stderr)
        return 1
    except grpc.RpcError as error:
        print(f"{error.code().name}: {error.details()}", file=sys.stderr)
        return 1
    return status


def _load(options: argparse.Namespace) -> int:
    images = [path.read_bytes() for path in options.images]
    load = Load(
        options.concurrency, options.seconds, options.images_per_call, tuple(options.profile or [""]),
        options.model, options.version, options.rate, options.timeout, options.budget,
        options.min_budget, options.within_ms / 1000,
    )  # fmt: skip
    report = asyncio.run(run(options.address, images, load, credentials=_credentials(options)))
    print(report.to_json() if options.json else f"{report}")
    return 0 if report.calls else 1


def _ask(options: argparse.Namespace) -> int:
    with Client(options.address, options.timeout, _credentials(options)) as client:
        if options.command == "profiles":
            print(profiles_table(list(client.profiles(options.model, options.version))))
            return 0
        if options.command == "dial":
            print(_dial(client, options))
            return 0
        names = [str(path) for path in options.images]
        asked: Asked = {"profile": options.profile, "model": options.model, "version": options.version}
        asked |= {"open": options.open, "closed": options.closed}
        if options.strength is not None:
            asked["strength"] = options.strength
        if options.budget is not None:
            asked["budget"] = options.budget
        if options.command == "predict" and options.min_budget is not None:
            asked["min_budget"] = options.min_budget
        if options.command == "compare":
            print(compare_table(names, in_calls(client.compare, options.images, asked)))
        elif options.command == "explain":
            explain = partial(client.explain, latents=options.latents)
            print(explain_table(names, in_calls(explain, options.images, asked)))
        else:
            predict = partial(client.predict, top_k=options.top_k)
            print(predict_table(names, in_calls(predict, options.images, asked)))
    return 0


def _dial(client: Client, options: argparse.Namespace) -> str:
    """The curve of the dial. Raises Refused when there is none."""
    model = client.model(options.model, options.version)
    if not model.dial:
        raise Refused(f"model {model.model!r} version {model.version} has no dial: it takes no budgets")
    of, where = model.dial, "without steering"
    if options.profile:
        of, where = client.profile(options.profile, options.model, options.version).dial, f"profile {options.profile}"
        if not of:
            raise Refused(f"{where} has no curve of its own: the one without steering counts")
    head = f"model {model.model} version {model.version}, {where}; budgets: {model.lowest_budget:g} to 1"
    return f"{head}\n\n{dial_table(of)}\n\n{dial_plot(of)}"


def _units(text: str) -> list[str]:
    """The units between the commas, checked."""
    units = text.split(",")
    try:
        for each in units:
            unit(each)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    return units


class Refused(Exception):
    """What the server refused or lacks; of a failed call with images its status, its sentence, and the file that it
    names."""


def in_calls(call: Callable[..., Answer], paths: Sequence[Path], asked: Asked) -> Answer:
    """The answers for all images as one, with the receipt of the last call. No call exceeds IMAGES_PER_CALL or
    BYTES_PER_CALL, except for a single larger file.

    Raises Refused.
    """
    whole: Answer | None = None
    done = 0
    while done < len(paths):
        images = [paths[done].read_bytes()]
        for path in paths[done + 1 : done + IMAGES_PER_CALL]:
            if sum(map(len, images)) + path.stat().st_size > BYTES_PER_CALL:
                break
            images.append(path.read_bytes())
        try:
            answer = call(images, **asked)
        except grpc.RpcError as error:
            of_file = re.match(r"images\[(\d+)\]", error.details() or "")
            which = f" ({paths[done + int(of_file[1])]})" if of_file else ""
            raise Refused(f"{error.code().name}: {error.details()}{which}") from error
        if whole is None:
            whole = answer
        else:
            whole.MergeFrom(answer)
        done += len(images)
        if len(images) < len(paths) and sys.stderr.isatty():
            end = "\n" if done == len(paths) else ""
            print(f"\r{done} of {len(paths)} images", end=end, file=sys.stderr, flush=True)
    assert whole is not None, "the command line has at least one image"
    return whole


def _discard_output() -> None:
    """Redirect standard output, so that Python does not fail to flush it at exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
