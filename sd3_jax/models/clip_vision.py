"""CLIP's vision tower: a ViT whose class token is the picture (Radford et al. 2021)."""

import jax.numpy as jnp
from flax import linen as nn
from jax import Array
from jax.typing import DTypeLike
from jaxtyping import Float

from sd3_jax.models.clip import ClipBlock, LayerNorm
from sd3_jax.models.layers import Dense, normal


class ClipVision(nn.Module):
    """Normalised images (b, size, size, 3) to projected embeddings (b, e).

    The embedding is the class token's last state, normalised and projected.
    """

    depth: int
    width: int
    num_heads: int
    mlp: int
    projection: int
    activation: str
    size: int = 224
    patch: int = 14
    dtype: DTypeLike = jnp.bfloat16

    @nn.compact
    def __call__(self, images: Float[Array, "b s s 3"]) -> Float[Array, "b e"]:
        # The published 14 x 14 convolution of stride 14, as one matrix product.
        n, p, d = self.size // self.patch, self.patch, self.width
        x = images.reshape(-1, n, p, n, p, 3).swapaxes(2, 3)  # (b, n, n, p, p, 3)
        x = x.reshape(-1, n * n, p * p * 3)  # (b, n*n, p*p*3)
        project = lambda features, axes, name: Dense(
            features, axes, bias=False, dtype=self.dtype, name=name
        )
        x = x.astype(self.dtype)
        x = project(d, (None, "embed"), "patch_embed")(x)  # (b, n*n, d)
        named = lambda axes: nn.with_logical_partitioning(normal(0.02), axes)
        first = self.param("class_token", named(("embed",)), (d,))
        places = self.param("positions", named((None, "embed")), (n * n + 1, d))
        first = jnp.broadcast_to(first, (len(x), 1, d)).astype(x.dtype)
        x = jnp.concatenate([first, x], axis=1)  # (b, n*n+1, d)
        x = x + places.astype(x.dtype)
        block = ClipBlock(
            self.num_heads,
            self.mlp,
            self.activation,
            self.dtype,
            causal=False,
            name="blocks",
        )
        scan = nn.scan(
            lambda block, x, _: (block(x), None),
            variable_axes={"params": 0, "intermediates": 0},
            split_rngs={"params": True},
            length=self.depth,
            metadata_params={nn.PARTITION_NAME: "layers"},
        )
        # CLIP has a norm before the first block too (pre_layrnorm in its files).
        x, _ = scan(block, LayerNorm(name="first_norm")(x), None)
        x = LayerNorm(name="final_norm")(x[:, 0])  # (b, d)
        return project(self.projection, ("embed", None), "visual_projection")(x)
