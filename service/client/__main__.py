"""python -m service.client predict --profile Shirt deploy/samples/Shirt/*.png      (compare, explain, load: likewise)

python -m service.client profiles (models: likewise)
python -m service.client dial [--profile Shirt]

The same as `steervit predict` and so on.
"""

import argparse
import asyncio
import json
import math
import os
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import grpc

from export.arguments import with_names
from service.client import Asked, Client, WrongValue, printable, unit
from service.client.load import Load, run
from service.client.tables import (
    answer_json,
    as_dict,
    compare_table,
    dial_plot,
    dial_table,
    explain_table,
    models_json,
    models_table,
    predict_table,
    profiles_table,
)
from service.client.unit_map import has_colour
from service.pb import steering_pb2 as pb
from training.terminal import HelpFormatter, print_anything

PROG = "python -m service.client"
COMMANDS: Mapping[str, str] = {
    "predict": "Classify image files, and show which units ran.",
    "compare": "Classify image files without and with steering, side by side.",
    "explain": "Classify image files, and show the latents that drive the gates.",
    "load": "Put a server under load with image files; report rate and latencies.",
    "profiles": "List the steering profiles and their measured effects.",
    "models": "List the models and versions in the server's repository.",
    "dial": "Show the measured compute and accuracy of each budget.",
}
OF_IMAGES = ("predict", "compare", "explain", "load")
IMAGES_PER_CALL, BYTES_PER_CALL = 64, 16 * 2**20
"""More files than this are sent in several calls; a single larger one in a call of its own."""
Answer = TypeVar("Answer", pb.PredictResponse, pb.CompareResponse, pb.ExplainResponse)


def _credentials(options: argparse.Namespace) -> grpc.ChannelCredentials | None:
    files = (options.tls_ca, options.tls_key, options.tls_certificate)
    if not any(files):
        return None
    return grpc.ssl_channel_credentials(*(path.read_bytes() if path else None for path in files))


def parser(prog: str = PROG) -> argparse.ArgumentParser:
    """The parser of all commands, or of one if prog, what a user types, ends with its name."""
    *_, name = prog.split()
    if name in COMMANDS:
        return _of_command(name, argparse.ArgumentParser(prog=prog, **_texts(name)))
    whole = argparse.ArgumentParser(prog=prog, description="Ask a running server.", formatter_class=HelpFormatter)
    commands = whole.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, summary in COMMANDS.items():
        _of_command(name, commands.add_parser(name, help=summary, **_texts(name)))
    return whole


def _texts(name: str) -> dict[str, Any]:
    images = "IMAGE [IMAGE ...] " if name in OF_IMAGES else ""
    usage = f"%(prog)s {images}[OPTION ...]"
    return {"usage": usage, "description": COMMANDS[name], "formatter_class": HelpFormatter}


