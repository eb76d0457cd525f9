"""Open GGUF files of SD3 and of its text encoders.

Names are those of ComfyUI-GGUF and stable-diffusion.cpp, which keep the names of the
file that they converted, and of llama.cpp for T5. Values are dequantized by the gguf
package, one tensor at a time.
"""

import functools
import math
import re

import ml_dtypes
import numpy as np
from etils import epath

from sd3_jax.errors import UserError
from sd3_jax.foreign_text import shown
from sd3_jax.weights import gguf_header
from sd3_jax.weights.gguf_header import Entry, Header
from sd3_jax.weights.stored_tensor import QuantizedTensor, Tensor, Tensors, fill

ARCHITECTURE = "general.architecture"
T5 = ("t5", "t5encoder")
# "pig" is any model, as the gguf nodes write it; stable-diffusion.cpp writes none.
ARCHITECTURES = ("sd3", *T5, "pig", None)
ORIGINAL_SHAPE = "comfy.gguf.orig_shape."  # ComfyUI-GGUF's field of a reshaped tensor
# Numbers of ggml's enum ggml_type (ggml.h).
PLAIN = {0: np.float32, 1: np.float16, 30: ml_dtypes.bfloat16}  # by ggml's type
INTEGERS = {24: np.int8, 25: np.int16, 26: np.int32, 27: np.int64}
READ = "F32, F16, BF16, Q4_0 to Q8_0, Q2_K to Q6_K, or IQ types"
BLOCK = 2**20  # numbers to dequantize at a time
PART = r"-(\d{5})-of-(\d{5})\.gguf$"
# llama.cpp's names of T5 (gguf-py's tensor_mapping), and transformers' names.
# Applied in this order, each to the result of those before.
T5_NAMES = {
    r"^enc\.": "encoder.",
    r"^dec\.": "decoder.",
    r"\.blk\.": ".block.",
    r"^token_embd\.": "shared.",
    r"^output\.": "lm_head.",
    r"\.output_norm\.": ".final_layer_norm.",
    r"\.attn_(q|k|v|o)\.": r".layer.0.SelfAttention.\1.",
    r"\.attn_norm\.": ".layer.0.layer_norm.",
    r"\.attn_rel_b\.": ".layer.0.SelfAttention.relative_attention_bias.",
    r"\.ffn_gate\.": ".layer.1.DenseReluDense.wi_0.",
    r"\.ffn_up\.": ".layer.1.DenseReluDense.wi_1.",
    r"\.ffn_down\.": ".layer.1.DenseReluDense.wo.",
    r"\.ffn_norm\.": ".layer.1.layer_norm.",
}
# ggml drops leading axes of size 1, which a position table (1, tokens, width) has.
POSITIONS = r"(.*\.)?pos_embed(\.pos_embed)?"


def open_file(path: epath.Path) -> Tensors:
    """The tensors of a GGUF file by name; values are not read.

    Raises UserError for a damaged file, a part of a split one, another architecture and
    a type that the gguf package does not dequantize.
    """
    header = gguf_header.read_header(path)
    _refuse_part(path, header)
    architecture = header.fields.get(ARCHITECTURE)
    if architecture not in ARCHITECTURES:
        raise UserError(
            f'{path} is a GGUF file of the architecture "{shown(architecture)}":'
            " expected sd3, or t5 or t5encoder for the text encoder"
        )
    if not header.tensors:
        raise UserError(f"{path} is a GGUF file without tensors, perhaps a vocabulary")
    tensors: Tensors = {}
    for name, entry in header.tensors.items():
        tensor = _tensor(path, header, name, entry)
        # Files of sd3 already have the names of the checkpoint that they were made
        # from.
        name = _t5_name(name) if architecture in T5 else name
        if name in tensors:  # by llama.cpp's and by transformers' name
            raise UserError(f"{path}: {name} appears twice, under two names")
        if re.fullmatch(POSITIONS, name) and len(tensor.shape) == 2:
            tensor = _reshaped(tensor, (1, *tensor.shape))
        tensors[name] = tensor
    return tensors


def _refuse_part(path: epath.Path, header: Header) -> None:
    """UserError for one file of a model that llama.cpp split into several."""
    match = re.search(PART, path.name)
    count = header.fields.get("split.count", 1)
    if match and int(match[2]) > 1 or isinstance(count, int) and count > 1:
        parts = int(match[2]) if match else count
        raise UserError(
            f"{path} is one of {parts} parts of a GGUF file; join them with"
            " `llama-gguf-split --merge FIRST_PART OUT` and name OUT"
        )


