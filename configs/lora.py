"""Train a LoRA of released weights on your pictures (docs/how-to/finetune.md).

    IN="--config=configs/lora.py --config.tune.base=SD35 --config.encode.weights=SD35"
    sd3-jax train  $IN --workdir=runs/lora --config.data.name=records \
        --config.data.records='DATA/records/train-*'
    sd3-jax sample $IN --workdir=runs/lora --config.sample.prompt="a fox in my style"

SD3.5-medium, rank 16 on attention; `precompute` makes the records. The run leaves
pytorch_lora_weights.safetensors, which diffusers loads as well.
"""

from configs import base, sd35_medium

VARIANTS = ("tiny",)


def get_config(variant: str = ""):
    c = sd35_medium.get_config("1024" if not variant else variant)
    c.tune.update(method="lora", rank=16, targets="attn")
    c.optim.update(name="adamw", lr=1e-4, warmup=50, eps=1e-8, weight_decay=1e-4)
    c.model.pos_crop = "center"
    c.text.dropout = 0.1
    c.ema.update(decay=0.99, every=1)
    c.data.batch_size = 8
    c.train.update(steps=1_000, log_every=10, sample_every=100)
    c.train.eval_every = 10_000  # none: few pictures, none held out
    c.checkpoint.every = 250
    if variant == "tiny":
        base.shrink(c)
    return c
