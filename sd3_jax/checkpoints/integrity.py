"""What tells a sound checkpoint from a damaged one, and one of ours from a newer one.

Of each leaf a fingerprint is taken on the devices before a save and after a load: it
holds over the whole way between. The sums of the files say which of them is damaged,
before a byte is believed, and cover what no leaf is read from. Orbax has neither: it
loads a flipped bit in silence.
"""

import hashlib
import json
import zlib
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jaxlib
from etils import epath

import sd3_jax
from sd3_jax import files, tree
from sd3_jax.errors import RetryableError, UserError, passing

FORMAT = 1  # of a step's folder; a larger one is of a later version of this code
FOLDER = "sums"  # in it, a file for each process
SMALL = 2**20  # bytes; files up to this size are summed even for a part of the state
BLOCK = 2**24
LISTED = 10  # names in an error, at most


class UnreadableCheckpoint(UserError):
    """A complete step whose files are damaged; an earlier step may be sound."""


def about(
    step: int, prints: Mapping[str, tree.Print], data: dict, config: dict
) -> dict:
    """What a step says of itself, with a digest of all that is JSON."""
    words = {name: f"{x.word:08x}" for name, x in prints.items()}
    made = {"format": FORMAT, "made": circumstances(), "fingerprints": words}
    return made | {"step": step, "digest": _digest([made, data, config])}


def circumstances() -> dict:
    """What must be the same for a run to go on to the very bit."""
    return {
        "sd3_jax": sd3_jax.__version__,
        "jax": jax.__version__,
        "jaxlib": jaxlib.__version__,
        "device": jax.devices()[0].device_kind,
        "devices": jax.device_count(),
        "processes": jax.process_count(),
    }


def refuse_newer(path: epath.Path, about: dict) -> None:
    if isinstance(about.get("format"), int) and about["format"] > FORMAT:
        by = about.get("made", {}).get("sd3_jax", "a later version")
        raise UserError(
            f"{path} has format {about['format']}, written by sd3_jax {by}; this is"
            f" sd3_jax {sd3_jax.__version__}, which reads formats up to {FORMAT}"
        )


def refuse_renamed(path: epath.Path, about: dict) -> None:
    """A folder's number must be the step it was saved at; older steps do not say."""
    step = about.get("step", int(path.name))
    if step != int(path.name):
        raise UserError(
            f"{path} was saved as step {step}: rename it to {path.parent / str(step)},"
            " for its number decides the data and the learning rate that follow"
        )


def check_about(path: epath.Path, about: dict, data: dict, config: dict) -> None:
    made = {key: about.get(key) for key in ("format", "made", "fingerprints")}
    if about.get("digest") != _digest([made, data, config]):
        raise UnreadableCheckpoint(f"{path} is damaged: its data, config or about")


def check_leaves(path: epath.Path, about: dict, part: Any) -> None:
    """Of the state, or a part of it, against the fingerprints before the save."""
    known = about["fingerprints"]
    found = tree.fingerprints(part)
    wrong = [k for k, x in found.items() if known.get(k) != f"{x.word:08x}"]
    if wrong:
        raise UnreadableCheckpoint(
            f"{path} is damaged: {_listed(wrong)} not as saved (fingerprint)"
        )


def write_sums(path: epath.Path, index: int, count: int) -> None:
    """Of the files that process `index` of `count` answers for; orbax has closed them.

    They are read back: what a disk does not give back is not on it.
    """
    own = (name for i, name in _files(path) if i % count == index)
    with ThreadPoolExecutor(4) as pool:
        names = sorted(own)
        sums = dict(zip(names, pool.map(lambda name: _sum(path / name), names)))
    folder = path / FOLDER
    folder.mkdir(exist_ok=True)
    part = folder / f"{index}.part"
    part.write_text(json.dumps({"files": sums, "digest": _digest(sums)}))
    part.rename(folder / f"{index}.json")


def check_files(
    path: epath.Path, *, largest: float = float("inf"), shared: bool = True
) -> bool:
    """Compare the files of at most `largest` bytes with their sums.

    With `shared`, each process reads a share of them, unless all are small. Returns
    whether there are sums: a step that was killed before they were written has none,
    but has its leaves' fingerprints. Raises UnreadableCheckpoint for a file that is
    missing or not as written, RetryableError where storage did not answer, and
    UserError for a file that cannot be read for another reason: neither is damage.
    """
    jobs = list(_jobs(path, largest, shared))
    with ThreadPoolExecutor(4) as pool:
        wrong = [x for x in pool.map(lambda job: _wrong(*job), jobs) if x]
    if wrong:
        raise UnreadableCheckpoint(f"{path} is damaged: {_listed(wrong)}")
    return bool(jobs)


def reading_failed(path: epath.Path, error: OSError) -> UserError | RetryableError:
    """What to raise where a file that should be there could not be read."""
    kind = RetryableError if passing(error) else UserError
    return kind(f"cannot read {path}: {error.strerror or error}; nothing was changed")


def _jobs(path: epath.Path, largest: float, shared: bool) -> Iterator[tuple]:
    shared &= largest == float("inf")
    mine, count = (jax.process_index(), jax.process_count()) if shared else (0, 1)
    folder = path / FOLDER
    for file in sorted(folder.glob("*.json")) if is_there(folder) else ():
        try:
            found = json.loads(file.read_bytes())
            if found["digest"] != _digest(found["files"]):
                raise ValueError
            rows = [(name, *both) for name, both in found["files"].items()]
        except OSError as error:
            raise reading_failed(file, error) from None
        except (ValueError, TypeError, KeyError, AttributeError):
            raise UnreadableCheckpoint(
                f"{path} is damaged: {FOLDER}/{file.name}"
            ) from None
        for i, (name, size, crc) in enumerate(rows):
            if size <= largest and i % count == mine:
                yield path, name, size, crc


def _wrong(path: epath.Path, name: str, size: int, crc: int) -> str | None:
    """What is wrong with a file, if anything is."""
    try:
        found, sum_ = _sum(path / name)
    except FileNotFoundError:
        return f"{name} is missing"
    except OSError as error:
        raise reading_failed(path / name, error) from None
    if found != size:
        return f"{name} has {found} bytes of {size}"
    return f"{name} is not as written" if sum_ != crc else None


def is_there(path: epath.Path) -> bool:
    """Whether the path exists; RetryableError or UserError if that cannot be told."""
    try:
        return files.exists(path)
    except OSError as error:
        raise reading_failed(path, error) from None


def _files(path: epath.Path) -> Iterator[tuple[int, str]]:
    """(index of the process that answers for it, name) of every file of a step."""

    def walk(folder: epath.Path, prefix: str, index: int):
        for child in sorted(folder.iterdir()):
            if child.is_dir():
                if prefix or child.name != FOLDER:
                    end = child.name.partition("ocdbt.process_")[2]
                    own = int(end) if end.isdecimal() else index
                    yield from walk(child, f"{prefix}{child.name}/", own)
            else:
                yield index, prefix + child.name

    return walk(path, "", 0)


def _sum(path: epath.Path) -> tuple[int, int]:
    size, crc = 0, 0
    with path.open("rb") as file:
        while block := file.read(BLOCK):
            size, crc = size + len(block), zlib.crc32(block, crc)
    return size, crc


def _digest(content: Any) -> str:
    text = json.dumps(content, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - LISTED} more" if names[LISTED:] else ""
    return ", ".join(names[:LISTED]) + more
