"""The training loop, top to bottom: `train` is the whole of a run."""

import contextlib
import logging
import math
from collections.abc import Mapping, Sequence
from functools import partial

import jax
import numpy as np
from etils import epath
from jax.sharding import Mesh
from ml_collections import ConfigDict

from sd3_jax import pictures
from sd3_jax.assembly import encoder_identity, examples, finetune_start, model_parts
from sd3_jax.checkpoints.manager import Checkpoints
from sd3_jax.distributed import processes, sharding, signals, watchdog
from sd3_jax.monitoring import writers
from sd3_jax.monitoring.goodput import Goodput
from sd3_jax.monitoring.metrics import PEAK_TFLOPS, Clock, Metrics, read
from sd3_jax.sampling.job import sampler
from sd3_jax.sampling.job.sampler import TrainedSampler
from sd3_jax.training import run_checks
from sd3_jax.training.compile_step import batch_shape, compile_for_batches
from sd3_jax.training.finetuning import SETS
from sd3_jax.training.held_out_loss import Validation
from sd3_jax.training.nonfinite import NonFinite
from sd3_jax.training.profiler import Trace
from sd3_jax.training.program import Program, build_program
from sd3_jax.training.resume import TrainedOn, data_record, restore_or_initialise
from sd3_jax.training.run_description import (
    describe_run,
    log_description,
    write_description,
)
from sd3_jax.training.run_progress import RunProgress, check_step
from sd3_jax.training.state import TrainState

log = logging.getLogger(__name__)


