"""The scaling study: depths compared by `study` (Esser et al. 2024, sec. 5.3.3).

    sd3-jax study --config=configs/scaling.py:digits --workdir=runs/scaling

Validation loss by t and over training FLOPs with a fitted power law, its correlation
with the other scores, what few steps cost (Table 6) and the length of the way. The
recipe itself is the paper's: depths 15 to 38 at 256 x 256, 500k steps of 4096; of its
largest model the paper lowered the rate at 300k steps, to a value it does not give.
"""

from configs import base, formulations

VARIANTS = ("digits", "tiny")
DEPTHS = (15, 18, 21, 30, 38)
SMALL = (2, 3, 4, 5)


def get_config(variant: str = ""):
    c = base.get_config()
    base.pretraining(c, "")
    c.train.update(steps=500_000, eval_every=50_000)
    c.checkpoint.update(every=50_000, keep=10)
    c.study.update(seeds=1, variants=tuple(f"d={n}: model.depth={n}" for n in DEPTHS))
    c.study.settings = tuple(f"steps={n} cfg=5" for n in (50, 20, 10, 5))
    c.study.weights = ("ema",)
    if variant:
        formulations.digits(c)
        c.train.update(steps=2_000, eval_every=250)
        c.checkpoint.update(every=250, keep=8)
        c.study.settings = tuple(f"steps={n} cfg=2" for n in (50, 20, 10, 5))
        c.study.variants = tuple(map(small, SMALL))
    if variant == "tiny":
        base.shrink(c)
        c.study.update(pictures=8, variants=tuple(map(small, (1, 2))))
        c.study.settings = ("steps=2 cfg=2", "steps=1 cfg=2")
    return c


def small(depth: int) -> str:
    """As in the paper width and heads grow with the depth: by 32 and 1."""
    width = f"model.width={32 * depth} model.num_heads={depth}"
    return f"d={depth}: model.depth={depth} {width} model.unroll={depth}"
