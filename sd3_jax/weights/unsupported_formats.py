"""Refuse files that cannot be loaded: other formats, quantized weights, other models.

Formats are recognised by their first bytes, quantization and other models by names of
tensors. Each function raises a UserError that says what the file is and what to do.
"""

import re
from collections.abc import Collection
from typing import NoReturn

from etils import epath

from sd3_jax.errors import UserError
from sd3_jax.foreign_text import shown

HEAD = 512  # first bytes that are read of a file; tar's mark is at byte 257
# torch.save before version 1.6: a bare pickle, of protocol 2 to 5.
PICKLES = (b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")
PICKLED = (".bin", ".pth", ".pt", ".ckpt", ".pkl", ".pickle")
AGAIN = "download it again"
UNPACK = "unpack it and name the .safetensors within"
FORMATS = {  # first bytes, in lower case where they are letters: what it is, what to do
    b"gguf": ("a GGUF file", "expected the .safetensors that it was made from"),
    # llama.cpp's older formats, whose magic numbers are little-endian.
    b"lmgg": ("a GGML file", "expected the .safetensors that it was made from"),
    b"tjgg": ("a GGML file", "expected the .safetensors that it was made from"),
    # What git checks out without git-lfs: three lines of text.
    b"version https://git-lfs": (
        "a git-lfs pointer, not the file that it stands for",
        "run `git lfs pull` in its repository, or download the file itself",
    ),
    b"<!doctype html": ("a web page", f"{AGAIN}, from the link of the file itself"),
    b"<html": ("a web page", f"{AGAIN}, from the link of the file itself"),
    b"<?xml": ("an XML page", f"{AGAIN}, from the link of the file itself"),
    b"pk\x03\x04": ("a zip archive", UNPACK),
    b"\x1f\x8b": ("a gzip archive", UNPACK),
    b"bzh": ("a bzip2 archive", UNPACK),
    b"\xfd7zxz": ("an xz archive", UNPACK),
    b"\x28\xb5\x2f\xfd": ("a zstd archive", UNPACK),
    b"7z\xbc\xaf": ("a 7z archive", UNPACK),
    b"rar!": ("a RAR archive", UNPACK),
    b"\x89hdf": ("an HDF5 file", "expected the model as .safetensors"),
    b"\x93numpy": ("a numpy file", "expected the model as .safetensors"),
    b"\x89png": ("a PNG picture", "expected the model as .safetensors"),
    b"\xff\xd8\xff": ("a JPEG picture", "expected the model as .safetensors"),
}
SUFFIXES = {  # formats without first bytes of their own
    ".onnx": "an ONNX program",
    ".msgpack": "flax's msgpack",
    ".tflite": "a TFLite program",
    ".engine": "a TensorRT program",
    ".plan": "a TensorRT program",
}


def refuse_format(path: epath.Path, head: bytes) -> None:
    """UserError for a known format; `head` is the first HEAD bytes of a file.

    Returns if the format is unknown.
    """
    # A web server may put a byte-order mark or blank lines before a page.
    low, suffix = head.lower().lstrip(b"\xef\xbb\xbf\r\n\t "), path.suffix.lower()
    # torch.save since 1.6: a zip archive with data.pkl.
    zipped = head.startswith(b"PK\x03\x04") and (b".pkl" in head or suffix in PICKLED)
    if head.startswith(PICKLES) or zipped:
        raise UserError(_pickle(path))
    for first, (kind, remedy) in FORMATS.items():
        if low.startswith(first):
            raise UserError(f"{path} is {kind}: {remedy}")
    if suffix in PICKLED:
        raise UserError(_pickle(path))
    if suffix in SUFFIXES:
        kind = SUFFIXES[suffix]
        raise UserError(f"{path} is {kind}: expected the model as .safetensors")
    if head[257:262] == b"ustar":  # a tar begins with its first member's name
        raise UserError(f"{path} is a tar archive: unpack it and name the file within")
    if len(head) == HEAD and not any(head):
        raise UserError(
            f"{path} begins with zeros, like an interrupted download; download it again"
        )
    if _is_text(head):
        begin = shown(" ".join(head.decode(errors="ignore").split()), 60)
        raise UserError(f'{path} is text, "{begin}": expected a .safetensors file')


def refuse_pickles(folder: epath.Path) -> None:
    """UserError if a folder without .safetensors holds pickles, or GGUF files."""
    for path in sorted(folder.iterdir()):
        if path.suffix in PICKLED:
            raise UserError(_pickle(path))
        if path.suffix.lower() == ".gguf":
            raise UserError(f"{folder}: holds no .safetensors file; name {path} itself")


def _pickle(path: epath.Path) -> str:
    return (
        f"{path} is a pickle, and loading one may run code; convert it to"
        " safetensors: huggingface.co/spaces/safetensors/convert, or"
        " safetensors.torch.save_file(torch.load(FILE, weights_only=True), OUT)"
    )


def _is_text(head: bytes) -> bool:
    """Whether the bytes are printable UTF-8."""
    try:
        text = head[:200].decode()
    except UnicodeDecodeError as error:
        # A fault in the last three bytes may be a character that is cut off.
        if error.start < len(head[:200]) - 3:
            return False
        text = head[: error.start].decode()
    # Short heads may print by chance.
    return len(text) > 8 and all(c.isprintable() or c.isspace() for c in text)


# By a tensor's name. The first match is reported, so specific patterns come first.
QUANTIZED = {  # what quantized_layers does not read
    r"\.(wscales|smooth(_factor(_orig)?)?|wtscale|wcscales)$": "SVDQuant",
    r"\.g_idx$": "GPTQ",
    r"\.(qweight|qzeros)$": "GPTQ or AWQ",
    r"\.weight_scale_2$": "NVFP4",
    r"\.weight_scale_inv$": "fp8 in blocks",
    r"\.weight\._(data|scale)$": "quanto",
    r"[.:]_?weight_(qdata|zero_point)$|:_weight_scale$": "torchao",
}
DTYPES = (  # of safetensors, that no published SD3 has but in a quantized form
    *("F4", "F6_E2M3", "F6_E3M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"),
    *("U16", "U32", "U64", "C64"),
)


def refuse_quantized(path: epath.Path, names: Collection[str]) -> None:
    """UserError for quantized weights of a format that is not read."""
    for pattern, kind in QUANTIZED.items():
        name = next((name for name in names if re.search(pattern, name)), None)
        if name is not None:
            refuse(path, kind, name)


def refuse(path: epath.Path, kind: str, name: str) -> NoReturn:
    """UserError for a format of quantized weights, which the tensor `name` shows."""
    raise UserError(
        f"{path} is quantized, {kind}, as {shown(name)} shows, which is not read; use"
        " the model in fp32, fp16, bf16 or fp8, as GGUF, or by bitsandbytes, and set"
        " quantize={...} to quantize to eight bits here"
    )


OTHERS = {  # by tensor names: what is no component of Stable Diffusion 3
    r"(^|[._])lora_|\.lora\.|\.dora_scale$|\.hada_w|\.lokr_": (
        "a LoRA; load it with lora=[PATH] or config.sample.lora"
    ),
    r"^controlnet_blocks\.": "a ControlNet; use sd3_jax.load_control(PATH, bundle)",
    r"(^|\.)(input_blocks|output_blocks)\.\d": (
        "not a model of this family but a U-Net (Stable Diffusion 1, 2 or XL): expected"
        " Stable Diffusion 3 or 3.5"
    ),
    r"^(up|down)_blocks\.\d+\.attentions\.": (
        "not a model of this family but a U-Net (Stable Diffusion 1, 2 or XL): expected"
        " Stable Diffusion 3 or 3.5"
    ),
    r"(^|\.)(double_blocks|single_blocks|single_transformer_blocks)\.\d": (
        "not a model of this family but Flux, or one like it: expected Stable Diffusion"
        " 3 or 3.5"
    ),
}


def refuse_others(path: epath.Path, names: Collection[str]) -> None:
    """UserError for a LoRA, a ControlNet or another model instead of weights."""
    for pattern, kind in OTHERS.items():
        if any(re.search(pattern, name) for name in names):
            raise UserError(f"{path} is {kind}")


CLASSES = {  # class in config.json: what to name instead
    "SD3ControlNetModel": "a ControlNet; use sd3_jax.load_control(PATH, bundle)",
    "CLIPModel": "a whole CLIP; use its .safetensors, whose text encoder is read",
    "CLIPTextModel": "a CLIP without a projection; use the .safetensors of CLIP-L",
    "T5ForConditionalGeneration": "a whole T5; use its .safetensors",
}
