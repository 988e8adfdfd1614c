"""python -m service.check_profiles FOLDER --bundle DIR: whether a server would take a profile folder, without a server.

For CI, before a ConfigMap is rolled out. Stricter than a server in two things: a file that is for none of the bundles
and a folder without files are wrong too.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from export.bundle import BundleError, load_bundle
from service.catalogue import scan
from service.profiles import check
from training.terminal import print_anything


def main(arguments: Sequence[str]) -> int:
    """Check a folder; returns the exit status: 0, or 1 with every reason on standard error, a line each.

    arguments: those after the program's name. Exits with 2 on wrong ones, as argparse does.
    """
    print_anything()
    parser = argparse.ArgumentParser(
        prog="python -m service.check_profiles", description="Check a folder of profiles (--profiles-dir of a server)."
    )
    parser.add_argument("folder", type=Path, help="the folder of JSON files")
    parser.add_argument(
        "--bundle", type=Path, action="append", required=True, metavar="DIR",
        help="a bundle that is served, or a repository of them; may be given several times",
    )  # fmt: skip
    parser.add_argument(
        "--default-profile", default="", help="as of the server: every bundle must have it, or that of its serving.json"
    )
    options = parser.parse_args(arguments)
    try:
        shelves = [shelf for repository in options.bundle for shelf in scan(repository).values()]
        served = [
            (load_bundle(version.path), shelf.settings.get("default_profile", options.default_profile))
            for shelf in shelves
            for version in shelf.versions.values()
        ]
    except BundleError as error:
        print(error, file=sys.stderr)
        return 1
    lines, problems = check(options.folder, served)
    print("\n".join(lines))
    for problem in problems:
        print(problem, file=sys.stderr)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
