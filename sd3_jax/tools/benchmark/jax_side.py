"""Our side of a case, with the programs that the jobs run.

Run by `python -m sd3_jax.tools.benchmark.jax_side`.
Jax's cache of programs is off in this process, so that compilation is timed.
"""

import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sd3_jax.diffusion import grids, guidance, solvers
from sd3_jax.diffusion.paths import RF
from sd3_jax.distributed import sharding
from sd3_jax.sampling import autoencoder_programs, compiled, evaluation_programs
from sd3_jax.sampling.text.prompts import Conditioning
from sd3_jax.tools.benchmark import cases, matmul_flops, process_memory, side_worker
from sd3_jax.tools.benchmark.cases import Spec
from sd3_jax.training import optimizer
from sd3_jax.training.state import init_state
from sd3_jax.training.step import make_train_step
from sd3_jax.weights import components, key_mapping, safetensors, sharded_load
from sd3_jax.weights.components import COMPONENTS

SCALE = dict(scaling=cases.SCALING, shift=cases.SHIFT)
DENOISER = ("remat", "attention", "unroll")  # what a spec may say of the module


class Case:
    """A program on one device, compiled by `first`, with its arguments."""

    def __init__(self, spec: Spec):
        self.spec, self.device = spec, jax.devices()[0]
        self.mesh = sharding.make_mesh(devices=[self.device])
        inputs = {k: jnp.asarray(x) for k, x in cases.inputs(spec).items()}
        if spec["kind"] == "matmul":
            self.module = self.variables = None
        else:
            self.module, self.variables = load(spec, self.mesh)
        program = MAKE[spec["kind"]](spec, self.module, self.variables, inputs)
        self.lower, self.arguments, self.flops, self.named = program
        if spec["kind"] == "train":
            self.variables = None  # the state has them
        self.result = None
        self.keywords = SCALE if spec["kind"].startswith("vae") else {}

    def about(self) -> dict:
        kind = self.device.device_kind
        return {"platform": self.device.platform, "device": kind, "flops": self.flops}

    def first(self) -> dict:
        start = time.perf_counter()
        with compiled.on(self.mesh):
            lowered = self.lower()
        self.lower = None  # and the arguments that it holds
        lower = time.perf_counter() - start
        # Lowering and compilation are timed apart: only the first is Python's work.
        self.program = lowered.compile()
        until_compiled = time.perf_counter() - start
        if self.spec["kind"] == "train":
            # Each step consumes its state, so the losses are kept to be compared later.
            self.losses = [self.step() for _ in range(cases.CHECKED_STEPS)]
        else:
            self.call()
        return {
            "lower": lower,
            "compile": until_compiled - lower,
            "first": time.perf_counter() - start - until_compiled,
        }

    def call(self) -> None:
        if self.spec["kind"] == "train":
            self.step()
        else:
            self.result = jax.block_until_ready(
                self.program(*self.arguments, **self.keywords)
            )

    def step(self) -> tuple[float, float]:
        """A training step; its input state is donated, as in `train`."""
        state, *rest = self.arguments
        state, metrics = self.program(state, *rest)
        jax.block_until_ready(state)
        self.arguments = (state, *rest)
        return float(metrics["loss"]), float(metrics["grad_norm"])

    def outputs(self) -> dict[str, np.ndarray]:
        if self.spec["kind"] == "train":
            loss, norm = zip(*self.losses)
            return {"loss": np.array(loss), "grad_norm": np.array(norm)}
        outputs = self.named(self.result)
        return {k: np.asarray(x.astype(jnp.float32)) for k, x in outputs.items()}

    def peak(self) -> int:
        # The CPU client keeps no statistics; the process's resident memory stands in.
        stats = self.device.memory_stats() if self.device.platform != "cpu" else None
        return stats["peak_bytes_in_use"] if stats else process_memory.peak()

    def reset_peak(self) -> bool:
        return self.device.platform == "cpu" and process_memory.reset()


# --- weights


def load(spec: Spec, mesh) -> tuple[Any, dict]:
    """The module and its variables, which are float32 in training."""
    component, dtype = COMPONENTS[spec["component"]], jnp.dtype(spec["dtype"])
    module = component.build(spec["config"], dtype)
    # remat, attention and unroll are ours alone and not in diffusers' configuration.
    if spec["component"] == "denoiser":
        module = module.clone(**{name: spec[name] for name in DENOISER})
    param_dtype = jnp.float32 if spec["kind"] == "train" else dtype
    shapes = components.abstract(component, module, spec["config"], mesh, param_dtype)
    tensors, _ = safetensors.open_file(spec["weights"])
    pieces = key_mapping.pieces(shapes, component.table(module), "diffusers")
    return module, sharded_load.load(tensors, shapes, pieces)


def make_weights(spec: Spec, path: str) -> dict:
    """Writes a file of random weights in diffusers' layout, for both sides."""
    component, dtype = COMPONENTS[spec["component"]], jnp.dtype(spec["dtype"])
    module = component.build(spec["config"], dtype)
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    shapes = components.abstract(component, module, spec["config"], mesh, dtype)
    rng = np.random.default_rng(spec["seed"])
    # A prime length: tensors whose sides are powers of two do not repeat in step with
    # it.
    block = rng.standard_normal(1_000_003, np.float32)
    entries = {}
    for piece in key_mapping.pieces(shapes, component.table(module), "diffusers"):
        # Default arguments bind this piece: entries are drawn later, while writing.
        def draw(key=piece.key, shape=piece.file_shape):
            x = cases.weight(rng, key, shape, block)
            if key.endswith("SelfAttention.q.weight"):  # T5 does not divide by it
                x = x * np.float32(spec["config"]["d_kv"] ** -0.5)
            return x.astype(dtype)

        entries[piece.key] = safetensors.Entry(dtype, piece.file_shape, draw)
    safetensors.write_file(path, entries)
    return {"bytes": sum(entry.size for entry in entries.values())}


