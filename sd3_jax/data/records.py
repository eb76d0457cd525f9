"""One example as bytes: a safetensors blob whose metadata says what it holds.

A record describes itself: its format and version, the caption, what it was made from,
and a checksum of all that and of the tensors. `decode` believes none of it unchecked.
"""

import hashlib
import json
import re
import zlib
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import safetensors
from safetensors.numpy import save

from sd3_jax.data import prompt_text, record_header
from sd3_jax.data.float_bits import finite
from sd3_jax.data.record_header import DTYPES, FORMAT, NAMES, VERSION, show
from sd3_jax.errors import UserError

CAPTION = 8_192  # characters; what follows them is cut
CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")  # category Cc, less \t and \n


class BadRecord(UserError):
    """A record that cannot be read: where it is, which field, and what is allowed."""


class Record(NamedTuple):
    """The precomputed part of an example; training computes the rest.

    Picture: image (h, w, 3) in uint8; moments (h, w, 2c), the mean and log-variance of
    its latents as the denoiser sees them; or latents (h, w, c). One or several of them.
    A preference also has the worse picture of the same text, in the same shape, as
    rejected_image, rejected_moments or rejected_latents.

    Text: context (l, d) and pooled (e,); or, instead of context, its parts clip (l, d)
    and t5 (l, d), without the zeros that pad CLIP's; or only the caption.

    Tensors other than images are float32, bfloat16 or float16.
    """

    tensors: dict[str, np.ndarray]
    source: str  # what it was made from: an address or a number, never opened
    caption: str | bytes | None = ""
    size: tuple[int, int] | None = None  # height and width of the original, in pixels
    crop: tuple[int, int, int, int] | None = None  # top, left, height, width of it
    caption_from: str = ""  # which of the original's captions it is


def encode(record: Record) -> bytes:
    """Serialize a record and clean its caption; BadRecord if `decode` would refuse."""
    where = f"record of {show(record.source)}"
    try:
        metadata = {
            "format": FORMAT,
            "version": str(VERSION),
            "source": record.source,
        }
        metadata["caption"] = clean(record.caption)
        if record.caption_from:
            metadata["caption_from"] = record.caption_from
        for name in ("size", "crop"):
            if (value := getattr(record, name)) is not None:
                metadata[name] = json.dumps(value)
        for name, x in record.tensors.items():
            if x.dtype not in NAMES:
                allowed = record_header.listed(NAMES)
                raise ValueError(f"{name}: dtype {x.dtype}, expected one of {allowed}")
        tensors = {k: np.asarray(x, order="C") for k, x in record.tensors.items()}
        metadata["checksum"] = _checksum(tensors, metadata)
        data = save(tensors, metadata)
    except (ValueError, TypeError) as error:
        raise BadRecord(f"{where}: {error}") from None
    decode(data, where)  # what would stop a training run stops precompute instead
    return data


def decode(data: bytes, where: str) -> Record:
    """Parse and check a record's bytes; a BadRecord says `where` and what is wrong."""
    try:
        return _decode(data)
    except ValueError as error:
        raise BadRecord(f"{where}: {error}") from None


def check_layout(
    record: Record, layout: Mapping[str, tuple[tuple[int, ...], np.dtype]], where: str
) -> None:
    """BadRecord if a batch of these shapes and dtypes cannot hold the record."""
    for name, (shape, dtype) in layout.items():
        if name not in record.tensors:
            raise BadRecord(f"{where}: {name}: missing, but the first record has it")
        x = record.tensors[name]
        if x.shape != shape:
            raise BadRecord(f"{where}: {name}: shape {x.shape}, expected {shape}")
        if not np.can_cast(x.dtype, dtype):
            raise BadRecord(
                f"{where}: {name}: dtype {x.dtype}, expected {dtype} as in the first"
                " record"
            )


def clean(caption: str | bytes | None) -> str:
    """Normalize a caption for a record; ValueError if it is not valid UTF-8 text.

    None and white space become "", the unconditional caption. Captions are cut after
    8,192 characters and lose the line ends at their end. Control characters other than
    newline and tab become spaces.
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
    # Before safetensors sees the bytes: it accepts tensors of any name and dtype.
    _, metadata = record_header.checked_header(data)
    try:
        entries = safetensors.deserialize(data)
    except safetensors.SafetensorError as error:
        raise ValueError(f"not a record: {error}") from None
    tensors = {
        name: np.frombuffer(x["data"], DTYPES[x["dtype"]]).reshape(x["shape"])
        for name, x in entries
    }
    actual = _checksum(tensors, metadata, metadata["checksum"].partition(":")[0])
    if actual != metadata["checksum"]:
        stated = show(metadata["checksum"])
        raise ValueError(
            f"checksum: {show(actual)}, expected {stated}: the record is damaged"
        )
    # Not covered by the checksum: `encode` finds here what overflowed float16.
    for name, x in tensors.items():
        if not finite(x):
            count = int(np.sum(~np.isfinite(x.astype(np.float32))))
            raise ValueError(f"{name}: {count} of {x.size} values are nan or infinite")
    size, crop = record_header.parse_geometry(metadata)
    source = record_header.check_line("source", metadata["source"])
    caption = clean(metadata["caption"])
    caption_from = metadata.get("caption_from", "")
    if caption_from:
        record_header.check_line("caption_from", caption_from)
    return Record(tensors, source, caption, size, crop, caption_from)


def _checksum(
    tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str], kind: str = "crc32"
) -> str:
    """Checksum of a record's metadata and tensors, whatever order they are stored in.

    It detects accidents, not forgery. Version 1 used sha256, which took half of a
    reader's time.
    """
    # safetensors may lay tensors out in another order than they were given in, and
    # JSON objects have none: both are sorted.
    facts = {k: v for k, v in metadata.items() if k != "checksum"}
    kinds = {k: (NAMES[x.dtype], x.shape) for k, x in tensors.items()}
    parts = [json.dumps([facts, kinds], sort_keys=True).encode()]
    parts += [x.reshape(-1).view(np.uint8) for _, x in sorted(tensors.items())]
    if kind == "sha256":
        digest = hashlib.sha256()
        for part in parts:
            digest.update(part)
        return f"sha256:{digest.hexdigest()}"
    crc = 0
    for part in parts:
        crc = zlib.crc32(part, crc)
    return f"crc32:{crc:08x}"
