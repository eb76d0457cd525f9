"""Votes in SQLite: each is on disk before `cast` returns, and none is ever deleted."""

import contextlib
import os
import secrets
import sqlite3
import threading
from collections.abc import Iterator
from typing import NamedTuple

from etils import epath

from sd3_jax import files
from sd3_jax.errors import UserError

FILE = "votes.sqlite"
WINNERS = ("first", "second", "tie", "bad")
VERSION = 1  # of the tables
# `again` is 1 for a pair that a voter judges a second time, to measure consistency. A
# vote that its voter takes back keeps its row, so that a late repeat of the request
# does not cast it again.
# The unique index makes a second vote on a question fail in SQLite itself, however many
# requests arrive at once. STRICT tables refuse values of another type.
TABLES = """
CREATE TABLE IF NOT EXISTS vote (
  id TEXT PRIMARY KEY, voter TEXT NOT NULL, pair TEXT NOT NULL,
  prompt TEXT NOT NULL, number INTEGER NOT NULL,
  first TEXT NOT NULL, second TEXT NOT NULL, question TEXT NOT NULL,
  again INTEGER NOT NULL CHECK (again IN (0, 1)),
  winner TEXT NOT NULL CHECK (winner IN ('first', 'second', 'tie', 'bad')),
  at_left TEXT NOT NULL CHECK (at_left IN ('first', 'second')),
  seconds REAL NOT NULL, withdrawn INTEGER NOT NULL DEFAULT 0
) STRICT;
CREATE UNIQUE INDEX IF NOT EXISTS one_vote ON vote (voter, pair, question, again)
  WHERE withdrawn = 0;
CREATE INDEX IF NOT EXISTS by_voter ON vote (voter);
CREATE TABLE IF NOT EXISTS secret (value BLOB NOT NULL) STRICT;
"""


class Vote(NamedTuple):
    """One answer. `seconds` is its time since 1970, by the server's clock."""

    id: str  # the client's
    voter: str
    pair: str
    prompt: str
    number: int
    first: str
    second: str
    question: str
    again: int
    winner: str  # one of WINNERS
    at_left: str  # "first" or "second"
    seconds: float


class Conflict(Exception):
    """The vote contradicts one that is stored."""


class StorageFailed(Exception):
    """The vote is not stored: the disk is full, or cannot be written."""


class BallotBox:
    """The votes of a folder. Threads may share it."""

    def __init__(self, folder: epath.PathLike):
        path = epath.Path(folder) / FILE
        if files.remote(path):
            raise UserError(
                f"{folder}: votes need a local disk; set --workdir to a local folder"
            )
        self._lock = threading.Lock()
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._connection = _connected(os.fspath(path))
            # 0 is a file that SQLite has just made.
            version = self._connection.execute("PRAGMA user_version").fetchone()[0]
            if version not in (0, VERSION):
                self._connection.close()
                raise UserError(
                    f"{path}: version {version} of the tables; expected {VERSION}"
                )
            self._connection.executescript(TABLES)
            self._connection.execute(f"PRAGMA user_version = {VERSION}")
            self.secret = self._load_secret()
        except (sqlite3.Error, OSError) as error:
            raise UserError(f"{path}: cannot be opened: {error}") from None

    def close(self) -> None:
        with self._lock:
            self._connection.close()

    def cast(self, vote: Vote) -> bool:
        """Store a vote; False if it is stored already, by its id.

        It survives a kill of the process and a loss of power once this returns.
        Conflict if the id belongs to another vote, or if the voter has judged the pair;
        StorageFailed if it cannot be stored.
        """
        places = ", ".join("?" * len(Vote._fields))
        insert = f"INSERT INTO vote ({', '.join(Vote._fields)}) VALUES ({places})"
        with self._lock, _writing():
            try:
                # A statement outside a transaction is committed, with fsync, at once.
                self._connection.execute(insert, vote)
                return True
            except sqlite3.IntegrityError:
                stored = self._by_id(vote.id)
        # Not the id but the index of `one_vote` is violated.
        if stored is None:
            raise Conflict("this voter has judged the pair already")
        # A repeat of a lost request has everything in common but its time of arrival.
        if stored._replace(seconds=vote.seconds) != vote:
            raise Conflict("the id belongs to another vote")
        return False

    def withdraw(self, voter: str, vote_id: str) -> tuple[Vote, bool] | None:
        """Take back a vote of the voter's; also whether it counted until now.

        None if the voter has no such vote.
        """
        with self._lock, _writing():
            vote = self._by_id(vote_id)
            if vote is None or vote.voter != voter:
                return None
            # Checked and set in one statement, so that two requests cannot both take it
            # back.
            update = "UPDATE vote SET withdrawn = 1 WHERE id = ? AND withdrawn = 0"
            return vote, self._connection.execute(update, [vote_id]).rowcount > 0

    def last_id(self, voter: str) -> str | None:
        """The id of the voter's last vote that was not taken back."""
        select = "SELECT id FROM vote WHERE voter = ? AND withdrawn = 0"
        with self._lock:
            # rowid is the order of insertion; seconds of two votes may be equal.
            query = f"{select} ORDER BY rowid DESC LIMIT 1"
            row = self._connection.execute(query, [voter]).fetchone()
        return row and row[0]

    def votes(self) -> list[Vote]:
        """All votes that were not taken back, oldest first."""
        with self._lock:
            return stored_votes(self._connection)

    def _by_id(self, vote_id: str) -> Vote | None:
        select = f"SELECT {', '.join(Vote._fields)} FROM vote WHERE id = ?"
        row = self._connection.execute(select, [vote_id]).fetchone()
        return Vote(*row) if row else None

    def _load_secret(self) -> bytes:
        """A key that hides which source a picture's address belongs to."""
        row = self._connection.execute("SELECT value FROM secret").fetchone()
        if row:
            return row[0]
        value = secrets.token_bytes(32)
        self._connection.execute("INSERT INTO secret VALUES (?)", [value])
        return value


def read_votes(folder: epath.PathLike) -> list[Vote]:
    """The votes of a folder, while its server runs or not; UserError if it has none."""
    path = epath.Path(folder) / FILE
    if not path.is_file():
        raise UserError(
            f"{folder}: no {FILE}; run `sd3-jax vote` first, or set --workdir to a"
            " folder of votes"
        )
    try:
        with contextlib.closing(_connected(os.fspath(path))) as connection:
            votes = stored_votes(connection)
    except sqlite3.Error as error:
        raise UserError(f"{path}: cannot be read: {error}") from None
    if not votes:
        raise UserError(f"{path}: holds no vote yet")
    return votes


def stored_votes(connection: sqlite3.Connection) -> list[Vote]:
    select = f"SELECT {', '.join(Vote._fields)} FROM vote WHERE withdrawn = 0"
    return [Vote(*row) for row in connection.execute(f"{select} ORDER BY rowid")]


def _connected(path: str) -> sqlite3.Connection:
    # isolation_level=None: no transaction begins unasked, so each statement commits.
    connection = sqlite3.connect(
        path, isolation_level=None, check_same_thread=False, timeout=10
    )
    connection.execute("PRAGMA journal_mode = WAL")
    # In WAL mode NORMAL would lose the last votes at a loss of power.
    connection.execute("PRAGMA synchronous = FULL")
    return connection


@contextlib.contextmanager
def _writing() -> Iterator[None]:
    try:
        yield
    # A constraint, which the callers explain; a full disk is an OperationalError.
    except sqlite3.IntegrityError:
        raise
    except sqlite3.Error as error:
        # sqlite has rolled the statement back: the box holds what it held before.
        raise StorageFailed(str(error)) from None
