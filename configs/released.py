"""Sample released weights with their published settings; the variant is the model.

    sd3-jax sample --config=configs/released.py:sd35_medium --workdir=runs/fox \\
        --config.weights=PATH_OR_HUB_NAME --config.sample.prompt="a red fox"

Steps and guidance are those of Stability's sd3_infer.py. The solver and its t's are
those of the scheduler in the model's folder; a file has none, and gets the published
ones. :tiny is for random weights of miniature size, in float32.
"""

from configs import base

DEFAULTS = {  # steps, cfg
    "sd3_medium": (50, 5.0),
    "sd35_medium": (50, 5.0),
    "sd35_large": (40, 4.5),
    "sd35_large_turbo": (4, 1.0),
}
VARIANTS = (*DEFAULTS, "tiny")


def get_config(variant: str = ""):
    variant = variant or "sd35_medium"
    c = base.get_config()
    c.image.update(height=1024, width=1024)
    c.sample.batch_size = 8
    if variant == "tiny":
        base.shrink(c)
        c.image.update(height=64, width=64)
        c.sample.update(batch_size=16, max_length=16)
        return c
    c.sample.steps, c.sample.cfg = DEFAULTS[variant]
    c.model.update(
        depth=38 if "large" in variant else 24, qk_norm=variant[:3] != "sd3_"
    )
    if variant == "sd35_medium":
        c.model.update(dual_blocks=13, pos_size=384)
    return c
