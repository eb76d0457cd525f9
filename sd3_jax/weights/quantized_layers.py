"""Join each quantized weight of a safetensors file with its scales.

Formats: ComfyUI's scaled fp8 and int8 (its QUANTIZATION.md, and the scale_weight of
earlier files), and bitsandbytes' (bitsandbytes_layers.py). Weights are read one at a
time, when they are loaded.
"""

import logging
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
from etils import epath

from sd3_jax.data.float_bits import finite
from sd3_jax.errors import UserError
from sd3_jax.foreign_text import parse_json, shown
from sd3_jax.weights import bitsandbytes_layers, unsupported_formats
from sd3_jax.weights.stored_tensor import (
    EightBits,
    QuantizedTensor,
    Tensor,
    Tensors,
    read_small,
)

log = logging.getLogger(__name__)
E4M3, E5M2 = np.dtype(ml_dtypes.float8_e4m3fn), np.dtype(ml_dtypes.float8_e5m2)
INT8 = np.dtype(np.int8)
FORMATS = {"float8_e4m3fn": E4M3, "float8_e5m2": E5M2, "int8_tensorwise": INT8}
METADATA = "_quantization_metadata"  # ComfyUI's, of a file
PREFIXES = ("", "model.diffusion_model.")  # which the metadata's names may lack
# Names beside a weight: the last part of theirs, by the weight's name.
# "weight_scale" is the name in QUANTIZATION.md, "scale_weight" that of earlier files.
PARTS = (
    (bitsandbytes_layers.FOUR_BITS, "{}"),
    (bitsandbytes_layers.INT8, "{}.weight"),
    (r"(.+)\.(scale_weight|weight_scale|comfy_quant)", "{}.weight"),
)
SCALES = ("scale_weight", "weight_scale")
UNREAD = r"(.+\.)?(scale_input|input_scale)"  # of activations, which stay in floats
# Its presence says that all fp8 matrices below have scales.
MARK = r"(.*\.)?scaled_fp8"
# ComfyUI scales linear layers alone: tables may be in plain fp8 beside them.
TABLE = r"(.*\.)?(shared|\w*embed\w*|relative_attention_bias)(\.weight)?"


class _Sorted(NamedTuple):
    """A file's tensors: parts by the name of their weight, and the names of others."""

    parts: dict[str, dict[str, Tensor]]
    weights: dict[str, Tensor]
    marks: list[str]
    unread: list[str]


def joined(
    path: epath.Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]
) -> Tensors:
    """`tensors` with a QuantizedTensor in place of each weight and its scales.

    Raises UserError, which names the tensor, for scales that are missing, do not fit or
    have no weight, and for a format of ComfyUI that is not read.
    """
    split = _sorted(tensors)
    listed = _listed_layers(path, tensors, metadata)
    texts = _texts(split.parts)
    result: Tensors = dict(split.weights)
    # Metadata may list a layer whose parts were lost: it is an error, not a plain
    # weight.
    for key in split.parts | listed:
        parts = split.parts.get(key, {})
        if key not in result:
            there = (
                f"its {', '.join(parts)} exists" if parts else f"{METADATA} lists it"
            )
            raise UserError(
                f"{path}: {key} is missing, but {there}; the file is incomplete"
            )
        result[key] = _layer(path, key, tensors[key], parts, texts, listed)
    for mark in split.marks:
        _require_scales(path, result, mark)
    if split.unread:
        # A scale of activations changes no weight: products here are in floats.
        log.info("%s: skipped %d scales of activations", path.name, len(split.unread))
    return result


def _sorted(tensors: Mapping[str, Tensor]) -> _Sorted:
    split = _Sorted({}, {}, [], [])
    for key, tensor in tensors.items():
        matches = ((re.fullmatch(p, key), weight) for p, weight in PARTS)
        match, weight = next((x for x in matches if x[0]), (None, ""))
        if match:
            parts = split.parts.setdefault(weight.format(match[1]), {})
            parts[match[2]] = tensor
        elif re.fullmatch(MARK, key):
            split.marks.append(key)
        elif re.fullmatch(UNREAD, key):
            split.unread.append(key)
        else:
            split.weights[key] = tensor
    return split


def _texts(parts: Mapping[str, Mapping[str, Tensor]]) -> dict[str, bytes]:
    """Bytes of the small tensors that hold text or a number, by weight and part."""
    text_parts = ("comfy_quant", bitsandbytes_layers.FORMAT)
    small = {
        f"{key}/{end}": x
        for key, ends in parts.items()
        for end, x in ends.items()
        if end in text_parts or end.startswith(bitsandbytes_layers.STATE)
    }
    return {key: x.tobytes() for key, x in read_small(small).items()}


def _listed_layers(
    path: epath.Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]
) -> dict[str, Any]:
    """{weight: settings} of the layers in ComfyUI's metadata of a file."""
    if METADATA not in metadata:
        return {}
    try:
        layers = parse_json(metadata[METADATA])["layers"]
        names = {f"{name}.weight": settings for name, settings in layers.items()}
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(f"{path}: {METADATA}: expected layers: {error}") from None
    within = lambda key: next((p + key for p in PREFIXES if p + key in tensors), key)
    return {within(key): settings for key, settings in names.items()}


