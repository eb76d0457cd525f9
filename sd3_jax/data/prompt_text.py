"""Checking and normalizing prompts for tokenizers, file names and HTML pages."""

import re

from sd3_jax.errors import UserError
from sd3_jax.foreign_text import shown

LENGTH = 8_192  # characters, many times what any encoder reads
LINES = re.compile("[\t\n\v\f\r\x85\u2028\u2029]")
ENDS = "\n\v\f\r\x85\u2028\u2029"  # of lines
REFUSED = re.compile("[\x00-\x1f\x7f-\x9f\ud800-\udfff]")


def checked(text: str, name: str = "prompt") -> str:
    """The prompt on one line; UserError if it is too long or has control characters.

    The empty prompt is allowed: guidance steers away from it.
    """
    # Halves of surrogate pairs, which UTF-8 cannot spell, and control characters come
    # from broken files. Marks of direction stay: right-to-left text needs them.
    if len(text) > LENGTH:
        raise UserError(f"{name}: {len(text)} characters; the limit is {LENGTH}")
    text = on_one_line(text)
    if bad := REFUSED.search(text):
        raise UserError(
            f"{name}: {shown(bad[0])} at character {bad.start() + 1}; expected text"
            " without control characters"
        )
    return text


def on_one_line(text: str) -> str:
    """The text without line ends at its end; tabs and other line ends become spaces.

    An editor leaves a line end in a .txt; it must not make another prompt.
    """
    return LINES.sub(" ", text.rstrip(ENDS))
