"""Command-line arguments that argparse would misread."""

from collections.abc import Sequence


def with_names(arguments: Sequence[str], *options: str) -> list[str]:
    """Rewrite `--profile -rf` as `--profile=-rf`, because argparse takes a name that begins with a dash for an option.
    Names that begin with two dashes, and -h, which asks for help, need the form with `=`."""
    joined: list[str] = []
    for argument in arguments:
        if joined and joined[-1] in options and argument[:1] == "-" and argument[:2] != "--" and argument != "-h":
            joined[-1] += f"={argument}"
        else:
            joined.append(argument)
    return joined
