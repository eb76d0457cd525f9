"""Errors as OpenAI's API answers them: {"error": {message, type, param, code}}."""

import re

from sd3_jax.errors import UserError
from sd3_jax.foreign_text import shown

LENGTH = 600  # characters of a message
# Absolute paths of the host, which no client is to learn.
PATHS = re.compile(r"(?<![\w:/])/(?:[^\s/:,;'\"]+/)+[^\s:,;'\"]*")


# Not a UserError: main turns that into exit code 2, and this one concerns a client.
class ApiError(Exception):
    """An answer that is not 200; `wait` is Retry-After in seconds."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str,
        param: str | None = None,
        wait: float | None = None,
    ):
        super().__init__(message)
        self.status, self.message, self.code = status, message, code
        self.param, self.wait = param, wait

    @property
    def headers(self) -> dict[str, str]:
        return (
            {} if self.wait is None else {"Retry-After": str(max(1, round(self.wait)))}
        )

    def body(self) -> dict:
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        kind = {401: "authentication_error", 429: "rate_limit_error"}.get(
            self.status, kind
        )
        return {
            "error": {
                "message": self.message,
                "type": kind,
                "param": self.param,
                "code": self.code,
            }
        }


def invalid(message: str, param: str | None = None, code: str = "invalid_value"):
    """A 400 for a value of the field `param`."""
    return ApiError(400, public(message), code=code, param=param)


def of_mistake(error: UserError, names: dict[str, str]) -> ApiError:
    """A UserError about a request as a 400; `names` are the API's by the config's."""
    text, param = str(error), None

    def renamed(match: re.Match) -> str:
        return names.get(match[1], match[1])

    # Checks speak of the config's keys, which the client has never seen.
    text = re.sub(r"config\.(?:sample|image)\.(\w+)", renamed, text)
    # Checks begin their messages with the setting's name; OpenAI's clients read it as
    # `param`.
    if match := re.match(r"(\w+)\b", text):
        word = names.get(match[1], match[1])
        param = word if word in names.values() else None
    return invalid(text, param)


def public(message: str) -> str:
    """The message without paths of the host, on one line."""
    return shown(PATHS.sub("a file", " ".join(message.split())), LENGTH)
