"""Train, sample and score coloured digits on 8 x 8 pixels in minutes.

    make quickstart
    sd3-jax train --config=configs/quickstart.py --workdir=runs/quickstart
    sd3-jax sample --config=configs/quickstart.py \
        --config.sample.prompt="a blue four" --workdir=runs/quickstart

About five minutes on a laptop; 7.5 measured on two slow cores. The model is an MMDiT of
2.4 M parameters; "single digits" should score 0.95 or more.
"""

from configs import base

VARIANTS = ("tiny",)
COLOURS = ("red", "green", "blue", "yellow")  # of the prompts painted on the way
DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven")


def get_config(variant: str = ""):
    c = base.get_config()
    c.model.update(depth=4, width=128, num_heads=4, patch=2, channels=3)
    c.model.update(pos_size=4, pos_base=4, context_dim=64, pooled_dim=64)
    c.model.update(dtype="float32", remat="none", unroll=4)
    c.text.update(name="bytes", length=24, words=4, depth=2, width=64, dropout=0.1)
    c.image.update(autoencoder="pixels", height=8, width=8)
    c.optim.update(lr=2e-3, b2=0.99, eps=1e-8, schedule="cosine", warmup=100)
    c.ema.update(decay=0.995, every=1)
    c.data.update(name="digits", batch_size=64, mix=(1.0, 0.0, 0.0))
    c.train.update(steps=1_200, log_every=50, eval_every=400, sample_every=200)
    c.train.prompts = tuple(f"a {c} {d}" for c in COLOURS for d in DIGITS)
    c.checkpoint.update(every=400)
    c.sample.update(steps=20, grid="shifted", cfg=2.0)
    c.eval.update(scores=("digits", "val_loss"))
    if variant == "tiny":
        base.shrink(c)
    return c
