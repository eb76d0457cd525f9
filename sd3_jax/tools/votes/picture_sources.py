"""Where the pictures of a vote are: folders of the `sample` job, or plain folders."""

import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from itertools import combinations
from typing import NamedTuple

from etils import epath

from sd3_jax import files
from sd3_jax.data import prompt_text
from sd3_jax.data.prompt_sheet import PromptRow
from sd3_jax.errors import UserError
from sd3_jax.foreign_text import parse_json, shown

LINES = "samples.jsonl"  # of the `sample` job
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
MOST = 10**6  # pictures of a source
LINE = 2**20  # characters of a line of JSON, at most


# Not by seed: different models draw different noise from one seed.
class PictureKey(NamedTuple):
    """What pictures of different sources have in common: prompt and number."""

    prompt: str
    number: int


class Source(NamedTuple):
    """A model's pictures. `problems` names those that were left out, with reasons.

    `sizes` are the heights and widths that were painted, as far as they are known:
    `sample` writes tiny pictures enlarged.
    """

    name: str
    folder: epath.Path
    pictures: dict[PictureKey, epath.Path]
    problems: list[str]
    sizes: dict[PictureKey, tuple[int, int]] = {}


class Entry(NamedTuple):
    """A picture of a folder, by its name there; `problem` says why it is left out."""

    key: PictureKey
    file: str
    problem: str = ""
    size: tuple[int, int] | None = None


class Pair(NamedTuple):
    """Two pictures of one prompt and number, of the sources `first` and `second`."""

    prompt: str
    number: int
    first: str
    second: str

    @property
    def id(self) -> str:
        """16 hexadecimal digits that depend on the fields alone."""
        # Stable over runs and processes, unlike hash(): votes on disk refer to it.
        return hashlib.sha256(json.dumps(self).encode()).hexdigest()[:16]

    @property
    def key(self) -> PictureKey:
        return PictureKey(self.prompt, self.number)


def named_folders(texts: Sequence[str]) -> dict[str, epath.Path]:
    """Folders by name, of texts such as "runs/a" or "base=runs/a".

    UserError for fewer than two, and for two of one name or one folder.
    """
    folders: dict[str, epath.Path] = {}
    for text in texts:
        name, equals, rest = text.partition("=")
        # A folder's own name may have an equals sign in it.
        split = bool(equals and name and not epath.Path(text).is_dir())
        folder = epath.Path(rest if split else text).expanduser()
        name = name.strip() if split else folder.name or str(folder)
        if name in folders:
            raise UserError(
                f'config.vote.sources: two sources are called "{shown(name)}"; name'
                f" them, such as old={shown(text)}"
            )
        if not folder.is_dir():
            raise UserError(f"config.vote.sources = {shown(text, 300)}: no such folder")
        folders[name] = folder
    if len(folders) < 2:
        raise UserError(
            f"config.vote.sources: {len(folders)} folder of pictures; a vote compares"
            " two or more: set --config.vote.sources=FOLDER,FOLDER"
        )
    paths = [files.absolute(folder) for folder in folders.values()]
    if len(set(paths)) < len(paths):
        raise UserError("config.vote.sources: the same folder twice; set two folders")
    return folders


def read_source(name: str, folder: epath.Path, rows: Sequence[PromptRow]) -> Source:
    """The pictures of a folder by prompt and number; UserError if it holds none.

    A folder of the `sample` job has samples.jsonl. In another one a picture's prompt is
    in the text file of its name, or is the one of `rows` whose place, from 0, the
    picture's name begins with.
    """
    read_entries = _sampled if (folder / LINES).is_file() else _plain
    pictures: dict[PictureKey, epath.Path] = {}
    sizes, problems = {}, []
    for key, file, problem, size in read_entries(folder, rows):
        if not problem and key in pictures:
            problem = f"a second picture {key.number} of its prompt"
        if problem:
            problems.append(f"{name}: {shown(file, 200)}: {problem}")
            continue
        pictures[key] = folder / file
        if size:
            sizes[key] = size
    if not pictures:
        first = f"; the first: {problems[0]}" if problems else ""
        raise UserError(f"{folder}: holds no picture with a prompt{first}")
    return Source(name, folder, pictures, problems, sizes)


