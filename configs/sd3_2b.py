"""SD3-medium: 2.0 B parameters, depth 24, no qk-norm.

    sd3-jax train --config=configs/sd3_2b.py --workdir=gs://BUCKET/RUN
    sd3-jax train --config=configs/sd3_2b.py:tiny --workdir=runs/tiny
    ... :512, :1024                                   # pixels a side

256 pixels, batch 4096, 500k steps, logit-normal(0, 1) (Esser et al. 2024, sec. 5.3);
higher resolutions shift the times, by 3 at 1024.

Planned (benchmarks/plan.md; bounds, not measured), images a chip, GB of HBM, MFU:

    256   v5e-16   --config.mesh.fsdp=16    8    5.2 of 15.8   0.82
    1024  v5p-128  --config.mesh.data=4     4   14.4 of 95.7   0.63
    1024  v6e-256  --config.mesh.data=4     4   13.3 of 31.2   0.42

`sd3-jax plan --config=configs/sd3_2b.py:512` finds them for any slice, with the
accumulation that a batch of 4096 needs.
"""

from configs import base

VARIANTS = base.PRETRAINING


def get_config(variant: str = ""):
    c = base.get_config()
    c.model.update(depth=24, qk_norm=False, dual_blocks=0, pos_size=192)
    c.optim.eps = 1e-8
    return base.pretraining(c, variant)
