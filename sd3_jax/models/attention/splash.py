"""Splash attention, the TPU's fused kernel, which never stores the logits."""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.experimental.pallas.ops.tpu.splash_attention import (
    splash_attention_kernel as kernel,
)
from jax.experimental.pallas.ops.tpu.splash_attention import (
    splash_attention_mask as masks,
)

from sd3_jax.distributed import mesh_context
from sd3_jax.distributed.mesh_context import platform

Parts = Sequence[Array]  # (b, n, a, k) each, of different n
LANES = 128  # of a TPU's vector registers; blocks are multiples of it
MOST = {  # the largest block that compiles, forward and backward, for heads of 64
    "TPU v5 lite": 1408,
    "TPU v5": 1408,
    "TPU v6 lite": 1536,
    "TPU7x": 1536,
}
FUSED = 6  # blocks of keys up to which backward is one kernel


def splash(
    q: Array, k: Array, v: Array, scale: float, *, most: int | None = None
) -> Array:
    """softmax(q k^T * scale) v, computed by each shard of the current mesh on its own.

    A shard holds some rows, heads and queries, and all keys of these rows. Lengths are
    padded to whole blocks of at most `most`: padded keys are masked, and outputs of
    padded queries dropped.
    """
    return joint((q,), (k,), (v,), scale, most=most)[0]


