"""One example as bytes: a safetensors blob whose metadata says what it holds.

A record describes itself: its format and version, the caption, what it was made from,
and a checksum of all that and of the tensors. `decode` believes none of it unchecked.
"""

import hashlib
import json
import re
import zlib
from collections.abc import Mapping
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
import safetensors
from safetensors.numpy import save

from sd3_jax.data import prompt_text
from sd3_jax.errors import UserError
from sd3_jax.foreign_text import parse_json

FORMAT, VERSION = (
    "sd3_jax.record",
    2,
)  # 1 had latents, context and pooled, and no caption_from
TENSORS = {
    "image": "h w 3",
    "moments": "h w 2c",
    "latents": "h w c",
    "rejected_image": "h w 3",
    "rejected_moments": "h w 2c",
    "rejected_latents": "h w c",
    "clip": "l d",
    "t5": "l d",
    "context": "l d",
    "pooled": "e",
}
PICTURES = ("image", "moments", "latents")
REJECTED = "rejected_"  # before the name of the other picture of a preference
TEXTS = ("context", "clip", "t5", "pooled")
FLOATS = {"F32": np.float32, "BF16": ml_dtypes.bfloat16, "F16": np.float16}
DTYPES = {"U8": np.uint8, **FLOATS}
NAMES = {np.dtype(dtype): name for name, dtype in DTYPES.items()}
EXPONENT = {4: 0x7F800000, 2: 0x7F80}  # of float32 and bfloat16, by bytes; all ones
HALF = 0x7C00  # float16's: nan or infinite
NEEDED = ("format", "version", "caption", "source", "checksum")
KNOWN = (*NEEDED, "caption_from", "size", "crop")

RECORD = 64 * 2**20  # bytes, at most; 2048 x 2048 pixels in float32 take 10 MB
HEADER = 2**20  # bytes of it
SIDE = 2**20  # of a tensor, or of an image in pixels
CAPTION = 8_192  # characters; what follows them is cut
SOURCE = 1_024
CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")  # category Cc, less \t and \n


class BadRecord(UserError):
    """A record that is not what this code reads: where, which field, what it wanted."""


class Record(NamedTuple):
    """What of an example was computed before; the rest is computed in training.

    A picture as image (h, w, 3) in uint8, as moments (h, w, 2c), mean and log-variance
    of its latents as the denoiser sees them, or as latents (h, w, c): one or several of
    these. A preference has another picture of the same text, that is worse, as
    rejected_image and so on, of the same shape. Of its text context (l, d) and pooled
    (e,); or context in the parts that it is made of, clip (l, d) and t5 (l, d), without
    the zeros that fill the first up; or only the caption. Numbers are float32, bfloat16
    or float16.
    """

    tensors: dict[str, np.ndarray]
    source: str  # what it was made from: an address or a number, never opened
    caption: str | bytes | None = ""
    size: tuple[int, int] | None = None  # height and width of the original, in pixels
    crop: tuple[int, int, int, int] | None = None  # top, left, height, width of it
    caption_from: str = ""  # which of the original's captions it is


def encode(record: Record) -> bytes:
    """The record's bytes, its caption cleaned; what `decode` refuses is a BadRecord."""
    where = f"record of {_show(record.source)}"
    try:
        metadata = {"format": FORMAT, "version": str(VERSION), "source": record.source}
        metadata["caption"] = clean(record.caption)
        if record.caption_from:
            metadata["caption_from"] = record.caption_from
        for name in ("size", "crop"):
            if (value := getattr(record, name)) is not None:
                metadata[name] = json.dumps(value)
        for name, x in record.tensors.items():
            if x.dtype not in NAMES:
                raise ValueError(
                    f"{name}: dtype {x.dtype}, wanted one of {_all(NAMES)}"
                )
        tensors = {k: np.asarray(x, order="C") for k, x in record.tensors.items()}
        metadata["checksum"] = _checksum(tensors, metadata)
        data = save(tensors, metadata)
    except (ValueError, TypeError) as error:
        raise BadRecord(f"{where}: {error}") from None
    decode(data, where)
    return data


def decode(data: bytes, where: str) -> Record:
    """The record that `encode` made these bytes of; else a BadRecord, at `where`."""
    try:
        return _decode(data)
    except ValueError as error:
        raise BadRecord(f"{where}: {error}") from None