def train(
    config: ConfigDict, workdir: epath.Path, mesh: Mesh, goodput: Goodput | None = None
) -> None:
    """Train to config.train.steps; resume from the newest checkpoint in workdir.

    Every process calls it, inside the mesh and the logical axis rules. All that must
    survive a crash is in the TrainState and the data record, which are saved together.
    KeyboardInterrupt says at which step the run stopped and where it resumes.
    """
    options, steps, settings = config.train, config.train.steps, config.to_dict()
    goodput = goodput or Goodput()

    # --- model, optimizer, step: no weights yet, so mistakes are told at once
    rows = sharding.local_rows(mesh, config.data.batch_size)  # of a batch, held here
    # The key never advances. A step folds in its own number, so a resumed run draws the
    # noise that the unbroken run would have drawn.
    key = jax.random.key(config.seed)
    program = build_program(config, mesh)
    if options.sample_every <= steps and options.prompts:
        sampler.require_text_encoders(config)

    # --- data, its encoders, and the weights to start from
    source = examples.source(config)
    encoder = examples.encoder_of(config, source, mesh)
    encoders = encoder_identity.of_run(source, encoder)
    program = program._replace(parts=program.parts._replace(encoders=encoders))
    parts, tuning = program.parts, program.tuning
    base_params = finetune_start.start(config, parts.denoiser, parts.objective, mesh)
    trained_on = TrainedOn.of(source, base_params, encoders)
    base_encoders = finetune_start.base_encoders(config)
    encoder_identity.warn_of_base(config, base_encoders, encoders)
    to_device = encoder or partial(sharding.put, mesh=mesh)
    to_device = partial(to_device, batch_size=config.data.batch_size)

    # --- what looks at the averaged weights
    validation = Validation(config, parts, mesh, encoder)
    # An encoder of records that hold pictures and captions has all parts that painting
    # needs. Another one lacks some, and the sampler loads its own when it first paints.
    complete = encoder and encoder.encodes_all
    sample_prompts = TrainedSampler(config, parts, mesh, encoder if complete else None)
    prompts = list(options.prompts)

    progress = RunProgress(
        steps, NonFinite(options.skip_nonfinite), max_hours=options.max_hours
    )
    with contextlib.ExitStack() as stack:
        # Entered first, so left last: by then the save in flight is durable.
        stack.enter_context(progress.explaining_interrupts())

        # --- processes agree, checkpoints open
        processes.agree("data", trained_on._asdict())
        run_checks.refuse_cpu_by_accident(program.abstract.params)
        stack.enter_context(processes.heeding_sigterm())
        folder, grace = model_parts.checkpoints(workdir), run_checks.grace_seconds()
        checkpoints = Checkpoints(folder, **config.checkpoint, grace=grace)
        stack.enter_context(checkpoints)
        checkpoints.require_space(program.abstract)

        # --- restore or initialise
        state, start, skipped, progress.batches_ahead = restore_or_initialise(
            config, workdir, checkpoints, program, key, base_params, trained_on
        )
        progress.nonfinite = NonFinite(options.skip_nonfinite, skipped, start)
        # What of the base does not train; the rest of it is freed.
        frozen, base_params = tuning.frozen_part(base_params), {}

        # --- tell what the run is: warnings, config.json, run.json
        run_checks.warn_of_settings(config)
        description = describe_run(state.params, flops=parts.flops, mesh=mesh)
        log_description(description, examples.by_bucket(source))
        write_description(workdir, settings, description)
        if start >= steps:
            log.info(
                "%s already has all of its %d steps; raise --config.train.steps to"
                " train more",
                workdir,
                steps,
            )
            save_adapter(config, program, state, start, workdir)  # if a kill came first
            return
        metrics = stack.enter_context(open_metrics(config, workdir, start, goodput))
        metrics.write(start, "goodput", goodput.line())

        # --- the loader, and the step compiled for each bucket that it gives
        batch_offset = progress.batches_ahead
        loader = examples.loader(
            config,
            rows,
            start=start,
            ahead=batch_offset,
            examples=source,
            encoder=encoder,
        )
        watchdog.expect("compiling the step", watchdog.LONG)
        with goodput.spend("compile"):
            example_batches = examples.batches(config, source, encoder)
            batches = (
                to_device({k: x[rows] for k, x in b.items()}) for b in example_batches
            )
            step_by_shape = compile_for_batches(
                program.step, state, key, batches, frozen
            )

        # --- the loop: the host is one step ahead of the device
        goodput.turn("productive")
        clock, logged, step_metrics = Clock(), start, None
        trace = Trace(workdir / "profile", **config.profile, done=start, total=steps)
        stack.enter_context(trace)
        for step in range(start + 1, steps + 1):
            watchdog.expect(f"step {step}", options.stuck_after)
            progress.step, last = step, step == steps
            log_now = is_due(step, options.log_every, steps)
            validate_now = is_due(step, options.eval_every, steps)
            sample_now = is_due(step, options.sample_every, steps)
            pause = validate_now or sample_now or trace.ends(step)
            progress.stop_in_time(goodput.lived())
            trace.begin(step, step_metrics)

            # --- dispatch step n, then read the loss of n - 1: the device stays busy
            with jax.profiler.StepTraceAnnotation("train", step_num=step):
                with goodput.spend("data_wait"), clock.wait():
                    batch = next(loader)
                batch = to_device(batch)
                previous_metrics, run_step = (
                    step_metrics,
                    step_by_shape[batch_shape(batch)],
                )
                state, step_metrics = run_step(state, key, batch, frozen)
                check_step(step - 1, previous_metrics, progress, loader.names, metrics)
            # What is logged, shown or saved is waited for, and its loss checked first.
            if log_now or pause or checkpoints.due(step, force=last):
                check_step(step, step_metrics, progress, loader.names, metrics)
            if log_now:
                row = train_row(
                    config, program, clock, step, step - logged, step_metrics
                )
                metrics.write(step, "train", row)
                logged = step

            # --- validate and sample
            with goodput.spend("evaluation"):
                if trace.ends(step):
                    trace.stop()
                if validate_now:
                    losses = validation(tuning.full_params(state.ema, frozen))
                    metrics.write(step, "val", losses)
                if sample_now and prompts:
                    # From the same noise each time: what differs is the weights.
                    images = sample_prompts(
                        tuning.full_params(state.ema, frozen),
                        prompts,
                        [0] * len(prompts),
                    )
                    write_samples(images, prompts, step, metrics)

            # --- save, and stop if SIGTERM came or the time is over
            watchdog.expect(f"the save after step {step}", options.stuck_after)
            with goodput.spend("checkpoint"):
                record = data_record(step, progress, trained_on)
                saved, stop = save(checkpoints, state, record, settings, progress)
                if saved:
                    save_adapter(config, program, state, step, workdir)
            if saved or validate_now or last or stop:
                metrics.write(step, "goodput", goodput.line(finished=last))
            if stop:
                if jax.process_index() == 0:
                    signals.say(
                        f"{progress.stop_reason}: stopped {progress.describe_stop()}"
                    )
                break
            if pause:  # logged rates are of training alone
                clock.reset()
                logged = step
    if jax.process_index() == 0:
        print(goodput.words())


