"""Attention of streams whose tokens lie over the mesh's context axis.

By "gather" every device gets all keys and values, by "ring" they pass from device to
device (ring.py), and by "ulysses" a device gets all tokens of some heads (ulysses.py).
"""

import functools
from collections.abc import Sequence

from jax import Array

from sd3_jax.distributed import mesh_context
from sd3_jax.models.attention import attention as kernels
from sd3_jax.models.attention.ring import ring
from sd3_jax.models.attention.ulysses import ulysses
from sd3_jax.models.layers import whole

# Image tokens for each other device of a ring with which transfers take no longer than
# the attention beside them: peak / (2 links) at heads of 64, 1275 on a v6e and 1094 on
# a v5e (benchmarks/latency.md).
HIDES = 1200
METHODS = ("gather", "ring", "ulysses", "auto")


def context_attention(
    qs: Sequence[Array],
    ks: Sequence[Array],
    vs: Sequence[Array],
    *,
    method: str = "gather",
    kernel: str = "auto",
) -> list[Array]:
    """joint_attention, by one of METHODS where tokens are cut over devices.

    The first of `ks` and `vs` are the image's. Raises ValueError for another method,
    and where "ulysses" does not fit the number of heads.
    """
    kernels.require_choice("context attention", method, METHODS)
    if not qs:
        return []
    if mesh_context.parts("tokens") == [1]:
        ks, vs = [whole(k) for k in ks], [whole(v) for v in vs]
        return kernels.joint_attention(qs, ks, vs, kernel=kernel)
    return BY_NAME[chosen(method, ks[0])](qs, ks, vs, kernel)


def gathered(qs, ks, vs, kernel: str) -> list[Array]:
    ks, vs = [whole(k) for k in ks], [whole(v) for v in vs]
    # Each stream by itself: joined queries would take two all-to-alls a block.
    attend = lambda q: kernels.joint_attention([q], ks, vs, kernel=kernel)[0]
    return [attend(q) for q in qs]


def passed_on(qs, ks, vs, kernel: str) -> list[Array]:
    if kernel == "dot_product":
        raise ValueError(
            'attention kernel "dot_product" gives no log-denominators, which'
            ' context attention "ring" merges; expected "auto", "xla" or "splash"'
        )
    # Not joint_attention's "auto", which may take a kernel without log-denominators.
    if kernel == "auto":
        kernel = "splash" if mesh_context.platform() == "tpu" else "xla"
    return ring(
        qs,
        ks,
        vs,
        scale=qs[0].shape[-1] ** -0.5,
        limit=kernels.most_logits(),
        splash=kernel == "splash",
    )


def by_heads(qs, ks, vs, kernel: str) -> list[Array]:
    sizes = mesh_context.parts("tokens", "heads")
    # shard_map would raise about shapes inside, without the name of the option.
    if reason := mesh_context.uneven_heads(ks[0].shape[2], *sizes):
        raise ValueError(reason)
    attend = functools.partial(kernels.joint_attention, kernel=kernel)
    return ulysses(qs, ks, vs, attend=attend)


BY_NAME = {"gather": gathered, "ring": passed_on, "ulysses": by_heads}


def chosen(method: str, k: Array) -> str:
    """The method that "auto" stands for, with keys like k (b, n, a, k)."""
    if method != "auto":
        return method
    parts, pieces = mesh_context.parts("tokens", "heads")
    uneven = mesh_context.uneven_heads(k.shape[2], parts, pieces)
    if mesh_context.platform() == "gpu":
        # cuDNN gives no log-denominators: a ring would attend by XLA's slower products.
        return "gather" if uneven else "ulysses"
    # All-to-alls send less than a ring from p = 3 on, but attention waits for them.
    hidden = mesh_context.platform() == "tpu" and k.shape[1] >= HIDES * (parts - 1)
    return "ring" if hidden or uneven else "ulysses"
