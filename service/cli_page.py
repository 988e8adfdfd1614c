"""python -m service.cli_page: writes docs/cli.md, the reference of the command line, from the flags in the code."""

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

from service.cli import COMMANDS, EXIT_STATUSES, GROUPS, Command, parser_of

PAGE = Path(__file__).parents[1] / "docs" / "cli.md"
HEAD = """# Command line

<!-- Written by `make reference` from the code. -->

One command, `steervit`, for everything; in a checkout, `pip install -e .` installs it (so do `make demo` and the other
targets, as `.venv/bin/steervit`). `steervit --help` lists the commands, and `steervit COMMAND --help` the flags of one.
The packages' own commands take the same flags: `python -m training STEP` (`train`, `evaluate`, `report`),
`python -m training.reproduce`, `python -m export`, `python -m export verify`, `python -m service` (`serve`),
`python -m service.check_profiles` (`profiles check`), `python -m service.doctor`, and
`python -m service.client COMMAND` for those that ask a server.

If a package is missing, the error names it and the `pip install` command for it.

`--json` prints one line of JSON instead of a table: the messages of [steering.proto](../proto/steering.proto) with
their field names, and each image's file as `image`. 64-bit integers are strings, as in all JSON of protobuf. Maps
of units are in colour on a terminal, unless `NO_COLOR` is set.
"""


def page() -> str:
    """The whole page, as Markdown."""
    statuses = [f"| {status} | {meaning} |" for status, meaning in EXIT_STATUSES.items()]
    lines = [HEAD, "| exit status | meaning |", "|---|---|", *statuses]
    for title, group in GROUPS.items():
        lines += ["", f"## {title}"]
        for name in group:
            lines += ["", f"### steervit {name}", "", *_section(name)]
    return "\n".join(lines) + "\n"


def _section(name: str) -> Iterator[str]:
    """Usage, description, and each group of flags as a list."""
    command = COMMANDS[name]
    if not command.parser:
        yield f"{command.summary} `steervit {name} --help` lists its flags.{_extras(command)}"
        return
    parser = parser_of(name)
    yield f"```text\n{parser.format_usage().removeprefix('usage: ').strip()}\n```"
    yield f"\n{_escaped(parser.description or command.summary)}{_extras(command)}"
    for group in parser._action_groups:
        actions = [a for a in group._group_actions if a.help != argparse.SUPPRESS and a.dest != "help"]
        if actions:
            yield f"\n{(group.title or '').capitalize()}:\n"
        for action in actions:
            text = (action.help or "") % {**vars(action), "prog": parser.prog}
            yield f"- `{_invocation(action)}`: {_escaped(text)}"
    if parser.epilog:
        yield "\n" + "  \n".join(map(_escaped, parser.epilog.splitlines()))


def _extras(command: Command) -> str:
    extras = " and ".join(f"`{extra}`" for extra in command.extras)
    return f" Needs the extra{'s' * (len(command.extras) > 1)} {extras}." if extras else ""


def _invocation(action: argparse.Action) -> str:
    value = action.metavar if isinstance(action.metavar, str) else action.dest.upper()
    return " ".join([", ".join(action.option_strings), value if action.nargs != 0 else ""]).strip()


def _escaped(text: str) -> str:
    """Escaped for Markdown; code between backticks is left as it is."""
    parts = " ".join(text.split()).split("`")
    for index in range(0, len(parts), 2):
        for character in "<*_|":
            parts[index] = parts[index].replace(character, f"\\{character}")
    return "`".join(parts)


if __name__ == "__main__":
    (Path(sys.argv[1]) if sys.argv[1:] else PAGE).write_text(page())
