"""DreamBooth: a subject from a few pictures, its class kept (Ruiz et al. 2022).

    IN="--config=configs/dreambooth.py --config.tune.base=SD35 \
        --config.encode.weights=SD35"
    sd3-jax train $IN --workdir=runs/dog --config.data.name=records \
        --config.data.records='DOG/train-*,DOGS/train-*' --config.data.weights=1,1

The last of data.records are the class's pictures, which `sample` makes of "a dog" by
the base itself; the loss on them counts tune.prior times. Half of a batch is of each.
"""

from configs import base, lora

VARIANTS = ("tiny",)


def get_config(variant: str = ""):
    c = lora.get_config(variant)
    c.tune.prior = 1.0
    c.text.dropout = 0.0
    c.data.batch_size = 4
    c.train.steps = 500
    if variant == "tiny":
        base.shrink(c)
    return c
