"""SD3.5-medium (MMDiT-X): 2.2 B parameters, dual attention in the first 13 blocks.

    sd3-jax train --config=configs/sd35_medium.py --workdir=gs://BUCKET/RUN
    sd3-jax train --config=configs/sd35_medium.py:tiny --workdir=runs/tiny
    ... :512, :1024                                   # pixels a side

256 pixels, batch 4096, 500k steps, logit-normal(0, 1) (Esser et al. 2024, sec. 5.3);
higher resolutions shift the times, by 3 at 1024.

benchmarks/plan.md has the slices that it was planned for, with memory, bound and
forecast. A v5p-128 takes 4 images a chip at 1024 with --config.mesh.data=4. On v5p and
tpu7x add --config.model.remat=mlp: there is memory to recompute nothing. `sd3-jax plan
--config=configs/sd35_medium.py:512` finds the keys for any slice, with the accumulation
that a batch of 4096 needs.
"""

from configs import base

VARIANTS = base.PRETRAINING


def get_config(variant: str = ""):
    c = base.get_config()
    c.model.update(depth=24, qk_norm=True, dual_blocks=13, pos_size=384)
    c.optim.eps = 1e-15
    base.pretraining(c, variant)
    c.model.pos_crop = "random"  # windows of one table at all resolutions, as released
    if variant != "tiny":
        c.model.pos_base = 64
    return c
