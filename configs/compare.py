"""Compare with PyTorch, layer by layer; small random models without weights.

    sd3-jax compare                                   # 2 CPU cores: 2 minutes
    sd3-jax compare --config.weights=PATH --workdir=runs/sd35 --config.image.height=512

Needs the extra "torch". Leaves compare.json and compare.html; exit code 1 where a layer
departs.
"""

from configs import base

VARIANTS = ()


def get_config(variant: str = ""):
    c = base.get_config()
    c.image.update(height=64, width=96)
    c.sample.update(steps=8, cfg=5.0, max_length=40)
    return c
