"""python -m export <run> <repository> --name <model>     write a finished training run as a bundle
python -m export verify <bundle>                         check that a bundle is complete and right  (no torch)"""

import argparse
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from export.arguments import with_names
from export.bundle import PRECISIONS, Bundle, BundleError
from training.terminal import HelpFormatter, print_anything

COMMANDS = "python -m export"


def main(arguments: Sequence[str], prog: str = COMMANDS) -> int:
    """Export or verify; returns the exit status: 0, or 1 with the reason on standard error.

    arguments: those after the program's name, prog; the first may be `verify`. Exits with 2 on wrong ones, as argparse
    does.
    """
    print_anything()
    try:
        verifying = arguments[:1] == ["verify"]
        bundle = _verify(arguments[1:], prog) if verifying else _export(arguments, prog)
    except (BundleError, OSError) as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 1
    if bundle is None:
        return 1
    size = sum(path.stat().st_size for path in bundle.folder.iterdir()) / 1e6
    print(f"{bundle.folder}: {size:.1f} MB, digest {bundle.digest}, {len(bundle.profiles)} profiles")
    return 0


def verify_parser(prog: str = COMMANDS) -> argparse.ArgumentParser:
    """The parser of `verify`. prog: what a user types, with or without that word."""
    parser = argparse.ArgumentParser(
        prog=f"{prog.removesuffix(' verify')} verify",
        usage="%(prog)s BUNDLE",
        description="Check a bundle's checksums, and its golden rows through every graph. No torch.",
        formatter_class=HelpFormatter,
    )
    parser.add_argument("bundle", type=Path, metavar="BUNDLE", help="a folder <repository>/<model>/<version>")
    return parser


def _verify(arguments: Sequence[str], prog: str) -> Bundle:
    options = verify_parser(prog).parse_args(arguments)
    from export.verify import verify

    return verify(options.bundle)


def parser(prog: str = COMMANDS) -> argparse.ArgumentParser:
    """The parser of an export. prog: what a user types."""
    parser = argparse.ArgumentParser(
        prog=prog,
        usage="%(prog)s RUN REPOSITORY --name NAME [OPTION ...]",
        description="Write a finished training run as a bundle: graphs that are compared with PyTorch on real images "
        "before they are written, profiles, autoencoders and golden rows.",
        epilog="To check an existing bundle: steervit verify BUNDLE",
        formatter_class=HelpFormatter,
    )
    add = parser.add_argument
    add("run", type=Path, metavar="RUN", help="a finished run folder of `steervit train`")
    add("repository", type=Path, metavar="REPOSITORY", help="the folder of bundles to add to")
    add("--name", metavar="NAME", required=True, help="the model's name in the repository")
    add("--version", metavar="N", type=int, help="a positive integer; default: the next one")
    add(
        "--attention",
        metavar="GRAPHS",
        type=_listed(("dispatch", "masked", "fused")),
        default="dispatch,masked",
        help="graphs to write, the default one first: dispatch computes a head for the images that keep it, masked "
        "computes all heads (the reference), fused too, in few large operations (for GPUs); default: %(default)s",
    )
    add(
        "--precision",
        metavar="PRECISIONS",
        type=_listed(PRECISIONS),
        default="fp32",
        help=f"of each graph, the default one first: {', '.join(PRECISIONS)}; fp16 is for GPUs, so not of dispatch; "
        "fused has no int8; default: %(default)s",
    )
    add(
        "--compact-for",
        metavar="PROFILE",
        help="leave out the heads and MLP groups that this profile's classes never use",
    )
    add(
        "--compact-threshold",
        metavar="SHARE",
        type=_share,
        default=0.01,
        help="share of its images below which a head or MLP group counts as not used; default: %(default)s",
    )
    add(
        "--specialise",
        metavar="PROFILE",
        action="append",
        default=[],
        help="also write a fused graph for this profile alone, without the heads and MLP groups that its classes never "
        "use, for batches of that profile on a GPU; may be given several times",
    )
    add("--specialise-all", action="store_true", help="the same for every profile")
    add(
        "--verify-images",
        metavar="N",
        type=_count,
        default=40,
        help="images to compare with PyTorch, each under up to 40 steerings; default: %(default)s",
    )
    add(
        "--accuracy-images",
        metavar="N",
        type=_count,
        default=2000,
        help="images to compare accuracy on; default: %(default)s",
    )
    return parser


def _export(arguments: Sequence[str], prog: str) -> Bundle | None:
    options = parser(prog).parse_args(with_names(arguments, "--compact-for", "--specialise"))
    from export.certify import ExportError  # imports torch, so not before it is needed
    from export.write import ExportSettings, write
    from training.checkpoint import Run, RunError
    from training.data.splits import DataError
    from training.model.gated_vit import UnsupportedModel

    settings = ExportSettings(
        name=options.name,
        version=options.version,
        attentions=options.attention,
        precisions=options.precision,
        compact_for=options.compact_for,
        compact_threshold=options.compact_threshold,
        specialise=None if options.specialise_all else tuple(options.specialise),
        verify_images=options.verify_images,
        accuracy_images=options.accuracy_images,
    )
    try:
        return write(Run(options.run), options.repository, settings)
    except (ExportError, RunError, DataError, UnsupportedModel) as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return None


def _listed(allowed: Sequence[str]) -> Callable[[str], tuple[str, ...]]:
    def parse(text: str) -> tuple[str, ...]:
        names = tuple(text.split(","))
        if not set(names) <= set(allowed) or len(set(names)) < len(names):
            raise argparse.ArgumentTypeError(f"{text!r}; allowed: some of {','.join(allowed)}, each once")
        return names

    return parse


def _count(text: str) -> int:
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"{text!r}; allowed: a number of images, 1 or more")
    return int(text)


def _share(text: str) -> float:
    try:
        share = float(text)
    except ValueError:
        share = math.nan
    if not 0 <= share <= 1:
        raise argparse.ArgumentTypeError(f"{text!r}; allowed: 0 to 1")
    return share


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
