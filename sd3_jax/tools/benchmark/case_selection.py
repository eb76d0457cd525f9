"""The cases that a config asks to time, as specifications for both sides."""

from ml_collections import ConfigDict

from sd3_jax.errors import UserError
from sd3_jax.models.mmdit import MMDiT
from sd3_jax.tools.benchmark import cases
from sd3_jax.tools.benchmark.cases import Spec
from sd3_jax.weights import components


def selected_cases(config: ConfigDict) -> list[Spec]:
    specs = [case(config, text) for text in config.benchmark.cases]
    for kind in config.benchmark.apart:
        if kind not in cases.KINDS:
            wanted = f"expected some of {', '.join(cases.KINDS)}"
            raise UserError(f"config.benchmark.apart: {kind}: {wanted}")
    names = [spec["name"] for spec in specs]
    # Names are keys of the comparison with an earlier result.
    if twice := [name for name in names if names.count(name) > 1]:
        raise UserError(f'config.benchmark.cases: "{twice[0]}" twice')
    return specs


def require_scaling_fits(config: ConfigDict) -> None:
    """UserError for tokens of config.benchmark.scaling beyond the position table."""
    scaling, most = config.benchmark.scaling, config.model.pos_size
    for tokens in scaling.tokens if scaling.kinds else ():
        sides = cases.rectangle(tokens, 1)
        if max(sides) > most:
            raise UserError(
                f"config.benchmark.scaling.tokens: {tokens} are {sides[0]} x"
                f" {sides[1]}, expected at most {most} a side, config.model.pos_size;"
                " use configs/benchmark.py, or set fewer tokens"
            )


def case(config: ConfigDict, text: str) -> Spec:
    model, bench = config.model, config.benchmark
    if model.name != "mmdit" or model.weight_sets != 2:
        raise UserError("benchmark times only what diffusers has; set a plain mmdit")
    optim = config.optim.to_dict()
    # The case is one step of the given batch, without accumulation.
    del optim["accumulate"]
    defaults = {
        "dtype": bench.dtype,
        "batch": config.data.batch_size,
        "height": config.image.height // cases.FACTOR,
        "width": config.image.width // cases.FACTOR,
        "length": config.text.length,
        "steps": config.sample.steps,
        "cfg": config.sample.cfg,
        "shift": config.sample.shift or 3.0,
        "patch": model.patch,
        "depth": model.depth,
        "remat": model.remat,
        "attention": model.attention,
        "unroll": model.unroll,
        "optim": optim | {"steps": config.train.steps},
        "ema": config.ema.decay,
        "seed": config.seed,
    }
    kind = (text.split() or [""])[0]
    # Text encoders have batches and lengths of their own, not those of training.
    if kind in ("t5", "clip"):
        defaults |= {k: bench[kind][k] for k in ("batch", "length")}
    spec = cases.parse(text, defaults)
    # A case may have another depth than the recipe. Not by assembly.model_parts, which
    # imports the data path: a machine with an accelerator may lack its packages.
    fields = ("patch", "channels", "qk_norm", "dual_blocks", "pos_size")
    module = MMDiT(
        depth=spec["depth"],
        width=model.width or 64 * spec["depth"],
        num_heads=model.num_heads or spec["depth"],
        **{name: model[name] for name in fields},
    )
    configs = {
        "denoiser": lambda: components.denoiser_config(
            module,
            sample_size=model.pos_base * model.patch,
            context_dim=model.context_dim,
            pooled_dim=model.pooled_dim,
        ),
        "vae": lambda: cases.vae(**bench.vae, latent_channels=model.channels),
        "t5": lambda: cases.t5(**bench.t5),
        "clip_l": lambda: cases.clip(**bench.clip),
    }
    most = model.pos_size * model.patch
    if spec["component"] == "denoiser" and max(spec["height"], spec["width"]) > most:
        raise UserError(
            f'config.benchmark.cases: "{text}": at most {most * cases.FACTOR} pixels a'
            f" side, config.model.pos_size = {model.pos_size} tokens"
        )
    spec["config"] = configs[spec["component"]]()
    if kind == "clip" and spec["length"] > spec["config"]["max_position_embeddings"]:
        raise UserError("config.benchmark.clip.length: must be at most 77")
    return spec
