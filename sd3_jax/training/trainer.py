"""The training loop, and what it needs: one step ahead of the device."""

import contextlib
import json
import logging
import math
import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from etils import epath
from jax.sharding import Mesh
from ml_collections import ConfigDict

import sd3_jax
from sd3_jax import pictures, tree
from sd3_jax.assembly import (
    compatibility,
    encoder_identity,
    examples,
    finetune_start,
    model_parts,
)
from sd3_jax.checkpoints.manager import (
    Checkpoints,
    UnreadableCheckpoint,
    saved_config,
)
from sd3_jax.distributed import processes, sharding, signals, watchdog
from sd3_jax.errors import UserError
from sd3_jax.evaluation.val_loss import val_loss
from sd3_jax.files import write_whole
from sd3_jax.monitoring import writers
from sd3_jax.monitoring.goodput import Goodput
from sd3_jax.monitoring.metrics import PEAK_TFLOPS, Clock, Metrics, read
from sd3_jax.sampling import sampler
from sd3_jax.sampling.encoder import Encoder
from sd3_jax.sampling.sampler import Painter
from sd3_jax.training import optimizer
from sd3_jax.training.finetuning import SETS, Tuning
from sd3_jax.training.nonfinite import NonFinite
from sd3_jax.training.profiler import Trace
from sd3_jax.training.state import TrainState, abstract_state, init_state
from sd3_jax.training.step import make_train_step

log = logging.getLogger(__name__)
COMPILERS = 4  # buckets' programs at once


def grace_seconds() -> float | None:
    """Seconds from SIGTERM to SIGKILL: SD3_GRACE_S, which launch/job.sh sets."""
    text = os.environ.get("SD3_GRACE_S", "")
    if not text:
        return None
    if not text.isdecimal():
        raise UserError(f"SD3_GRACE_S = {text}: wanted an integer, seconds")
    return float(text)


def refuse_sample_step(config: ConfigDict, workdir: epath.Path) -> None:
    """UserError for sample.step, which reads a checkpoint and does not go back to it.

    A run that went on from the middle of its own steps would have to delete the rest.
    """
    if step := config.sample.step:
        raise UserError(
            f"config.sample.step = {step}: train goes on from the newest checkpoint. To"
            f" go on from an earlier one, copy {workdir}/checkpoints/{step} to"
            f" NEW/checkpoints/{step} and train with --workdir=NEW; to start a new run"
            f" from its weights, set --config.tune.base={workdir}/checkpoints/{step}"
        )


class Program(NamedTuple):
    """The step that a config means on a mesh, and the state it takes: not one array."""

    parts: model_parts.Parts
    tuning: Tuning
    tx: optax.GradientTransformation
    rate: Callable  # of learning, by step
    abstract: TrainState  # shapes with shardings
    step: Callable  # jitted

    @property
    def placed(self) -> TrainState:
        return jax.tree.map(lambda x: x.sharding, self.abstract)


def require_trainable_dtype(config: ConfigDict) -> None:
    """UserError for float16, whose gradients need a scaled loss, which is not here.

    A mean over a batch divides each example's gradient by its size: at batch 1024 most
    of the entries fall below float16's least number and are zero.
    """
    if config.model.dtype == "float16":
        raise UserError(
            'config.model.dtype = "float16": gradients would be rounded to zero; wanted'
            ' "bfloat16" or "float32" to train (float16 is for sampling alone)'
        )


def tell_average(config: ConfigDict) -> None:
    """What `ema` will be, where config.ema does not say it."""
    steps, every = config.train.steps, config.ema.every
    if config.optim.name == "schedule_free":
        log.info(
            "validation, samples and exports take the average of config.optim.name ="
            ' "schedule_free"; config.ema is not used'
        )
    elif steps < every:
        log.warning(
            "config.train.steps = %d, config.ema.every = %d: until its first turn the"
            " average follows every step closely, and is little else than the last"
            " weights; for an average set --config.ema.every=1",
            *(steps, every),
        )


