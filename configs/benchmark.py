"""Time sd3_jax against PyTorch and diffusers on the same shapes and weights.

    make bench                                        # 2 CPU cores: half an hour
    sd3-jax benchmark --config=configs/benchmark.py:gpu --workdir=runs/benchmark
    ... :tpu (ours alone), :tiny (seconds)

`cpu`, the default, is depth 8 and width 512 at 256 pixels in float32; `gpu` and `tpu`
are the 2B model in bfloat16. docs/explanation/speed.md says how to read what it leaves.
"""

from configs import base

VARIANTS = ("cpu", "gpu", "tpu", "tiny")
ALL = ("forward", "train", "sample", "vae_encode", "vae_decode", "t5", "clip")
LARGE = (
    *("forward side=256 batch=16", "forward side=1024 batch=4"),
    *("train side=256 batch=16", "train side=1024 batch=2"),
    *("sample side=256 batch=4", "sample side=1024 batch=1"),
    *("vae_encode side=1024 batch=1", "vae_decode side=1024 batch=1", "t5", "clip"),
)


def get_config(variant: str = ""):
    c = base.get_config()
    c.model.update(depth=8, width=512, num_heads=8, dtype="float32")
    c.model.update(remat="none", unroll=1)
    c.data.batch_size = 4
    c.optim.update(eps=1e-8, warmup=0)
    c.ema.update(decay=0.999, every=1)
    c.sample.update(steps=10, cfg=5.0)
    c.benchmark.cases = (
        *("forward", "train unroll=8", "sample batch=1"),
        *("vae_encode batch=1", "vae_decode batch=1", "t5", "clip"),
    )
    if variant in ("gpu", "tpu"):
        c.model.update(depth=24, width=1536, num_heads=24, qk_norm=False)
        c.model.update(dtype="bfloat16", remat="full")
        c.sample.steps = 28
        c.benchmark.update(cases=LARGE, dtype="bfloat16", matmul=8192, pause=0.1)
        c.benchmark.update(against=("eager", "compile"), apart=("train",))
        c.benchmark.t5.update(depth=24, width=2048, num_heads=32, mlp=5120)
        c.benchmark.scaling.update(width=1536, num_heads=24, batch=4)
    if variant == "tiny":
        tiny(c)
    return c


def tiny(c) -> None:
    base.shrink(c)
    c.data.batch_size = 2
    c.optim.warmup = 0
    c.sample.steps = 2
    c.benchmark.update(repeats=2, warmup=1, pause=0.0, matmul=128, startup=0)
    c.benchmark.vae.update(channels=(32, 32, 32, 32), layers=1)
    small = dict(depth=2, width=64, num_heads=1, mlp=96, vocab=99, length=8)
    c.benchmark.t5.update(small)
    c.benchmark.clip.update(small)
    c.benchmark.scaling.update(tokens=(4, 16), depths=(2, 3), width=32, num_heads=2)
    c.benchmark.scaling.update(depth=2, repeats=2)