def is_due(step: int, every: int, total_steps: int) -> bool:
    """Whether what comes once in `every` steps comes now.

    The last step counts too, unless the whole run is shorter than `every`.
    """
    last = step == total_steps
    return step % every == 0 or (last and every <= total_steps)


def open_metrics(
    config: ConfigDict, workdir: epath.Path, start: int, goodput: Goodput
) -> Metrics:
    """Open the metrics, which process 0 writes, with the goodput of earlier lives."""
    is_first = jax.process_index() == 0
    if is_first:
        # Before Metrics drops the lines of steps that will run again: the newest
        # goodput line at or before `start` has the sums of the earlier lives.
        goodput.go_on(read(workdir), start)
    names = config.train.writers if is_first else ()
    return Metrics(
        workdir,
        total_steps=config.train.steps,
        start_step=start,
        process_index=jax.process_index(),
        writers=writers.open_all(names, workdir, config.to_dict()),
    )


def train_row(
    config: ConfigDict,
    program: Program,
    clock: Clock,
    step: int,
    steps: int,
    values: Mapping[str, jax.Array],
) -> dict[str, float]:
    """A "train" line: this step's values, and rates over the last `steps` steps."""
    images = steps * config.data.batch_size
    rates = clock.summary(
        steps,
        images,
        flops=3 * program.parts.flops * images,  # backward is two forward passes
        devices=jax.device_count(),
        peak=PEAK_TFLOPS.get(jax.devices()[0].device_kind),
    )
    row = {name: float(value) for name, value in values.items()}
    for name in SETS:  # DreamBooth: NaN stands for a set that the batch lacks
        if math.isnan(row.get(name, 0.0)):
            del row[name]
    lr = float(program.rate(step - 1))  # optax counts updates from 0
    return {**row, "lr": lr, **rates}


def write_samples(
    images: np.ndarray, prompts: Sequence[str], step: int, metrics: Metrics
) -> None:
    """A contact sheet in samples/ by process 0, and its line in the metrics."""
    path = f"samples/step_{step:08d}.png"
    if jax.process_index() == 0:
        (metrics.workdir / "samples").mkdir(parents=True, exist_ok=True)
        sheet = pictures.grid(images, columns=8)
        pictures.save_png(sheet, metrics.workdir / path)
    metrics.write(step, "samples", {"path": path, "prompts": prompts})


def save(
    checkpoints: Checkpoints,
    state: TrainState,
    record: dict,
    settings: dict,
    progress: RunProgress,
) -> tuple[bool, bool]:
    """(saved, stop): whether a save was due, and whether all processes stop here.

    Where the run ends, after the last step or before it, it waits for the save.
    """
    step = progress.step
    last = step == progress.total_steps
    # Asked at every step, by all: jax answers "stop" for one step only.
    stop = checkpoints.reached_preemption(step)
    if stop and processes.leads_others():  # of one process: signals.py does
        reason = progress.stop_reason
        signals.say(f"{reason}: saving step {step}, then all processes stop")
    saved = checkpoints.save(step, state, record, settings, force=last, finite=True)
    if saved:
        progress.nonfinite.last_saved = step
    if last or stop:
        checkpoints.wait()
    return saved, stop


def save_adapter(
    config: ConfigDict,
    program: Program,
    state: TrainState,
    step: int,
    workdir: epath.Path,
) -> None:
    """The average of a LoRA run in diffusers' layout; nothing of other runs."""
    denoiser = program.parts.denoiser
    finetune_start.save_adapter(config, denoiser, state.ema, workdir, step)
