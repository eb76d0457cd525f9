"""SD3-medium: 2.0 B parameters, depth 24, no qk-norm.

    sd3-jax train --config=configs/sd3_2b.py --workdir=gs://BUCKET/RUN
    sd3-jax train --config=configs/sd3_2b.py:tiny --workdir=runs/tiny
    ... :512, :1024                                   # pixels a side

256 pixels, batch 4096, 500k steps, logit-normal(0, 1) (Esser et al. 2024, sec. 5.3);
higher resolutions shift the times, by 3 at 1024.

benchmarks/plan.md has the slices that it was planned for, with memory, bound and
forecast. A v5e-16 takes 8 images a chip with --config.mesh.fsdp=16; v5p-128 and v6e-256
take 4 at 1024 with --config.mesh.data=4. On v5p and tpu7x add --config.model.remat=mlp:
there is memory to recompute nothing. `sd3-jax plan --config=configs/sd3_2b.py:512`
finds the keys for any slice, with the accumulation that a batch of 4096 needs.
"""

from configs import base

VARIANTS = base.PRETRAINING


def get_config(variant: str = ""):
    c = base.get_config()
    c.model.update(depth=24, qk_norm=False, dual_blocks=0, pos_size=192)
    c.optim.eps = 1e-8
    return base.pretraining(c, variant)
