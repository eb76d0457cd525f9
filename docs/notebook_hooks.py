"""MkDocs hooks: notebooks are executed, and become pages with their figures.

A cell that fails ends the build. The notebooks in the repository have no outputs.
"""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import nbformat
from mkdocs.structure.files import File, Files
from nbconvert import MarkdownExporter
from nbconvert.preprocessors import ExecutePreprocessor

SECONDS = 600  # that a cell may take


def on_files(files: Files, config) -> Files:
    """Add a page NAME.md, and its figures, for each notebook NAME.ipynb."""
    notebooks = [file for file in files if file.src_uri.endswith(".ipynb")]
    with ThreadPoolExecutor() as pool:  # each notebook runs in a process of its own
        pages = list(pool.map(page_of, [Path(file.abs_src_path) for file in notebooks]))
    for file, (markdown, figures) in zip(notebooks, pages):
        uri = Path(file.src_uri)
        contents = {uri.with_suffix(".md"): markdown}
        contents |= {uri.parent / name: image for name, image in figures.items()}
        for path, content in contents.items():
            files.append(File.generated(config, path.as_posix(), content=content))
    return files


def page_of(notebook: Path) -> tuple[str, dict[str, bytes]]:
    """The Markdown of an executed notebook, and its figures by file name."""
    book = nbformat.read(notebook, as_version=4)
    folder = {"metadata": {"path": str(notebook.parent)}}
    ExecutePreprocessor(timeout=SECONDS, kernel_name="python3").preprocess(book, folder)
    for cell in book.cells:
        if cell.cell_type == "code":  # logs are for the terminal, not for a page
            cell.outputs = [x for x in cell.outputs if x.get("name") != "stderr"]
    resources = {"output_files_dir": ".", "unique_key": notebook.stem}
    markdown, resources = MarkdownExporter().from_notebook_node(book, resources)
    figures = {Path(name).name: data for name, data in resources["outputs"].items()}
    title, _, rest = markdown.lstrip().partition("\n")
    return f"{title}\n\n[Download the notebook]({notebook.name})\n{rest}", figures
