"""Binding and typography at small scale: coloured digits, pairs, numbers, 16 x 16.

    sd3-jax train --config=configs/digits.py --workdir=runs/digits    # 2 cores: 12 min
    sd3-jax evaluate --config=configs/digits.py --workdir=runs/digits

Captions such as "a red seven left of a blue three" and 'the number "42" in green'; a
tenth of the pairs, with their mirrors, and of the numbers is kept for the scores.
"""

from configs import base

VARIANTS = ("tiny",)


def get_config(variant: str = ""):
    c = base.get_config()
    c.model.update(depth=4, width=128, num_heads=4, patch=4, channels=3)
    c.model.update(pos_size=4, pos_base=4, context_dim=64, pooled_dim=64)
    c.model.update(dtype="float32", remat="none", unroll=4)
    c.text.update(name="bytes", length=42, words=8, depth=2, width=64, dropout=0.1)
    c.image.update(autoencoder="pixels", height=16, width=16)
    c.flow.shift = 3.0
    c.optim.update(name="muon", lr=1.5e-3, b2=0.99, eps=1e-8, weight_decay=0.01)
    c.optim.update(schedule="cosine", warmup=200)
    c.ema.update(decay=0.999, every=1)
    c.data.update(name="digits", batch_size=64, easy=32_000)
    c.train.update(steps=4_000, log_every=50, eval_every=1_000, sample_every=500)
    c.train.prompts = (
        "a red seven",
        "a blue four",
        "a red seven left of a blue three",
        "a green one right of a yellow eight",
        "a cyan five above a magenta two",
        "a yellow nine below a red six",
        'the number "42" in green',
        'the number "17" in magenta',
    )
    c.checkpoint.update(every=1_000, keep=2)
    c.sample.update(steps=20, grid="shifted", cfg=3.0)
    c.eval.update(scores=("digits", "val_loss"), pictures=480)
    if variant == "tiny":
        base.shrink(c)
    return c
