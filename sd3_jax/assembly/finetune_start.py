"""config.tune: the weights that training starts from, and which of them train."""

import logging
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from etils import epath
from flax import linen as nn
from jax import Array
from jax.sharding import Mesh
from ml_collections import ConfigDict

from sd3_jax import tree
from sd3_jax.assembly import compatibility
from sd3_jax.checkpoints.restoring import (
    read_newest,
    restore_params,
    saved_config,
    saved_data,
)
from sd3_jax.distributed import sharding, watchdog
from sd3_jax.errors import UserError, prefixed
from sd3_jax.models.mmdit import MMDiT
from sd3_jax.params import lora
from sd3_jax.sampling import bundle_loading
from sd3_jax.sampling.adapters import lora_adapters
from sd3_jax.training import finetuning
from sd3_jax.training.finetuning import Tuning
from sd3_jax.training.objectives import Objective
from sd3_jax.weights import adapter_files, lora_files, sources

log = logging.getLogger(__name__)
CHECKPOINTS = "checkpoints"  # in a workdir
PLAIN = dict(base="", method="full", objective="flow", prior=0.0)
# What the denoiser of released weights fixes, and the recipe has to agree with.
SHAPE = (
    *("depth", "width", "num_heads", "patch", "channels", "qk_norm", "dual_blocks"),
    *("weight_sets", "mlp_ratio"),
)


def build_tuning(config: ConfigDict, objective: Objective) -> Tuning:
    """Build the fine-tuning of an objective that config.tune describes."""
    tune = config.tune
    if not tune.base:
        require_base(config)
        tuning = finetuning.plain(objective)
    elif tune.method == "full":
        bytewise = config.text.name == "bytes" and tune.text
        tuning = finetuning.full(
            objective, text=bytewise, reference=tune.objective == "dpo"
        )
    else:
        # Raises for targets that match no kernel, before any weights are read.
        shapes = jax.eval_shape(objective.init, jax.random.key(0))["denoiser"]
        lora.target_kernels(tree.unbox(shapes), tune.targets)
        tuning = finetuning.low_rank(
            objective, rank=tune.rank, alpha=tune.alpha, targets=tune.targets
        )
    if tune.objective == "dpo":
        options = dict(beta=tune.beta, weight=tune.weight)
        return finetuning.preferring(tuning, objective, **options)
    if tune.prior:
        # The last path of data.records is the prior's: examples of the class, which
        # the fine-tuned model is to go on painting as before.
        last = max(1, len(config.data.records) - 1)
        return finetuning.preserving(tuning, objective, weight=tune.prior, last=last)
    return tuning


def base_of(workdir: epath.PathLike, step: int) -> str:
    """The base that a run's step was trained from, "" if it had none."""
    saved = saved_config(epath.Path(workdir) / CHECKPOINTS, step)
    return saved.get("tune", {}).get("base", "")


def checkpoint_of(base: str) -> tuple[epath.Path, int | None]:
    """The checkpoints folder and the step, None for the newest, of a base.

    `base` is a run's workdir, or WORKDIR/checkpoints/STEP. For released weights the
    returned folder does not exist.
    """
    path = epath.Path(base).expanduser()
    if path.parent.name == CHECKPOINTS and path.name.isdecimal():
        return path.parent, int(path.name)
    return path / CHECKPOINTS, None


def base_encoders(config: ConfigDict) -> dict[str, str]:
    """Fingerprints of the encoders that the base, if it is a run, was trained with."""
    if not config.tune.base:
        return {}
    folder, step = checkpoint_of(config.tune.base)
    if not folder.is_dir():
        return {}
    record = read_newest(folder, lambda number: saved_data(folder, number), step)
    return record.get("encoders", {})


def require_base(config: ConfigDict) -> None:
    """UserError if config.tune asks for a method or objective that needs a base."""
    for key, value, plain in (
        ("method", config.tune.method, "full"),
        ("objective", config.tune.objective, "flow"),
    ):
        if value != plain:
            raise UserError(
                f'config.tune.{key} = "{value}" needs weights to start from: set'
                " config.tune.base to released weights or to the workdir of another"
                f" run, or --config.tune.{key}={plain}"
            )