def clean(caption: str | bytes | None) -> str:
    """A caption as it is kept; ValueError if it is no text, which UTF-8 could spell.

    None, nothing and white space are "", the unconditional caption. After 8,192
    characters it is cut, and ends of lines at its end are left out. Control characters
    other than newline and tab become spaces.
    """
    if caption is None:
        return ""
    try:
        text = caption.decode() if isinstance(caption, bytes) else caption
        text.encode()  # which a lone surrogate does not survive
    except UnicodeError as error:
        raise ValueError(f"caption: not UTF-8: {error.reason}") from None
    text = CONTROL.sub(" ", text[:CAPTION].rstrip(prompt_text.ENDS))
    return "" if text.isspace() else text


def _decode(data):
    header, metadata = _header(data)
    _check_version(metadata)
    _check_names(metadata, NEEDED, KNOWN)
    _check_tensors(header)
    for name, entry in header.items():
        _check_entry(name, entry)
    _check_pairs(header)
    try:
        read = safetensors.deserialize(data)
    except safetensors.SafetensorError as error:
        raise ValueError(f"not a record: {error}") from None
    tensors = {
        name: np.frombuffer(x["data"], DTYPES[x["dtype"]]).reshape(x["shape"])
        for name, x in read
    }
    found = _checksum(tensors, metadata, metadata["checksum"].partition(":")[0])
    if found != metadata["checksum"]:
        wanted = _show(metadata["checksum"])
        raise ValueError(f"checksum: its bytes have {_show(found)}, it says {wanted}")
    for name, x in tensors.items():
        if count := _not_finite(x):
            raise ValueError(f"{name}: {count} of {x.size} values are nan or infinite")
    size, crop = _place(metadata)
    source, caption = _line("source", metadata["source"]), clean(metadata["caption"])
    made_by = metadata.get("caption_from", "")
    made_by = _line("caption_from", made_by) if made_by else ""
    return Record(tensors, source, caption, size, crop, made_by)


def _not_finite(x: np.ndarray) -> int:
    """How many values have an exponent of ones: a tenth of np.isfinite's time."""
    if x.dtype == np.uint8:
        return 0
    ones = HALF if x.dtype == np.float16 else EXPONENT[x.dtype.itemsize]
    exponents = x.reshape(-1).view(f"u{x.dtype.itemsize}") & ones
    return int(np.sum(exponents == ones)) if exponents.max() == ones else 0


def _header(data) -> tuple[dict, dict[str, str]]:
    """The tensors' entries, of which nothing is known yet, and the metadata: texts."""
    if not 8 <= len(data) <= RECORD:
        raise ValueError(f"not a record: {len(data)} bytes, wanted 8 to {RECORD}")
    size, most = int.from_bytes(data[:8], "little"), min(HEADER, len(data) - 8)
    if size > most:
        raise ValueError(
            f"not a record: a header of {size} bytes, wanted at most {most}"
        )
    try:
        header = parse_json(bytes(data[8 : 8 + size]))
    except ValueError as error:
        raise ValueError(f"not a record: its header: {error}") from None
    metadata = header.pop("__metadata__", None) if isinstance(header, dict) else None
    if not isinstance(metadata, dict):
        raise ValueError("not a record: its header has no metadata")
    for name, value in metadata.items():
        if not isinstance(value, str):
            raise ValueError(f"{_show(name)}: {_show(value)}, wanted text")
    return header, metadata


def _check_version(metadata):
    name, version = metadata.get("format"), metadata.get("version", "")
    if name != FORMAT:
        given = "none" if name is None else _show(name)
        raise ValueError(f'not a record: format {given}, wanted "{FORMAT}"')
    if not re.fullmatch("[1-9][0-9]{0,8}", version):
        raise ValueError(f'version: {_show(version)}, wanted "{VERSION}"')
    if int(version) > VERSION:
        raise ValueError(f"version {version} is newer than this code's, {VERSION}")


def _check_names(found, needed, known):
    for name in needed:
        if name not in found:
            raise ValueError(f"{name}: missing")
    for name in found:
        if name not in known:
            raise ValueError(f"{_show(name)}: unknown, wanted one of {_all(known)}")