def pairs(
    sources: Sequence[Source], rows: Sequence[PromptRow]
) -> tuple[list[Pair], list[str]]:
    """All pairs of pictures to compare, and a line for each picture without a partner.

    With `rows` only their prompts count. UserError if no pair is left.
    """
    chosen = {row.prompt for row in rows}
    by_source: Mapping[str, set[PictureKey]] = {
        source.name: {
            key for key in source.pictures if not rows or key.prompt in chosen
        }
        for source in sources
    }
    every_key = set().union(*by_source.values())
    sampled = {key.prompt for key in every_key}
    # A prompt that no source painted is reported too.
    every_key |= {PictureKey(x.prompt, 0) for x in rows if x.prompt not in sampled}
    problems = [
        f'{name}: no picture {key.number} of "{shown(key.prompt, 60)}"'
        for name, keys in by_source.items()
        for key in sorted(every_key - keys)
    ]
    for source in sources:
        if others := len(source.pictures) - len(by_source[source.name]):
            problems.append(
                f"{source.name}: {others} pictures of prompts that the file lacks"
            )
    # Sorted names, so that a pair keeps its id when the sources are listed differently.
    joint = [
        Pair(*key, a, b)
        # A key joins every two sources that have it, so that one missing picture costs
        # only its own pairs.
        for a, b in combinations(sorted(by_source), 2)
        for key in sorted(by_source[a] & by_source[b])
    ]
    if not joint:
        raise UserError(
            "config.vote.sources: no prompt has a picture in two sources; sample all of"
            " them with the same prompts" + (f"; {problems[0]}" if problems else "")
        )
    return joint, problems


def _sampled(folder: epath.Path, rows: Sequence[PromptRow]) -> Iterator[Entry]:
    """The picture of each line of samples.jsonl."""
    # Split at "\n" alone: str.splitlines also splits at U+2028, which JSON allows in a
    # text.
    text = files.read_bytes(folder / LINES).decode(errors="replace")
    for number, line in enumerate(text.split("\n")[:MOST], 1):
        if not line.strip():
            continue
        try:
            entry = _entry_of(parse_json(line[:LINE]))
        except (ValueError, UserError) as error:
            # A job killed as it wrote leaves half a line.
            where = f"{LINES}, line {number}"
            yield Entry(PictureKey("", 0), where, shown(error, 200))
            continue
        if not entry.problem and not (folder / entry.file).is_file():
            entry = entry._replace(problem="no such picture")
        yield entry


def _entry_of(fields) -> Entry:
    if not isinstance(fields, dict):
        raise ValueError("expected a JSON object")
    prompt, number, path = (fields.get(x) for x in ("prompt", "number", "file"))
    # A list is the prompt of each text encoder; the first one is shown.
    prompt = prompt[0] if isinstance(prompt, list) and prompt else prompt
    if not isinstance(prompt, str) or type(number) is not int or number < 0:
        raise ValueError("expected the prompt and number of a picture")
    # The file may be someone else's: it names pictures below its folder alone.
    if not isinstance(path, str) or not path or re.search(r"^/|^~|\\|\.\.|\0|:", path):
        raise ValueError(f"file {shown(path)}: expected a path below the folder")
    size = None
    match fields.get("settings"):
        case {"height": int(height), "width": int(width)} if min(height, width) > 0:
            size = height, width
    key = PictureKey(prompt_text.checked(prompt), number)
    problem = "black, because sample.filter flagged it" if "filtered" in fields else ""
    return Entry(key, path, problem, size)


def _plain(folder: epath.Path, rows: Sequence[PromptRow]) -> Iterator[Entry]:
    """The pictures of a folder without samples.jsonl."""
    # One listing: in a bucket each look for a caption would be a request.
    listing = set(files.names(folder))
    for name in sorted(x for x in listing if x.lower().endswith(SUFFIXES)):
        stem = name.rpartition(".")[0]
        prompt, problem = "", ""
        if f"{stem}.txt" in listing:
            data = files.read_bytes(folder / f"{stem}.txt")
            try:
                prompt = prompt_text.checked(data.decode("utf-8-sig").strip())
            except (UserError, UnicodeDecodeError) as error:
                problem = f"{stem}.txt: {error}"
        # As benchmarks name their pictures: 00012.png shows prompt 12, counted from 0.
        elif match := re.match(r"\d{1,9}", stem):
            index = int(match[0])
            if index < len(rows):
                prompt = rows[index].prompt
            else:
                problem = f"prompt {index} of {len(rows)} in config.vote.prompts"
        else:
            problem = f"no {stem}.txt, and no number at the start of its name"
        yield Entry(PictureKey(prompt, 0), name, problem)
