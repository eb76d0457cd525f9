"""Whether the prose reads like that of a well-known project.

    python tests/prose.py              # what breaks a rule, one line each
    python tests/prose.py --figures    # and the length of sentences in each set

Documents: no sentence over 40 words, and at most 20 words on average in each set. Code
blocks, tables, URLs and generated pages do not count. Documents, docstrings and
messages: none of the phrases below. Exit code 1 if a rule is broken.
"""

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
LONGEST, MEAN = 40, 20  # words of a sentence
SETS = {  # globs of Markdown
    "README.md": ["README.md"],
    "CONTRIBUTING.md": ["CONTRIBUTING.md"],
    "ARCHITECTURE.md": ["ARCHITECTURE.md"],
    "docs": ["docs/**/*.md"],
    "launch/README.md": ["launch/README.md"],
}
GENERATED = {"docs/keys.md", "docs/reference/config.md"}

PHRASES = [  # (pattern, what to write); upper and lower case alike
    (r"(?<!`)\bwanted\b(?!`)", "expected X, got Y; or: must be X; set ..."),
    (r"\b(is|are|was|were|be|been) told\b", "who does what: logs, prints, receives"),
    (r"\bis told of\b|\btold of\b", "is logged"),
    (r"\bof whose\b|\bwhose\b[^.;]*\bof all\b", "name the thing; two sentences"),
    (r"\bwhat can(not|'t| not)? be \w+", "files that cannot be read, rejected files"),
    (r"\bwhich, and which\b", "X and Y depend only on Z"),
    (r"\bsooner done\b|\bsooner \w+ than\b", "is faster than"),
    (r"\b(is|are|was|were) gone\b", "no longer exists, was removed, exited"),
    (r"\b(is|are|was|were) not there\b", "does not exist, is missing"),
    (r"\btakes? the others with it\b", "the other processes exit too"),
    (r"\bends the run by\b", "stops the run; the error names"),
    (r"\bthe (found|made|told|taken|wished)\b", "the noun: the missing keys, the loss"),
    (r"\bthe given\b(?=[.,;:)]|$)", "the noun: the given value"),
    (r"(?<!there )\b(is|are) no (?!longer|more|less|such|\w+er\b)", "is not a ..."),
    (r"\bgo(es|ing)? on (from|with|without|at|by)\b|\bgoes on\b", "continues, resumes"),
    (r"\banew\b", "again; from the start"),
    (r"\b(mend|heed)(s|ed|ing)?\b", "fix; use"),
    (r"\bputs? (it|that|this|them) right\b|\bput right\b", "fix"),
    (r"\bto mean it\b|\bsay so\b(?! in)", "to confirm; set --config.KEY=VALUE"),
    (r"\bstands? (there )?twice\b|\bcomes twice\b", "appears twice"),
    (r"\bgives? back the old\b|\bbring those back\b", "restore the old value"),
    (r"\bnothing but\b", "only"),
    (r"\bwhoever\b|\bwhatever it is\b", "the user, the process; any"),
    (r"\bto be had\b|\bcan be had\b", "is available"),
    (r"\bas (many|few|much) as (may|will) be\b", "the number"),
    (r"\bin the place of\b", "instead of"),
    (r"\bof an? (unknown )?kind other\b", "another kind"),
]
MESSAGE_PHRASES = [  # of messages alone, where documents may use them
    (r"\bthere (is|are) no\b", "X does not exist; no X in Y"),
    (r"\bgave\b", "returned"),
    (r"\bcame\b(?! from)", "arrived; were read"),
]


class Finding(NamedTuple):
    """A broken rule: where, the first words, and the count of words or the advice."""

    path: str
    line: int
    start: str
    reason: str

    def __str__(self) -> str:
        return f"{self.path}:{self.line}: {self.start} ({self.reason})"


class Sentence(NamedTuple):
    line: int
    text: str

    def words(self) -> int:
        return sum(bool(re.search(r"\w", word)) for word in self.text.split())


# --- Markdown


def blocks(markdown: str) -> Iterator[list[tuple[int, str]]]:
    """Paragraphs, headings and list items as numbered lines; no code and no tables."""
    block, fence, comment, inside, blank, code = [], "", False, False, True, False
    for number, line in enumerate(markdown.splitlines(), 1):
        text = line.strip()
        # Four spaces make code, but not inside a list, an admonition or a tab.
        if text and not line.startswith((" ", "\t")):
            inside = bool(re.match(r"[-*+] |\d+\. |!!!|\?\?\?|===", text))
        indented = line.startswith(("    ", "\t")) and not inside
        code = bool(text) and indented and (blank or code)
        blank = not text
        if code:
            continue
        mark = re.match(r"(?:[-*] |\d+\. )?(`{3,}|~{3,})", text)
        if fence:
            fence = "" if text.startswith(fence) and not text.strip(fence[0]) else fence
            continue
        if comment or text.startswith("<!--"):
            comment = "-->" not in text
            continue
        # A line of HTML, a table, an admonition's or a tab's head, a rule.
        apart = re.match(r"\||<[^>]*>$|!!!|\?\?\?|===|:::|---+$|--8<--", text)
        item = re.match(r"[-*+] |\d+\. |> |#+ ", text)
        if mark or apart or item or not text:
            if block:
                yield block
            block = []
        if mark:
            fence = mark[1]
        elif text and not apart:
            block.append((number, text[item.end() :] if item else text))
        if block and text.startswith("#"):
            yield block
            block = []
    if block:
        yield block


