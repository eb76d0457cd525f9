"""Prompts as people give them, made fit for tokenizers, file names and pages."""

import re

from sd3_jax.errors import UserError
from sd3_jax.foreign_text import shown

LENGTH = 8_192  # characters, many times what any encoder reads
LINES = re.compile("[\t\n\v\f\r\x85\u2028\u2029]")
ENDS = "\n\v\f\r\x85\u2028\u2029"  # of lines
REFUSED = re.compile("[\x00-\x1f\x7f-\x9f\ud800-\udfff]")


def checked(text: str, name: str = "prompt") -> str:
    """The text on one line; else a UserError: one too long, or no text at all.

    It is as `on_one_line` has it. Other control characters, and halves of
    surrogate pairs, which UTF-8 cannot spell, come of broken files: they are refused.
    Marks of direction stay, for they are part of what is said; pages do without.
    Nothing is what a guided velocity is steered away from: the empty prompt is allowed.
    """
    if len(text) > LENGTH:
        raise UserError(f"{name}: {len(text)} characters; wanted at most {LENGTH}")
    text = on_one_line(text)
    if bad := REFUSED.search(text):
        raise UserError(
            f"{name}: {shown(bad[0])} at character {bad.start() + 1}; wanted text"
            " without control characters"
        )
    return text


def on_one_line(text: str) -> str:
    """Without the ends of lines at its end, as an editor leaves one in a .txt; tabs and
    other ends of lines as spaces."""
    return LINES.sub(" ", text.rstrip(ENDS))
