"""What a run would be on TPU slices that are not there: its own programs, compiled by
the TPU's own compiler for each."""

import json
import logging
from typing import Any

import jax
from etils import epath
from flax import linen as nn
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from sd3_jax import tree
from sd3_jax.assembly import model_parts
from sd3_jax.distributed import sharding
from sd3_jax.errors import UserError
from sd3_jax.files import write_whole
from sd3_jax.sampling import sampler
from sd3_jax.tools.plan import (
    aot,
    bounds,
    hlo,
    link_traffic,
    mesh_search,
    plan_chart,
    sampling_programs,
    schedule,
    slices,
)
from sd3_jax.tools.plan.aot import Case
from sd3_jax.tools.plan.slices import Slice
from sd3_jax.training.program import abstract_batch, build_program

log = logging.getLogger(__name__)
COLUMNS = {
    "slice": "slice",
    "program": "program",
    "billions": "params B",
    "spelt": "mesh",
    "remat": "remat",
    "batch": "images/chip",
    "peak": "peak GiB",
    "capacity": "of GiB",
    "verdict": "memory",
    "compute": "matmul ms",
    "serial": "serial ms",
    "memory": "HBM ms",
    "links": "ICI ms",
    "other_slices": "DCN ms",
    "scheduled": "scheduled ms",
    "binds": "binds",
    "mfu": "bound MFU",
    "mfu_scheduled": "scheduled MFU",
    "forecast_mfu": "forecast MFU",
    "rate": "bound images/s/chip",
    "forecast_rate": "forecast images/s/chip",
}
KNOWN = list(COLUMNS).index("batch") + 1  # columns of a row that does not fit, too
FLOORS = {"serial": "serial", "memory": "HBM", "links": "ICI", "other_slices": "DCN"}


def run(config: ConfigDict, workdir: epath.PathLike) -> int:
    """Prints a row a slice and program; leaves plan.json, plan.png, and the programs'
    text if asked, in workdir."""
    model_parts.mmdit(config.model, "plan knows no other's bounds")
    tune = config.tune
    if tune.base or (tune.method, tune.objective) != ("full", "flow"):
        raise UserError(
            f'config.tune: base = "{tune.base}", method = "{tune.method}", objective ='
            f' "{tune.objective}": plan knows training from the start alone; wanted "",'
            ' "full", "flow"'
        )
    aot.prepare()
    aot.compiler()
    planned_for = [slices.find(name) for name in config.plan.slices]
    for each in planned_for:  # mistakes first, for a compilation takes minutes
        aot.flags(config.plan.flags, each, config.plan.job)
    workdir = epath.Path(workdir)
    workdir.mkdir(parents=True, exist_ok=True)
    rows = []
    for each in planned_for:
        for row in JOBS[config.plan.job](config, each, workdir):
            rows.append(row)
            write_whole(workdir / "plan.json", json.dumps(rows, indent=2).encode())
    write_whole(workdir / "plan.png", plan_chart.draw(rows))
    print(*table(rows), *map(details, rows), *notes(rows), sep="\n")
    print(workdir / "plan.json", workdir / "plan.png", sep="\n")
    return 0


def training(config: ConfigDict, each: Slice, workdir: epath.Path) -> list[dict]:
    """One row: of the best that a search finds, or of the config as it is."""
    if config.plan.per_chip or not config.plan.search:
        return [train_row(config, each, workdir)]
    batch = config.data.batch_size
    if batch % each.chips:
        raise UserError(
            f"config.data.batch_size = {batch}: wanted a multiple of the {each.chips}"
            f" chips of {each.name}, or config.plan.per_chip"
        )
    made = sized(config, each)
    rows: list[dict] = []
    for candidate, estimate in mesh_search.ordered(batch=batch, **made):
        best = max((row.get("mfu", 0.0) for row in rows), default=0.0)
        if len(rows) == config.plan.tries or estimate.mfu <= best:
            break
        keys = candidate.keys(batch, each.chips)
        changed = config.copy_and_resolve_references()
        changed.update_from_flattened_dict(keys)
        row = train_row(changed, each, workdir)
        recipe = " ".join(f"--config.{k}={v}" for k, v in keys.items())
        rows.append(row | {"recipe": recipe})
        log.info("%s: %s: %s", each.name, recipe, row.get("mfu", row.get("needs")))
    return sorted(rows, key=lambda row: -row.get("mfu", 0.0))[:1]


def sized(config: ConfigDict, each: Slice) -> dict:
    """What a search knows without compiling anything."""
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    with jax.set_mesh(mesh), nn.logical_axis_rules(sharding.RULES):
        made = build_program(config, mesh)
    params = tree.count(made.abstract.params)
    return dict(
        model=made.parts.denoiser,
        each=each,
        params=params,
        work=work_of(config, made.parts, each),
        total=made.parts.flops,
    )


