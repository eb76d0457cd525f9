"""The autoencoder's names; the original counts the decoder's levels from the output."""

from sd3_jax.models.vae import VAE
from sd3_jax.weights.key_mapping import CONV, CONV_1X1, LINEAR, Group, Row


def table(model: VAE) -> list[Group]:
    groups = []
    for half in ("encoder", "decoder"):
        groups.append(Group(half, half, half, ENDS))
        groups.append(Group(f"{half}/mid", f"{half}.mid_block", f"{half}.mid", MIDDLE))
    last = len(model.channels) - 1
    for i in range(last + 1):
        ours, down = f"encoder/down_{i}", f"encoder.down_blocks.{i}"
        groups += level(ours, down, f"encoder.down.{i}", "down", model.layers)
        ours, up = f"decoder/up_{i}", f"decoder.up_blocks.{i}"
        groups += level(ours, up, f"decoder.up.{last - i}", "up", model.layers + 1)
    return groups


def level(ours, diffusers, original, way, layers) -> list[Group]:
    """The residual blocks of one size, and the convolution to the next."""
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
        f"{diffusers}.{way}samplers.0.conv",
        f"{original}.{way}sample.conv",
        CONV,
    )
    return [*resnets, Group("", "", "", (conv,))]


RESNET = (
    Row("norm1", "norm1"),
    Row("conv1", "conv1", kind=CONV),
    Row("norm2", "norm2"),
    Row("conv2", "conv2", kind=CONV),
    Row("shortcut", "conv_shortcut", "nin_shortcut", CONV),
)
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
            original=f"block_{i + 1}.{row.original or row.diffusers}",
        )
        for i in range(2)
        for row in RESNET
    ),
    Row("attn/norm", "attentions.0.group_norm", "attn_1.norm"),
    *(
        Row(
            f"attn/to_{name}",
            f"attentions.0.to_{theirs}",
            f"attn_1.{original}",
            LINEAR,
            CONV_1X1,
        )
        for name, theirs, original in (
            ("q", "q", "q"),
            ("k", "k", "k"),
            ("v", "v", "v"),
            ("out", "out.0", "proj_out"),
        )
    ),
)
