"""python -m service.delivery push BUNDLE REFERENCE      push a bundle into a registry
python -m service.delivery pull SOURCE REPOSITORY     pull one from a registry or an object store
"""

import argparse
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from training.terminal import HelpFormatter, print_anything

PROGRAM = "python -m service.delivery"


def main(arguments: Sequence[str], prog: str = PROGRAM) -> int:
    """Push or pull. Returns the exit status: 0, or 1 with the reason on standard error.

    arguments: `push` or `pull`, and its own. Exits with 2 for invalid ones, as argparse does.
    """
    print_anything()
    from export.bundle import BundleError
    from service.delivery.errors import DeliveryError
    from training.steering import SteeringError

    steps = {"push": _push, "pull": _pull}
    if arguments[:1] not in (["push"], ["pull"]):
        print(f"usage: {PROGRAM} push|pull ...", file=sys.stderr)
        return 2
    if os.getpid() == 1:  # process 1 of a container: the kernel ignores signals without a handler there
        signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    try:
        return steps[arguments[0]](arguments[1:], prog)
    except (BundleError, DeliveryError, SteeringError, OSError) as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 1


def push_parser(prog: str = PROGRAM) -> argparse.ArgumentParser:
    """The parser of `push`. prog: the command that a user types, with or without `push`."""
    parser = argparse.ArgumentParser(
        prog=f"{prog.removesuffix(' push')} push",
        usage="%(prog)s BUNDLE REFERENCE [OPTION ...]",
        description="Push a bundle, or a folder of profiles, into a registry as an OCI artefact, and print the "
        "reference with its digest, for `steervit pull`. Blobs that the registry has are not sent again.",
        epilog="Credentials are those of `docker login`: config.json in ~/.docker or $DOCKER_CONFIG.",
        formatter_class=HelpFormatter,
    )
    add = parser.add_argument
    add("folder", type=Path, metavar="BUNDLE", help="a folder <repository>/<model>/<version>, or one of profiles")
    add("reference", metavar="REFERENCE", help="<registry>/<path>[:<tag>]; default tag: the version")
    add("--image", action="store_true", help="as an image, for image volumes; default tag: <version>-image")
    add("--move-tag", action="store_true", help="move the tag if it names something else")
    add("--plain-http", action="store_true", help="without TLS; always so for localhost")
    return parser


def pull_parser(prog: str = PROGRAM) -> argparse.ArgumentParser:
    """The parser of `pull`. prog: the command that a user types, with or without `pull`."""
    parser = argparse.ArgumentParser(
        prog=f"{prog.removesuffix(' pull')} pull",
        usage="%(prog)s SOURCE REPOSITORY [OPTION ...]",
        description="Pull a bundle into a repository folder. It appears there once all of it has been checked; "
        "nothing is overwritten; an interrupted pull is resumed. Profiles go into a new folder, and "
        "the given link then points to it.",
        epilog="URLs need the extra `delivery`. Credentials of a registry are those of `docker login`: config.json in "
        "~/.docker or $DOCKER_CONFIG.",
        formatter_class=HelpFormatter,
    )
    add = parser.add_argument
    add(
        "source",
        metavar="SOURCE",
        help="<registry>/<path>:<tag> or <registry>/<path>@sha256:<digest>, or the URL of a bundle's folder: s3://..., "
        "hf://..., file:///...",
    )
    add("folder", type=Path, metavar="REPOSITORY", help="the folder of bundles to add to; for profiles, a link")
    add("--digest", default="", metavar="HEX", help="required digest of the bundle; any other is refused")
    add("--label", default="", metavar="NAME", help="set this label in labels.json to the version afterwards")
    add("--plain-http", action="store_true", help="without TLS; always so for localhost")
    return parser


def _push(arguments: Sequence[str], prog: str) -> int:
    options = push_parser(prog).parse_args(arguments)
    from service.delivery.push import push
    from service.delivery.reference import Reference

    to = Reference.parse(options.reference)
    print(push(options.folder, to, options.image, options.move_tag, options.plain_http))
    return 0


def _pull(arguments: Sequence[str], prog: str) -> int:
    options = pull_parser(prog).parse_args(arguments)
    from service.delivery.artefact import PROFILES
    from service.delivery.errors import DeliveryError
    from service.delivery.profile_folder import pull_profiles
    from service.delivery.pull import Artefact, pull, source_of

    source = source_of(options.source, options.plain_http)
    if isinstance(source, Artefact) and source.kind == PROFILES:
        if options.digest or options.label:
            raise DeliveryError(f"{options.source} has profiles; allowed for them: neither --digest nor --label")
        print(f"{options.folder}: {len(source.files)} files of profiles, in {pull_profiles(source, options.folder)}")
        return 0
    bundle, new = pull(source, options.folder, options.digest, options.label)
    label = f", labelled {options.label}" if options.label else ""
    print(f"{bundle.folder}: {'pulled' if new else 'already there'}, digest {bundle.digest}{label}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
