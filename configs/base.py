"""Every key with its default. A recipe imports this and assigns over it.

docs/reference/config.md lists the keys; sd3_jax/config/schema holds them.
"""

import math

from ml_collections import ConfigDict

from sd3_jax.config import schema


def get_config() -> ConfigDict:
    """A locked config: a recipe sets other values, and cannot add keys by mistake."""
    return schema.defaults()


PRETRAINING = ("tiny", "256", "512", "1024")


def pretraining(c: ConfigDict, variant: str) -> ConfigDict:
    """What the paper's sizes share: rate, batch, and a variant's pixels a side."""
    c.optim.update(lr=1e-4, warmup=1_000)
    c.data.batch_size = 4096
    c.model.remat = "attention"  # what benchmarks/plan.md has room for
    resolution(c, 256 if variant in ("", "tiny") else int(variant))
    if variant == "tiny":
        shrink(c)
    return c


def resolution(c: ConfigDict, side: int) -> None:
    """Images of about `side`^2 pixels, whose sides span 16 units of the position table.

    So a table is interpolated from one resolution to the next and extended at its rim
    (sec. 5.3.2). Times are shifted by 3 at 1024; the paper gives no other shift, and
    sqrt(3) at 512 is what lies half way from 1 at 256.
    """
    c.image.update(height=side, width=side)
    c.model.pos_base = side // 16
    c.flow.shift = 3.0 ** (math.log2(side / 256) / 2)


def shrink(c: ConfigDict) -> None:
    """Any recipe in half a minute on a laptop: the same code, the smallest shapes."""
    c.model.update(depth=2, width=32, num_heads=2, dual_blocks=0, dtype="float32")
    c.model.update(context_dim=64, pooled_dim=32, pos_size=16, text_split=5)
    c.model.pos_base = min(c.model.pos_base, 4)
    c.model.update(unroll=1, remat="none")
    c.image.update(height=min(c.image.height, 64), width=min(c.image.width, 64))
    c.text.update(length=min(c.text.length, 24), width=32, num_heads=2, depth=1)
    c.data.batch_size = 8
    c.optim.warmup = 2
    c.train.update(steps=10, log_every=1, eval_every=5, sample_every=5)
    c.checkpoint.every = 5
    c.ema.every = 1  # which is the same, in a run of so few steps
    c.sample.update(steps=4)
    c.eval.examples = 16
