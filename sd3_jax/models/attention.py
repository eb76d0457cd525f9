"""Softmax attention: one function, the kernels behind it by name."""

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float


def attention(
    q: Float[Array, "b n a k"],
    k: Float[Array, "b m a k"],
    v: Float[Array, "b m a k"],
    *,
    bias: Float[Array, "#b #a #n m"] | None = None,
    scale: float | None = None,
    kernel: str = "xla",
) -> Float[Array, "b n a k"]:
    """softmax(q k^T * scale + bias) v for each of the `a` heads; scale 1/sqrt(k)."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    return KERNELS[kernel](q, k, v, bias, scale)


def xla(q, k, v, bias, scale):
    """Products in the inputs' dtype, accumulated in float32; the softmax in float32."""
    logits = jnp.einsum("bnak,bmak->banm", q, k, preferred_element_type=jnp.float32)
    logits = logits * scale
    if bias is not None:
        logits = logits + bias
    weights = jax.nn.softmax(logits).astype(v.dtype)
    return jnp.einsum("banm,bmak->bnak", weights, v)


def dot_product(q, k, v, bias, scale):
    """jax.nn.dot_product_attention, which picks cuDNN on a GPU that has it."""
    return jax.nn.dot_product_attention(q, k, v, bias, scale=scale)


KERNELS = {"xla": xla, "dot_product": dot_product}
