"""Train all weights of a released denoiser on your pictures (docs/how-to/finetune.md).

    sd3-jax train --config=configs/finetune.py --workdir=gs://BUCKET/RUN \
        --config.tune.base=SD35 --config.data.name=records \
        --config.data.records='DATA/records/train-*' \
        --config.data.held_out='DATA/records/val-*'

SD3.5-medium at 1024 and a tenth of pre-training's rate, which the paper does not give.
`convert` writes the result as a whole model.
"""

from configs import base, sd35_medium

VARIANTS = ("tiny", "512", "1024")


def get_config(variant: str = ""):
    c = sd35_medium.get_config(variant or "1024")
    c.tune.method = "full"
    c.optim.update(lr=1e-5, warmup=500, weight_decay=1e-4)
    c.model.pos_crop = "center"
    c.text.dropout = 0.1
    c.data.batch_size = 256
    c.train.update(steps=20_000, eval_every=1_000)
    if variant == "tiny":
        base.shrink(c)
    return c
