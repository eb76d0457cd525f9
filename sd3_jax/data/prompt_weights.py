"""Weights within a prompt: "(word:1.3)" as AUTOMATIC1111 reads it, "word++" as compel.

"parentheses" is the grammar of AUTOMATIC1111's prompt_parser.parse_prompt_attention;
"compel" that of compel's PromptParser, for attention alone.
"""

import math
import re
from typing import NamedTuple

from sd3_jax.errors import UserError
from sd3_jax.foreign_text import shown

MOST = 100  # of a weight, without its sign
ROUND, SQUARE = 1.1, 1 / 1.1  # the weights of (word) and [word]
PLUS, MINUS = 1.1, 0.9  # of a + and a - of compel
DEPTH = 100  # of groups inside each other, in compel's syntax
NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)")


class Piece(NamedTuple):
    """A part of a prompt and its weight; 1 leaves it as it is."""

    text: str
    weight: float


class WeightedPrompt(NamedTuple):
    """A prompt's `pieces`, and its `text` without the syntax of weights."""

    text: str
    pieces: tuple[Piece, ...]

    @property
    def is_plain(self) -> bool:
        return all(piece.weight == 1 for piece in self.pieces)


def parse(prompt: str, syntax: str) -> WeightedPrompt:
    """Read a prompt in one of the SYNTAXES.

    Raises UserError with the position of what does not parse: a bracket without a
    partner, a weight that is not a finite number, an operator that is not supported.
    """
    return SYNTAXES[syntax](prompt)


def _refuse(prompt: str, at: int, fault: str) -> UserError:
    return UserError(f'prompt "{shown(prompt, 60)}", character {at + 1}: {fault}')


def _joined(
    prompt: str, parts: list[tuple[str, float, int]], between: str
) -> WeightedPrompt:
    """Parts (text, weight, position) with neighbours of one weight made one."""
    pieces: list[Piece] = []
    for text, weight, at in parts:
        # Written so that NaN fails as well.
        if not abs(weight) <= MOST:
            fault = f"a weight of {weight:g}; expected -{MOST} to {MOST}"
            raise _refuse(prompt, at, fault)
        # Fewer pieces: tokens are joined piece by piece, and a cut within a phrase may
        # change them.
        if pieces and pieces[-1].weight == weight:
            pieces[-1] = Piece(pieces[-1].text + between + text, weight)
        elif text:
            pieces.append(Piece(text, weight))
    return WeightedPrompt(between.join(piece.text for piece in pieces), tuple(pieces))


# --- parentheses

LEXEMES = re.compile(r"\\[()\[\]\\:]|[()\[\]:|]|[^()\[\]:|\\]+|\\")
AFTER_COLON = re.compile(r"\s*([^()\[\]:|\\]*?)\s*([)\]])")


def _parse_parentheses(prompt: str) -> WeightedPrompt:
    parts: list[list] = []  # text, weight, position
    opened: list[tuple[str, int, int]] = []  # bracket, its position, its first part
    at = 0
    while at < len(prompt):
        lexeme = LEXEMES.match(prompt, at)[0]
        end = at + len(lexeme)
        if lexeme in ("(", "["):
            opened.append((lexeme, at, len(parts)))
        elif lexeme in (")", "]"):
            _close(prompt, at, opened, parts, ROUND if lexeme == ")" else SQUARE)
        elif lexeme == ":" and (number := _number(prompt, end, opened)):
            weight, end = number
            _close(prompt, end - 1, opened, parts, weight)
        elif lexeme == "|" and opened and opened[-1][0] == "[":
            # AUTOMATIC1111 alternates such words: another prompt for each step.
            raise _refuse(prompt, at, "alternatives [a|b] are not supported")
        else:
            # An escaped bracket, colon or backslash is text; before any other letter a
            # backslash is text itself.
            text = lexeme[1:] if len(lexeme) == 2 and lexeme[0] == "\\" else lexeme
            parts.append([text, 1.0, at])
        at = end
    if opened:
        bracket, at, _ = opened[-1]
        raise _refuse(prompt, at, f'"{bracket}" is not closed; write \\{bracket}')
    return _joined(prompt, [(text, w, at) for text, w, at in parts], "")


def _close(prompt, at, opened, parts, weight) -> None:
    """Multiply the parts since the bracket that prompt[at] closes."""
    partner = {")": "(", "]": "["}[prompt[at]]
    if not opened or opened[-1][0] != partner:
        fault = f'"{prompt[at]}" without a "{partner}"; write \\{prompt[at]}'
        raise _refuse(prompt, at, fault)
    # Weights of nested brackets multiply, so it is the parts that bear them.
    *_, first = opened.pop()
    for part in parts[first:]:
        part[1] *= weight


