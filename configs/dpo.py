"""DPO after training: preferences by a LoRA on all linear layers (paper, appendix C).

    sd3-jax train --config=configs/dpo.py --workdir=runs/dpo \
        --config.tune.base=RELEASED \
        --config.data.records='PAIRS/train-*' --config.data.held_out='PAIRS/val-*'

Records hold two pictures of a caption (docs/how-to/preferences.md). The loss starts at
ln 2, 0.693; metrics have the share of pairs told apart ("accuracy") and by how much
("margin"). SD3.5-medium at 1024 by default; the paper trained 4k steps of its 2B model
and 2k of its 8B, at rank 128, and gives neither rate nor beta. "digits" is the small
one of benchmarks/preference.md.
"""

from configs import base, quickstart, sd35_medium

VARIANTS = ("digits", "tiny")


def get_config(variant: str = ""):
    c = quickstart.get_config() if variant == "digits" else sd35_medium.get_config()
    c.tune.update(method="lora", rank=128, targets="", objective="dpo", beta=5_000.0)
    c.optim.update(name="adamw", lr=1e-5, warmup=100, schedule="constant")
    c.text.dropout = 0.0
    c.train.update(steps=4_000, eval_every=500, sample_every=500)
    c.train.prompts = ()
    c.data.update(name="records", batch_size=64)
    base.resolution(c, 1024) if not variant else None
    if variant == "digits":
        c.tune.update(rank=16, beta=1_000.0)
        c.optim.update(lr=1e-3, warmup=20)
        c.train.update(steps=200, log_every=20, eval_every=1_000)
        c.checkpoint.update(every=100)
        c.ema.update(decay=0.9, every=1)
        c.eval.examples = 128
    if variant == "tiny":
        base.shrink(c)
        c.data.name = "synthetic"
        c.tune.rank = 4
    return c
