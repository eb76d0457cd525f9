"""The paper's 61 formulations compared by `study` (Esser et al. 2024, sec. 5.1).

    sd3-jax study --config=configs/formulations.py:digits --workdir=runs/formulations

"digits" has nine of them on coloured digits, three seeds each, an hour on 2 cores;
"all" are the 61 there, "tiny" as well, 20 steps each. The recipe itself is the
paper's: 256 x 256 latents, batches of 1024, a depth of our choice; it wants
data.records, data.held_out, encode.weights and eval.clip.
"""

from configs import base
from sd3_jax.diffusion.variants import VARIANTS as FORMULATIONS

VARIANTS = ("digits", "all", "tiny")
SOME = (  # the best of each family in Table 1, and what they are compared with
    *("rf", "rf/lognorm(0.00,1.00)", "rf/lognorm(0.50,0.60)", "rf/mode(1.29)"),
    *("rf/cosmap", "eps/linear", "v/cos", "edm(-1.20,1.20)", "edm(0.00,0.60)"),
)


def get_config(variant: str = ""):
    c = base.get_config()
    c.model.update(depth=15, qk_norm=False)
    c.optim.update(lr=1e-4, warmup=1_000, eps=1e-8)
    c.train.steps = 100_000
    c.sample.update(grid="linear", shift=1.0)
    c.study.variants = tuple(map(told, FORMULATIONS))
    if variant:
        digits(c)
    if variant == "digits":
        c.study.variants = tuple(map(told, SOME))
    if variant == "tiny":
        base.shrink(c)
        c.train.update(steps=20, eval_every=20, log_every=20)
        c.study.update(seeds=1, pictures=8, settings=("steps=2 cfg=2",))
    return c


def told(name: str) -> str:
    """As config.study.variants has it: "rf/cosmap: flow.path=rf flow.density=…"."""
    settings = (f"flow.{key}={value}" for key, value in FORMULATIONS[name].items())
    return f"{name}: {' '.join(settings)}"


def digits(c) -> None:
    """Single coloured digits on 8 x 8, by a model that learns them in a minute."""
    c.model.update(depth=3, width=64, num_heads=2, patch=2, channels=3)
    c.model.update(pos_size=4, pos_base=4, context_dim=32, pooled_dim=32)
    c.model.update(dtype="float32", remat="none", unroll=3, qk_norm=True)
    c.text.update(name="bytes", length=24, words=4, depth=1, width=32, num_heads=2)
    c.text.dropout = 0.1
    c.image.update(autoencoder="pixels", height=8, width=8)
    c.optim.update(lr=2e-3, b2=0.99, warmup=50)
    c.ema.update(decay=0.99, every=1)
    c.data.update(name="digits", batch_size=64, mix=(1.0, 0.0, 0.0))
    c.train.update(steps=1_000, log_every=250, eval_every=250)
    c.checkpoint.update(every=250, keep=4)
    c.sample.batch_size = 200
    c.study.pictures = 400
    c.eval.examples = 512
