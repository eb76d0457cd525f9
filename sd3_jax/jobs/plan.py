"""Plans a TPU run without a TPU: compiles its programs for slices, and bounds them."""

import json
import logging
from typing import Any

import jax
from etils import epath
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from sd3_jax import tree
from sd3_jax.assembly import model_parts
from sd3_jax.distributed import sharding
from sd3_jax.errors import UserError
from sd3_jax.files import write_whole
from sd3_jax.sampling import compiled
from sd3_jax.sampling.job import row_batches
from sd3_jax.tools.plan import (
    aot,
    bounds,
    hlo,
    latency_lines,
    link_traffic,
    mesh_search,
    phase_memory,
    plan_chart,
    plan_table,
    sampling_programs,
    schedule,
    slices,
)
from sd3_jax.tools.plan.aot import Case
from sd3_jax.tools.plan.slices import Slice
from sd3_jax.training.program import abstract_batch, build_program

log = logging.getLogger(__name__)


def run(config: ConfigDict, workdir: epath.PathLike) -> int:
    """Prints a row for each slice and program; writes plan.json, plan.png and, if
    asked, the programs' text to workdir."""
    model_parts.mmdit(config.model, "plan knows no other's bounds")
    tune = config.tune
    if tune.base or (tune.method, tune.objective) != ("full", "flow"):
        raise UserError(
            f'config.tune: base = "{tune.base}", method = "{tune.method}", objective ='
            f' "{tune.objective}": plan supports only training from scratch; expected'
            ' "", "full" and "flow"'
        )
    # Environment first: libtpu reads it when it is loaded.
    aot.prepare()
    aot.compiler()
    planned_for = [slices.find(name) for name in config.plan.slices]
    for tpu_slice in planned_for:  # mistakes first, for a compilation takes minutes
        aot.flags(config.plan.flags, tpu_slice, config.plan.job)
    workdir = epath.Path(workdir)
    workdir.mkdir(parents=True, exist_ok=True)
    rows = []
    for tpu_slice in planned_for:
        for row in JOBS[config.plan.job](config, tpu_slice, workdir):
            rows.append(row)
            write_whole(workdir / "plan.json", json.dumps(rows, indent=2).encode())
    write_whole(workdir / "plan.png", plan_chart.draw(rows))
    print(
        *plan_table.table(rows),
        *map(plan_table.details, rows),
        *phase_memory.lines(rows, config.quantize.to_dict()),
        *latency_lines.lines(rows),
        *plan_table.notes(rows),
        sep="\n",
    )
    print(workdir / "plan.json", workdir / "plan.png", sep="\n")
    return 0


def training(config: ConfigDict, tpu_slice: Slice, workdir: epath.Path) -> list[dict]:
    """One row: the best that a search finds, or the config unchanged."""
    if config.plan.per_chip or not config.plan.search:
        return [train_row(config, tpu_slice, workdir)]
    batch = config.data.batch_size
    if batch % tpu_slice.chips:
        raise UserError(
            f"config.data.batch_size = {batch}: must be a multiple of the"
            f" {tpu_slice.chips} chips of {tpu_slice.name}; or set config.plan.per_chip"
        )
    sizes = sized(config, tpu_slice)
    rows: list[dict] = []
    # An estimate is an upper bound of the MFU: the search ends where it is below what a
    # compiled candidate reaches.
    for candidate, estimate in mesh_search.ordered(batch=batch, **sizes):
        best = max((row.get("mfu", 0.0) for row in rows), default=0.0)
        if len(rows) == config.plan.tries or estimate.mfu <= best:
            break
        keys = candidate.keys(batch, tpu_slice.chips)
        changed = config.copy_and_resolve_references()
        changed.update_from_flattened_dict(keys)
        row = train_row(changed, tpu_slice, workdir)
        recipe = " ".join(f"--config.{k}={v}" for k, v in keys.items())
        rows.append(row | {"recipe": recipe})
        log.info("%s: %s: %s", tpu_slice.name, recipe, row.get("mfu", row.get("needs")))
    return sorted(rows, key=lambda row: -row.get("mfu", 0.0))[:1]


