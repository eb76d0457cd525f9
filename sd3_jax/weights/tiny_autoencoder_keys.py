"""TAESD's key table, and its original files, which hold a half each.

diffusers numbers the layers of a half below "encoder.layers" and "decoder.layers". The
author's files, as ComfyUI's folder vae_approx has them, number them without a prefix,
and the decoder's from 1, since its first layer bounds the latents.
"""

import re

from etils import epath

from sd3_jax.errors import UserError
from sd3_jax.models.tiny_autoencoder import TinyAutoencoder
from sd3_jax.weights.key_mapping import CONV, Group, Row
from sd3_jax.weights.safetensors import Tensors, open_file

HALVES = ("encoder", "decoder")
BARE = re.compile(r"\d+\.(conv\.\d+\.)?(weight|bias)")
# In one file, as ComfyUI names them once both are read.
PREFIX = re.compile(r"taesd_(?=(en|de)coder\.\d)")
# From the large autoencoder's latents, in which ComfyUI has them, to TAESD's: ours.
FACTORS = ("vae_scale", "vae_shift")


def table(model: TinyAutoencoder) -> list[Group]:
    """Groups for both halves."""
    encoder = _rows(_encoder_layers(model), first=0)
    # diffusers' DecoderTiny has the bound in its forward, and no layer for it.
    decoder = _rows(_decoder_layers(model), first=1)
    return [
        Group("encoder", "encoder.layers", "encoder", encoder),
        Group("decoder", "decoder.layers", "decoder", decoder),
    ]


def _encoder_layers(model: TinyAutoencoder) -> list[str | None]:
    """Our names of the encoder's layers, in order; None for those without weights."""
    layers: list[str | None] = ["conv_in"]
    for i, count in enumerate(model.encoder_blocks):
        # The first level keeps the resolution.
        layers += [f"down_{i}"] * (i > 0)
        layers += [f"level_{i}_block_{j}" for j in range(count)]
    return [*layers, "conv_out"]


def _decoder_layers(model: TinyAutoencoder) -> list[str | None]:
    layers: list[str | None] = ["conv_in", None]  # ReLU
    last = len(model.decoder_blocks) - 1
    for i, count in enumerate(model.decoder_blocks):
        layers += [f"level_{i}_block_{j}" for j in range(count)]
        layers += [None, f"up_{i}"] if i < last else ["conv_out"]  # upsampling
    return layers


def _rows(layers: list[str | None], *, first: int) -> list[Row]:
    rows = []
    for number, name in enumerate(layers):
        theirs = str(number), str(number + first)
        if name is not None and "block" in name:
            # ReLUs are the layers 1 and 3 of a block.
            for i in range(3):
                # Two names of one layer: diffusers' and the original's.
                names = [f"{x}.conv.{2 * i}" for x in theirs]
                rows.append(Row(f"{name}/conv{i + 1}", *names, kind=CONV))
        elif name is not None:
            rows.append(Row(name, *theirs, kind=CONV))
    return rows


def with_both_halves(path: epath.Path, tensors: Tensors) -> Tensors:
    """Tensors of an original file with those of the file of its other half.

    Other files' tensors are returned as they are. UserError if there is no other half.
    """
    if any(PREFIX.match(key) for key in tensors):
        rest = {key: x for key, x in tensors.items() if key not in FACTORS}
        return {PREFIX.sub("", key): x for key, x in rest.items()}
    if not tensors or not all(BARE.fullmatch(key) for key in tensors):
        return tensors
    # The decoder begins with a layer that has no weights.
    half, other = HALVES if "0.weight" in tensors else HALVES[::-1]
    file = path.with_name(path.name.replace(half, other))
    if file == path or not file.exists():
        expected = f"{file.name} beside it" if file != path else f'"{half}" in its name'
        raise UserError(
            f"{path} is the {half} of a TAESD alone; expected {expected}, or a folder"
            " of diffusers' AutoencoderTiny"
        )
    other_tensors, _ = open_file(file)
    named = lambda half, tensors: {f"{half}.{key}": x for key, x in tensors.items()}
    return named(half, tensors) | named(other, other_tensors)
