"""MkDocs hooks: links out of docs/ lead to copies of the repository's files.

Pages link to benchmarks, launchers and code by their paths in the repository, so that
the links work on a code host as well. The site has these files below repository/. A
link to a path that does not exist stays as it is, and mkdocs --strict refuses it.
"""

import os
import re
from pathlib import Path

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
COPIES = Path("repository")
# The target of an inline link or picture, and that of a reference.
LINK = re.compile(r"(?<=\]\()([^)\s]+)(?=\))|^\[[^\]]+\]: (\S+)$", re.M)
PAGES = ("*.md", "benchmarks/*.md", "launch/*.md")  # may link to docs/ themselves


def on_files(files: Files, config) -> Files:
    """Add the repository's pages, and every file that a page links to."""
    todo = [DOCS / file.src_uri for file in files.documentation_pages()]
    todo += [path for pattern in PAGES for path in sorted(ROOT.glob(pattern))]
    added = set()
    for page in todo:
        outside = [path for path, _ in targets(page) if not path.is_relative_to(DOCS)]
        own = [] if page.is_relative_to(DOCS) else [page]
        for path in {*outside, *own} - added:
            if path.is_file():
                added.add(path)
                files.append(copy_of(path, config))
    return files


def copy_of(path: Path, config) -> File:
    uri = (COPIES / path.relative_to(ROOT)).as_posix()
    return File.generated(config, uri, abs_src_path=str(path))


def targets(page: Path):
    """The files that a page links to, each with the link's text."""
    for match in LINK.finditer(page.read_text()):
        link = match[1] or match[2]
        if "://" not in link and not link.startswith(("#", "mailto:")):
            name = link.partition("#")[0]
            yield Path(os.path.normpath(page.parent / name)), link


def on_page_markdown(markdown: str, page, config, files: Files) -> str:
    """Rewrite links that cross the border of docs/, or lie outside of it."""
    if page.file.abs_src_path is None:  # a notebook's page (docs/notebook_hooks.py)
        return markdown
    source = Path(page.file.abs_src_path)
    here = Path(page.file.src_uri).parent
    moved = {}
    for path, link in targets(source):
        if path.is_relative_to(ROOT) and path.exists():
            inside = path.is_relative_to(DOCS)
            uri = path.relative_to(DOCS) if inside else COPIES / path.relative_to(ROOT)
            if inside and uri.suffix == ".ipynb":
                uri = uri.with_suffix(".md")  # the page, not the file
            anchor = link.partition("#")[1:]
            moved[link] = Path(os.path.relpath(uri, here)).as_posix() + "".join(anchor)
    target = lambda m: m[0].replace(m[1] or m[2], moved.get(m[1] or m[2], m[1] or m[2]))
    return LINK.sub(target, markdown)