def joint(
    qs: Parts, ks: Parts, vs: Parts, scale: float, *, most: int | None = None
) -> list[Array]:
    """`splash` of queries, keys and values concatenated along tokens.

    Returns one output for each of `qs`. Concatenation and padding are one operation, as
    is the split: each is a copy in memory.
    """
    length = lambda parts: sum(x.shape[1] for x in parts)
    n, m = length(qs), length(ks)
    spec, parts, _ = mesh_context.attending((len(qs[0]), n, *qs[0].shape[2:]))
    most = most or largest(qs[0])
    rows, columns = block(-(-n // parts), most), block(m, most)
    local = functools.partial(attend, rows=rows, columns=columns, keys=m)
    q = joined([q * scale for q in qs], rows * parts)  # splash does not scale
    out = mesh_context.on_each(local, spec)(q, joined(ks, columns), joined(vs, columns))
    ends = np.cumsum([q.shape[1] for q in qs])
    return jnp.split(out, ends, axis=1)[:-1]


def largest(q: Array) -> int:
    """The largest block for q's dtype and head size on this generation of TPUs."""
    if q.shape[-1] > LANES:
        return 512  # the autoencoder's one head
    return min(MOST.get(device_kind(), 1024), 4096 // q.dtype.itemsize)


def device_kind() -> str:
    """Device kind of the program being traced, as mesh_context.platform has it.

    On a CPU a program for a TPU may be traced: `plan` compiles for absent devices.
    """
    mesh = jax.sharding.get_abstract_mesh()
    return (jax.devices()[0] if mesh.empty else mesh.abstract_device).device_kind


def block(n: int, most: int) -> int:
    """The block for n tokens: all of n, or what pads it least from 512 to `most`.

    A multiple of 128, as the kernel requires; of equals the largest.
    """
    if n <= most:
        return -(-n // LANES) * LANES
    return min(range(min(512, most), most + 1, LANES), key=lambda s: (-n % s, -s))


def joined(parts: Parts, multiple: int) -> Array:
    """Concatenate along tokens, and pad with zeros to a multiple of `multiple`."""
    b, _, *head = parts[0].shape
    pad = -sum(x.shape[1] for x in parts) % multiple
    zeros = [jnp.zeros((b, pad, *head), parts[0].dtype)] if pad else []
    return jnp.concatenate([*parts, *zeros], axis=1)


def attend(
    q: Array, k: Array, v: Array, *, rows: int, columns: int, keys: int
) -> Array:
    """One device's attention; keys and values from number `keys` on are padding."""
    q, k, v = (x.swapaxes(1, 2) for x in (q, k, v))  # (b, a, n, k)
    call = _kernel(q, k, rows, columns)
    ids = _segments(q, k, keys)
    return jax.vmap(call, in_axes=(0, 0, 0, None))(q, k, v, ids).swapaxes(1, 2)


def with_totals(
    q: Array, k: Array, v: Array, scale: float, *, keys: int | Array
) -> tuple[Array, Array]:
    """One device's attention (b, n, a, k) to the first `keys` keys, which may be
    traced, and the softmax's log-denominators (b, n, a, 1) in float32. `gradients` is
    its gradient.
    """
    n, m, most = q.shape[1], k.shape[1], largest(q)
    rows, columns = block(n, most), block(m, most)
    q, k, v = _padded(q * scale, rows), _padded(k, columns), _padded(v, columns)
    call = _kernel(q, k, rows, columns, save_residuals=True)
    ids = _segments(q, k, keys)
    out, (total,) = jax.vmap(call, in_axes=(0, 0, 0, None))(q, k, v, ids)
    return out.swapaxes(1, 2)[:, :n], total.swapaxes(1, 2)[:, :n, :, None]


def gradients(
    q: Array,
    k: Array,
    v: Array,
    out: Array,
    total: Array,
    dout: Array,
    scale: float,
    *,
    keys: int | Array,
) -> list[Array]:
    """Gradients of q, k and v; `out` and `total` may be those of more keys than k, of
    which these are a part."""
    n, m, most = q.shape[1], k.shape[1], largest(q)
    rows, columns = block(n, most), block(m, most)
    q, out, dout = (_padded(x, rows) for x in (q * scale, out, dout))
    k, v = _padded(k, columns), _padded(v, columns)
    total = _padded(total, rows)[..., 0]  # (b, a, n)
    call, ids = _kernel(q, k, rows, columns), _segments(q, k, keys)

    def row(q, k, v, out, total, dout):
        masks = call.dq_mask_info, call.dkv_mask_info
        residuals = q, k, v, ids, None, out, total, *masks
        sizes, function = call.kwargs["block_sizes"], call.kwargs["mask_function"]
        # The kernel's own backward pass: jax has no public name for one that takes the
        # denominators of a softmax over more keys.
        options = False, kernel.DEFAULT_MASK_VALUE, False, sizes, None, function, None
        interpret = call.kwargs["interpret"]
        grads = kernel._splash_attention_bwd(*options, interpret, residuals, dout)
        return grads[3:6]

    grads = jax.vmap(row)(q, k, v, out, total, dout)
    dq, dk, dv = (x.swapaxes(1, 2) for x in grads)
    return [scale * dq[:, :n], dk[:, :m], dv[:, :m]]


def _padded(x: Array, multiple: int) -> Array:
    """(b, n, a, k) to (b, a, n, k), with zeros up to a multiple of tokens."""
    return joined([x], multiple).swapaxes(1, 2)


def _segments(q: Array, k: Array, keys: int | Array) -> kernel.SegmentIds | None:
    """Tokens attend within their segment: padding is a segment without queries."""
    n, m = q.shape[2], k.shape[2]
    if isinstance(keys, int) and keys == m:
        return None
    padding = (jnp.arange(m) >= keys).astype(jnp.int32)
    return kernel.SegmentIds(q=jnp.zeros(n, jnp.int32), kv=padding)


def _kernel(q: Array, k: Array, rows: int, columns: int, **options):
    """The kernel for queries and keys (b, a, n, k), a row of the batch at a time."""
    heads, n, m = *q.shape[1:3], k.shape[2]
    # One backward kernel makes 5 products of a block and not 7, but writes dq once a
    # block of keys: with 24 heads and 4250 tokens about 100 MB more an image.
    fused = m // columns <= FUSED
    sizes = kernel.BlockSizes(
        block_q=rows,
        block_kv=columns,
        block_q_dkv=rows,
        block_kv_dkv=columns,
        block_q_dq=None if fused else rows,
        block_kv_dq=None if fused else columns,
        use_fused_bwd_kernel=fused,
        # Tokens in the lanes: a head of 64 in the 128 lanes would take twice the
        # memory, and the layout would be none that a linear map reads or writes.
        q_layout=kernel.QKVLayout.SEQ_MINOR,
        k_layout=kernel.QKVLayout.SEQ_MINOR,
        v_layout=kernel.QKVLayout.SEQ_MINOR,
    )
    return kernel.make_splash_mha(
        masks.MultiHeadMask([masks.FullMask((n, m))] * heads),
        block_sizes=sizes,
        head_shards=1,
        q_seq_shards=1,
        residual_checkpoint_name="attention",  # for remat, see scan.REMAT
        interpret=platform() == "cpu",  # so that tests run the kernel's own code
        **options,
    )
