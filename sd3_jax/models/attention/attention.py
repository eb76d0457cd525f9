"""Softmax attention: one function, with a choice of kernels behind it."""

import difflib
from collections.abc import Collection, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Float

from sd3_jax.distributed import mesh_context
from sd3_jax.distributed.mesh_context import platform
from sd3_jax.models.attention import splash as tpu
from sd3_jax.models.attention.chunked import blockwise

# Most bytes of float32 logits that kernel "xla" holds at once; more are no faster. A
# CPU's should not leave its cache.
LIMIT, CACHE = 2**28, 2**22


def attention(
    q: Float[Array, "b n a k"],
    k: Float[Array, "b m a k"],
    v: Float[Array, "b m a k"],
    *,
    bias: Float[Array, "#b #a #n m"] | None = None,
    scale: float | None = None,
    kernel: str = "auto",
) -> Float[Array, "b n a k"]:
    """softmax(q k^T * scale + bias) v for each of the `a` heads: (b, n, a, k).

    `scale` is 1/sqrt(k) by default, `kernel` a key of KERNELS. Raises ValueError for
    another kernel, and for a bias with "splash".
    """
    require_choice("attention kernel", kernel, KERNELS)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    return KERNELS[kernel](q, k, v, bias, scale)


def require_choice(option: str, name: str, names: Collection[str]) -> None:
    """ValueError for a name that is not one of `names`."""
    if name not in names:
        near = difflib.get_close_matches(name, names, n=1, cutoff=0)[0]
        raise ValueError(
            f'{option} "{name}": expected one of {", ".join(names)}; did you mean'
            f' "{near}"?'
        )


def joint_attention(
    qs: Sequence[Float[Array, "b _ a k"]],
    ks: Sequence[Float[Array, "b _ a k"]],
    vs: Sequence[Float[Array, "b _ a k"]],
    *,
    kernel: str = "auto",
) -> list[Float[Array, "b _ a k"]]:
    """Attention of several streams' queries to all streams' keys (SD3 paper, fig. 2b).

    Streams may differ in length. Returns one output for each of `qs`.
    """
    q, k, v = (jnp.concatenate(parts, axis=1) for parts in (qs, ks, vs))
    chosen = choose(q, k, None) if kernel == "auto" else kernel
    # Splash pads anyway, and each joining or padding is a copy in memory.
    if chosen == "splash":
        return tpu.joint(qs, ks, vs, q.shape[-1] ** -0.5)
    ends = np.cumsum([q.shape[1] for q in qs])  # numpy: splits must be static
    return jnp.split(attention(q, k, v, kernel=chosen), ends[:-1], axis=1)


def shares(
    q: Float[Array, "b n a k"], k: Float[Array, "b m a k"]
) -> Float[Array, "b n m"]:
    """Each query's attention to each key, the mean over heads, in float32."""

    def of_head(pair):
        q, k = pair  # (b, n, k), (b, m, k)
        logits = jnp.einsum("bnk,bmk->bnm", q, k, preferred_element_type=jnp.float32)
        return jax.nn.softmax(logits * q.shape[-1] ** -0.5)

    # One head at a time: all heads of 4096 tokens at once would fill a device.
    add = lambda total, pair: (total + of_head(pair), None)
    none = jnp.zeros((q.shape[0], q.shape[1], k.shape[1]), jnp.float32)
    heads = jnp.moveaxis(q, 2, 0), jnp.moveaxis(k, 2, 0)
    return jax.lax.scan(add, none, heads)[0] / q.shape[2]


def auto(q, k, v, bias, scale):
    return KERNELS[choose(q, k, bias)](q, k, v, bias, scale)


def choose(q, k, bias) -> str:
    """The platform's kernel; "xla" with a bias, for few tokens or heads over 512."""
    # Splash takes no bias and pads tokens to blocks of 128; cuDNN takes few biases.
    # Kernels hold whole heads.
    if bias is not None or min(q.shape[1], k.shape[1]) < 128 or q.shape[-1] > 512:
        return "xla"
    return {"tpu": "splash", "gpu": "dot_product"}.get(platform(), "xla")


def xla(q, k, v, bias, scale):
    """Products in the inputs' dtype, accumulated in float32; softmax in float32."""
    limit = most_logits()
    if bias is None and logits(q, k) > limit:
        return blockwise(q, k, v, scale, limit)
    return checkpoint_name(plain(q, k, v, bias, scale), "attention")


def most_logits() -> int:
    """LIMIT, or what a CPU's cache takes."""
    return LIMIT if platform() != "cpu" else min(LIMIT, CACHE)


def logits(q, k) -> int:
    """Bytes of one device's logits if it computed all its heads' queries at once."""
    b, n, a, _ = q.shape
    # 4 bytes; the last of `attending` counts the parts that rows and heads make.
    return 4 * b * a * n * k.shape[1] // mesh_context.attending(q.shape)[2]


def plain(q, k, v, bias, scale):
    """All logits (b, a, n, m) at once; the only kernel here that takes any bias."""
    # Scaled after the product: scaling q in bfloat16 would round it once more.
    logits = jnp.einsum("bnak,bmak->banm", q, k, preferred_element_type=jnp.float32)
    logits = logits * scale
    if bias is not None:
        logits = logits + bias
    weights = jax.nn.softmax(logits).astype(v.dtype)
    return jnp.einsum("banm,bmak->bnak", weights, v)


def dot_product(q, k, v, bias, scale):
    """jax.nn.dot_product_attention, by cuDNN where cuDNN takes the arguments."""
    # JAX leaves it to the caller to know: NVIDIA GPUs, half precision, heads of at most
    # 128 (256 from Hopper on). With a bias cuDNN refuses some broadcasts and, in
    # training, odd lengths.
    half = q.dtype in (jnp.bfloat16, jnp.float16)
    fits = half and bias is None and q.shape[-1] <= 128 and q.shape[-1] % 8 == 0
    cudnn = fits and tpu.device_kind().startswith("NVIDIA")
    implementation = "cudnn" if cudnn else "xla"
    out = jax.nn.dot_product_attention(
        q, k, v, bias, scale=scale, implementation=implementation
    )
    return checkpoint_name(out, "attention")


def splash(q, k, v, bias, scale):
    """The TPU's fused kernel; ValueError with a bias."""
    if bias is not None:
        raise ValueError('attention kernel "splash" takes no bias; use "xla"')
    return tpu.splash(q, k, v, scale)


KERNELS = {"auto": auto, "xla": xla, "dot_product": dot_product, "splash": splash}