def _of_command(name: str, parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """The parser with that command's flags."""
    parser.set_defaults(command=name)
    add = parser.add_argument
    if name in OF_IMAGES:
        add("images", nargs="+", type=Path, metavar="IMAGE", help="JPEG, PNG, WebP, BMP or GIF file")
        _add_steering(name, parser)
    if name == "predict":
        add("--top-k", type=int, default=2, metavar="N", help="classes to show (default: %(default)s)")
    elif name == "explain":
        others = "latents of each site to show, besides steered ones (default: 10)"
        add("--latents", type=int, default=0, metavar="N", help=others)
    elif name == "dial":
        add("--profile", default="", metavar="NAME", help="under this profile (default: without steering)")
    elif name == "load":
        add("--concurrency", type=int, default=16, metavar="N", help="calls at a time (default: %(default)s)")
        add("--rate", type=float, default=0.0, metavar="X", help="calls a second, instead of --concurrency")
        add("--seconds", type=float, default=10.0, metavar="X", help="how long to send (default: %(default)g)")
        add("--images-per-call", type=int, default=1, metavar="N", help="images in a call (default: %(default)s)")
        add("--within-ms", type=float, default=0.0, metavar="X", help="also report the share of calls answered in X ms")
    add("--json", action="store_true", help="print one line of JSON")
    server = parser.add_argument_group("server").add_argument
    server("--address", default="127.0.0.1:8001", metavar="HOST:PORT", help="of the server (default: %(default)s)")
    if name != "models":
        server("--model", default="", metavar="NAME", help="needed when several models are served")
        server("--version", default="", metavar="VERSION", help="number or label (default: the one that is served)")
    server("--timeout", type=float, default=30.0, metavar="X", help="seconds for a call (default: %(default)g)")
    who = "of this client, for the server's limits and its log"
    server("--client-name", type=_name, default="", metavar="NAME", help=who)
    server("--tls-ca", type=Path, metavar="PATH", help="connect with TLS; PEM file with the server's authority")
    server("--tls-certificate", type=Path, metavar="PATH", help="PEM file with a certificate of yours")
    server("--tls-key", type=Path, metavar="PATH", help="PEM file with its key")
    return parser


def _add_steering(name: str, parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("steering and budget").add_argument
    if name == "load":
        several = "steering profile; given several times, calls take them in turn, '' for the server's default"
        add("--profile", action="append", metavar="NAME", help=several)
    else:
        one = "steering profile, such as a class name (default: the server's, if it has one)"
        add("--profile", default="", metavar="NAME", help=one)
        add("--strength", type=float, metavar="X", help="0: no steering; 1: the profile as it is (default)")
    add("--budget", type=float, metavar="X", help="compute fraction to spend on average (default: no budget)")
    if name in ("predict", "load"):
        lowest = "what a busy server may lower the budget to (default: the server's setting)"
        add("--min-budget", type=float, metavar="X", help=lowest)
    if name != "load":
        units = "head 5 of block 2 and MLP group 0 of block 3 are 2/h5,3/m0"
        for flag, what in (("--open", "run"), ("--closed", "do not run")):
            what = f"units that {what}, whatever their gates decide: {units}"
            add(flag, type=_units, action="extend", default=[], metavar="UNITS", help=what)


def main(arguments: Sequence[str], prog: str = PROG) -> int:
    """Run a command; returns the exit status: 0, or 1 with the reason on standard error.

    arguments: those after prog, which may end with the command. Exits with 2 on wrong ones, as argparse does.
    """
    print_anything()
    flags = parser(prog)
    options = flags.parse_args(with_names(arguments, "--profile"))
    if (options.tls_certificate is None) != (options.tls_key is None):  # gRPC ends the process
        flags.error("--tls-certificate and --tls-key belong together; allowed: both or none")
    for name in ("concurrency", "seconds", "images_per_call", "timeout"):
        if not 0 < getattr(options, name, 1) < math.inf:
            flags.error(f"--{name.replace('_', '-')} is {getattr(options, name)}; allowed: a number above 0")
    for name, zero in (("rate", "by --concurrency"), ("within_ms", "not reported")):
        if not 0 <= getattr(options, name, 0) < math.inf:
            flags.error(f"--{name.replace('_', '-')} is {getattr(options, name)}; allowed: 0 ({zero}) or more")
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
    except WrongValue as error:
        flags.error(str(error))
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
        options.min_budget, options.within_ms / 1000, options.client_name,
    )  # fmt: skip
    report = asyncio.run(run(options.address, images, load, credentials=_credentials(options)))
    print(report.to_json() if options.json else f"{report}")
    return 0 if report.calls else 1


def _ask(options: argparse.Namespace) -> int:
    listed = {"profiles": _profiles, "models": _models, "dial": _dial}
    with Client(options.address, options.timeout, _credentials(options), name=options.client_name) as client:
        print(listed.get(options.command, _of_images)(client, options))
    return 0


def _of_images(client: Client, options: argparse.Namespace) -> str:
    """The answers to predict, compare or explain, as text or JSON."""
    names, colour = [str(path) for path in options.images], has_colour()
    asked: Asked = {"profile": options.profile, "model": options.model, "version": options.version}
    asked |= {"strength": options.strength, "budget": options.budget, "open": options.open, "closed": options.closed}
    if options.command == "compare":
        compared = in_calls(client.compare, options.images, asked)
        return answer_json(names, compared) if options.json else compare_table(names, compared, colour)
    if options.command == "explain":
        explained = in_calls(partial(client.explain, latents=options.latents), options.images, asked)
        return answer_json(names, explained) if options.json else explain_table(names, explained)
    asked["min_budget"] = options.min_budget
    predicted = in_calls(partial(client.predict, top_k=options.top_k), options.images, asked)
    return answer_json(names, predicted) if options.json else predict_table(names, predicted, colour)


def _profiles(client: Client, options: argparse.Namespace) -> str:
    profiles = list(client.profiles(options.model, options.version))
    as_json = {"profiles": [as_dict(profile) for profile in profiles]}
    return json.dumps(as_json) if options.json else profiles_table(profiles)


def _models(client: Client, options: argparse.Namespace) -> str:
    models = [
        (entry, client.model(entry.name, entry.version) if entry.state == "READY" else None)
        for entry in client.models()
    ]
    return models_json(models) if options.json else models_table(models)


def _dial(client: Client, options: argparse.Namespace) -> str:
    """The curve of the dial, as text or JSON. Raises Refused when there is none."""
    model = client.model(options.model, options.version)
    if not model.dial:
        raise Refused(f"model {model.model!r} version {model.version} has no dial: it takes no budgets")
    of, where = model.dial, "without steering"
    if options.profile:
        of, where = client.profile(options.profile, options.model, options.version).dial, f"profile {options.profile}"
        if not of:
            raise Refused(f"{where} has no curve of its own: the one without steering counts")
    if options.json:
        names = {"model": model.model, "version": model.version, "profile": options.profile}
        curve = {"lowest_budget": model.lowest_budget, "dial": [as_dict(point) for point in of]}
        return json.dumps(names | curve)
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


def _name(text: str) -> str:
    try:
        return printable("name", text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


class Refused(Exception):
    """What the server refused or lacks. For a failed call with images: its status, the server's sentence, and the file
    that this is about."""


def in_calls(call: Callable[..., Answer], paths: Sequence[Path], asked: Asked) -> Answer:
    """The answers for all images as one. No call exceeds IMAGES_PER_CALL or BYTES_PER_CALL, except for a single larger
    file.

    The receipt is that of the last call, with the usage and compute of all images, the times and near gates of all
    calls together, and the lowest budget that was applied.

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
            answer.receipt.CopyFrom(_joined(whole.receipt, done, answer.receipt, len(images)))
            whole.ClearField("receipt")
            whole.MergeFrom(answer)
        done += len(images)
        if len(images) < len(paths) and sys.stderr.isatty():
            end = "\n" if done == len(paths) else ""
            print(f"\r{done} of {len(paths)} images", end=end, file=sys.stderr, flush=True)
    assert whole is not None, "the command line has at least one image"
    return whole


def _joined(before: pb.Receipt, images_before: int, last: pb.Receipt, images: int) -> pb.Receipt:
    """The receipt of both calls: see in_calls."""
    joined = pb.Receipt()
    joined.CopyFrom(last)
    for name in ("head_usage", "mlp_usage", "compute_fraction"):
        of_both = images_before * getattr(before, name) + images * getattr(last, name)
        setattr(joined, name, of_both / (images_before + images))
    for name in ("gates_near_threshold", "queue_seconds", "inference_seconds"):
        setattr(joined, name, getattr(before, name) + getattr(last, name))
    joined.brownout = before.brownout or last.brownout
    if applied := [receipt.budget_applied for receipt in (before, last) if receipt.HasField("budget_applied")]:
        joined.budget_applied = min(applied)
    return joined


def _discard_output() -> None:
    """Redirect standard output, so that Python does not fail to flush it at exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
