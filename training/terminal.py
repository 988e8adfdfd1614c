"""Output of the command lines on terminals and pipes. Standard library only."""

import argparse
import re
import shutil
import sys
import textwrap

WIDTH = 80
"""Largest width of help texts, in columns."""
METAVARS = {"Path": "PATH", "str": "TEXT", "int": "N", "float": "X"}
"""Metavars by pydantic's name of a setting's type."""
SHORT = 24
"""Longest metavar, in characters; a longer list of choices follows the help text instead."""
NO_DEFAULT = re.compile(r" \(default: (None|null|\(\)|\{\}|)\)$")


def print_anything() -> None:
    """From now on, escape characters that the encoding of standard output or standard error lacks."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # false for a stream that a test put there
            stream.reconfigure(errors="backslashreplace")


class HelpFormatter(argparse.HelpFormatter):
    """Help texts no wider than the terminal and WIDTH; words with hyphens stay whole."""

    def __init__(self, prog: str):
        width = min(WIDTH, shutil.get_terminal_size().columns)
        super().__init__(prog, max_help_position=26, width=width - 2)

    def _split_lines(self, text: str, width: int) -> list[str]:
        return textwrap.wrap(" ".join(text.split()), width, break_on_hyphens=False)


def make_readable(parser: argparse.ArgumentParser) -> None:
    """Simplify the help that pydantic generates: words for types, no empty defaults, short lists of choices."""
    for action in parser._actions:
        if not action.help or action.help == argparse.SUPPRESS:
            continue
        text, default = NO_DEFAULT.sub("", action.help), ""
        if with_default := re.fullmatch(r"(.*?) (\(default: .*\))", text, re.DOTALL):
            text, default = with_default[1], with_default[2].replace(": True)", ": on)").replace(": False)", ": off)")
        if isinstance(action.metavar, str):
            repeated = re.fullmatch(r"tuple\[(.*),\.\.\.\]", action.metavar)
            metavar = repeated[1] if repeated else action.metavar
            metavar = re.sub(r"\w+", lambda word: METAVARS.get(word[0], word[0]), metavar)
            choices = metavar[1:-1].split(",") if metavar.startswith("{") else []
            if choices:
                action.completer = lambda choices=choices, **_: choices  # type: ignore[attr-defined]  # argcomplete's
            if len(metavar) > SHORT and choices:
                metavar = "NAME"
                text += f" Allowed: {', '.join(choices)}."
            if repeated:
                text += " May be given several times."
            action.metavar = "JSON" if metavar.startswith("dict[") else re.sub(r"^tuple\[(.*)\]$", r"\1", metavar)
        action.help = f"{text} {default}".strip()
