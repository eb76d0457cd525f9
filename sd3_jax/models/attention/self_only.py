"""Attention whose map among image tokens is the identity (PAG, Ahn et al. 2024)."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float


def self_only_attention(
    q: Float[Array, "b n a k"],
    k: Float[Array, "b n a k"],
    v: Float[Array, "b n a k"],
    text_ks: Sequence[Float[Array, "b _ a k"]],
    text_vs: Sequence[Float[Array, "b _ a k"]],
) -> Float[Array, "b n a k"]:
    """Attention of each image token to itself and to the text, not to other images'.

    As diffusers' PAGJointAttnProcessor2_0 does with a mask of (n + m)^2 numbers.
    """
    text_k, text_v = (jnp.concatenate(x, axis=1) for x in (text_ks, text_vs))
    product = dict(preferred_element_type=jnp.float32)
    image = jnp.einsum("bnak,bnak->bna", q, k, **product)
    text = jnp.einsum("bnak,bmak->bnam", q, text_k, **product)
    logits = jnp.concatenate([image[..., None], text], axis=-1) * q.shape[-1] ** -0.5
    weights = jax.nn.softmax(logits).astype(v.dtype)  # (b, n, a, 1 + m)
    text = jnp.einsum("bnam,bmak->bnak", weights[..., 1:], text_v)
    return weights[..., :1] * v + text
