"""Pictures that clients fetch by URL: the newest ones, in memory."""

import secrets
import threading
from collections import OrderedDict


class PictureStore:
    """At most `most` files by names that cannot be guessed."""

    def __init__(self, most: int):
        self._most, self._files = most, OrderedDict[str, tuple[bytes, str]]()
        self._lock = threading.Lock()

    def add(self, data: bytes, suffix: str, kind: str) -> str:
        """The file's name."""
        # 144 random bits: the name is all that protects a picture, since /pictures asks
        # for no key.
        name = secrets.token_urlsafe(18) + suffix
        with self._lock:
            self._files[name] = data, kind
            while len(self._files) > self._most:
                self._files.popitem(last=False)
        return name

    def get(self, name: str) -> tuple[bytes, str] | None:
        """The file and its media type."""
        with self._lock:
            return self._files.get(name)
