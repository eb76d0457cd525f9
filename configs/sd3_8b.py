"""The paper's largest: 8.1 B parameters, depth 38, with qk-norm.

    sd3-jax train --config=configs/sd3_8b.py --workdir=gs://BUCKET/RUN
    sd3-jax train --config=configs/sd3_8b.py:tiny --workdir=runs/tiny
    ... :512, :1024                                   # pixels a side

256 pixels, batch 4096, 500k steps, logit-normal(0, 1) (Esser et al. 2024, sec. 5.3);
higher resolutions shift the times, by 3 at 1024.

Planned (benchmarks/plan.md; bounds, not measured), images a chip, GB of HBM, MFU:

    1024  v5e-256   1   10.7 of 15.8   0.69
    1024  v5p-128   4   41.3 of 95.7   0.69
    1024  v6e-256   4   30.2 of 31.2   0.49

`sd3-jax plan --config=configs/sd3_8b.py:512` finds them for any slice, with the
accumulation that a batch of 4096 needs.
"""

from configs import base

VARIANTS = base.PRETRAINING


def get_config(variant: str = ""):
    c = base.get_config()
    c.model.update(depth=38, qk_norm=True, dual_blocks=0, pos_size=192)
    c.optim.eps = 1e-15
    if variant != "tiny":
        c.mesh.data = 4  # 2432 is 2^7 x 19; in groups of 64 gradients are scattered
    return base.pretraining(c, variant)
