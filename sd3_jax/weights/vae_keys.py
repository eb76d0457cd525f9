"""The autoencoder's key table, in diffusers' names and in those of LDM's code."""

from sd3_jax.models.vae import VAE
from sd3_jax.weights.key_mapping import CONV, CONV_1X1, LINEAR, Group, Row


def table(model: VAE) -> list[Group]:
    """Groups for every module of a VAE."""
    groups = []
    for half in ("encoder", "decoder"):
        # Encoder and decoder have the same names at both ends and in the middle.
        groups.append(Group(half, half, half, ENDS))
        groups.append(Group(f"{half}/mid", f"{half}.mid_block", f"{half}.mid", MIDDLE))
    # LDM counts the decoder's levels from the output, diffusers from the latent.
    last = len(model.channels) - 1
    for i in range(last + 1):
        ours, down = f"encoder/down_{i}", f"encoder.down_blocks.{i}"
        groups += level(ours, down, f"encoder.down.{i}", "down", model.layers)
        ours, up = f"decoder/up_{i}", f"decoder.up_blocks.{i}"
        groups += level(ours, up, f"decoder.up.{last - i}", "up", model.layers + 1)
    return groups


def level(ours, diffusers, original, way, layers) -> list[Group]:
    """The residual blocks of one size, and the convolution to the next.

    The last level of either half has no such convolution: its row is not used.
    """
    resnets = [
        Group(
            f"{ours}_resnet_{j}",
            f"{diffusers}.resnets.{j}",
            f"{original}.block.{j}",
            RESNET,
        )
        for j in range(layers)
    ]
    conv = Row(
        f"{ours}_conv",
        f"{diffusers}.{way}samplers.0.conv",  # a list of one in diffusers
        f"{original}.{way}sample.conv",
        CONV,
    )
    return [*resnets, Group("", "", "", (conv,))]


# LDM's "nin_shortcut" is a 1 x 1 convolution ("network in network").
RESNET = (
    Row("norm1", "norm1"),
    Row("conv1", "conv1", kind=CONV),
    Row("norm2", "norm2"),
    Row("conv2", "conv2", kind=CONV),
    Row("shortcut", "conv_shortcut", "nin_shortcut", CONV),
)
# conv_norm_out is diffusers' name of LDM's norm_out.
ENDS = (
    Row("conv_in", "conv_in", kind=CONV),
    Row("norm_out", "conv_norm_out", "norm_out"),
    Row("conv_out", "conv_out", kind=CONV),
)
MIDDLE = (
    *(
        row._replace(
            ours=f"resnet_{i}/{row.ours}",
            diffusers=f"resnets.{i}.{row.diffusers}",
            original=f"block_{i + 1}.{row.original or row.diffusers}",  # from 1
        )
        for i in range(2)
        for row in RESNET
    ),
    # LDM has 1 x 1 convolutions for q, k, v and out, diffusers linear maps.
    Row("attn/norm", "attentions.0.group_norm", "attn_1.norm"),
    *(
        Row(
            f"attn/to_{name}",
            f"attentions.0.to_{diffusers}",
            f"attn_1.{original}",
            LINEAR,
            CONV_1X1,
        )
        for name, diffusers, original in (
            ("q", "q", "q"),
            ("k", "k", "k"),
            ("v", "v", "v"),
            ("out", "out.0", "proj_out"),
        )
    ),
)