def work_of(config: ConfigDict, parts: model_parts.Parts, each: Slice) -> bounds.Work:
    h, w, _ = parts.shape
    return bounds.work_on(
        each.generation,
        parts.denoiser,
        height=h,
        width=w,
        text=config.text.length,
        total=parts.flops,
    )


def train_row(config: ConfigDict, each: Slice, workdir: epath.Path) -> dict[str, Any]:
    mesh = sharding.make_mesh(**config.mesh, devices=aot.devices(each))
    config = config.copy_and_resolve_references()
    if config.plan.per_chip:
        config.data.batch_size = config.plan.per_chip * each.chips
        shards = sharding.batch_shards(mesh) * config.optim.accumulate
        if config.data.batch_size % shards:
            raise UserError(
                f"config.plan.per_chip = {config.plan.per_chip}: {each.chips} chips"
                f" take {config.data.batch_size} images; wanted a multiple of data x"
                f" fsdp x accumulate = {shards}"
            )
    accumulate = config.optim.accumulate
    images = config.data.batch_size / each.devices
    with jax.set_mesh(mesh), nn.logical_axis_rules(sharding.RULES):
        made = build_program(config, mesh)
        sharding.local_rows(mesh, config.data.batch_size)
        key = jax.eval_shape(lambda: jax.random.key(0))
        placed = NamedSharding(mesh, PartitionSpec())
        key = jax.ShapeDtypeStruct(key.shape, key.dtype, sharding=placed)
        program = lambda: made.step.lower(
            made.abstract, key, abstract_batch(config, mesh), {}
        )
        model, work = made.parts.denoiser, work_of(config, made.parts, each)
        again = mesh_search.AGAIN.get(model.remat, 0.0)
        head = model.width // model.num_heads
        compute = bounds.training(work, each.generation, head=head, again=again)
        case = Case(
            "train",
            program,
            {k: v * images for k, v in compute._asdict().items()},
            3 * made.parts.flops * images,
            images,
            tree.count(made.abstract.params),
        )
        row = planned(config, each, mesh, case, workdir)
    # Every part of an accumulated batch gathers and scatters anew.
    least = accumulate * bounds.least_wire(
        case.parameters, mesh.shape["fsdp"], mesh.shape["data"]
    )
    if config.plan.per_chip:
        row["recipe"] = f"--config.data.batch_size={config.data.batch_size}"
    row["remat"] = model.remat
    row["batch"] = config.data.batch_size / accumulate / each.chips
    if "needs" not in row and least:
        row["sent_over_least"] = sum(row["sent_bytes"].values()) / least
    return row


def planned(config, each: Slice, mesh: Mesh, case: Case, workdir) -> dict[str, Any]:
    """A program's row: what it needs, and what bounds it."""
    row = {
        "slice": each.name,
        "program": case.name,
        "parameters": case.parameters,
        "billions": case.parameters / 1e9,
        "mesh": dict(mesh.shape),
        "spelt": " ".join(f"{k} {n}" for k, n in mesh.shape.items() if n > 1),
        "remat": "",
        "batch": case.images * each.generation.devices,
        "capacity": each.generation.hbm / slices.GB,
    }
    lowered = case.lower()
    try:
        made = aot.compile(lowered, aot.flags(config.plan.flags, each, config.plan.job))
    except aot.TooLarge as error:
        return row | {"needs": str(error)}
    log.info("%s: %s compiled in %.0f s", each.name, case.name, made.seconds)
    if config.plan.hlo:
        name = f"plan-{each.name}-{case.name}.hlo"
        write_whole(workdir / name, made.text.encode())
    module = hlo.parse(made.text)
    links = link_traffic.Links(each, list(mesh.devices.flat))
    program = schedule.Schedule(module, each.generation, mesh.shape, links, usual)
    account = program.run()
    return (
        row
        | made.memory
        | accounted(account, case, each, made)
        | {"unknown": sorted(program.unknown)}
    )


def usual(x: hlo.Instruction, lengths: dict[str, int]) -> str:
    """The branch that most steps take: all but the average's, which acts now and then,
    and but for a step that is not finite, which changes nothing."""
    choose = min if "/ema/" in x.source else max
    return choose(lengths, key=lengths.get)