def _t5_name(name: str) -> str:
    for llama, transformers in T5_NAMES.items():
        name = re.sub(llama, transformers, name)
    return name


def _reshaped(tensor: Tensor | QuantizedTensor, shape: tuple[int, ...]):
    if isinstance(tensor, Tensor):
        return tensor._replace(shape=shape)
    read = tensor.read
    return tensor._replace(shape=shape, read=lambda: read().reshape(shape))


def _tensor(
    path: epath.Path, header: Header, name: str, entry: Entry
) -> Tensor | QuantizedTensor:
    """A tensor of a plain or of a quantized type, whose bytes are in the file."""
    where = f"{path}: {name}"
    shape = _original_shape(where, header.fields.get(ORIGINAL_SHAPE + name), entry)
    plain = (PLAIN | INTEGERS).get(entry.type)
    if plain is not None:
        tensor = Tensor(path, np.dtype(plain), shape, entry.start)
        _require_whole(where, entry.start + tensor.size, header.length)
        return tensor
    # Quantized rows are whole blocks along the last axis.
    kind, numbers, size = _type(where, entry.type)
    if math.prod(entry.sizes) == 0 or not entry.sizes or entry.sizes[-1] % numbers:
        raise UserError(
            f"{where} is {list(entry.sizes)} of {kind}, which has blocks of {numbers};"
            " the file is damaged"
        )
    rows = math.prod(entry.sizes[:-1])
    bytes_in_row = entry.sizes[-1] // numbers * size
    _require_whole(where, entry.start + rows * bytes_in_row, header.length)

    def read() -> np.ndarray:
        # Read at once: the largest, T5's table of tokens, has 140 MB in eight bits.
        raw = np.empty((rows, bytes_in_row), np.uint8)
        with path.open("rb") as file:
            fill(file, path, entry.start, raw)
        return dequantized(raw, entry.type, entry.sizes[-1]).reshape(shape)

    return QuantizedTensor(path, np.dtype(np.float32), shape, kind, read)


def _original_shape(where: str, original, entry: Entry) -> tuple[int, ...]:
    """The shape that ComfyUI-GGUF noted of a tensor that it reshaped, or the stored."""
    if original is None:
        return entry.sizes
    counts = isinstance(original, list)
    counts = counts and all(type(n) is int and n >= 0 for n in original)
    if not counts or math.prod(original) != math.prod(entry.sizes):
        raise UserError(
            f"{where} is {list(entry.sizes)}, but {ORIGINAL_SHAPE} says"
            f" {shown(original)}; the file is damaged"
        )
    return tuple(original)


def _require_whole(where: str, end: int, length: int) -> None:
    if end > length:
        raise UserError(
            f"{where} ends at byte {end}, but the file has {length}: it was not copied"
            " whole, copy it again"
        )


def _type(where: str, number: int) -> tuple[str, int, int]:
    """(name, numbers of a block, bytes of a block) of a type that can be read."""
    import gguf

    try:
        kind = gguf.GGMLQuantizationType(number)
    except ValueError:
        raise UserError(
            f"{where} is of GGUF type {number}, which the gguf package does not know:"
            f" expected {READ}"
        ) from None
    if not _readable(kind):
        raise UserError(
            f"{where} is of GGUF type {kind.name}, which the gguf package cannot"
            f" dequantize: expected {READ}"
        )
    return kind.name, *gguf.GGML_QUANT_SIZES[kind]


@functools.cache
def _readable(kind) -> bool:
    """Whether the gguf package dequantizes a type."""
    import gguf

    try:  # it says so only when it is asked
        gguf.dequantize(np.zeros((1, gguf.GGML_QUANT_SIZES[kind][1]), np.uint8), kind)
    except NotImplementedError:
        return False
    return True


def dequantized(raw: np.ndarray, kind: int, width: int) -> np.ndarray:
    """Float32 values (rows, width) of rows of bytes (rows, bytes) of a ggml type."""
    import gguf

    kind = gguf.GGMLQuantizationType(kind)
    x = np.empty((len(raw), width), np.float32)
    # gguf holds its result twice while it works: rows of BLOCK numbers at a time.
    rows = max(1, BLOCK // width)
    for i in range(0, len(raw), rows):
        x[i : i + rows] = gguf.dequantize(raw[i : i + rows], kind)
    return x