def _number(prompt: str, start: int, opened: list) -> tuple[float, int] | None:
    """The weight from `start` to a closing bracket, and where that ends; None for a
    colon of the text."""
    match = AFTER_COLON.match(prompt, start)
    if not opened or match is None:
        return None
    text, bracket = match.groups()
    is_number = NUMBER.fullmatch(text) is not None
    if bracket == "]":
        # AUTOMATIC1111 changes the prompt there during sampling.
        if is_number:
            fault = "changes of the prompt [a:b:0.5] are not supported"
            raise _refuse(prompt, start - 1, fault)
        return None
    if not is_number or not math.isfinite(float(text)):
        fault = f'a weight "{shown(text, 20)}"; expected a number, or \\: for a colon'
        raise _refuse(prompt, start, fault)
    return float(text), match.end()


# --- compel

SYNTAX = re.compile(r'[()"\\+-]')
OPERATOR = re.compile(r"(?<!\\)\.(swap|blend|and|add|attend)\(|\b(withLora|useLora)\(")
SIGNS = re.compile(r"\++|-+")
FACTOR = re.compile(r"[\d.]\w*(?:\.\d\w*)*")
# A word that may bear + or -: within it a sign is followed by a letter or a digit.
WORD = re.compile(r"""(?:\\.|[+-](?![\s()",.+\-=]|$)|[^\s()",.+\-=\\])++(?=[+-])""")
# `++` above gives nothing back: a word of a thousand letters is read once, and not once
# for each of its lengths.
PLAIN_WORD = re.compile(r"(?:\\.|[^\s()\\,])+,*|,+|\\")
ESCAPED = re.compile(r'\\([()"+\-.,=\\])')


def _parse_compel(prompt: str) -> WeightedPrompt:
    if match := OPERATOR.search(prompt):
        fault = f'"{match[0]}" is not supported, only weights'
        raise _refuse(prompt, match.start(), fault)
    # As it is, spaces included: the parts below would be joined by single ones.
    if not SYNTAX.search(prompt):
        return WeightedPrompt(prompt, (Piece(prompt, 1.0),))
    parts, end = _compel_parts(prompt, 0, "")
    return _joined(prompt, parts, " ")


def _compel_parts(
    prompt: str, at: int, closing: str, depth: int = 0
) -> tuple[list[tuple[str, float, int]], int]:
    """Parts (text, weight, position) up to the bracket or quote that closes a group,
    and the position behind it."""
    parts, start = [], at - 1
    # A stranger's prompt must not end the program at Python's limit of recursion.
    if depth > DEPTH:
        fault = f"more than {DEPTH} groups inside each other"
        raise _refuse(prompt, start, fault)
    while at < len(prompt):
        c = prompt[at]
        if c == closing:
            return parts, at + 1
        if c.isspace():
            at += 1
        elif c == ")":
            raise _refuse(prompt, at, '")" without a "("; write \\)')
        elif c in '("':
            end = ")" if c == "(" else c
            group, at = _compel_parts(prompt, at + 1, end, depth + 1)
            factor, at = _compel_factor(prompt, at)
            parts += [(text, weight * factor, where) for text, weight, where in group]
        elif match := WORD.match(prompt, at):
            signs = SIGNS.match(prompt, match.end())[0]
            parts.append((ESCAPED.sub(r"\1", match[0]), _power(signs), at))
            at = match.end() + len(signs)
        else:
            # A quote within a word is text, unless it closes the group.
            word = PLAIN_WORD.match(prompt, at)[0]
            word = word.partition('"')[0] if closing == '"' else word
            parts.append((ESCAPED.sub(r"\1", word), 1.0, at))
            at += len(word)
    if closing:
        opening = prompt[start]
        raise _refuse(prompt, start, f"'{opening}' is not closed; write \\{opening}")
    return parts, at


def _compel_factor(prompt: str, at: int) -> tuple[float, int]:
    """The weight written behind a group, 1 if there is none, and where it ends."""
    if match := SIGNS.match(prompt, at):
        # A negative weight is meant, which compel does not have.
        if prompt[match.end() : match.end() + 1].isdigit():
            fault = "a weight with a sign; expected +, - or a number of 0 or more"
            raise _refuse(prompt, at, fault)
        return _power(match[0]), match.end()
    match = FACTOR.match(prompt, at)
    if match is None or match[0] == ".":
        if match := re.compile(r"(nan|inf(inity)?)\b", re.I).match(prompt, at):
            raise _refuse(prompt, at, f'a weight "{match[0]}"; expected a number')
        return 1.0, at
    text = match[0]
    if not NUMBER.fullmatch(text) or not math.isfinite(float(text)):
        raise _refuse(prompt, at, f'a weight "{shown(text, 20)}"; expected a number')
    return float(text), match.end()


def _power(signs: str) -> float:
    return (PLUS if signs[0] == "+" else MINUS) ** len(signs)


SYNTAXES = {"parentheses": _parse_parentheses, "compel": _parse_compel}
