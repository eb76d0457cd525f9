"""Read and write safetensors files one tensor at a time, at any path of epath.

The format: 8 bytes of header size, a JSON header, then the tensors' bytes. The header
is checked before any tensor is read. The safetensors library maps whole files instead,
which works on no bucket and does not bound memory.
"""

import json
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
from etils import epath

from sd3_jax import files
from sd3_jax.errors import UserError
from sd3_jax.foreign_text import listed, parse_json, shown
from sd3_jax.weights import quantized_layers, unsupported_formats
from sd3_jax.weights.stored_tensor import Tensor, Tensors

DTYPES = {  # plain ones; those of quantized files are in unsupported_formats
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "BF16": ml_dtypes.bfloat16,
    "F8_E4M3": ml_dtypes.float8_e4m3fn,
    "F8_E5M2": ml_dtypes.float8_e5m2,
    "I64": np.int64,
    "I32": np.int32,
    "I16": np.int16,
    "I8": np.int8,
    "U8": np.uint8,
    "BOOL": np.bool_,
}
NAMES = {np.dtype(dtype): name for name, dtype in DTYPES.items()}
HEADER = 16 * 2**20  # bytes, at most: room for 100,000 tensors; models have 2,000
NAME, AXES = 512, 8  # characters of a name, axes of a tensor, at most
SHARD = 10**10  # bytes of a shard at most, as diffusers writes them
SHARDED = re.compile(r"(?:^|-)(\d{1,5})-of-(\d{1,5})(?=\.)")  # in a file's name
DIFFUSERS = "diffusion_pytorch_model."
STEMS = ("model.", DIFFUSERS)  # transformers' and diffusers' names of weights


def open_file(path: epath.PathLike) -> tuple[Tensors, dict[str, str]]:
    """(tensors by name, metadata) of one file; values are not read.

    Scales of quantized tensors belong to these and have no entries of their own. Raises
    UserError for a file that is damaged, truncated or of another format.
    """
    path = epath.Path(path)
    tensors, metadata = _open_raw(path)
    return quantized_layers.joined(path, tensors, metadata), metadata


def _open_raw(path: epath.Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """`open_file` with the tensors as they are stored."""
    # --- read the header
    files.require_regular(path)
    try:
        with path.open("rb") as file:
            length = files.size(path)
            head = file.read(unsupported_formats.HEAD)
            size = int.from_bytes(head[:8], "little")
            _check_head(path, head, size, length)
            file.seek(8)
            text = file.read(size)
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror or error}") from None
    # --- parse it; each ValueError below is a damaged header
    try:
        header = parse_json(text)
        if not isinstance(header, dict):
            raise ValueError("expected a JSON object")
        metadata = header.pop("__metadata__", {})
        if not _texts(metadata):
            raise ValueError("__metadata__: expected texts by name")
        # Before dtypes: a quantized file is told as such, not as an unknown dtype.
        unsupported_formats.refuse_quantized(path, header)
        tensors = {k: _tensor(path, k, v, 8 + size) for k, v in header.items()}
    except ValueError as error:
        raise _damaged(path, f"its header: {error}") from None
    # --- tensors must fill the file, one after the other
    end = 8 + size
    for tensor in sorted(tensors.values(), key=lambda x: (x.start, x.size)):
        if tensor.start != end:
            raise _damaged(path, "tensors overlap or leave a gap")
        end += tensor.size
    if end != length:
        cut = ": it was not copied whole, copy it again" if length < end else ""
        raise _damaged(path, f"{length} bytes, its header says {end}{cut}")
    return tensors, metadata