# The program of each kind: (lower, arguments, FLOPs, outputs by name)

CaseProgram = tuple[Callable, tuple, float, Callable]
velocity = lambda x: {"velocity": x}
latents = lambda x: {"latents": x}


def matmul(spec, module, variables, inputs) -> CaseProgram:
    a, b = (inputs[k].astype(spec["dtype"]) for k in "ab")
    program = jax.jit(jnp.matmul)
    return lambda: program.lower(a, b), (a, b), 2.0 * len(a) ** 3, lambda x: {"ab": x}


def forward(spec, module, variables, inputs) -> CaseProgram:
    dtype = spec["dtype"]
    x, t = inputs["latents"], inputs["t"]
    context, pooled = (inputs[k].astype(dtype) for k in ("context", "pooled"))
    arguments = (variables, x, t, context, pooled)
    lower = lambda: evaluation_programs.velocity.lower(module, *arguments, skip=())
    return lower, arguments, forward_flops(spec, module), velocity


def forward_flops(spec, module) -> float:
    one = module.flops(
        height=spec["height"],
        width=spec["width"],
        text=spec["length"],
        text_dim=spec["config"]["joint_attention_dim"],
    )
    return spec["batch"] * one


def train(spec, module, variables, inputs) -> CaseProgram:
    tx, _ = optimizer.make(**spec["optim"])
    step = make_train_step(flow_loss(module), tx, ema_decay=spec["ema"], ema_every=1)
    # The position table is no parameter: it is neither trained nor averaged.
    buffers = {k: x for k, x in variables.items() if k != "params"}
    key = jax.random.key(spec["seed"])
    # The parameters are donated to the state, which would hold them a second time.
    begin = jax.jit(
        lambda params: init_state(key, lambda _: params, tx), donate_argnums=0
    )
    state = begin(variables["params"])
    # As in `train`: the new state is written over the old one.
    program = jax.jit(step, donate_argnums=0)
    arguments = (state, key, inputs, buffers)
    return (
        lambda: program.lower(*arguments),
        arguments,
        3 * forward_flops(spec, module),
        None,
    )


def flow_loss(module) -> Callable:
    """The loss of diffusion/losses.py, with noise and t from the batch."""

    def loss(params, key, batch, buffers):
        x0, noise, t = batch["latents"], batch["noise"], batch["t"]
        variables = {"params": params, **buffers}
        xt = RF.interpolate(x0, noise, t)
        v = module.apply(variables, xt, t, batch["context"], batch["pooled"])
        return jnp.mean(jnp.square(v - RF.target(x0, noise, t))), {}

    return loss


def sample(spec, module, variables, inputs) -> CaseProgram:
    dtype, steps = spec["dtype"], spec["steps"]
    cond, uncond = (
        Conditioning(*(inputs[f"{no}{k}"].astype(dtype) for k in Conditioning._fields))
        for no in ("", "no_")
    )
    # Arrays, as `sample` passes them: Python floats would be other programs.
    number = lambda x: jnp.asarray(x, jnp.float32)
    grid = grids.released(steps, spec["shift"])
    solver_inputs = compiled.solver_inputs("euler", grid)
    sampling_inputs = compiled.Inputs(
        keys=None,
        cond=cond,
        uncond=uncond,
        **jax.tree.map(jnp.asarray, solver_inputs),
        scale=number(spec["cfg"]),
        interval=(number(0.0), number(1.0)),
        rescale=number(0.0),
        noise=inputs["latents"],
    )
    guided = guidance.guides(spec["cfg"])
    shape = inputs["latents"].shape[1:]
    plan = compiled.Plan(module, solvers.same_program("euler"), shape, guided)
    arguments = (variables, sampling_inputs)
    lower = lambda: compiled.sample.lower(plan, *arguments)
    # Guidance runs the denoiser on twice the rows.
    count = (1 + guided) * steps * forward_flops(spec, module)
    return lower, arguments, count, latents


def vae_encode(spec, module, variables, inputs) -> CaseProgram:
    arguments = (variables, inputs["image"], None)
    lower = lambda: autoencoder_programs.encode_image.lower(
        module, *arguments, **SCALE, tile=None
    )
    count = matmul_flops.flops(
        lambda v, x: module.apply(v, x, method="encode"), variables, inputs["image"]
    )
    return lower, arguments, count, latents


def vae_decode(spec, module, variables, inputs) -> CaseProgram:
    arguments = (variables, inputs["latents"])
    lower = lambda: autoencoder_programs.decode.lower(
        module, *arguments, **SCALE, tile=None
    )
    count = matmul_flops.flops(
        lambda v, x: module.apply(v, x, method="decode"), variables, inputs["latents"]
    )
    return lower, arguments, count, lambda x: {"image": x}


def encoder(spec, module, variables, inputs) -> CaseProgram:
    program = jax.jit(module.apply)
    arguments = (variables, inputs["ids"])
    name = {
        "t5": lambda x: {"states": x},
        "clip": lambda x: dict(zip(("states", "pooled"), x)),
    }
    lower = lambda: program.lower(*arguments)
    return (
        lower,
        arguments,
        matmul_flops.flops(module.apply, *arguments),
        name[spec["kind"]],
    )


MAKE = {
    "matmul": matmul,
    "forward": forward,
    "train": train,
    "sample": sample,
    "vae_encode": vae_encode,
    "vae_decode": vae_decode,
    "t5": encoder,
    "clip": encoder,
}


if __name__ == "__main__":
    jax.config.update("jax_enable_compilation_cache", False)
    side_worker.serve(Case, weights=make_weights)
