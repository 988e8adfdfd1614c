"""What argparse leaves to be done on our command lines."""

from collections.abc import Sequence


def with_names(arguments: Sequence[str], *options: str) -> list[str]:
    """`--profile -rf` as `--profile=-rf`: argparse takes a name that begins with a dash for an option. Names that begin
    with two, and -h, which asks for help, need the form with `=`."""
    found: list[str] = []
    for argument in arguments:
        if found and found[-1] in options and argument[:1] == "-" and argument[:2] != "--" and argument != "-h":
            found[-1] += f"={argument}"
        else:
            found.append(argument)
    return found
