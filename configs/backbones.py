"""The paper's backbones at matched size (Esser et al. 2024, sec. 5.2.3, fig. 4).

    sd3-jax train --config=configs/backbones.py:crossdit --workdir=runs/crossdit
    sd3-jax train --config=configs/backbones.py:crossdit-2b --workdir=gs://BUCKET/RUN
    sd3-jax study --config=configs/backbones.py:study --workdir=runs/backbones

mmdit, mmdit3 (a third weight set), dit, crossdit, uvit and unet: the recipe of the
digits (configs/digits.py), each with as many parameters in its denoiser as the MMDiT's
2.29 M, within 5 %; with -2b that of SD3-medium and its 2.03 B. Shared weights see more
tokens each: at equal parameters the DiT and the UViT take more operations.
"""

from configs import digits, sd3_2b

NAMES = ("mmdit", "mmdit3", "dit", "crossdit", "uvit", "unet")
VARIANTS = ("tiny", "study", *NAMES, *(f"{name}-2b" for name in NAMES))
# At the paper's size width / depth is 64, the rule of its family, where it matches.
LEVELS = dict(multipliers=(1, 2, 4, 4), attended=(0, 1, 2))  # Stable Diffusion 2.1's
DIGITS = dict(
    mmdit=dict(depth=4, width=128, num_heads=4),
    mmdit3=dict(depth=4, width=108, num_heads=4, weight_sets=3, text_split=4),
    dit=dict(depth=5, width=152, num_heads=4),
    crossdit=dict(depth=5, width=140, num_heads=4),
    uvit=dict(depth=7, width=152, num_heads=4),
    unet=dict(
        **dict(depth=1, width=48, num_heads=2, patch=2),
        **dict(multipliers=(1, 2), attended=(1,)),
    ),
)
LARGE = dict(
    mmdit=dict(depth=24, width=1536, num_heads=24),
    mmdit3=dict(depth=21, width=1344, num_heads=21, weight_sets=3),
    dit=dict(depth=30, width=1920, num_heads=30),
    crossdit=dict(depth=28, width=1792, num_heads=28),
    uvit=dict(depth=33, width=2176, num_heads=34),
    unet=dict(depth=2, width=480, num_heads=6, patch=1, **LEVELS),
)

SMALL = dict(
    mmdit=dict(depth=3, width=64),
    mmdit3=dict(depth=3, width=56, weight_sets=3, text_split=4),
    dit=dict(depth=4, width=72),
    crossdit=dict(depth=3, width=76),
    uvit=dict(depth=5, width=80),
    unet=dict(depth=1, width=20, num_heads=1, patch=2, multipliers="1,2", attended=1),
)


def get_config(variant: str = ""):
    if variant == "study":
        return study(digits.get_config())
    name, _, size = (variant or "mmdit").partition("-")
    if variant == "tiny":
        c = digits.get_config("tiny")
        return matched(c, "dit", dict(dit=dict(depth=3)))
    if size == "2b":
        return matched(sd3_2b.get_config(), name, LARGE)
    return matched(digits.get_config(), name)


def study(c):
    """Figure 4 in small: all six, of 455 k parameters within 5 %, two rates each and
    three seeds of the better."""
    c.text.update(width=32, num_heads=2, depth=1)
    c.model.num_heads = 2
    c.data.easy = 16_000
    c.train.update(steps=1_500, log_every=250, eval_every=250)
    c.checkpoint.update(every=250, keep=6)
    c.eval.examples = 512
    c.sample.batch_size = 150
    c.study.variants = tuple(map(small, NAMES))
    c.study.sweep = (
        "optim.muon_lr=0.01 optim.lr=0.001",
        "optim.muon_lr=0.02 optim.lr=0.002",
    )
    c.study.settings = ("steps=20 cfg=3", "steps=5 cfg=3")
    c.study.update(weights=("ema",), pictures=450)
    return c


def small(name: str) -> str:
    """As config.study.variants has it."""
    sizes = dict(name=name.rstrip("3"), unroll=SMALL[name]["depth"]) | SMALL[name]
    return f"{name}: {' '.join(f'model.{k}={v}' for k, v in sizes.items())}"


def matched(c, name: str, sizes: dict[str, dict] = DIGITS):
    """A recipe of the digits whose denoiser is the backbone `name` of the same size."""
    if name not in NAMES:
        raise ValueError(f'backbone "{name}": expected one of {", ".join(NAMES)}')
    c.model.name = "mmdit" if name == "mmdit3" else name
    c.model.update(sizes[name])
    if c.model.unroll > 1:
        c.model.unroll = c.model.depth
    return c