def sized(config: ConfigDict, tpu_slice: Slice) -> dict:
    """The model, parameters and FLOPs, which a search needs without compiling."""
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    with compiled.on(mesh):
        train_program = build_program(config, mesh)
    params = tree.count(train_program.abstract.params)
    return dict(
        model=train_program.parts.denoiser,
        tpu_slice=tpu_slice,
        params=params,
        work=work_of(config, train_program.parts, tpu_slice),
        total=train_program.parts.flops,
    )


def work_of(
    config: ConfigDict, parts: model_parts.Parts, tpu_slice: Slice
) -> bounds.Work:
    h, w, _ = parts.shape
    return bounds.work_on(
        tpu_slice.generation,
        parts.denoiser,
        height=h,
        width=w,
        text=config.text.length,
        total=parts.flops,
    )


def train_row(
    config: ConfigDict, tpu_slice: Slice, workdir: epath.Path
) -> dict[str, Any]:
    mesh = sharding.make_mesh(**config.mesh, devices=aot.devices(tpu_slice))
    config = config.copy_and_resolve_references()
    if config.plan.per_chip:
        config.data.batch_size = config.plan.per_chip * tpu_slice.chips
        shards = sharding.batch_shards(mesh) * config.optim.accumulate
        if config.data.batch_size % shards:
            raise UserError(
                f"config.plan.per_chip = {config.plan.per_chip}: {tpu_slice.chips}"
                f" chips take {config.data.batch_size} images, which must be a multiple"
                f" of data x fsdp x accumulate = {shards}"
            )
    accumulate = config.optim.accumulate
    images = config.data.batch_size / tpu_slice.devices
    with compiled.on(mesh):
        train_program = build_program(config, mesh)
        sharding.local_rows(mesh, config.data.batch_size)
        # Abstract arguments with shardings: nothing is allocated, as there is no
        # device.
        key = jax.eval_shape(lambda: jax.random.key(0))
        placed = NamedSharding(mesh, PartitionSpec())
        key = jax.ShapeDtypeStruct(key.shape, key.dtype, sharding=placed)
        program = lambda: train_program.step.lower(
            train_program.abstract, key, abstract_batch(config, mesh), {}
        )
        model, work = (
            train_program.parts.denoiser,
            work_of(config, train_program.parts, tpu_slice),
        )
        again = mesh_search.AGAIN.get(model.remat, 0.0)
        head = model.width // model.num_heads
        compute = bounds.training(work, tpu_slice.generation, head=head, again=again)
        case = Case(
            "train",
            program,
            {k: v * images for k, v in compute._asdict().items()},
            # A backward pass has two products for each product of the forward pass.
            3 * train_program.parts.flops * images,
            images,
            tree.count(train_program.abstract.params),
        )
        row = planned(config, tpu_slice, mesh, case, workdir)
    # Every part of an accumulated batch gathers and scatters anew.
    least = accumulate * bounds.least_wire(
        case.parameters, mesh.shape["fsdp"], mesh.shape["data"]
    )
    if config.plan.per_chip:
        row["recipe"] = f"--config.data.batch_size={config.data.batch_size}"
    row["remat"] = model.remat
    row["batch"] = config.data.batch_size / accumulate / tpu_slice.chips
    if "needs" not in row and least:
        row["sent_over_least"] = sum(row["sent_bytes"].values()) / least
    return row


