"""Fingerprints and checksums, by which a damaged checkpoint is recognised.

A fingerprint of each leaf is computed on the devices before a save and after a load, so
it covers the whole way between. Checksums of the files name the damaged file before any
of it is used, and cover files that no leaf is read from. Orbax has neither: it loads a
flipped bit silently.
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
from sd3_jax.foreign_text import listed

FORMAT = 1  # of a step's folder; a larger one is of a later version of this code
FOLDER = "sums"  # in it, a file for each process
SMALL = 2**20  # bytes; files up to this size are summed even for a part of the state
BLOCK = 2**24  # bytes read at a time


class UnreadableCheckpoint(UserError):
    """A complete step whose files are damaged; an earlier step may be sound."""


def about(
    step: int, prints: Mapping[str, tree.Print], data: dict, config: dict
) -> dict:
    """A step's "about" item: format, circumstances, fingerprints, and a digest."""
    words = {name: f"{x.word:08x}" for name, x in prints.items()}
    record = {"format": FORMAT, "made": circumstances(), "fingerprints": words}
    # The digest covers the JSON items, which have no fingerprints.
    return record | {"step": step, "digest": _digest([record, data, config])}


def circumstances() -> dict:
    """What must be the same for a resumed run to be equal to the last bit."""
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
            f" sd3_jax {sd3_jax.__version__}, which reads formats up to {FORMAT}:"
            " install the newer version"
        )


def refuse_renamed(path: epath.Path, about: dict) -> None:
    """A folder's number must be the step it was saved at; older steps do not say."""
    step = about.get("step", int(path.name))
    if step != int(path.name):
        raise UserError(
            f"{path} was saved as step {step}: rename it to {path.parent / str(step)},"
            " because the number decides which data and learning rate follow"
        )


def check_about(path: epath.Path, about: dict, data: dict, config: dict) -> None:
    """UnreadableCheckpoint unless the JSON items agree with their digest."""
    record = {key: about.get(key) for key in ("format", "made", "fingerprints")}
    if about.get("digest") != _digest([record, data, config]):
        raise UnreadableCheckpoint(f"{path} is damaged: its data, config or about")


def check_leaves(path: epath.Path, about: dict, part: Any) -> None:
    """Compare the state, or a part of it, with the fingerprints of the save."""
    saved_prints = about["fingerprints"]
    prints = tree.fingerprints(part)
    wrong = [k for k, x in prints.items() if saved_prints.get(k) != f"{x.word:08x}"]
    if wrong:
        raise UnreadableCheckpoint(
            f"{path} is damaged: {listed(wrong)} differ from what was saved"
            " (fingerprint)"
        )


def write_sums(path: epath.Path, index: int, count: int) -> None:
    """Write the checksums of the files that process `index` of `count` answers for.

    Call it once orbax has closed them. The files are read back: what a disk does not
    give back is not on it.
    """
    with ThreadPoolExecutor(4) as pool:
        names = sorted(name for i, name in _files(path) if i % count == index)
        sums = dict(zip(names, pool.map(lambda name: _sum(path / name), names)))
    folder = path / FOLDER
    folder.mkdir(exist_ok=True)
    part = folder / f"{index}.part"
    part.write_text(json.dumps({"files": sums, "digest": _digest(sums)}))
    part.rename(folder / f"{index}.json")  # whole or absent, if a kill comes


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
        raise UnreadableCheckpoint(f"{path} is damaged: {listed(wrong)}")
    return bool(jobs)


def reading_failed(path: epath.Path, error: OSError) -> UserError | RetryableError:
    """What to raise where a file that should be there could not be read."""
    kind = RetryableError if passing(error) else UserError
    return kind(f"cannot read {path}: {error.strerror or error}; nothing was changed")


def _jobs(path: epath.Path, largest: float, shared: bool) -> Iterator[tuple]:
    """Arguments of _wrong for each file that this process is to compare."""
    # With a bound on the size few files are left: each process reads them all.
    shared &= largest == float("inf")
    mine, count = (jax.process_index(), jax.process_count()) if shared else (0, 1)
    folder = path / FOLDER
    for file in sorted(folder.glob("*.json")) if is_there(folder) else ():
        try:
            sums = json.loads(file.read_bytes())
            # The sums may be damaged as well, and would then accuse sound files.
            if sums["digest"] != _digest(sums["files"]):
                raise ValueError
            rows = [(name, size, crc) for name, (size, crc) in sums["files"].items()]
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
    """What is wrong with a file, None if it is as it was written."""
    try:
        actual_size, actual_crc = _sum(path / name)
    except FileNotFoundError:
        return f"{name} is missing"
    except OSError as error:
        raise reading_failed(path / name, error) from None
    if actual_size != size:
        return f"{name} has {actual_size} bytes, expected {size}"
    return f"{name} is not as written" if actual_crc != crc else None


def is_there(path: epath.Path) -> bool:
    """Whether the path exists; RetryableError or UserError if storage does not say."""
    try:
        return files.exists(path)
    except OSError as error:
        raise reading_failed(path, error) from None


def _files(path: epath.Path) -> Iterator[tuple[int, str]]:
    """(index of the process that answers for it, name) of every file of a step."""

    def walk(folder: epath.Path, prefix: str, index: int):
        for child in sorted(folder.iterdir()):
            if child.is_dir():
                if prefix or child.name != FOLDER:  # the sums do not sum themselves
                    # Orbax has each process write its leaves into a folder with its
                    # number: whoever wrote a file sums it.
                    end = child.name.partition("ocdbt.process_")[2]
                    owner = int(end) if end.isdecimal() else index
                    yield from walk(child, f"{prefix}{child.name}/", owner)
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
    # Sorted: what comes back from storage may have its keys in another order.
    text = json.dumps(content, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
