"""The header of a record: which names, dtypes and sizes it may hold, and the checks.

Each check raises a ValueError with the field, its value and the allowed values.
"""

import json
import re
from typing import Any

import ml_dtypes
import numpy as np

from sd3_jax.foreign_text import parse_json, shown

FORMAT = "sd3_jax.record"
VERSION = 2  # 1 had latents, context and pooled, and no caption_from
# Axes of each tensor. `context` holds CLIP's tokens, padded with zeros to T5's width,
# and T5's; `clip` and `t5` are the same without the padding.
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
NEEDED = ("format", "version", "caption", "source", "checksum")
KNOWN = (*NEEDED, "caption_from", "size", "crop")

# Limits. Lengths in a damaged record are arbitrary and must not become allocations.
RECORD = 64 * 2**20  # bytes, at most; 2048 x 2048 pixels in float32 take 10 MB
HEADER = 2**20  # bytes of it
SIDE = 2**20  # of a tensor, or of an image in pixels
SOURCE = 1_024  # characters of a source


def checked_header(data: bytes) -> tuple[dict, dict[str, str]]:
    """Entries of a record's tensors, and its metadata, with every field checked."""
    header, metadata = parse_header(data)
    # The version comes first: a newer format is reported as such, not as the first
    # unknown field in it.
    check_version(metadata)
    check_names(metadata, NEEDED, KNOWN)
    check_tensors(header)
    for name, entry in header.items():
        check_entry(name, entry)
    check_pairs(header)
    return header, metadata


def parse_header(data) -> tuple[dict, dict[str, str]]:
    """The unchecked entries of the tensors, and the metadata, a dict of texts."""
    # safetensors: 8 bytes of length, then so many of JSON, then the tensors.
    if not 8 <= len(data) <= RECORD:
        raise ValueError(f"not a record: {len(data)} bytes, expected 8 to {RECORD}")
    size, limit = int.from_bytes(data[:8], "little"), min(HEADER, len(data) - 8)
    if size > limit:
        raise ValueError(
            f"not a record: a header of {size} bytes, expected at most {limit}"
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
            raise ValueError(f"{show(name)}: {show(value)}, expected text")
    return header, metadata


def check_version(metadata):
    name, version = metadata.get("format"), metadata.get("version", "")
    if name != FORMAT:
        shown_format = "none" if name is None else show(name)
        raise ValueError(f'not a record: format {shown_format}, expected "{FORMAT}"')
    if not re.fullmatch("[1-9][0-9]{0,8}", version):
        raise ValueError(f'version: {show(version)}, expected "{VERSION}"')
    if int(version) > VERSION:
        raise ValueError(f"version {version} is newer than this code's, {VERSION}")


def check_names(names, required, allowed):
    for name in required:
        if name not in names:
            raise ValueError(f"{name}: missing")
    for name in names:
        if name not in allowed:
            raise ValueError(
                f"{show(name)}: unknown, expected one of {listed(allowed)}"
            )


def check_tensors(header):
    """Require a picture in one form at least, and all of the text or none of it."""
    check_names(header, (), TENSORS)
    if not any(name in header for name in PICTURES):
        raise ValueError(
            f"{PICTURES[-1]}: missing; a record needs it or one of"
            f" {listed(PICTURES[:-1])}"
        )
    for name in PICTURES:
        if REJECTED + name in header and name not in header:
            raise ValueError(f"{name}: missing, but {REJECTED}{name} is stored")
    if any(name in header for name in TEXTS):
        split = "clip" in header or "t5" in header
        check_names(header, ("clip" if split else "context", "pooled"), TENSORS)
        if split and "context" in header:
            raise ValueError(
                "context: stored whole and also as clip and t5; expected one of them"
            )


def check_entry(name, entry):
    if not isinstance(entry, dict):
        raise ValueError(f"{name}: {show(entry)}, expected a tensor's entry")
    dtype, shape, axes = entry.get("dtype"), entry.get("shape"), TENSORS[name]
    form = name.removeprefix(REJECTED)
    kinds = ("U8",) if form == "image" else tuple(FLOATS)
    if not isinstance(dtype, str) or dtype not in kinds:
        raise ValueError(
            f"{name}: dtype {show(dtype)}, expected one of {listed(kinds)}"
        )
    allowed = f"({axes}), each in [1, {SIDE}]"
    if not (
        _are_integers(shape, len(axes.split()), low=1)
        and (form != "image" or shape[-1] == 3)
        and (form != "moments" or shape[-1] % 2 == 0)
    ):
        raise ValueError(f"{name}: shape {show(shape)}, expected {allowed}")


def check_pairs(header):
    for name in PICTURES:
        chosen_shape = header.get(name, {}).get("shape")
        rejected_shape = header.get(REJECTED + name, {}).get("shape", chosen_shape)
        if rejected_shape != chosen_shape:
            raise ValueError(
                f"{REJECTED}{name}: shape {show(rejected_shape)}, expected that of"
                f" {name}, {chosen_shape}"
            )


def parse_geometry(metadata):
    """The original's size and the crop of it that the record shows, if it has them."""
    size = _parse_integers(metadata, "size", 2)
    crop = _parse_integers(metadata, "crop", 4)
    if size and 0 in size:
        raise ValueError(f"size: {show(size)}, expected pixels, at least 1")
    if crop and size is None:
        raise ValueError("size: missing, but crop needs it")
    if crop:
        (top, left, height, width), (h, w) = crop, size
        if not (height and width and top + height <= h and left + width <= w):
            raise ValueError(f"crop: {show(crop)}, expected a part of {show(size)}")
    return size, crop


def check_line(name, text):
    line = not re.search(r"[\x00-\x1f\x7f-\x9f]", text)
    if not (line and text.strip() and len(text) <= SOURCE):
        allowed = f"1 to {SOURCE} characters without control characters"
        raise ValueError(f"{name}: {show(text)}, expected {allowed}")
    return text


def show(value: Any) -> str:
    """A value for a message: one short line, texts in quotes."""
    return shown(ascii(value))


def _parse_integers(metadata, name, count):
    if name not in metadata:
        return None
    try:
        value = json.loads(metadata[name])
    except (ValueError, RecursionError):  # "[[[[…" exhausts the parser's stack
        value = None
    if not _are_integers(value, count, low=0):
        text = show(metadata[name])
        raise ValueError(f"{name}: {text}, expected {count} integers in [0, {SIDE}]")
    return tuple(value)


def _are_integers(values, count, low):
    """Whether a value from JSON is a list of `count` integers in [low, SIDE]."""
    return (
        isinstance(values, list)
        and len(values) == count
        # Not isinstance: JSON's true is a bool, which is an int to Python.
        and all(type(x) is int and low <= x <= SIDE for x in values)
    )


def listed(names):
    return ", ".join(map(str, names))