def accounted(
    account: schedule.Account, case: Case, each: Slice, made: aot.Compiled
) -> dict[str, Any]:
    """What a program's operations add up to, in ms, bytes and shares of the peak."""
    chip = each.generation
    flops = case.flops or account.flops
    waits = [account.by_kind[kind] for kind in schedule.WAITS.values()]
    kinds = {name: 1e3 * x for name, x in account.by_kind.items() if x}
    times = {
        "compute": kinds.get("matmul", 0.0) + kinds.get("attention", 0.0),
        "memory": 1e3 * account.hbm / chip.hbm_rate,
        "serial": 1e3 * (account.seconds - sum(waits)),
        "links": 1e3 * account.links["ici"],
        "other_slices": 1e3 * account.links["dcn"],
        "scheduled": 1e3 * account.seconds,
    }
    binds = max(FLOORS, key=times.get)
    least = times[binds] / 1e3
    reached = flops / chip.peak / least
    rate = case.images * chip.devices / least
    forecast = bounds.FORECAST["train" if case.name == "train" else "sample"]
    sent: dict[str, float] = {}
    for (axes, _), size in account.wire.items():
        sent[axes] = sent.get(axes, 0.0) + size
    all_sent = max(account.sent + account.outside, 1)
    products = case.seconds or {"linear": flops / chip.peak}
    return times | {
        "verdict": bounds.verdict(made.memory["peak"], chip.hbm / slices.GB),
        "seconds": round(made.seconds, 1),
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
        "binds": FLOORS[binds],
    }


def sampled(config: ConfigDict, each: Slice, workdir: epath.Path) -> list[dict]:
    """Three rows: the text encoders, all denoising steps, the autoencoder's decoder."""
    mesh = sharding.make_mesh(**config.mesh, devices=aot.devices(each))
    per_chip = config.plan.per_chip
    most = per_chip * each.chips if per_chip else config.sample.batch_size
    images = sampler.batch_size(most, most, mesh)  # as `sample` fills its batches
    with jax.set_mesh(mesh), nn.logical_axis_rules(sharding.RULES):
        return [
            planned(config, each, mesh, case, workdir)
            for case in sampling_programs.cases(config, each, mesh, images)
        ]


JOBS = {"train": training, "sample": sampled}


def table(rows: list[dict]) -> list[str]:
    cells = [list(COLUMNS.values())]
    for row in rows:
        if "needs" in row:
            cells.append([shown(row[name]) for name in list(COLUMNS)[:KNOWN]])
            cells[-1].append(f"does not fit: needs {row['needs']} HBM")
        else:
            cells.append([shown(row[name]) for name in COLUMNS])
    whole = [row for row in cells if len(row) == len(COLUMNS)]
    wide = [
        max(len(row[i]) for row in (cells if i < KNOWN else whole))
        for i in range(len(COLUMNS))
    ]
    return ["  ".join(f"{cell:>{n}}" for cell, n in zip(row, wide)) for row in cells]


def details(row: dict) -> str:
    """What a row's time is for, and the recipe's keys that a search found."""
    name = f"{row['slice']} {row['program']}"
    recipe = f"\n  {row['recipe']}" if "recipe" in row else ""
    if "needs" in row:
        return name + ": does not fit" + recipe
    total = row["scheduled"]
    shares = [
        f"{k} {v / total:.0%}" for k, v in row["shares"].items() if v > 5e-3 * total
    ]
    sent = [f"{axes} {size / 1e9:.3g} GB" for axes, size in row["sent_bytes"].items()]
    if row["sent_between_slices"]:
        sent.append(f"between slices {row['sent_between_slices'] / 1e9:.3g} GB")
    overlapped, beside = row["overlapped"], row["beside_matmuls"]
    lines = [
        f"{name}: scheduled {total:.4g} ms: {', '.join(shares)}",
        f"sends {', '.join(sent) or 'nothing'}; {overlapped:.0%} overlapped,"
        f" {beside:.0%} beside matmuls",
    ]
    if row["unknown"]:
        names = ", ".join(row["unknown"][:3])
        lines.append(
            f"not counted ({len(row['unknown'])}): {names}: all times are more"
        )
    return "\n  ".join(lines) + recipe


def notes(rows: list[dict]) -> list[str]:
    """What the figures are, and of which compiler."""
    jobs = {"train" if row["program"] == "train" else "sample" for row in rows}
    reach = [shown(list(bounds.FORECAST[job])) for job in sorted(jobs)]
    lines = [
        f"bound: no run is faster. forecast: {', '.join(reach)} x bound, which"
        " published runs reach. Nothing was measured.",
        f"compiled by {aot.compiler()}: other versions make other programs",
    ]
    for name in dict.fromkeys(row["slice"] for row in rows):
        if (cloud := slices.cloud_name(name)).startswith(slices.LITEPOD[0]):
            lines.append(f"{name}: {cloud} to gcloud and in launch/'s ACCELERATOR_TYPE")
    if any(row.get("verdict") == "tight" for row in rows):
        lines.append(
            f"tight: more than {bounds.TIGHT:.0%} of HBM by the compiler's count"
        )
    return lines


def shown(value) -> str:
    if isinstance(value, list):
        return "-".join(dict.fromkeys(f"{x:.3g}" for x in value))
    return f"{value:.3g}" if isinstance(value, float) else str(value)
