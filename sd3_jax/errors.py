"""The user's mistakes: one line that says what, where, what was given and wanted."""

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """What only the user can put right: main prints it in one line and exits with 2."""


class ConfigError(UserError, ValueError):
    """A recipe, a key or a value that cannot be."""


class RunFailed(Exception):
    """A run that cannot go on, and not by the user's mistake: one line, exit code 1."""


def near(given: str, choices: Iterable[str]) -> str | None:
    """The choice that was probably meant, if any is close."""
    spelling = {choice.lower(): choice for choice in choices}
    match = difflib.get_close_matches(given.lower(), spelling, n=1)
    return spelling[match[0]] if match else None


def nearest(given: str, choices: Iterable[str]) -> str:
    """The end of a message: `; did you mean "euler"?`, or else all the choices."""
    choices = list(choices)
    match = near(given, choices)
    if match is not None:
        return f'; did you mean "{match}"?'
    return f"; wanted one of {', '.join(choices)}" if choices else ""
