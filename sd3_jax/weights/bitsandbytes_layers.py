"""Dequantize bitsandbytes' layers: nf4 and fp4 in blocks, and int8 by rows.

Names and rules are those of bitsandbytes.functional.QuantState and of LLM.int8.
"""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from etils import epath

from sd3_jax.errors import UserError
from sd3_jax.foreign_text import parse_json, shown
from sd3_jax.weights import unsupported_formats
from sd3_jax.weights.stored_tensor import EightBits, QuantizedTensor, Tensor

# The name ends with the type: quant_state.bitsandbytes__nf4.
STATE = "quant_state.bitsandbytes__"
FOUR_BITS = r"(.+)\.((?:nested_)?(?:absmax|quant_map)|quant_state\.bitsandbytes__\w+)"
FORMAT = "weight_format"
INT8_PARTS = ("SCB", FORMAT)
INT8 = r"(.+)\.(SCB|weight_format)"
TYPES = ("nf4", "fp4")
DTYPES = ("float32", "float16", "bfloat16")
UNIT = np.float32(1 / 127)  # bitsandbytes' scale is that of the largest of a row


class State(NamedTuple):
    """What the JSON of a quant_state says."""

    blocksize: int
    dtype: np.dtype
    shape: tuple[int, ...]
    nested_blocksize: int
    nested_offset: float


# --- four bits


def four_bits(
    path: epath.Path,
    key: str,
    packed: Tensor,
    parts: Mapping[str, Tensor],
    texts: Mapping[str, bytes],
) -> QuantizedTensor:
    """A weight of two values a byte: a table's entry times the largest of its block."""
    where = f"{path}: {key}"
    kind, text = _state_of(where, texts)
    absent = [x for x in ("absmax", "quant_map") if x not in parts]
    # Double quantization (QLoRA, Dettmers et al. 2023, section 3): the blocks' scales
    # are in eight bits themselves, with an offset that was subtracted before.
    nested = "nested_absmax" in parts or "nested_quant_map" in parts
    nested = nested or "absmax" in parts and parts["absmax"].dtype == np.uint8
    if nested:
        names = "nested_absmax", "nested_quant_map"
        absent += [x for x in names if x not in parts]
    if absent:
        raise UserError(
            f"{where}.{absent[0]} is missing: without it the {kind} weight cannot be"
            " read; the file is incomplete"
        )
    state = _parsed(where, kind, text, nested)
    count = math.prod(state.shape)
    _require_sizes(where, kind, packed, parts, state, nested)

    def read() -> np.ndarray:
        largest = _floats(parts["absmax"])
        if nested:
            table = _floats(parts["nested_quant_map"])
            scales = _floats(parts["nested_absmax"])
            codes = parts["absmax"].read().reshape(-1)
            largest = _by_blocks(table[codes], scales, state.nested_blocksize)
            largest += np.float32(state.nested_offset)
        bytes_ = packed.read().reshape(-1).view(np.uint8)
        codes = np.empty(2 * len(bytes_), np.uint8)
        # The first value of a byte is in its high four bits.
        codes[0::2], codes[1::2] = bytes_ >> 4, bytes_ & 15
        # [:count]: an odd number of values leaves half a byte.
        x = _floats(parts["quant_map"])[codes[:count]]
        x = _by_blocks(x, largest, state.blocksize)
        # In the dtype that the library computes, and no finer.
        return x.reshape(state.shape).astype(state.dtype)

    form = kind if not nested else f"{kind} (double)"
    return QuantizedTensor(packed.path, state.dtype, state.shape, form, read)