def _layer(
    path: epath.Path,
    key: str,
    weight: Tensor,
    parts: Mapping[str, Tensor],
    texts: Mapping[str, bytes],
    listed: Mapping[str, Any],
) -> QuantizedTensor:
    """One weight with its parts; `texts` are by weight and part."""
    layer_texts = {
        end: texts[f"{key}/{end}"] for end in parts if f"{key}/{end}" in texts
    }
    if any(end in parts for end in bitsandbytes_layers.INT8_PARTS):
        return bitsandbytes_layers.int8(path, key, weight, parts, layer_texts)
    if not any(end in parts for end in (*SCALES, "comfy_quant")) and key not in listed:
        return bitsandbytes_layers.four_bits(path, key, weight, parts, layer_texts)
    stored = weight.dtype
    if "comfy_quant" in layer_texts or key in listed:
        settings = _settings(path, key, layer_texts.get("comfy_quant"), listed.get(key))
        stored = _format(path, key, weight, settings)
    scales = [parts[end] for end in SCALES if end in parts]
    if len(scales) != 1:
        fault = "has both scale_weight and" if scales else "is incomplete: it lacks"
        raise UserError(
            f"{path}: {key} is quantized ({stored}), but the file {fault} weight_scale"
        )
    return scaled(path, key, weight, scales[0], stored)


def _settings(path: epath.Path, key: str, text: bytes | None, listed: Any) -> dict:
    """ComfyUI's settings of a layer: of its comfy_quant or of the file's metadata."""
    try:
        settings = listed if text is None else parse_json(text)
    except ValueError as error:
        raise UserError(f"{path}: {key}: comfy_quant: {error}") from None
    # A bare name stands for a format without settings.
    settings = {"format": settings} if isinstance(settings, str) else settings
    if not isinstance(settings, dict) or not isinstance(settings.get("format"), str):
        raise UserError(
            f"{path}: {key}: comfy_quant {shown(settings)}: expected a format"
        )
    return settings


def _format(
    path: epath.Path, key: str, weight: Tensor, settings: Mapping[str, Any]
) -> np.dtype:
    """The dtype of the values of a layer in ComfyUI's formats."""
    name, more = settings["format"], settings.get("params")
    # "convrot": the weights are rotated, and need inputs that are rotated alike.
    rotated = any(isinstance(x, dict) and x.get("convrot") for x in (settings, more))
    if name not in FORMATS or rotated:
        kind = f"{shown(name)} with rotations" if rotated else shown(name)
        unsupported_formats.refuse(path, f"ComfyUI's {kind}", key)
    # A container of plain bytes may hold them.
    if weight.dtype not in (FORMATS[name], np.dtype(np.uint8)):
        raise UserError(
            f"{path}: {key} is of {weight.dtype}, but its comfy_quant says"
            f" {shown(name)}"
        )
    return FORMATS[name]


def scaled(
    path: epath.Path, key: str, weight: Tensor, scale: Tensor, stored: np.dtype
) -> QuantizedTensor:
    """A weight times its scale: one for the tensor, or one for each output.

    `stored` is the dtype of the weight's values.
    """
    axes = len(weight.shape)
    outputs = weight.shape[:1]
    # Shapes of a scale: a scalar in three spellings, or one number for each row, in
    # two.
    sizes = {(): 1, (1,): 1, (1, 1): 1} | {outputs: -1, (*outputs, 1): -1}
    if axes < 1 or scale.shape not in sizes:
        raise UserError(
            f"{path}: the scale of {key} is {list(scale.shape)}, expected one number or"
            f" {list(outputs)}, one for each output of {list(weight.shape)}"
        )
    if scale.dtype.kind not in "fV":  # V: of ml_dtypes
        raise UserError(
            f"{path}: the scale of {key} is of {scale.dtype}, expected floats"
        )
    # Bytes may be packed values of a format whose other parts do not tell it.
    if stored.kind in "biu" and stored != INT8:
        raise UserError(
            f"{path}: {key} is of {stored} with a scale, expected fp8 or int8; set its"
            " format in a comfy_quant"
        )
    count = 1 if sizes[scale.shape] == 1 else outputs[0]
    # A view: uint8 bytes become fp8 values without a cast.
    q = lambda: weight.read().view(stored)

    def factors() -> np.ndarray:
        x = scale.read().astype(np.float32).reshape(count, *[1] * (axes - 1))
        if not finite(x):
            raise UserError(f"{path}: the scale of {key} is NaN or infinite")
        return x

    plain = stored.itemsize > 1  # ComfyUI multiplies these as well, usually by 1
    form = f"scaled {stored.name}" if plain or stored != INT8 else "int8 (ComfyUI)"
    # Our leaves have these two kinds for matrices: such weights are loaded with the
    # file's own scales, without a second rounding.
    ours = stored in (E4M3, INT8) and axes == 2
    eight = EightBits(stored, lambda: (q(), factors())) if ours else None
    read = lambda: multiplied(q(), factors())
    dtype = np.dtype(np.float32)
    return QuantizedTensor(weight.path, dtype, weight.shape, form, read, eight)


def multiplied(q: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """q * scale in float32."""
    x = q.astype(np.float32)
    x *= scale  # in place: one float32 copy of a tensor at most
    return x


def _require_scales(path: epath.Path, tensors: Tensors, mark: str) -> None:
    """UserError for a matrix in fp8 without a scale below a mark of scaled fp8."""
    prefix = mark.removesuffix("scaled_fp8")
    eight: Callable = lambda x: isinstance(x, Tensor) and x.dtype in (E4M3, E5M2)
    bare = [
        key
        for key, x in tensors.items()
        if key.startswith(prefix) and eight(x) and len(x.shape) == 2
        if not re.fullmatch(TABLE, key)
    ]
    if bare:
        raise UserError(
            f"{path}: {len(bare)} matrices in fp8 have no scale_weight, {bare[0]}"
            f" first, but {mark} says that they are scaled; the file is incomplete"
        )
