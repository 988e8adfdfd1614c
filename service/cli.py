"""steervit: one command over all packages. Also python -m service.cli

Each command hands its arguments to the main() of a package, which is imported then. For --help and for completion only
the module with the flags is imported, and none of them needs an extra.
"""

import argparse
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PROJECT = "steervit"
OURS = ("training", "export", "service")


@dataclass(frozen=True)
class Command:
    """One command: what it does, and where."""

    summary: str
    main: str
    """`module:function` of the arguments and of what the user typed before them; it returns the exit status."""
    parser: str
    """`module:function` of what the user typed; it returns the ArgumentParser. The module imports little. Empty: main
    takes only its arguments, and answers --help itself."""
    arguments: tuple[str, ...] = ()
    """Arguments of main before those of the user."""
    extras: tuple[str, ...] = ()
    """The extras of pyproject.toml that it needs."""


def _training(summary: str, *step: str) -> Command:
    return Command(summary, "training.__main__:main", "training.config:parser", step, ("train",))


def _client(summary: str) -> Command:
    return Command(summary, "service.client.__main__:main", "service.client.__main__:parser")


GROUPS: Mapping[str, Mapping[str, Command]] = {
    "Train and export": {
        "train": _training("Train a model, its autoencoders and its profiles, and report."),
        "evaluate": _training("Measure a trained run on the test images.", "evaluate"),
        "report": _training("Write the report of an evaluated run.", "report"),
        "reproduce": Command(
            "Train and report several seeds, with all their controls.",
            "training.reproduce:main",
            "training.reproduce:parser",
            extras=("train",),
        ),
        "export": Command(
            "Write a trained run as a bundle, compared with PyTorch.",
            "export.__main__:main",
            "export.__main__:parser",
            extras=("train", "export"),
        ),
        "verify": Command(
            "Check that a bundle is complete and its answers are right.",
            "export.__main__:main",
            "export.__main__:verify_parser",
            ("verify",),
        ),
    },
    "Deliver": {
        "push": Command(
            "Push a bundle or profiles into a registry, as OCI artefacts.",
            "service.delivery.__main__:main",
            "service.delivery.__main__:push_parser",
            ("push",),
        ),
        "pull": Command(
            "Pull a bundle or profiles from a registry or a store.",
            "service.delivery.__main__:main",
            "service.delivery.__main__:pull_parser",
            ("pull",),
        ),
    },
    "Serve": {
        "serve": Command("Serve bundles over gRPC.", "service.__main__:main", "service.config:parser"),
        "playground": Command(
            "Show a web page on which to try a running server.",
            "service.playground.__main__:main",
            "service.playground.__main__:parser",
            extras=("playground",),
        ),
        "profiles check": Command(
            "Check a folder of profiles before a server reads it.",
            "service.check_profiles:main",
            "service.check_profiles:parser",
        ),
        "doctor": Command(
            "Report what support would ask for, and what is wrong.",
            "service.doctor:main",
            "service.config:doctor_parser",
        ),
    },
    "Ask a running server": {
        "predict": _client("Classify image files, and show which units ran."),
        "compare": _client("Classify image files without and with steering."),
        "explain": _client("Classify image files, and show what drives the gates."),
        "profiles": _client("List the steering profiles and their measured effects."),
        "models": _client("List the models and versions in the server's repository."),
        "dial": _client("Show the measured compute and accuracy of each budget."),
        "load": _client("Put a server under load with image files; report latencies."),
    },
    "Shell": {
        "completion": Command(
            "Print the completion script for bash, zsh or fish.",
            "service.cli:print_completion",
            "service.cli:completion_parser",
            extras=("completion",),
        ),
    },
}
COMMANDS: Mapping[str, Command] = {name: command for group in GROUPS.values() for name, command in group.items()}
EXIT_STATUSES: Mapping[int, str] = {
    0: "done",
    1: "failed; the reason is on standard error",
    2: "wrong arguments or settings; nothing was done",
    130: "interrupted by Ctrl-C",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns its exit status, one of EXIT_STATUSES. Exits with 2 on wrong arguments, as argparse does.

    arguments: those after `steervit`; by default the process's own.
    """
    if "_ARGCOMPLETE" in os.environ:
        _complete()
    words = list(sys.argv[1:] if arguments is None else arguments)
    name = _command(words)
    if name not in COMMANDS:
        parser().parse_args(words)  # ends the process: --help, --version, or no such command
    try:
        status = _run(name, words[len(name.split()) :])
        sys.stdout.flush()
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # the reader has closed the output
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    return status


def _command(words: Sequence[str]) -> str:
    """The command, of one or two words, at the start of these words; the first word if there is no such command."""
    both = " ".join(words[:2])
    return both if both in COMMANDS else "".join(words[:1])


def _run(name: str, rest: Sequence[str]) -> int:
    command = COMMANDS[name]
    help_alone = bool(command.parser) and not {"-h", "--help"}.isdisjoint(rest)
    if not help_alone and (missing := _missing(command.extras)):
        return _refuse(name, missing)
    given = [*command.arguments, *rest]
    try:
        if help_alone:
            parser_of(name).print_help()
            return 0
        run = _resolve(command.main)
        status: int = run(given, f"{PROJECT} {name}") if command.parser else run(given)
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] in OURS and not command.extras:
            raise
        return _refuse(name, [error.name or "a module"])
    return status


def parser(own: str = "") -> argparse.ArgumentParser:
    """The parser of `steervit` itself. It knows the flags of at most one command and of those under it, such as
    `profiles check` under `profiles`. own: that command's name."""
    from importlib.metadata import version

    width = max(map(len, COMMANDS))
    groups = [
        "\n".join([f"{title}:", *(f"  {name:<{width}}  {command.summary}" for name, command in group.items())])
        for title, group in GROUPS.items()
    ]
    statuses = "\n".join(f"  {status:<{width}}  {meaning}" for status, meaning in EXIT_STATUSES.items())
    parser = argparse.ArgumentParser(
        prog=PROJECT,
        usage="%(prog)s COMMAND [ARGUMENT ...]",
        description="Steered inference for Vision Transformers: train, export, serve, ask.",
        epilog="\n\n".join([*groups, f"Exit status:\n{statuses}", "steervit COMMAND --help lists a command's flags."]),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {version(PROJECT)}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True, help=argparse.SUPPRESS)
    for name in COMMANDS:
        if " " not in name:
            commands.add_parser(name)
    if own in COMMANDS and COMMANDS[own].parser:
        commands.choices[own] = parser_of(own)
        longer = [name for name in COMMANDS if name.startswith(f"{own} ")]
        if longer:
            under = commands.choices[own].add_subparsers()
            for name in longer:
                under.add_parser(name.split()[1])
                under.choices[name.split()[1]] = parser_of(name)
    return parser


def parser_of(name: str) -> argparse.ArgumentParser:
    """The parser of one command. Raises ModuleNotFoundError if something that its flags need is not installed."""
    parser: argparse.ArgumentParser = _resolve(COMMANDS[name].parser)(f"{PROJECT} {name}")
    return parser


def completion_parser(prog: str = f"{PROJECT} completion") -> argparse.ArgumentParser:
    """The parser of `completion`. prog: what a user types."""
    parser = argparse.ArgumentParser(
        prog=prog,
        usage="%(prog)s SHELL",
        description=COMMANDS["completion"].summary,
        epilog='bash: eval "$(steervit completion bash)" in ~/.bashrc\n'
        'zsh:  eval "$(steervit completion zsh)" in ~/.zshrc, after compinit\n'
        "fish: steervit completion fish > ~/.config/fish/completions/steervit.fish",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("shell", choices=("bash", "zsh", "fish"), metavar="SHELL", help="bash, zsh or fish")
    return parser


def print_completion(arguments: Sequence[str], prog: str) -> int:
    """Print the shell's completion script, which calls this program; returns 0. arguments: the shell's name."""
    shell = completion_parser(prog).parse_args(arguments).shell
    from argcomplete.shell_integration import shellcode

    print(shellcode([PROJECT], True, shell))
    return 0


def _complete() -> None:
    """Answer a shell's completion request, and end the process."""
    import argcomplete

    _, own, *_ = [*os.environ.get("COMP_LINE", "").split(), "", ""]
    argcomplete.autocomplete(parser(own))


def _missing(extras: Sequence[str]) -> list[str]:
    """The distributions in these extras that are not installed."""
    if not extras:
        return []
    import re
    from importlib.metadata import distributions, requires

    def canonical(name: str) -> str:
        return re.sub(r"[-_.]+", "-", name).lower()

    needed = [
        re.split(r"[^\w.-]", requirement)[0]
        for requirement in requires(PROJECT) or ()
        for extra in extras
        if re.search(rf"extra == ['\"]{extra}['\"]$", requirement)
    ]
    installed = {canonical(found.name) for found in distributions()}
    return [name for name in needed if canonical(name) not in installed]


def _refuse(name: str, missing: Sequence[str]) -> int:
    """Say what is not installed and how to install it; returns 1."""
    extras = COMMANDS[name].extras
    root = Path(__file__).parents[1]
    source = str(root) if (root / "pyproject.toml").exists() else PROJECT
    target = f"{source}[{','.join(extras)}]" if extras else source
    needs = f"the extra{'s' * (len(extras) > 1)} {' and '.join(extras)}" if extras else "the base installation"
    few = ", ".join(missing[:3]) + (f" and {len(missing) - 3} more" if len(missing) > 3 else "")
    print(f"{PROJECT} {name} needs {needs}; missing: {few}. Install: pip install '{target}'", file=sys.stderr)
    return 1


def _resolve(reference: str) -> Any:
    """The object that a `module:function` names."""
    import pkgutil

    return pkgutil.resolve_name(reference)


if __name__ == "__main__":
    sys.exit(main())
