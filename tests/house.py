"""Whether the code stays one that people find their way in: sizes, names, comments.

    python tests/house.py            # the figures, and what is over a bound
    python tests/house.py --list     # and every long file, vague name

Exit code 1 when a bound is passed. What the figures are for: style guides say "short
files" and "names that say what they hold"; this says how many do not.
"""

import ast
import io
import sys
import tokenize
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
SOURCES = sorted((ROOT / "sd3_jax").rglob("*.py"))
LONG_FILE, LONG_FUNCTION = 300, 60  # lines
# As variables, arguments or functions they say nothing of what they hold.
VAGUE = {"found", "made", "told", "given", "own", "each", "some", "both", "what"}


class Bound(NamedTuple):
    """A figure, and the most (or with `least`, the least) that it may be."""

    name: str
    value: float
    bound: float
    least: bool = False

    def passed(self) -> bool:
        return self.value < self.bound if self.least else self.value > self.bound


def line_count(path: Path) -> int:
    return len(path.read_text().splitlines())


def long_functions(path: Path) -> Iterator[tuple[str, int]]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            lines = node.end_lineno - node.lineno + 1
            if lines > LONG_FUNCTION:
                yield node.name, lines


def bindings(path: Path) -> Iterator[tuple[str, int]]:
    """Names that a file gives to variables, arguments and functions, with lines."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id, node.lineno
        elif isinstance(node, ast.arg):
            yield node.arg, node.lineno
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node.name, node.lineno


def comment_lines(path: Path) -> int:
    """Lines with a comment, alone or behind code."""
    tokens = tokenize.generate_tokens(io.StringIO(path.read_text()).readline)
    return sum(token.type == tokenize.COMMENT for token in tokens)


def main(every: bool) -> int:
    lines = {path: line_count(path) for path in SOURCES}
    total = sum(lines.values())
    packages = Counter(str(path.parent.relative_to(ROOT)) for path in SOURCES)
    names = Counter(path.stem for path in SOURCES if path.stem != "__init__")
    twice = sorted(name for name, count in names.items() if count > 1)
    long_files = {path: count for path, count in lines.items() if count > LONG_FILE}
    functions = [(p, *each) for p in SOURCES for each in long_functions(p)]
    bound = [(p, *each) for p in SOURCES for each in bindings(p)]
    vague = [(p, name, line) for p, name, line in bound if name in VAGUE]
    figures = (
        Bound("lines of sd3_jax", total, BOUNDS["lines"]),
        Bound("module names that occur twice", len(twice), BOUNDS["twice"]),
        Bound(f"files over {LONG_FILE} lines", len(long_files), BOUNDS["long_files"]),
        Bound("lines of the longest file", max(lines.values()), BOUNDS["longest"]),
        Bound(
            f"functions over {LONG_FUNCTION} lines", len(functions), BOUNDS["functions"]
        ),
        Bound(
            "comment lines, %",
            100 * sum(map(comment_lines, SOURCES)) / total,
            BOUNDS["comments"],
            least=True,
        ),
        Bound("vague bindings, %", 100 * len(vague) / len(bound), BOUNDS["vague"]),
    )
    print("modules:", ", ".join(f"{k} {n}" for k, n in sorted(packages.items())))
    for figure in figures:
        limit = f"{'at least' if figure.least else 'at most'} {figure.bound:g}"
        wrong = "  <-- over its bound" if figure.passed() else ""
        print(f"{figure.name}: {figure.value:.6g} ({limit}){wrong}")
    if every:
        print(*twice, sep="\n")
        for path, count in sorted(long_files.items(), key=lambda item: -item[1]):
            print(f"{path.relative_to(ROOT)}: {count} lines")
        for path, name, count in functions:
            print(f"{path.relative_to(ROOT)}: {name} has {count} lines")
        for path, name, line in vague:
            print(f"{path.relative_to(ROOT)}:{line}: {name}")
    return int(any(figure.passed() for figure in figures))


# Goals, but for `lines` and `comments`: today's figures, which are to get better.
BOUNDS = dict(
    lines=58_900,
    twice=0,
    long_files=12,
    longest=450,
    functions=8,
    comments=7,
    vague=0.3,
)

if __name__ == "__main__":
    sys.exit(main("--list" in sys.argv))