def planned(
    config, tpu_slice: Slice, mesh: Mesh, case: Case, workdir
) -> dict[str, Any]:
    """A program's row: the memory it needs, and what bounds its time."""
    mesh = case.mesh or mesh
    row = {
        "slice": tpu_slice.name,
        "program": case.name,
        "chips": tpu_slice.chips,
        "steps": case.turns,
        "context_attention": config.model.context_attention,
        "parameters": case.parameters,
        "billions": case.parameters / 1e9,
        "mesh": dict(mesh.shape),
        "spelt": " ".join(f"{k} {n}" for k, n in mesh.shape.items() if n > 1),
        "remat": "",
        "batch": case.images * tpu_slice.generation.devices,
        "capacity": tpu_slice.generation.hbm / slices.GB,
        "weights": case.weights,
        "forwards": case.forwards,
    }
    lowered = case.lower()
    try:
        executable = aot.compile(
            lowered, aot.flags(config.plan.flags, tpu_slice, config.plan.job)
        )
    except aot.TooLarge as error:
        return row | {"needs": str(error)}
    log.info("%s: %s compiled in %.0f s", tpu_slice.name, case.name, executable.seconds)
    if config.plan.hlo:
        name = f"plan-{tpu_slice.name}-{case.name}.hlo"
        write_whole(workdir / name, executable.text.encode())
    module = hlo.parse(executable.text)
    # In the mesh's order, which is that of the program's partitions.
    links = link_traffic.Links(tpu_slice, list(mesh.devices.flat))
    program = schedule.Schedule(
        module, tpu_slice.generation, mesh.shape, links, case.turns
    )
    account = program.run()
    return (
        row
        | executable.memory
        | accounted(account, case, tpu_slice, executable)
        | {"unknown": sorted(program.unknown)}
    )


def accounted(
    account: schedule.Account, case: Case, tpu_slice: Slice, executable: aot.Compiled
) -> dict[str, Any]:
    """The totals of a program's operations, in ms, bytes and shares of the peak."""
    chip = tpu_slice.generation
    # The decoder has no analytic FLOPs; those of its compiled program count.
    flops = case.flops or account.flops
    kinds = {name: 1e3 * x for name, x in account.by_kind.items() if x}
    floors = {name: 1e3 * x for name, x in bounds.floors(account, chip).items()}
    times = floors | {
        "compute": kinds.get("matmul", 0.0) + kinds.get("attention", 0.0),
        "scheduled": 1e3 * account.seconds,
    }
    # The largest of the floors bounds the run; they may all overlap at best.
    binds = max(floors, key=floors.get)
    least = times[binds] / 1e3
    # Model FLOPs, without recomputation: that is what MFU means.
    reached = flops / chip.peak / least
    rate = case.images * chip.devices / least
    forecast = bounds.FORECAST["train" if case.name == "train" else "sample"]
    sent: dict[str, float] = {}
    for (axes, _), size in account.wire.items():
        sent[axes] = sent.get(axes, 0.0) + size
    all_sent = max(account.sent + account.outside, 1)
    products = case.seconds or {"linear": flops / chip.peak}
    return times | {
        "verdict": bounds.verdict(executable.memory["peak"], chip.hbm / slices.GB),
        "seconds": round(executable.seconds, 1),
        "compiler": aot.compiler(),
        "flops": account.flops,
        "hbm_bytes": account.hbm,
        "tflop": flops * chip.devices / 1e12,
        "shares": kinds,
        "products": {name: 1e3 * x for name, x in products.items()},
        "sent_bytes": sent,
        "sent_between_slices": account.outside,
        "all_reduced": sum(
            size for (_, kind), size in account.wire.items() if kind == "all-reduce"
        ),
        "adaln_bytes": sum(
            size for source, size in account.sources.items() if "adaln" in source
        ),
        "overlapped": account.hidden / all_sent,
        "beside_matmuls": account.beside / all_sent,
        "mfu": reached,
        "mfu_scheduled": flops / chip.peak / account.seconds,
        "forecast_mfu": [share * reached for share in forecast],
        "rate": rate,
        "forecast_rate": [share * rate for share in forecast],
        "binds": bounds.FLOORS[binds],
    }


def sampled(config: ConfigDict, tpu_slice: Slice, workdir: epath.Path) -> list[dict]:
    """Rows of text encoders, denoising and decoder, with the peaks of the placement."""
    mesh = sharding.make_mesh(**config.mesh, devices=aot.devices(tpu_slice))
    per_chip = config.plan.per_chip
    most = per_chip * tpu_slice.chips if per_chip else config.sample.batch_size
    # As `sample` fills its batches.
    images = row_batches.batch_size(most, most, mesh, spread=True)
    with compiled.on(mesh):
        cases = [*sampling_programs.cases(config, tpu_slice, mesh, images)]
        rows = [planned(config, tpu_slice, mesh, case, workdir) for case in cases]
    weights = [case.weights for case in cases]
    return phase_memory.with_placements(rows, weights, config.sample.placement)


JOBS = {"train": training, "sample": sampled}
