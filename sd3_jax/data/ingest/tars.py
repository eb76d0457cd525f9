"""Locate the members of WebDataset tars; nothing is ever extracted.

Python's tarfile is unused: before 3.11.14 a negative size makes it loop forever, and
it still ends silently at a damaged header, keeps every member in memory and reads names
of any length.
"""

import re
from collections.abc import Iterator
from typing import BinaryIO, NamedTuple

from etils import epath

from sd3_jax import files
from sd3_jax.errors import UserError
from sd3_jax.foreign_text import shown

EXTENSIONS = ("jpg", "jpeg", "png", "webp", "txt", "caption", "json")
OTHER = "another extension"
# Limits: sizes in a damaged or hostile header are arbitrary.
MEMBER = 2**27  # bytes of one member, at most
NAME = 255  # characters
LONG = 2**20  # bytes of what precedes a member with a long name
BLOCK = 512
FOLDER = "folder"
# Type flags of POSIX and GNU: what each is called, "" for a plain file.
KINDS = {"1": "hard link", "2": "symbolic link", "3": "device", "4": "device"}
KINDS |= {"5": FOLDER, "6": "FIFO", "S": "sparse file", "0": "", "7": "", "\0": ""}
COMPRESSED = {  # by its first bytes: the program, and how to unpack
    b"\x1f\x8b": ("gzip", "gzip -dc"),
    b"\x28\xb5\x2f\xfd": ("zstd", "zstd -dc"),
    b"\xfd7zXZ\0": ("xz", "xz -dc"),
    **{b"BZh%d1AY&SY" % n: ("bzip2", "bzip2 -dc") for n in range(1, 10)},
}
BARE = "123456"  # types without data, whatever size their header gives


class BadTar(UserError):
    """A tar that cannot be read on: its path, the last good member, and the reason."""


class Member(NamedTuple):
    """Where a member's bytes lie, or why it is rejected."""

    name: str
    key: str  # a label with its folder, never a path
    extension: str  # in lower case, without the first dot
    start: int
    size: int
    reason: str  # "" if it is taken


def members(path: epath.PathLike) -> Iterator[Member]:
    """Yield every member in order, rejected ones too, reading headers only.

    Raises BadTar where a damaged or truncated tar cannot be read on.
    """
    path = epath.Path(path)
    try:
        with path.open("rb") as file:
            for name, kind, start, size in _entries(file, path):
                yield _member(name, kind, start, size)
    except OSError as error:
        files.require_answered(str(path), error)
        raise BadTar(f"{path}: cannot be read: {error.strerror or error}") from None


def compression(path: epath.PathLike) -> str:
    """Why a compressed tar is refused and how to unpack it; "" for any other file."""
    try:
        with epath.Path(path).open("rb") as file:
            return _compressed(file.read(BLOCK), str(path))
    except OSError:  # the part that is to read it says so
        return ""


def by_last_dot(member: Member) -> Member | None:
    """A member whose extension is unknown, with its key ending at the last dot instead;
    None if what follows the last dot is not a known extension either."""
    key, _, extension = member.name.rpartition(".")
    parts = [part for part in key.split("/") if part not in ("", ".")]
    if member.reason != OTHER or extension.lower() not in EXTENSIONS or not parts:
        return None
    reason = f"more than {MEMBER} bytes" if member.size > MEMBER else ""
    key, extension = "/".join(parts), extension.lower()
    return member._replace(key=key, extension=extension, reason=reason)


def _member(name: str, kind: str, start: int, size: int) -> Member:
    key, extension = _split(name)
    reason = kind or _unfit(name, key)
    if not reason and extension not in EXTENSIONS:
        reason = OTHER
    if not reason and size > MEMBER:
        reason = f"more than {MEMBER} bytes"
    return Member(name, key, extension, start, size, reason)


def _compressed(start: bytes, path: str) -> str:
    for magic, (program, unpack) in COMPRESSED.items():
        if start.startswith(magic):
            plain = re.sub(r"(\.tar)?\.[^./]+$", "", path) + ".plain.tar"
            command = f"{unpack} {shown(path, 200)} > {shown(plain, 200)}"
            wanted = f"expected a plain tar: unpack it with {command}"
            return f"is compressed by {program}; {wanted}"
    return ""