def tell_rate(config: ConfigDict) -> None:
    """A rate that an optimizer which estimates its own makes too small to train."""
    if config.optim.name == "prodigy" and config.optim.lr < 0.1:
        log.warning(
            'config.optim.lr = %g: config.optim.name = "prodigy" multiplies the rate'
            " that it estimates by it; 1.0 is usual",
            config.optim.lr,
        )


def warn_of_short_run(config: ConfigDict) -> None:
    """What the config asks for and a run of train.steps does not come to."""
    train, warmup = config.train, config.optim.warmup
    for name, asked, consequence in (
        ("log_every", True, "metrics.jsonl gets no losses"),
        ("eval_every", config.data.held_out, "the held-out records are never used"),
        ("sample_every", train.prompts, "config.train.prompts are never painted"),
    ):
        if asked and train[name] > train.steps:
            log.warning(
                "config.train.%s = %d is more than config.train.steps = %d: %s; set"
                " --config.train.%s=%d",
                *(name, train[name], train.steps, consequence),
                *(name, max(1, train.steps // 10)),
            )
    if warmup > train.steps:
        log.warning(
            "config.optim.warmup = %d is more than config.train.steps = %d: the"
            " learning rate does not reach config.optim.lr = %g; set"
            " --config.optim.warmup=%d",
            *(warmup, train.steps, config.optim.lr, train.steps // 20),
        )


def program(config: ConfigDict, mesh: Mesh) -> Program:
    require_trainable_dtype(config)
    parts = model_parts.build_parts(config)
    tuning = finetune_start.build_tuning(config, parts.objective)
    optim = config.optim.to_dict()
    accumulate = optim.pop("accumulate")
    tx, rate = optimizer.make(**optim, steps=config.train.steps)
    step = make_train_step(
        tuning.loss,
        tx,
        ema_decay=config.ema.decay,
        ema_every=config.ema.every,
        accumulate=accumulate,
        prepared=tuning.prepared,
    )
    key = jax.eval_shape(lambda: jax.random.key(0))
    abstract = abstract_state(key, tuning.init, tx, mesh)
    placed = jax.tree.map(lambda x: x.sharding, abstract)
    step = jax.jit(step, donate_argnums=0, out_shardings=(placed, None))
    return Program(parts, tuning, tx, rate, abstract, step)


def example(config: ConfigDict, mesh: Mesh) -> dict[str, jax.ShapeDtypeStruct]:
    """The shapes of a batch of the recipe's size, on the mesh."""
    placed = sharding.batch_sharding(mesh)
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=placed),
        examples.nominal(config),
    )


class Training:
    """The loop and what it needs; all that must survive a crash is in the state."""

    def __init__(
        self,
        config: ConfigDict,
        workdir: epath.Path,
        mesh: Mesh,
        goodput: Goodput | None = None,
    ):
        self.config, self.workdir, self.mesh = config, workdir, mesh
        self.goodput = goodput or Goodput()
        self.settings = config.to_dict()
        self.batch_size = config.data.batch_size
        self.rows = sharding.local_rows(mesh, self.batch_size)
        self.key = jax.random.key(config.seed)
        made = program(config, mesh)
        self.parts, self.tuning = made.parts, made.tuning
        self.tx, self.rate = made.tx, made.rate
        self.abstract, self.placed, self.step = made.abstract, made.placed, made.step
        if config.train.sample_every <= config.train.steps and config.train.prompts:
            sampler.check(config)
        self.source = examples.source(config)
        self.data = json.loads(json.dumps(self.source.identity()))
        self.encoder = examples.encoder_of(config, self.source, mesh)
        self.encoders = encoder_identity.of_run(self.source, self.encoder)
        self.parts = self.parts._replace(encoders=self.encoders)
        parts = self.parts.denoiser, self.parts.objective
        self.base = finetune_start.start(config, *parts, mesh)
        encoder_identity.warn_of_base(
            config, finetune_start.base_encoders(config), self.encoders
        )
        self.began_with, self.frozen = finetune_start.identity(self.base), {}
        self.validation = Validation(config, self.parts, mesh, self.encoder)
        self.painter = Painter(config, self.parts, mesh)
        self.step_now = self.settled = 0  # the newest step that was looked at
        self.ahead = 0  # batches that the data are ahead of the step
        self.nonfinite = NonFinite(config.train.skip_nonfinite)

    def run(self) -> None:
        train = self.config.train
        folder = model_parts.checkpoints(self.workdir)
        about = {"data": self.data, "base": self.began_with}
        processes.agree("data", about | {"encoders": self.encoders})
        self.refuse_cpu_by_accident()
        with (
            processes.heeding_sigterm(),
            Checkpoints(
                folder, **self.config.checkpoint, grace=grace_seconds()
            ) as checkpoints,
        ):
            checkpoints.require_space(self.abstract)
            state, start = self.restore_or_init(checkpoints)
            self.frozen, self.base = self.tuning.kept(self.base), {}
            tell_average(self.config)
            tell_rate(self.config)
            warn_of_short_run(self.config)
            self.describe(state)
            if start >= train.steps:
                log.info("%s has all of its %d steps", self.workdir, train.steps)
                self.save_adapter(state.ema, start)  # a kill may have come before it
                return
            first = jax.process_index() == 0
            if first:  # before Metrics drops the lines of what will be done again
                self.goodput.go_on(read(self.workdir), start)
            names = train.writers if first else ()
            with Metrics(
                self.workdir,
                total_steps=train.steps,
                start_step=start,
                process_index=jax.process_index(),
                writers=writers.open_all(names, self.workdir, self.settings),
            ) as metrics:
                metrics.write(start, "goodput", self.goodput.line())
                self.loop(state, start, checkpoints, metrics)
        if first:
            print(self.goodput.words())

    def interrupted(self) -> str:
        """Where a signal came, once all that was begun is saved, and how to go on."""
        saved, last = self.nonfinite.last_saved, self.config.train.steps
        step = f"at step {self.step_now} of {last}" if self.step_now else "at the start"
        then = f"goes on from step {saved}" if saved else "starts again, from nothing"
        return f"{step}; the same command {then}"

    def save_adapter(self, params: dict, step: int) -> None:
        watchdog.expect("writing the LoRA", watchdog.LONG)
        finetune_start.save_adapter(
            self.config, self.parts.denoiser, params, self.workdir, step
        )

    def begin(self, key: jax.Array, base: dict, adapter: dict) -> TrainState:
        """A new state; `adapter` is a LoRA to start from, or {}."""

        def start(key):
            params = self.tuning.start(key, base)
            return finetune_start.adapted(params, adapter) if adapter else params

        return init_state(key, start, self.tx)

    def whole(self, params: dict) -> dict:
        """The model's parameters, with those that do not train."""
        return self.tuning.whole(params, self.frozen)

    def restore_or_init(self, checkpoints: Checkpoints) -> tuple[TrainState, int]:
        """The state, on its devices from birth, and the step it is at."""
        allowed = self.config.train.skip_nonfinite
        if checkpoints.latest() is None:
            adapter = finetune_start.initial_adapter(self.config, self.parts)
            begin = jax.jit(self.begin, out_shardings=self.placed)
            return begin(self.key, self.base, adapter), 0
        newest = {}
        with contextlib.suppress(UnreadableCheckpoint):  # restore will see to it
            newest = saved_config(checkpoints.directory)
        compatibility.compare(self.workdir, newest, self.config)
        state, data, saved = checkpoints.restore(self.abstract)
        if saved != newest:
            compatibility.compare(self.workdir, saved, self.config)
        compatibility.compare_data(
            self.workdir, data.get("source"), self.data, self.config
        )
        finetune_start.compare(self.workdir, data.get("base", ""), self.began_with)
        known = data.get("encoders", {})
        encoder_identity.compare(self.workdir, known, self.encoders, self.config)
        step = data["next_step"]
        if step < self.config.train.steps:
            compatibility.compare_rate(self.workdir, saved, self.config, step)
            self.ahead = compatibility.batches_ahead(data, saved, self.config)
        self.nonfinite = NonFinite(allowed, data.get("skipped", 0), step)
        log.info("goes on from step %d of %s", step, self.workdir)
        return state, step

    def refuse_cpu_by_accident(self) -> None:
        """jax falls back to it in silence where it finds no accelerator's driver."""
        size, kind = tree.count(self.abstract.params), jax.devices()[0].platform
        if kind == "cpu" and size > 2e8 and not os.environ.get("JAX_PLATFORMS"):
            raise UserError(
                f"{size / 1e9:.1f} billion parameters, and jax found nothing but CPUs:"
                " wanted jax[tpu] or jax[cuda12] and their devices, or"
                " JAX_PLATFORMS=cpu, to mean it"
            )

    def describe(self, state: TrainState) -> None:
        """config.json and run.json, for people and for the report."""
        parameters = {name: tree.count(x) for name, x in state.params.items()}
        about = {
            "parameters": sum(parameters.values()),
            "parameters_by_model": parameters,
            "forward_flops_per_image": self.parts.flops,
            "devices": jax.device_count(),
            "device_kind": jax.devices()[0].device_kind,
            "processes": jax.process_count(),
            "mesh": dict(self.mesh.shape),
            "versions": {"sd3_jax": sd3_jax.__version__, "jax": jax.__version__},
        }
        log.info(
            "%d parameters (%s) on %d x %s",
            about["parameters"],
            ", ".join(f"{name} {n}" for name, n in parameters.items()),
            about["devices"],
            about["device_kind"],
        )
        if shares := examples.by_bucket(self.source):
            log.info("buckets: %s", shares)
        if jax.process_index() == 0:
            for name, value in ("config", self.settings), ("run", about):
                text = json.dumps(value, indent=2)
                write_whole(self.workdir / f"{name}.json", text.encode())

    def loop(self, state, start: int, checkpoints: Checkpoints, metrics: Metrics):
        """One step ahead of the device: step n is given before n - 1 is waited for."""
        train, goodput, since = self.config.train, self.goodput, start
        loader = examples.loader(
            self.config,
            self.rows,
            start=start,
            ahead=self.ahead,
            examples=self.source,
            encoder=self.encoder,
        )
        watchdog.expect("compiling the step", watchdog.LONG)
        with goodput.spend("compile"):
            compiled, values = self.compiled(state), None
        goodput.turn("productive")
        clock = Clock()
        with self.trace(start) as trace:
            for step in range(start + 1, train.steps + 1):
                watchdog.expect(f"step {step}", train.stuck_after)
                self.step_now = step
                last = step == train.steps
                log_now, validate_now, sample_now = (
                    step % every == 0 or (last and every <= train.steps)
                    for every in (train.log_every, train.eval_every, train.sample_every)
                )
                pause = validate_now or sample_now or trace.ends(step)
                trace.begin(step, values)
                with jax.profiler.StepTraceAnnotation("train", step_num=step):
                    with goodput.spend("data_wait"), clock.wait():
                        batch = next(loader)
                    batch = self.put(batch)
                    before, program = values, compiled[kind(batch)]
                    state, values = program(state, self.key, batch, self.frozen)
                    self.settle(step - 1, before, loader, metrics)
                if log_now or pause or checkpoints.due(step, force=last):
                    self.settle(step, values, loader, metrics)
                if log_now:
                    self.log(metrics, clock, step, step - since, values)
                    since = step
                with goodput.spend("evaluation"):
                    if trace.ends(step):
                        trace.stop()
                    if validate_now:
                        metrics.write(
                            step, "val", self.validation(self.whole(state.ema))
                        )
                    if sample_now and train.prompts:
                        self.sample(metrics, step, state)
                watchdog.expect(f"the save after step {step}", train.stuck_after)
                with goodput.spend("checkpoint"):
                    saved, stop = self.save(step, state, checkpoints)
                    if saved:
                        self.save_adapter(state.ema, step)
                if saved or validate_now or last or stop:
                    metrics.write(step, "goodput", goodput.line(finished=last))
                if stop:
                    if jax.process_index() == 0:
                        signals.say(f"SIGTERM: stopped {self.interrupted()}")
                    return
                if pause:
                    clock.reset()
                    since = step

    def trace(self, start: int) -> Trace:
        folder, total = self.workdir / "profile", self.config.train.steps
        return Trace(folder, **self.config.profile, done=start, total=total)

    def save(self, step: int, state, checkpoints: Checkpoints) -> tuple[bool, bool]:
        """Whether it saved, and whether the run is to stop: all is on disk then."""
        last = step == self.config.train.steps
        skipped = self.nonfinite.skipped
        data = {"next_step": step, "skipped": skipped, "source": self.data}
        data |= {"next_batch": step + self.ahead} if self.ahead else {}
        data |= {"base": self.began_with} if self.began_with else {}
        data |= {"encoders": self.encoders} if self.encoders else {}
        stop = checkpoints.reached_preemption(step)
        if stop and processes.leads_others():  # a run of one process: see signals
            signals.say(f"SIGTERM: saves step {step}, then all processes stop")
        saved = checkpoints.save(
            step, state, data, self.settings, force=last, finite=True
        )
        if saved:
            self.nonfinite.last_saved = step
        if last or stop:
            checkpoints.wait()
        return saved, stop

    def settle(self, step: int, values, loader, metrics: Metrics) -> None:
        """Wait for a step, and see that it made an update; once for each step."""
        if values is None or step == self.settled:
            return
        self.settled = step
        loss, norm = map(float, jax.device_get((values["loss"], values["grad_norm"])))
        if not self.nonfinite.is_one(step, loss, norm):
            return
        names = loader.names(step - 1)
        words = self.nonfinite.words(step, loss, norm, names)
        log.warning("%s", words)
        about = {"loss": loss, "grad_norm": norm, "skipped": self.nonfinite.skipped}
        metrics.write(step, "nonfinite", about)
        if jax.process_index() == 0:
            text = json.dumps({"step": step, "words": words, "batch": names}, indent=1)
            path = self.workdir / "nonfinite" / f"step_{step:08d}.json"
            write_whole(path, text.encode())
        self.nonfinite.stop_beyond(words)

    def put(self, batch: dict) -> dict[str, jax.Array]:
        """This process's rows onto the mesh, what is still to be encoded encoded."""
        put = self.encoder or partial(sharding.put, mesh=self.mesh)
        return put(batch, batch_size=self.batch_size)

    def compiled(self, state: TrainState) -> dict[tuple, Callable]:
        """The step's program for each bucket, by the `kind` of its batches, ahead of
        time: no step's time has a compilation in it, an encoder's neither."""
        begin, lowered = time.perf_counter(), {}
        for batch in examples.batches(self.config, self.source, self.encoder):
            rows = self.put({name: x[self.rows] for name, x in batch.items()})
            shapes = jax.tree.map(
                lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding),
                rows,
            )
            lowered[kind(rows)] = self.step.lower(state, self.key, shapes, self.frozen)
        with ThreadPoolExecutor(COMPILERS) as threads:  # XLA works without the GIL
            programs = dict(zip(lowered, threads.map(compile_, lowered.values())))
        seconds = time.perf_counter() - begin
        log.info("compiled the step in %.1f s, shapes: %d", seconds, len(programs))
        processes.meet("compiled the step")
        return programs

    def log(self, metrics, clock: Clock, step: int, steps: int, values) -> None:
        images = steps * self.batch_size
        rates = clock.summary(
            steps,
            images,
            flops=3 * self.parts.flops * images,
            devices=jax.device_count(),
            peak=PEAK_TFLOPS.get(jax.devices()[0].device_kind),
        )
        values = {name: float(value) for name, value in values.items()}
        for name in SETS:  # nothing is logged of a set that the batch lacks
            if math.isnan(values.get(name, 0.0)):
                del values[name]
        lr = float(self.rate(step - 1))
        metrics.write(step, "train", {**values, "lr": lr, **rates})

    def sample(self, metrics: Metrics, step: int, state: TrainState) -> None:
        """The recipe's prompts, always from the same noise: a picture's development."""
        captions = list(self.config.train.prompts)
        images = self.painter(self.whole(state.ema), captions, [0] * len(captions))
        path = f"samples/step_{step:08d}.png"
        if jax.process_index() == 0:
            (self.workdir / "samples").mkdir(parents=True, exist_ok=True)
            sheet = pictures.grid(images, columns=8)
            pictures.save_png(sheet, self.workdir / path)
        metrics.write(step, "samples", {"path": path, "prompts": captions})


