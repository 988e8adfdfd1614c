"""steervit profiles check FOLDER --bundle DIR: would a server take this profile folder? It needs no server.

Also python -m service.check_profiles.

For CI, before a ConfigMap is rolled out. Stricter than a server in two ways: a file that is for none of the bundles is
an error, and so is a folder without files.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from export.arguments import with_names
from training.terminal import HelpFormatter, print_anything

PROG = "python -m service.check_profiles"


def parser(prog: str = PROG) -> argparse.ArgumentParser:
    """The parser of the command line. prog: what a user types."""
    parser = argparse.ArgumentParser(
        prog=prog,
        usage="%(prog)s FOLDER --bundle DIR [OPTION ...]",
        description="Check a folder of profiles (--profiles-dir of a server) against the bundles that are served, "
        "without a server.",
        formatter_class=HelpFormatter,
    )
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="the folder of JSON files")
    parser.add_argument(
        "--bundle", type=Path, action="append", required=True, metavar="DIR",
        help="a bundle that is served, or a repository of them; may be given several times",
    )  # fmt: skip
    parser.add_argument(
        "--default-profile",
        default="",
        metavar="NAME",
        help="as of the server: every bundle must have it, or that of its serving.json",
    )
    return parser


def main(arguments: Sequence[str], prog: str = PROG) -> int:
    """Check a folder; returns the exit status: 0, or 1 with every reason on standard error, a line each.

    arguments: those after the program's name, prog. Exits with 2 on wrong ones, as argparse does.
    """
    print_anything()
    options = parser(prog).parse_args(with_names(arguments, "--default-profile"))
    from export.bundle import BundleError, load_bundle
    from service.catalogue import scan
    from service.profiles import check

    try:
        shelves = [shelf for repository in options.bundle for shelf in scan(repository).values()]
        served = [
            (load_bundle(version.path), shelf.settings.get("default_profile", options.default_profile))
            for shelf in shelves
            for version in shelf.versions.values()
        ]
    except (BundleError, OSError) as error:
        print(error, file=sys.stderr)
        return 1
    lines, problems = check(options.folder, served)
    for line in lines:
        print(line)
    for problem in problems:
        print(problem, file=sys.stderr)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
