"""The paper's largest: 8.1 B parameters, depth 38, with qk-norm.

    sd3-jax train --config=configs/sd3_8b.py --workdir=gs://BUCKET/RUN
    sd3-jax train --config=configs/sd3_8b.py:tiny --workdir=runs/tiny
    ... :512, :1024                                   # pixels a side

256 pixels, batch 4096, 500k steps, logit-normal(0, 1) (Esser et al. 2024, sec. 5.3);
higher resolutions shift the times, by 3 at 1024.

benchmarks/plan.md has the slices that it was planned for, with memory, bound and
forecast. On v5p and tpu7x add --config.model.remat=mlp: there is memory to recompute
nothing. `sd3-jax plan --config=configs/sd3_8b.py:512` finds the keys for any slice,
with the accumulation that a batch of 4096 needs.
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