def _require_sizes(
    where: str,
    kind: str,
    packed: Tensor,
    parts: Mapping[str, Tensor],
    state: State,
    nested: bool,
) -> None:
    """UserError for a part of another size than the weight's shape gives it."""
    count = math.prod(state.shape)
    blocks = -(-count // state.blocksize)
    # Rounded up, as the last block may be short.
    sizes = {"absmax": blocks, "quant_map": 16}
    if nested:
        sizes["nested_absmax"] = -(-blocks // state.nested_blocksize)
        sizes["nested_quant_map"] = 256
    for name, size in sizes.items():
        if math.prod(parts[name].shape) != size:
            raise UserError(
                f"{where}.{name} has {list(parts[name].shape)} values, expected {size}"
                f" for {list(state.shape)} in blocks of {state.blocksize}"
            )
    if nested and parts["absmax"].dtype != np.uint8:
        raise UserError(
            f"{where}.absmax is of {parts['absmax'].dtype}, expected uint8 beside"
            " nested_absmax"
        )
    if packed.size != -(-count // 2):  # it may be stored as floats of the same bytes
        raise UserError(
            f"{where} has {packed.size} bytes, expected {-(-count // 2)} for"
            f" {list(state.shape)} in {kind}"
        )


def _state_of(where: str, texts: Mapping[str, bytes]) -> tuple[str, bytes]:
    """(quant_type, JSON) of a weight's quant_state."""
    states = {k.removeprefix(STATE): x for k, x in texts.items() if k.startswith(STATE)}
    if len(states) != 1:
        raise UserError(
            f"{where} has {len(states)} of .{STATE}TYPE, expected one; the file is"
            " incomplete"
        )
    ((kind, text),) = states.items()
    if kind not in TYPES:
        raise UserError(
            f'{where}: quant_type "{shown(kind)}": expected {" or ".join(TYPES)}'
        )
    return kind, text


def _parsed(where: str, kind: str, text: bytes, nested: bool) -> State:
    is_count = lambda x: type(x) is int and 0 < x < 2**40
    try:
        x = parse_json(text)
        if x["quant_type"] != kind:
            raise ValueError(f"quant_type {shown(x['quant_type'])}, expected {kind}")
        if not is_count(x["blocksize"]):
            raise ValueError(f"blocksize {shown(x['blocksize'])}")
        if not isinstance(x["shape"], list) or not all(map(is_count, x["shape"])):
            raise ValueError(f"shape {shown(x['shape'])}")
        if x["dtype"] not in DTYPES:
            raise ValueError(f"dtype {shown(x['dtype'])}, not of {', '.join(DTYPES)}")
        # Without the offset the scales of blocks would be wrong, and not missing.
        size = x["nested_blocksize"] if nested else 1
        offset = x["nested_offset"] if nested else 0.0
        if not is_count(size) or type(offset) not in (int, float):
            raise ValueError("nested_blocksize or nested_offset is no number")
        dtype = np.dtype(jnp.dtype(x["dtype"]))
        return State(x["blocksize"], dtype, tuple(x["shape"]), size, float(offset))
    except KeyError as error:
        raise UserError(f"{where}: its quant_state lacks {error}") from None
    except (ValueError, TypeError) as error:
        raise UserError(f"{where}: its quant_state is damaged: {error}") from None


def _floats(tensor: Tensor) -> np.ndarray:
    return tensor.read().reshape(-1).astype(np.float32)


# Not padded to whole blocks: that would copy the tensor.
def _by_blocks(x: np.ndarray, factors: np.ndarray, size: int) -> np.ndarray:
    """x with each block of `size` values times its factor, in place."""
    full = len(x) - len(x) % size
    x[:full].reshape(-1, size)[...] *= factors[: full // size, None]
    if full < len(x):
        x[full:] *= factors[-1]
    return x


# --- int8


def int8(
    path: epath.Path,
    key: str,
    weight: Tensor,
    parts: Mapping[str, Tensor],
    texts: Mapping[str, bytes],
) -> QuantizedTensor:
    """A weight whose row i is int8 times SCB[i] / 127 (LLM.int8)."""
    where, module = f"{path}: {key}", key.removesuffix(".weight")
    if "SCB" not in parts:
        raise UserError(
            f"{where}: {module}.SCB, the scales of its rows, is missing; the file is"
            " incomplete"
        )
    scale = parts["SCB"]
    if weight.dtype != np.int8 or len(weight.shape) != 2:
        raise UserError(
            f"{where} is {list(weight.shape)} of {weight.dtype}, but {module}.SCB says"
            " that it is a matrix of int8"
        )
    if math.prod(scale.shape) != weight.shape[0] or scale.dtype.kind not in "fV":
        raise UserError(
            f"{path}: {module}.SCB is {list(scale.shape)} of {scale.dtype}, expected"
            f" {[weight.shape[0]]} floats, one for each row of {list(weight.shape)}"
        )
    # 0 is "row", the plain layout.
    if any(texts.get(FORMAT, b"")):  # others are the layouts of GPU kernels
        unsupported_formats.refuse(
            path, "bitsandbytes in 8 bits in a GPU's layout", f"{module}.{FORMAT}"
        )

    def eight() -> tuple[np.ndarray, np.ndarray]:
        return weight.read(), _floats(scale)[:, None] * UNIT

    def read() -> np.ndarray:
        q, rows = eight()
        x: Any = q.astype(np.float32)
        x *= rows
        return x

    dtype = np.dtype(np.float32)
    form = "int8 (bitsandbytes)"
    eight_bits = EightBits(np.dtype(np.int8), eight)
    return QuantizedTensor(weight.path, dtype, weight.shape, form, read, eight_bits)