def _check_head(path: epath.Path, head: bytes, size: int, length: int) -> None:
    """UserError unless the first bytes are a header's size and its opening brace."""
    # A pickle begins with bytes such as 80 02, which a size may have as well: the ninth
    # byte, "{", tells them apart.
    brace = head[8:9] == b"{"
    if brace and 2 <= size <= length - 8 and size <= HEADER:
        return
    if not length:
        raise UserError(f"{path} is empty; copy it again")
    if not brace or size > HEADER:
        unsupported_formats.refuse_format(path, head)
    if len(head) < 8 or size > min(HEADER, length - 8):
        cut = brace and size <= HEADER
        end = ": it was not copied whole, copy it again" if cut else ""
        raise _damaged(path, f"a header of {size} bytes in a file of {length}{end}")


def _tensor(path, key, entry, base) -> Tensor:
    """The Tensor of a header's entry; ValueError for one that cannot be."""
    # Names go into messages and logs: only such as print, and not too long.
    if len(key) > NAME or not key.isprintable():
        raise ValueError(f'"{shown(key)}": expected a printable name of {NAME}')
    if not isinstance(entry, dict):
        raise ValueError(f"{key}: expected its dtype, shape and data_offsets")
    name, shape, offsets = (entry.get(k) for k in ("dtype", "shape", "data_offsets"))
    if name in unsupported_formats.DTYPES:
        wanted = ", ".join(DTYPES)
        raise UserError(f"{path}: {key} is of {name}: expected tensors of {wanted}")
    if not isinstance(name, str) or name not in DTYPES:
        raise ValueError(f"{key}: dtype {shown(name)}, expected {', '.join(DTYPES)}")
    if not _counts(shape) or len(shape) > AXES or not _addressable(shape):
        raise ValueError(f"{key}: shape {shown(shape)}, expected {AXES} sizes at most")
    if not _counts(offsets) or len(offsets) != 2:
        raise ValueError(
            f"{key}: data_offsets {shown(offsets)}, expected start and end"
        )
    start, end = offsets
    tensor = Tensor(path, np.dtype(DTYPES[name]), tuple(shape), base + start)
    if end - start != tensor.size:
        raise ValueError(f"{key}: {name} {shape} does not fit bytes {start} to {end}")
    return tensor


def _counts(x: Any) -> bool:  # true is no 1
    return isinstance(x, list) and all(type(n) is int and n >= 0 for n in x)


def _addressable(shape: list[int]) -> bool:
    """Whether numpy can hold the shape, whose size must fit even if an axis is 0."""
    return math.prod(max(n, 1) for n in shape) < 2**59


def _texts(x: Any) -> bool:
    return isinstance(x, dict) and all(isinstance(v, str) for v in x.values())


def _damaged(path, reason) -> UserError:
    return UserError(f"{path}: not a safetensors file, or damaged: {reason}")


def open_folder(folder: epath.PathLike, variant: str = "") -> Tensors:
    """Tensors of a component's folder: one file, or the shards of one.

    If the folder has several precisions ("variants"), `variant` is taken, else the
    unnamed one, else the first. Raises UserError if no single file can be chosen.
    """
    folder = epath.Path(folder)
    names = files.names(folder)
    kinds = sorted({variant_of(x) for x in names if _is_weights(x) or _is_index(x)})
    if not kinds:
        unsupported_formats.refuse_pickles(folder)
        raise UserError(f"{folder}: holds no .safetensors file")
    kind = variant if variant in kinds else kinds[0]  # "" sorts first
    names = [name for name in names if variant_of(name) == kind]
    indexes = [name for name in names if _is_index(name)]
    whole = [name for name in names if _is_weights(name) and not SHARDED.search(name)]
    usual = [name for name in whole if name.startswith(STEMS)]
    # If both a whole file and shards are there, one is left over from an earlier save.
    # transformers reads the whole file, diffusers the shards, and so do we.
    sharded = [x for x in indexes if x.startswith(DIFFUSERS) and _has_shards(folder, x)]
    if sharded:
        return _open_indexed(folder, sharded[0])
    if len(usual) == 1 or len(whole) == 1 and not indexes:
        return open_file(folder / (usual or whole)[0])[0]
    if indexes:
        return _open_indexed(folder, indexes[0])
    if whole:
        raise UserError(f"{folder}: holds {listed(whole)}; name one of them")
    return open_shards(folder, [name for name in names if _is_weights(name)])


