"""SD3.5-large: 8.1 B parameters, depth 38, with qk-norm; sd3_8b's program.

    sd3-jax train --config=configs/sd35_large.py --workdir=gs://BUCKET/RUN
    sd3-jax train --config=configs/sd35_large.py:tiny --workdir=runs/tiny
    ... :512, :1024                                   # pixels a side

The released model is this one; its rate, batch and times are not published, so they are
the paper's: see sd3_8b.py, whose plans hold here too.
"""

from configs import sd3_8b

VARIANTS = sd3_8b.VARIANTS


def get_config(variant: str = ""):
    return sd3_8b.get_config(variant)