def start(config: ConfigDict, denoiser: nn.Module, objective: Objective, mesh: Mesh):
    """Load the base's parameters into their shardings; {} without a base.

    The tree has "denoiser", "text" and, of released weights, "buffers".
    """
    base = config.tune.base
    if not base:
        return {}
    # Frozen weights beside a LoRA are only computed with, in the compute dtype; weights
    # that train are float32.
    adapts = config.tune.method == "lora"
    dtype = config.model.dtype if adapts else "float32"
    folder, step = checkpoint_of(base)
    if not folder.is_dir():
        return released(config, denoiser, mesh, dtype)

    def require_same_model(saved: dict) -> None:
        # Another run's weights fit by shape in many models that compute something else.
        if rows := compatibility.differing(saved, config):
            raise UserError(
                f"config.tune.base = {base} was trained with other settings:"
                f" {compatibility.spelled(rows)}"
            )

    params, step = restored(
        *(config, objective, denoiser, folder, mesh, require_same_model),
        which="ema",
        step=step,
    )
    log.info("starting from step %d of %s", step, base)
    return jax.tree.map(lambda x: x.astype(dtype), params)


def released(config: ConfigDict, denoiser: nn.Module, mesh: Mesh, dtype: str) -> dict:
    """Load a released denoiser; UserError if it is not shaped as the recipe's."""
    base = config.tune.base
    with prefixed("config.tune.base"):
        bundle = bundle_loading.load(base, mesh=mesh, dtype=dtype, only=("denoiser",))
    base_denoiser = bundle.part("denoiser")
    pairs = {
        name: (getattr(base_denoiser, name), getattr(denoiser, name)) for name in SHAPE
    }
    if differing := [name for name, (a, b) in pairs.items() if a != b]:
        settings = ", ".join(f"config.model.{k} = {pairs[k][1]}" for k in differing)
        keys = " ".join(f"--config.model.{k}={pairs[k][0]}" for k in differing)
        raise UserError(
            f"config.tune.base = {base} has other sizes than {settings}; set {keys}"
        )
    variables = bundle.variables["denoiser"]
    params = {"denoiser": variables["params"], "text": {}}
    if "buffers" in variables:
        params["buffers"] = variables["buffers"]
    return params


def restored(
    config: ConfigDict,
    objective: Objective,
    denoiser: nn.Module,
    folder: epath.Path,
    mesh: Mesh,
    compare: Callable[[dict], None],
    *,
    which: str,
    step: int | None,
) -> tuple[dict, int]:
    """Restore a checkpoint's weights together with the frozen ones, and its step.

    Without `step`, the newest whose settings and weights are both sound. `compare` is
    called with its saved config before the weights are read.
    """

    def read(number: int) -> tuple[ConfigDict, Tuning, dict, int]:
        saved = saved_config(folder, number)
        compare(saved)
        # What was trained, and from which base, is the checkpoint's config.tune:
        # `config` may be that of another recipe, as in `sample`.
        # A copy: the caller's config stays as the command line gave it.
        tuned = config.copy_and_resolve_references()
        with tuned.unlocked():
            tuned.tune.update(PLAIN | saved.get("tune", {}))
        tuning = build_tuning(tuned, objective)
        shapes = abstract(tuning.init, mesh)
        params, _ = restore_params(folder, shapes, which=which, step=number)
        return tuned, tuning, params, number

    tuned, tuning, params, step = read_newest(folder, read, step)
    # Not in `read`: damage of the base's checkpoint is none of this one's.
    frozen = tuning.frozen_part(start(tuned, denoiser, objective, mesh))
    return tuning.full_params(params, frozen), step


