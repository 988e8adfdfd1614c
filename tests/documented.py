"""The commands, queries and examples of the documentation: its fenced blocks, by language.

`not run here` marks a command that no test runs: in its line, or in a sentence of its page that names the program.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

from processes import ROOT

PAGES = (
    "README.md", *sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "docs").glob("*.md")),
    "deploy/RUNBOOK.md", "deploy/CAPACITY.md", "deploy/kubernetes/README.md",
)  # fmt: skip
LANGUAGES = {"sh", "python", "promql", "yaml", "json", "mermaid", "text"}
FENCED = re.compile(r"^( *)```(\w*)\n(.*?)^ *```$", re.MULTILINE | re.DOTALL)
MARK = "not run here"


@dataclass(frozen=True)
class Block:
    page: str
    language: str
    text: str


@dataclass(frozen=True)
class Command:
    page: str
    text: str
    """Without comments; continued lines as one; a here-document with its lines."""
    marked: bool

    @property
    def program(self) -> str:
        return self.text.split()[0]


@cache
def text(page: str) -> str:
    return (ROOT / page).read_text()


def blocks(language: str, *pages: str) -> Iterator[Block]:
    for page in pages or PAGES:
        for indent, of, content in FENCED.findall(text(page)):
            if of == language:
                yield Block(page, of, re.sub(rf"^{indent}", "", content, flags=re.MULTILINE))


def commands(*pages: str) -> list[Command]:
    """Every command, in the order of the pages."""
    found = []
    for block in blocks("sh", *pages):
        for line in re.findall(r".*<<EOF\n(?s:.*?)\nEOF$|(?:.*[\\|]\n)*.+", block.text, re.MULTILINE):
            command, _, comment = re.sub(r"(\\|(?<=\|))\n *", " ", line).partition(" #")
            if not line.startswith("#"):
                command = command.strip()
                named = command.split()[0] in not_run(block.page)
                found.append(Command(block.page, command, named or MARK in comment))
    return found


def not_run(page: str) -> set[str]:
    """Programs that the page says are not run here."""
    sentences = re.split(r"(?<=[.:])\s", FENCED.sub("", text(page)))
    return {name for each in sentences if MARK in " ".join(each.split()) for name in re.findall(r"[`\[](\w+)", each)}


def queries(*pages: str) -> list[str]:
    """Those in PromQL; a line that begins with a space continues the one before it."""
    found: list[str] = []
    for block in blocks("promql", *pages):
        for line in block.text.splitlines():
            if query := line.partition("#")[0].rstrip():
                found[-1:] = [found[-1] + query] if query.startswith(" ") else [*found[-1:], query]
    return found


def examples(*pages: str) -> list[Block]:
    """Those in Python."""
    return list(blocks("python", *pages))
