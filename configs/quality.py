"""The aesthetic stage after training: few steps on the best pictures.

    IN="--config=configs/quality.py --config.ingest.inputs=PICTURES"
    sd3-jax precompute $IN --workdir=runs/best --config.encode.weights=SD35 \
        --config.precompute.held_out=0.01
    sd3-jax train $IN --workdir=gs://BUCKET/RUN --config.tune.base=PRETRAINED \
        --config.data.name=records --config.data.records='runs/best/records/train-*' \
        --config.data.held_out='runs/best/records/val-*'

Full weights, a lower rate to zero, and filters of `precompute` by what the pictures'
metadata says. SD3-medium's card tells of 30 M pictures of high aesthetic rating after
1 B of pre-training, the paper of neither rate, steps nor threshold: these are ours.
"""

from configs import base, finetune

VARIANTS = ("tiny", "512", "1024")


def get_config(variant: str = ""):
    c = finetune.get_config(variant)
    c.ingest.filters = ("aesthetic>=6", "width>=1024", "height>=1024")
    c.optim.update(lr=5e-6, schedule="linear")
    c.ema.update(decay=0.999, every=1)
    c.data.batch_size = 512
    c.train.steps = 10_000
    if variant == "tiny":
        base.shrink(c)
    return c
