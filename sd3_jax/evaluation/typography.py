"""Whether a picture spells what its prompt asks for in quotes, by the user's OCR.

    read(images u8 (n, h, w, 3)) -> n texts

A picture is right if the texts are equal apart from what `ignore` names. The character
error rate is the edit distance over the length of the text that was asked for.
"""

import re
import unicodedata
from collections.abc import Callable, Sequence

from rapidfuzz.distance import Levenshtein

from sd3_jax.data import prompt_text
from sd3_jax.errors import UserError
from sd3_jax.evaluation import scorers
from sd3_jax.evaluation.scorers import Asked, Score, Verdict, answers, called
from sd3_jax.foreign_text import parse_json, shown

QUOTED = re.compile(
    '"([^"]+)"|“([^”]+)”|«([^»]+)»|„([^“”]+)[“”]'
    "|(?<!\\w)'([^']+)'(?!\\w)|‘([^’]+)’(?!\\w)"
)
READ = 2_000  # characters that count, of what is read; a word asked for has ten
ERRORS = "character error rate"


IGNORE = {
    "case": str.casefold,
    "punctuation": lambda x: "".join(c for c in x if unicodedata.category(c)[0] != "P"),
    "space": lambda text: " ".join(text.split()),
}


def parse(line: str) -> Asked:
    """A prompt with its text in quotes, or {"prompt": …, "text": …, "category": …}.

    Several quotes are joined with spaces. UserError if no text is asked for.
    """
    record = {"prompt": line}
    if line.startswith("{"):
        try:
            record = parse_json(line)
        except ValueError as error:
            raise UserError(f"not JSON: {error}") from None
    prompt = record.get("prompt")
    text, category = record.get("text"), record.get("category", "text")
    if not isinstance(prompt, str) or not isinstance(category, str):
        raise UserError('expected {"prompt": TEXT, "text": TEXT, "category": TEXT}')
    # An explicit "text" wins: prompts may quote what is not to be spelled.
    text = quoted(prompt) if text is None else text
    if not isinstance(text, str) or not text.strip():
        raise UserError(
            f'"{shown(prompt, 60)}" asks for no text; put the text in quotes'
        )
    return Asked(prompt_text.checked(prompt), category, text)


def quoted(prompt: str) -> str:
    """The text in quotes of any usual kind; an apostrophe is not a quote."""
    quotes = ["".join(groups) for groups in QUOTED.findall(prompt)]
    return " ".join(quotes)


def normal(text: str, ignore: Sequence[str] = ()) -> str:
    """The text in Unicode's form NFC, after the IGNORE functions that are named."""
    # OCR may give letters and accents apart, which is the same text.
    text = unicodedata.normalize("NFC", text)
    # In IGNORE's order, not the caller's: punctuation may leave double spaces.
    for name, without in IGNORE.items():
        text = without(text) if name in ignore else text
    return text


def scorer(read: Callable, ignore: Sequence[str] = ("space",)) -> scorers.Scorer:
    """A scorer from the user's OCR function."""

    def judge(asked, images):
        texts = answers(read, "texts", len(images), images)
        for text in texts:
            if not isinstance(text, str):
                kind = type(text).__name__
                raise UserError(
                    f"{called(read)} returned {kind}; expected a text a picture"
                )
        return [judged(x.wanted, text, ignore) for x, text in zip(asked, texts)]

    return judge


def judged(wanted: str, read: str, ignore: Sequence[str] = ("space",)) -> Verdict:
    # Edits take time in the product of lengths; an OCR that repeats itself is cut.
    wanted, read = normal(wanted, ignore), normal(read, ignore)[:READ]
    rate = Levenshtein.distance(wanted, read) / max(len(wanted), 1)
    reason = "" if wanted == read else f'expected "{wanted}", read "{shown(read)}"'
    return Verdict(float(wanted == read), reason, {ERRORS: rate})


def rows(asked: Sequence[Asked], verdicts: Sequence[Verdict]) -> list[Score]:
    """The share of right pictures, also by category if there are several, and the mean
    character error rate."""
    groups = scorers.by_category(asked, verdicts)
    named = {"typography": verdicts}
    if len(groups) > 1:
        named |= {f"typography, {name}": group for name, group in groups.items()}
    scores = [scorers.share_right(name, group) for name, group in named.items()]
    # Mean of the rates, not of the edits: every prompt counts equally.
    rates = [v.others[ERRORS] for v in verdicts]
    return [*scores, scorers.mean(f"typography, {ERRORS}", rates)]