def only_file(folder: epath.Path, wanted: str, hint: str = "") -> epath.Path:
    """The only .safetensors file of a folder; UserError with what was `wanted` if not.

    `hint` ends the message where the folder has no such file.
    """
    names = [name for name in files.names(folder) if _is_weights(name)]
    if len(names) == 1:
        return folder / names[0]
    if names:
        hint = f" ({listed(names)}: name one)"
    elif not hint:
        unsupported_formats.refuse_pickles(folder)
    raise UserError(
        f"{folder}: expected {wanted} or one .safetensors file; it has {len(names)} of"
        f" those{hint}"
    )


def variants(folder: epath.Path) -> set[str]:
    """Precisions that a folder holds; "" is the unnamed one."""
    return {variant_of(name) for name in files.names(folder) if _is_weights(name)}


def variant_of(name: str) -> str:
    """The variant in a file's name: "fp16" of model.fp16.safetensors, else ""."""
    # Libraries put it before or after the shard's number, and before or after "index":
    # what is left without the known words is the variant.
    bare = SHARDED.sub("", name)
    words = bare.split(".")[1:]
    return ".".join(w for w in words if w not in ("safetensors", "index", "json"))


def _is_weights(name: str) -> bool:
    return name.endswith(".safetensors")


def _is_index(name: str) -> bool:
    return name.endswith(".json") and ".safetensors" in name and ".index" in name


def is_sharded(names: Iterable[str]) -> bool:
    """Whether the names are shards of a single file."""
    return len({SHARDED.sub("", name) for name in names if SHARDED.search(name)}) == 1


def open_shards(folder: epath.Path, names: Sequence[str]) -> Tensors:
    """Tensors of shards without an index; UserError if one is missing.

    Each shard's name says how many there are.
    """
    numbers = {name: tuple(map(int, SHARDED.search(name).groups())) for name in names}
    if len(sets := {(SHARDED.sub("", x), n) for x, (_, n) in numbers.items()}) > 1:
        raise UserError(
            f"{folder}: holds shards of {len(sets)} models; expected those of one"
        )
    ((stem, count),) = sets
    present = {number for number, _ in numbers.values()}
    first = 0 if 0 in present else 1  # some tools count from 0
    if missing := sorted(set(range(first, first + count)) - present):
        raise UserError(
            f"{folder}: {len(missing)} of the {count} shards of {stem} are missing:"
            f" {listed(missing)}"
        )
    tensors: dict[str, Tensor] = {}
    metadata: dict[str, str] = {}
    for name in names:
        part, about = _open_raw(folder / name)
        metadata |= about
        if twice := tensors.keys() & part.keys():
            raise UserError(
                f"{folder / name}: {shown(min(twice))} is also in another shard"
            )
        tensors |= part
    return quantized_layers.joined(folder, tensors, metadata)


def _weight_map(path: epath.Path) -> dict[str, str]:
    """The file of each tensor, from an index; UserError for a damaged one."""
    try:
        where = parse_json(files.read_bytes(path))["weight_map"]
        if not _texts(where):
            raise ValueError("weight_map: expected files by tensor")
        # An index from elsewhere must not name files outside its folder.
        if any(not _neighbour(name) for name in where.values()):
            raise ValueError("names a file outside its folder")
    except (ValueError, TypeError, KeyError) as error:
        raise UserError(f"{path}: not an index: {error}") from None
    return where


def _has_shards(folder: epath.Path, index: str) -> bool:
    names = set(_weight_map(folder / index).values())
    return any((folder / name).exists() for name in names)