def _entries(file: BinaryIO, path) -> Iterator[tuple[str, str, int, int]]:
    """(name, kind or "" for a file, start, size) of each member."""
    length, at, name, extended = files.size(path), 0, "its start", {}
    while True:
        file.seek(at)
        block = file.read(BLOCK)
        if not at and (reason := _compressed(block, str(path))):
            raise BadTar(f"{path}: {reason}")
        if len(block) < BLOCK:
            raise _bad(path, name, "cut off after it")
        if not any(block):  # a block of zeros ends a tar; what follows is padding
            return
        kind, size = chr(block[156]), _octal(block[124:136])
        if size is None or _octal(block[148:156]) != _checksum(block):
            hint = "" if at else "; expected a plain tar"
            raise _bad(path, name, f"no tar header after it{hint}")
        at += BLOCK
        # x and g (pax), L and K (GNU) are headers of the member that follows: of them
        # its long name and its size beyond 8 GiB are used.
        if kind not in "xgLK":
            name = extended.get("path", _name(block))
            size = extended.get("size", size)
            # GNU's flag that a table of more pieces follows the header.
            if kind == "S" and block[482]:
                raise _bad(
                    path,
                    name,
                    "a sparse file in many pieces, which is not supported",
                )
            size = 0 if kind in BARE else size
        if at + size > length:
            raise _bad(
                path,
                name,
                f"{size} bytes, of which {max(0, length - at)} could be read",
            )
        if kind in "xL":
            if size > LONG:
                raise _bad(path, name, f"a name of {size} bytes after it")
            text = _read(file, size, path, name)
            extended |= _pax(text) if kind == "x" else {"path": _text(text)}
        elif kind not in "gK":
            kind_name = KINDS.get(kind, "unknown type")
            kind_name = FOLDER if name.endswith("/") and not kind_name else kind_name
            yield name, extended.get("kind", kind_name), at, size
            extended = {}
        at += -(-size // BLOCK) * BLOCK


def _octal(field: bytes) -> int | None:
    if field[0] == 0x80:  # GNU: a large number in binary
        return int.from_bytes(field[1:])
    digits = re.fullmatch(rb" *([0-7]*)[ \0]*", field)
    return int(digits[1] or b"0", 8) if digits else None


def _checksum(block: bytes) -> int:
    """The sum of a header's bytes, its own checksum field counted as spaces."""
    return sum(block) - sum(block[148:156]) + 8 * ord(" ")


def _name(block: bytes) -> str:
    parts = [block[:100]]
    if block[257:263] == b"ustar\0" and block[345]:
        parts = [block[345:500], *parts]
    return "/".join(map(_text, parts))


def _pax(text: bytes) -> dict:
    """The path, size and sparseness in pax records, each "length name=value"."""
    values = {}
    while record := re.match(rb"(\d{1,7}) ([^=]+)=", text):
        name, value = record[2], text[record.end() : int(record[1]) - 1]
        text = text[max(int(record[1]), record.end()) :]
        if name == b"path":
            values["path"] = value.decode(errors="surrogateescape")
        elif name == b"size" and re.fullmatch(rb"\d{1,18}", value):
            values["size"] = int(value)
        elif name.startswith(b"GNU.sparse"):
            values["kind"] = KINDS["S"]
    return values


def _text(field: bytes) -> str:
    return field.split(b"\0")[0].decode(errors="surrogateescape")


def _split(name: str) -> tuple[str, str]:
    """WebDataset's rule: the extension begins at the first dot of the last part."""
    *folders, last = [part for part in name.split("/") if part not in ("", ".")] or [""]
    stem, _, extension = last.partition(".")
    return "/".join([*folders, stem]) if stem else "", extension.lower()


def _unfit(name: str, key: str) -> str:
    """Why a name cannot be a source: it reads as a path elsewhere, or is garbage."""
    leads = name.startswith("/") or ".." in re.split(r"[/\\]", name)
    if leads or re.match(r"[A-Za-z]:[/\\]", name):
        return "a name that leads out of its folder"
    if len(name) > NAME or not name.isprintable() or "\\" in name or not key:
        return "an odd name"
    return ""


def _read(file, size, path, name) -> bytes:
    data = file.read(size)
    if len(data) < size:
        raise _bad(path, name, f"{size} bytes, of which {len(data)} could be read")
    return data


def _bad(path, name, reason) -> BadTar:
    return BadTar(f"{path}: at {shown(name)}: {reason}")