def compile_(lowered) -> Callable:
    """A UserError, with what to do, if it does not fit a device's memory."""
    try:
        return lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise UserError(
            f"the step does not fit the memory of {jax.devices()[0].device_kind}:"
            " wanted a smaller config.data.batch_size, config.optim.accumulate,"
            " config.model.remat = full or a larger config.mesh.fsdp (sd3-jax plan"
            f" finds some): {' '.join(str(error).split())[:300]}"
        ) from error


def kind(batch: dict) -> tuple:
    """What of a batch its program is compiled for."""
    return tuple(sorted((name, x.shape) for name, x in batch.items()))


class Validation:
    """The mean loss at each of eight times, on the same held-out examples each time."""

    def __init__(
        self,
        config: ConfigDict,
        parts: model_parts.Parts,
        mesh: Mesh,
        encoder: Encoder | None = None,
    ):
        self.config, self.mesh, self.encoder = config, mesh, encoder
        self.trained_with = parts.encoders
        self.size = examples.batch_size(config, held_out=True)
        self.source = None  # opened by the first validation, for those to come
        self.key = jax.random.key(config.seed + 1)
        self.program = jax.jit(
            lambda params, key, batch, t: parts.objective.loss_at(
                params, key, batch, jnp.broadcast_to(t, self.size)
            )
        )

    def __call__(self, params: dict) -> dict[str, float]:
        return dict(val_loss(self.program, params, self.key, self.batches()))

    def batches(self) -> Iterator[dict]:
        """The held-out examples, each batch read and placed when it is asked for."""
        size = self.size
        key = f"{'eval' if self.config.eval.batch_size else 'data'}.batch_size"
        rows = sharding.local_rows(self.mesh, size, key=key)
        if self.source is None:
            self.source = examples.source(self.config, held_out=True)
        if self.encoder is None:
            self.encoder = examples.encoder_of(self.config, self.source, self.mesh)
        encoder = self.encoder
        held_out = encoder_identity.of_run(self.source, encoder)
        if told := encoder_identity.differing(self.trained_with, held_out):
            words = "config.data.held_out: encoded by others than the run's records: %s"
            log.warning(words, told)
        loader = examples.loader(
            self.config, rows, examples=self.source, encoder=encoder, held_out=True
        )
        count = max(1, self.config.eval.examples // size)
        place = encoder or partial(sharding.put, mesh=self.mesh)

        def put(_):
            watchdog.expect("a batch of validation", watchdog.LONG)
            return place(next(loader), batch_size=size)

        return map(put, range(count))