def _open_indexed(folder: epath.Path, index: str) -> Tensors:
    where = _weight_map(folder / index)
    names = sorted(set(where.values()))
    if missing := [name for name in names if not (folder / name).exists()]:
        raise UserError(
            f"{folder / index} names {len(names)} files, of which {len(missing)} are"
            f" missing: {listed(missing)}"
        )
    tensors, metadata = {}, {}
    for name in names:
        shard, about = _open_raw(folder / name)
        metadata |= about
        # The index decides where a tensor is in two files; others are taken as well.
        tensors |= {k: x for k, x in shard.items() if where.get(k, name) == name}
    if absent := [key for key in where if key not in tensors]:
        raise UserError(
            f"{folder / index}: {len(absent)} tensors are not in the files that it"
            f" names for them, {shown(absent[0])} first"
        )
    # A scale may be in another shard than its weight.
    return quantized_layers.joined(folder, tensors, metadata)


def _neighbour(name: str) -> bool:
    plain = name.endswith(".safetensors") and name.isprintable()
    return plain and epath.Path(name).name == name


class Entry(NamedTuple):
    """A tensor to write; `data()` is called when its turn comes, and not before."""

    dtype: np.dtype
    shape: tuple[int, ...]
    data: Callable[[], np.ndarray]

    @property
    def size(self) -> int:
        return math.prod(self.shape) * np.dtype(self.dtype).itemsize


def write_file(
    path: epath.PathLike,
    entries: Mapping[str, Entry],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write one file, a tensor at a time; it gets its name once it is complete."""
    path = epath.Path(path)
    # transformers 4 refuses files without a format in their metadata.
    header, end = {"__metadata__": {"format": "pt", **(metadata or {})}}, 0
    for key, entry in entries.items():
        header[key] = {
            "dtype": NAMES[np.dtype(entry.dtype)],
            "shape": list(entry.shape),
            "data_offsets": [end, end + entry.size],
        }
        end += entry.size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # tensors start at a multiple of 8
    path.parent.mkdir(parents=True, exist_ok=True)
    # A kill leaves a file that no reader takes for weights.
    partial = path.parent / f"{path.name}.partial"
    with partial.open("wb") as file:
        file.write(len(text).to_bytes(8, "little"))
        file.write(text)
        for key, entry in entries.items():
            x = entry.data()
            if x.shape != tuple(entry.shape):
                raise ValueError(f"{key}: shape {x.shape}, expected {entry.shape}")
            x = np.ascontiguousarray(x, dtype=entry.dtype).reshape(-1)
            file.write(memoryview(x.view(np.uint8)))
    partial.replace(path)


def write_folder(
    folder: epath.PathLike, entries: Mapping[str, Entry], stem: str, shard: int = SHARD
) -> None:
    """Write `stem`.safetensors, or several shards of `shard` bytes and their index.

    Files of an earlier save under that stem are removed: readers may prefer them.
    """
    folder = epath.Path(folder)
    shards = list(_shards(entries.items(), shard))
    whole, index = f"{stem}.safetensors", f"{stem}.safetensors.index.json"
    written = [whole]
    if len(shards) > 1:
        numbers, last = range(1, len(shards) + 1), f"of-{len(shards):05d}.safetensors"
        written = [f"{stem}-{number:05d}-{last}" for number in numbers]
    for name, part in zip(written, shards, strict=True):
        write_file(folder / name, dict(part))
    if len(shards) > 1:
        where = {key: name for name, part in zip(written, shards) for key, _ in part}
        total = {"total_size": sum(entry.size for entry in entries.values())}
        text = json.dumps({"metadata": total, "weight_map": where}, indent=2)
        (folder / index).write_text(text)
        written.append(index)
    # --- remove what is left of an earlier save, once the new one is complete
    for name in set(files.names(folder)) - set(written):
        shard_of = SHARDED.search(name) and SHARDED.sub("", name)
        if name in (whole, index) or shard_of == whole:
            (folder / name).unlink()


def _shards(entries: Iterable, most: int) -> Iterator[list]:
    part, size = [], 0
    for key, entry in entries:
        if part and size + entry.size > most:
            yield part
            part, size = [], 0
        part.append((key, entry))
        size += entry.size
    yield part
