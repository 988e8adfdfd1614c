"""The pages of the site lie where they lie in the repository, so that their links work there and here.

A hook of MkDocs: pages are the Markdown files below, with the pictures that they show. A link to any other file of the
repository becomes the file's name, as the site has no sources; a link to a file that does not exist is left alone, and
the strict build fails. Pages with a diagram load the site's own copy of Mermaid: without it, Material would load one
from elsewhere.
"""

import re
from pathlib import Path, PurePosixPath
from posixpath import normpath

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page
from mkdocs.utils import get_relative_url

ROOT = Path(__file__).parents[2]
PAGES = ("*.md", "docs/*.md", "docs/*.png", "deploy/**/*.md", "tests/*.md")
MERMAID = "assets/mermaid.js"
LINK = re.compile(r"(?<!!)\[([^\]]+)\]\(([^)\s#]+)(#[^)\s]*)?\)")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages and their pictures."""
    for pattern in PAGES:
        for path in sorted(ROOT.glob(pattern)):
            name = path.relative_to(ROOT).as_posix()
            files.append(File.generated(config, name, abs_src_path=str(path)))
    files.append(File.generated(config, MERMAID, abs_src_path=config.extra["mermaid"]))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Turn links to files that are no pages into their names."""
    folder = PurePosixPath(page.file.src_uri).parent

    def named(link: re.Match[str]) -> str:
        text, target = link[1], link[2]
        path = normpath(str(folder / target))
        if "://" in target or files.get_file_from_path(path) or not (ROOT / path).exists():
            return link[0]
        return text if text.startswith("`") else f"`{path}`" if text in path else f"{text} (`{path}`)"

    return LINK.sub(named, markdown)


def on_post_page(output: str, page: Page, config: MkDocsConfig) -> str:
    """Add Mermaid to a page with a diagram."""
    if 'class="mermaid"' not in output:
        return output
    script = f'<script src="{get_relative_url(MERMAID, page.url)}"></script>'
    return output.replace("</head>", f"{script}</head>", 1)
