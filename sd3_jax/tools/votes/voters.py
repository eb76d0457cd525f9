"""Who may vote: everyone under a name of their choice, or named voters with a token."""

import hmac
import json
import os
import re
import secrets
from collections.abc import Sequence

from etils import epath

from sd3_jax import files
from sd3_jax.errors import UserError
from sd3_jax.foreign_text import shown

FILE = "voters.json"
# No control characters and no markup: a name appears in results.
NAME = re.compile(r"[^\W_][\w .'-]{0,47}")  # letters of any script, digits


def is_name(text: object) -> bool:
    return isinstance(text, str) and bool(NAME.fullmatch(text))


class Voters:
    """Names by the cookie of a request. Without `tokens` the cookie is the name."""

    def __init__(self, tokens: dict[str, str]):
        self.tokens = tokens  # by name

    def name(self, cookie: str) -> str | None:
        """The voter of a cookie's text, or None."""
        # Names without tokens are on trust: anyone may take another's.
        if not self.tokens:
            return cookie if is_name(cookie) else None
        match = None
        # Every token is compared, each in constant time: the time of an answer says
        # nothing about how much of a guess is right.
        for name, token in self.tokens.items():
            if hmac.compare_digest(token.encode(), cookie.encode()):
                match = name
        return match


def load(folder: epath.PathLike, names: Sequence[str]) -> Voters:
    """The voters of a folder; new `names` get a token, which voters.json keeps.

    Without names everyone may vote. UserError for a name that is not allowed.
    """
    for name in names:
        if not is_name(name):
            raise UserError(
                f'config.vote.voters: "{shown(name)}"; expected names of letters,'
                " digits and spaces, at most 48 characters"
            )
    if not names:
        return Voters({})
    path = epath.Path(folder) / FILE
    stored = files.read_object(path) if path.is_file() else {}
    # Too short a token was edited by hand, and could be guessed.
    stored_tokens = {
        k: v for k, v in stored.items() if isinstance(v, str) and len(v) >= 16
    }
    tokens = {
        name: stored_tokens.get(name) or secrets.token_urlsafe(24) for name in names
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    # The file must never be readable by others, not even while it is written.
    partial = f"{path}.{secrets.token_hex(4)}.part"
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL
    with os.fdopen(os.open(partial, flags, 0o600), "w") as file:
        # Tokens of names that are not listed now stay: their links work again if they
        # return.
        json.dump(stored_tokens | tokens, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)
    return Voters(tokens)