def _check_tensors(header):
    """A picture in one form at least, and of its text all or nothing."""
    _check_names(header, (), TENSORS)
    if not any(name in header for name in PICTURES):
        raise ValueError(f"{PICTURES[-1]}: missing, as are {_all(PICTURES[:-1])}")
    for name in PICTURES:
        if REJECTED + name in header and name not in header:
            raise ValueError(f"{name}: missing, beside {REJECTED}{name}")
    if any(name in header for name in TEXTS):
        split = "clip" in header or "t5" in header
        _check_names(header, ("clip" if split else "context", "pooled"), TENSORS)
        if split and "context" in header:
            raise ValueError("context: given whole, and as clip and t5")


def _check_entry(name, entry):
    if not isinstance(entry, dict):
        raise ValueError(f"{name}: {_show(entry)}, wanted a tensor's entry")
    dtype, shape, axes = entry.get("dtype"), entry.get("shape"), TENSORS[name]
    form = name.removeprefix(REJECTED)
    kinds = ("U8",) if form == "image" else tuple(FLOATS)
    if not isinstance(dtype, str) or dtype not in kinds:
        raise ValueError(f"{name}: dtype {_show(dtype)}, wanted one of {_all(kinds)}")
    wanted = f"({axes}), each in [1, {SIDE}]"
    if not (
        _whole(shape, len(axes.split()), low=1)
        and (form != "image" or shape[-1] == 3)
        and (form != "moments" or shape[-1] % 2 == 0)
    ):
        raise ValueError(f"{name}: shape {_show(shape)}, wanted {wanted}")


def _check_pairs(header):
    for name in PICTURES:
        wanted = header.get(name, {}).get("shape")
        given = header.get(REJECTED + name, {}).get("shape", wanted)
        if given != wanted:
            raise ValueError(
                f"{REJECTED}{name}: shape {_show(given)}, that of {name} is {wanted}"
            )


def _place(metadata):
    """Size and crop, of which the one holds the other."""
    size, crop = (_numbers(metadata, name, n) for name, n in (("size", 2), ("crop", 4)))
    if size and 0 in size:
        raise ValueError(f"size: {_show(size)}, wanted pixels, at least 1")
    if crop and size is None:
        raise ValueError("size: missing, and a crop is of something")
    if crop:
        (top, left, height, width), (h, w) = crop, size
        if not (height and width and top + height <= h and left + width <= w):
            raise ValueError(f"crop: {_show(crop)}, wanted a part of {_show(size)}")
    return size, crop


def _numbers(metadata, name, count):
    if name not in metadata:
        return None
    try:
        value = json.loads(metadata[name])
    except (ValueError, RecursionError):
        value = None
    if not _whole(value, count, low=0):
        given = _show(metadata[name])
        raise ValueError(f"{name}: {given}, wanted {count} integers in [0, {SIDE}]")
    return tuple(value)


def _whole(values, count, low):
    """Whether a list from JSON is of so many integers in [low, SIDE]."""
    return (
        isinstance(values, list)
        and len(values) == count
        and all(type(x) is int and low <= x <= SIDE for x in values)
    )


def _line(name, text):
    line = not re.search(r"[\x00-\x1f\x7f-\x9f]", text)
    if not (line and text.strip() and len(text) <= SOURCE):
        wanted = f"1 to {SOURCE} characters, none for control"
        raise ValueError(f"{name}: {_show(text)}, wanted {wanted}")
    return text


def _checksum(
    tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str], kind: str = "crc32"
) -> str:
    """Of what a record says and holds, in one order however it is laid out.

    Against accidents, not forgers, who would make it anew. The first version's sha256
    took half of a reader's time.
    """
    said = {k: v for k, v in metadata.items() if k != "checksum"}
    kinds = {k: (NAMES[x.dtype], x.shape) for k, x in tensors.items()}
    parts = [json.dumps([said, kinds], sort_keys=True).encode()]
    parts += [x.reshape(-1).view(np.uint8) for _, x in sorted(tensors.items())]
    if kind == "sha256":
        made = hashlib.sha256()
        for part in parts:
            made.update(part)
        return f"sha256:{made.hexdigest()}"
    found = 0
    for part in parts:
        found = zlib.crc32(part, found)
    return f"crc32:{found:08x}"


def _show(value: Any) -> str:
    """For a message: on one line, harmless to a terminal, and short."""
    text = ascii(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _all(names):
    return ", ".join(map(str, names))
