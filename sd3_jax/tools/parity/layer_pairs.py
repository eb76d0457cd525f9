"""Pairs of outputs, ours and PyTorch's, layer by layer in order."""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from sd3_jax.models import position_table
from sd3_jax.tools.parity.torch_components import nhwc


class Layer(NamedTuple):
    """`ours(intermediates)` is our output in flax's intermediates; PyTorch's is
    pick(output) of the submodule named `theirs`."""

    name: str
    ours: Callable[[dict], Any]
    theirs: str
    pick: Callable = lambda answer: answer


def at(*path: str) -> Callable[[dict], Any]:
    """A function of the intermediates: the output of the module at `path`."""

    def find(taken):
        for name in path:
            taken = taken[name]
        return taken["__call__"][0]

    return find


def denoiser(config: dict, variables: dict, shape: tuple[int, int]) -> list[Layer]:
    """The layers of the denoiser for latents of `shape`, (h, w)."""
    depth, patch = config["num_layers"], config.get("patch_size", 2)
    dual = len(config.get("dual_attention_layers") or ())
    table = variables["buffers"]["pos_embed"].astype(np.float32)
    # diffusers crops the middle of its table to the picture's patches.
    place = position_table.crop(table, *(side // patch for side in shape))
    time = "time_text_embed.{}_embedder"
    layers = [
        Layer("patches", at("patch_embed"), "pos_embed.proj", _tokens),
        Layer(
            "patches + positions",
            lambda taken: at("patch_embed")(taken).astype(np.float32) + place,
            "pos_embed",
        ),
        Layer("context", at("context_embed"), "context_embedder"),
        Layer("time", at("time_embed"), time.format("timestep")),
        Layer("pooled text", at("pooled_embed"), time.format("text")),
    ]
    for i in range(depth):
        # Our blocks lie in scans, one for dual and one for plain blocks; the last block
        # is a module of its own, as it has no text output.
        group, j = ("dual_blocks", i) if i < dual else ("blocks", i - dual)
        for stream, name in enumerate(("image", "text")):
            if i == depth - 1:
                ours = lambda taken: at("last_block")(taken)[0]
            else:
                ours = lambda taken, group=group, j=j, stream=stream: at(group)(taken)[
                    stream
                ][j]
            if i < depth - 1 or name == "image":
                # diffusers' block returns (text, image), ours (image, text).
                pick = lambda answer, stream=stream: answer[1 - stream]
                block = f"transformer_blocks.{i}"
                layers.append(Layer(f"block {i} {name}", ours, block, pick))
    return [*layers, Layer("tokens out", at("final"), "proj_out")]


def _tokens(answer):
    return answer.flatten(2).transpose(1, 2)


# --- the autoencoder


def encoder(config: dict) -> list[Layer]:
    levels, resnets = len(config["block_out_channels"]), config["layers_per_block"]
    layers = [_conv("encoder", "conv_in")]
    for i in range(levels):
        layers += _level("encoder", "down", i, resnets, levels)
    return [*layers, _middle("encoder"), _conv("encoder", "conv_out")]


def decoder(config: dict) -> list[Layer]:
    levels, resnets = len(config["block_out_channels"]), config["layers_per_block"] + 1
    layers = [_conv("decoder", "conv_in"), _middle("decoder")]
    for i in range(levels):
        layers += _level("decoder", "up", i, resnets, levels)
    return [*layers, _conv("decoder", "conv_out")]


def _conv(half, name):
    return Layer(f"{half} {name}", at(half, name), f"{half}.{name}", nhwc)


def _middle(half):
    return Layer(f"{half} middle", at(half, "mid"), f"{half}.mid_block", nhwc)


def _level(half, way, i, resnets, levels):
    ours, theirs = f"{way}_{i}", f"{half}.{way}_blocks.{i}"
    for j in range(resnets):
        label = f"{half} {way} {i} resnet {j}"
        path = at(half, f"{ours}_resnet_{j}")
        yield Layer(label, path, f"{theirs}.resnets.{j}", nhwc)
    if i < levels - 1:
        sampler = f"{theirs}.{way}samplers.0"
        yield Layer(f"{half} {way} {i} conv", at(half, f"{ours}_conv"), sampler, nhwc)


# --- the text encoders


def clip(config: dict) -> list[Layer]:
    return [
        *_blocks(
            config["num_hidden_layers"], at("blocks"), "text_model.encoder.layers"
        ),
        Layer("final norm", at("final_norm"), "text_model.final_layer_norm"),
        Layer("pooled", at("text_projection"), "text_projection"),
    ]


def t5(config: dict) -> list[Layer]:
    return [
        *_blocks(config["num_layers"], at("stack", "blocks"), "encoder.block"),
        Layer("final norm", at("stack", "norm"), "encoder.final_layer_norm"),
    ]


def _blocks(depth: int, ours: Callable[[dict], Any], theirs: str) -> list[Layer]:
    # Some blocks of transformers return a tuple, whose first entry is the states.
    first = lambda answer: answer[0] if isinstance(answer, tuple) else answer
    return [
        Layer(f"block {i}", lambda taken, i=i: ours(taken)[i], f"{theirs}.{i}", first)
        for i in range(depth)
    ]
