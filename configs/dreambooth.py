"""DreamBooth: learn a subject from a few pictures (Ruiz et al. 2022).

    IN="--config=configs/dreambooth.py --config.tune.base=SD35 \
        --config.encode.weights=SD35"
    sd3-jax train $IN --workdir=runs/dog --config.data.name=records \
        --config.data.records='DOG/records/train-*,DOGS/records/train-*' \
        --config.data.weights=1,1

`precompute` writes DOG/records from the subject's pictures, and DOGS/records from the
class's, which `sample` makes of "a photo of a dog" by the base. The loss on the last of
data.records counts tune.prior times; data.weights=1,1 gives each half of a batch. To
train without the class, set --config.tune.prior=0 and name DOG's records alone.
docs/how-to/finetune.md has all the commands.
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