def initial_adapter(config: ConfigDict, parts) -> dict:
    """Read the LoRA file config.tune.lora, as host arrays; {} without one.

    UserError unless it adapts only kernels of the denoiser that train, at tune.rank.
    """
    source, rank = config.tune.lora, config.tune.rank
    if not source:
        return {}
    where = f"config.tune.lora = {source}"
    path, weight = lora_adapters.named(source)
    with prefixed(where):
        path = sources.resolve(path, adapter_files.WANTED, label="LoRA")
        parts_of_file = adapter_files.read(path)
    if foreign := sorted(set(parts_of_file) - {"denoiser"}):
        raise UserError(
            f"{where}: adapts {foreign[0]}; only a LoRA of the denoiser can be trained"
        )
    if not isinstance(parts.denoiser, MMDiT):
        name = config.model.name
        raise UserError(f'{where}: config.model.name must be "mmdit", got "{name}"')
    layers = parts_of_file["denoiser"]
    with prefixed(where):
        lora_files.require_lora(layers)
    ranks = sorted(layers.ranks - {None})
    if ranks != [rank]:
        advice = f"--config.tune.rank={ranks[0]}" if not ranks[1:] else "one rank"
        listed = ", ".join(map(str, ranks))
        raise UserError(
            f"{where}: its rank is {listed} but config.tune.rank = {rank}; expected"
            f" {advice}"
        )
    init = parts.objective.init
    shapes = tree.unbox(jax.eval_shape(init, jax.random.key(0)))["denoiser"]
    loaded = lora_files.load(layers, "denoiser", parts.denoiser, shapes, weight=weight)
    trained = lora.target_kernels(shapes, config.tune.targets)
    of_file = [module for module, _ in lora.modules(loaded, "a")]
    if foreign := ["/".join(module) for module in of_file if module not in trained]:
        raise UserError(
            f"{where}: adapts {foreign[0]}, which config.tune.targets ="
            f' "{config.tune.targets}" does not include; set --config.tune.targets= to'
            " train all linear layers"
        )
    log.info(
        "%s: %d of %d linear layers start from it", where, len(of_file), len(trained)
    )
    # The file's pairs are whole updates. `attach` multiplies b by alpha / rank, so that
    # is divided out here.
    scale = config.tune.alpha / rank if config.tune.alpha else 1.0
    divide = lambda pair: {"a": pair["a"], "b": pair["b"] / np.float32(scale)}
    flat = {path: divide(pair) for path, pair in lora.modules(loaded, "a")}
    return {"denoiser": lora.nested(flat)}


def adapted(params: dict, adapter: dict) -> dict:
    """Put an adapter's matrices into a new LoRA's `params`, where it has them."""
    # Layers, or one of q, k and v, that the adapter lacks are zero in it. The new a
    # stays there: if a and b are both zero, neither ever has a gradient.
    params = tree.unbox(params)
    denoiser = lora.started(params["denoiser"], adapter["denoiser"])
    return params | {"denoiser": denoiser}


def save_adapter(
    config: ConfigDict,
    denoiser: nn.Module,
    params: dict,
    workdir: epath.Path,
    step: int,
) -> None:
    """Write a LoRA run's file for diffusers into workdir; other runs write none."""
    if not config.tune.base or config.tune.method != "lora":
        return
    if not isinstance(denoiser, MMDiT):
        log.info(
            "diffusers has no layout for %s: no LoRA file is written",
            type(denoiser).__name__,
        )
        return
    watchdog.expect("writing the LoRA", watchdog.LONG)
    path = lora_files.save(
        workdir,
        {"denoiser": params["denoiser"]},
        {"denoiser": denoiser},
        alpha=config.tune.alpha,
        facts={"base": str(config.tune.base), "step": str(step)},
    )
    log.info("wrote %s: the LoRA of step %d in diffusers' layout", path, step)


def abstract(init: Callable[[Array], dict], mesh: Mesh) -> Any:
    """The shapes of `init`'s parameters, with their shardings."""
    boxed = jax.eval_shape(init, jax.random.key(0))
    return jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
        tree.unbox(boxed),
        sharding.shardings(boxed, mesh),
    )


def identity(base: dict) -> str:
    """A fingerprint of the base's weights, compared on resume; "" without a base."""
    return tree.fingerprint(base) if base else ""


def compare(where: Any, saved: str, current: str) -> None:
    """UserError if a resumed run has another base than it began with."""
    if saved != current:
        raise UserError(
            f"{where} began with other weights: the fingerprint of config.tune.base was"
            f" {saved or 'none'}, is {current or 'none'}. Restore the old weights or"
            " use another workdir"
        )