def plain(text: str) -> str:
    """Without URLs and marks; code in a line is one word."""
    text = re.sub(r"!\[[^\]]*\]\([^)]*\)", "", text)  # an image
    text = re.sub(r"(`+)(.+?)\1", lambda m: re.sub(r"\W+", "_", m[2]) + "_", text)
    text = re.sub(r"\[([^\]]*)\](\([^)]*\)|\[[^\]]*\])", r"\1", text)
    text = re.sub(r"<[^>]+>|https?://\S+|[*_]{2,}", "", text)
    return text


# A mark that ends a sentence, and what may close after it; then a new one begins.
END = re.compile(r"(?<=[.!?])[\"”’')\]*]*\s+(?=[\"“‘'(\[*]*[A-Z0-9_`])")
ABBREVIATION = re.compile(r"\b(e\.g|i\.e|et al|vs|cf|sec|fig|eq|no|approx)\.$", re.I)


def sentences(markdown: str) -> Iterator[Sentence]:
    """The sentences of a document, each with the line where it begins."""
    for block in blocks(markdown):
        starts, offset = [], 0
        for number, text in block:
            starts.append((offset, number))
            offset += len(text) + 1
        # Marks are blanked for the count alone, so offsets are those of the lines.
        joined, start = " ".join(text for _, text in block), 0
        ends = [m for m in END.finditer(joined) if not in_code(joined, m.start())]
        for end in [m.end() for m in ends if not abbreviated(joined, m)] + [offset]:
            line = [number for at, number in starts if at <= start][-1]
            if text := plain(joined[start:end]).strip():
                yield Sentence(line, text)
            start = end


def in_code(text: str, at: int) -> bool:
    return text.count("`", 0, at) % 2 == 1


def abbreviated(text: str, end: re.Match) -> bool:
    return bool(ABBREVIATION.search(text[: end.start()]))


def documents() -> dict[str, list[Path]]:
    """The files of each set."""
    return {
        name: sorted(
            path
            for pattern in patterns
            for path in ROOT.glob(pattern)
            if str(path.relative_to(ROOT)) not in GENERATED
        )
        for name, patterns in SETS.items()
    }


# --- Python


def strings(source: str) -> Iterator[tuple[int, str, bool]]:
    """(line, text, whether it is a docstring) of each text; {} for an expression."""
    tree, docstrings, parts = ast.parse(source), set(), set()
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if isinstance(body, list) and body and isinstance(body[0], ast.Expr):
            docstrings.add(id(body[0].value))
        if isinstance(node, ast.JoinedStr):
            parts |= {id(value) for value in node.values}
            yield node.lineno, "".join(map(part, node.values)), False
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            if id(node) not in parts:
                yield node.lineno, node.value, id(node) in docstrings


def part(value: ast.expr) -> str:
    return value.value if isinstance(value, ast.Constant) else "{}"


# --- The rules


def long_sentences(path: str, found: list[Sentence]) -> Iterator[Finding]:
    for sentence in found:
        if (count := sentence.words()) > LONGEST:
            reason = f"{count} words, at most {LONGEST}"
            yield Finding(path, sentence.line, first_words(sentence.text), reason)


def banned(path: str, line: int, text: str, phrases: list) -> Iterator[Finding]:
    """Every phrase of `phrases` in a text; a line within it is counted on."""
    if " " not in text:
        return
    for pattern, better in phrases:
        for match in re.finditer(pattern, text, re.I):
            at = line + text.count("\n", 0, match.start())
            words = " ".join(match[0].split())
            shown = first_words(text[max(0, match.start() - 30) :])
            yield Finding(path, at, shown, f'"{words}": write {better}')


def first_words(text: str) -> str:
    return " ".join(text.split()[:8])


def mean(counts: list[int]) -> float:
    return sum(counts) / max(1, len(counts))


def main(figures: bool = False) -> int:
    findings = []
    for name, paths in documents().items():
        counts = []
        for path in paths:
            where, text = str(path.relative_to(ROOT)), path.read_text()
            found = list(sentences(text))
            counts += [sentence.words() for sentence in found]
            findings += long_sentences(where, found)
            for sentence in found:
                findings += banned(where, sentence.line, sentence.text, PHRASES)
        average = mean(counts)
        if average > MEAN:
            reason = f"{average:.1f} words a sentence on average, at most {MEAN}"
            findings.append(Finding(name, 1, f"{len(counts)} sentences", reason))
        if figures:
            longest = max(counts, default=0)
            print(f"{name}: {len(counts)} sentences, mean {average:.1f}, max {longest}")
    for path in sorted((ROOT / "sd3_jax").rglob("*.py")):
        where = str(path.relative_to(ROOT))
        for line, text, is_docstring in strings(path.read_text()):
            rules = PHRASES if is_docstring else PHRASES + MESSAGE_PHRASES
            findings += banned(where, line, text, rules)
    for finding in findings:
        print(finding)
    return int(bool(findings))


if __name__ == "__main__":
    sys.exit(main("--figures" in sys.argv))
