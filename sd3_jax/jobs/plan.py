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

from sd3_jax import sharding, tree
from sd3_jax.errors import UserError
from sd3_jax.jobs import assemble, plan_sampling, train
from sd3_jax.metrics import write_whole
from sd3_jax.plan import aot, bounds, chart, hlo, search, slices
from sd3_jax.plan.aot import Case
from sd3_jax.plan.slices import Slice

log = logging.getLogger(__name__)
COLUMNS = {
    "slice": "slice",
    "program": "program",
    "billions": "params B",
    "spelt": "mesh",
    "remat": "remat",
    "batch": "batch/chip",
    "arguments": "args GB",
    "temporaries": "temp GB",
    "peak": "peak GB",
    "capacity": "of GB",
    "tflop_of_all": "TFLOP",
    "tflop": "TFLOP/chip",
    "compute": "compute ms",
    "memory": "HBM ms",
    "links": "links ms",
    "mfu": "bound MFU",
    "rate": "images/s/chip",
    "binds": "binds",
}
KNOWN = list(COLUMNS).index("batch") + 1  # columns of a row that does not fit, too
FLOORS = ("compute", "memory", "links")


def run(config: ConfigDict, workdir: epath.PathLike) -> int:
    """Prints a row a slice and program; leaves plan.json, plan.png, and the programs'
    text if asked, in workdir."""
    assemble.mmdit(config.model, "plan knows no other's bounds")
    tune = config.tune
    if tune.base or (tune.method, tune.objective) != ("full", "flow"):
        raise UserError(
            f'config.tune: base = "{tune.base}", method = "{tune.method}", objective ='
            f' "{tune.objective}": plan knows training from the start alone; wanted "",'
            ' "full", "flow"'
        )
    aot.prepare()
    workdir = epath.Path(workdir)
    workdir.mkdir(parents=True, exist_ok=True)
    rows = []
    for each in [slices.find(name) for name in config.plan.slices]:
        for row in JOBS[config.plan.job](config, each, workdir):
            rows.append(row)
            write_whole(workdir / "plan.json", json.dumps(rows, indent=2).encode())
    write_whole(workdir / "plan.png", chart.draw(rows))
    print(*table(rows), *map(told, rows), sep="\n")
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
    for candidate, estimate in search.ordered(batch=batch, **made):
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
        made = train.program(config, mesh)
    params = tree.count(made.abstract.params)
    return dict(
        model=made.parts.denoiser,
        each=each,
        params=params,
        work=work_of(config, made.parts, each),
        total=made.parts.flops,
    )


def work_of(config: ConfigDict, parts: assemble.Parts, each: Slice) -> bounds.Work:
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
    accumulate = config.optim.accumulate
    images = config.data.batch_size / each.devices
    with jax.set_mesh(mesh), nn.logical_axis_rules(sharding.RULES):
        made = train.program(config, mesh)
        sharding.local_rows(mesh, config.data.batch_size)
        key = jax.eval_shape(lambda: jax.random.key(0))
        placed = NamedSharding(mesh, PartitionSpec())
        key = jax.ShapeDtypeStruct(key.shape, key.dtype, sharding=placed)
        program = lambda: made.step.lower(
            made.abstract, key, train.example(config, mesh), {}
        )
        model, work = made.parts.denoiser, work_of(config, made.parts, each)
        again = search.AGAIN.get(model.remat, 0.0)
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
        made = aot.compile(lowered, aot.flags(config.plan.flags, each))
    except aot.TooLarge as error:
        return row | {"needs": str(error)}
    log.info("%s: %s compiled in %.0f s", each.name, case.name, made.seconds)
    if config.plan.hlo:
        name = f"plan-{each.name}-{case.name}.hlo"
        write_whole(workdir / name, made.text.encode())
    chip = each.generation
    flops = case.flops or made.flops
    seconds = case.seconds or {"linear": flops / chip.peak}
    found = hlo.collectives(made.text, mesh.shape)
    sent = bounds.wire(found)
    outside = "data" if each.slices > 1 else None
    links = {
        axes: 1e3 * n / (chip.slice_rate if axes == outside else chip.link_rate)
        for axes, n in sent.items()
    }
    times = {
        "compute": 1e3 * sum(seconds.values()),
        "memory": 1e3 * hlo.traffic(made.text) / chip.hbm_rate,
        "links": sum(links.values()),
    }
    binds = max(FLOORS, key=times.get)
    step = times[binds] / 1e3
    gathered = [x for x in found if x.kind in ("all-gather", "collective-permute")]
    beside = sum(x.total for x in gathered if x.asynchronous)
    row |= made.memory | times
    return row | {
        "seconds": round(made.seconds, 1),
        "tflop": flops * chip.devices / 1e12,
        "tflop_of_all": flops * each.devices / 1e12,
        "shares": {k: 1e3 * v for k, v in seconds.items()},
        "sent_bytes": sent,
        "links_by_axis": links,
        "all_reduced": sum(x.total for x in found if x.kind == "all-reduce"),
        "gathers_overlapped": beside / max(sum(x.total for x in gathered), 1),
        "mfu": flops / chip.peak / step,
        "rate": case.images * chip.devices / step,
        "binds": binds,
    }


def sampled(config: ConfigDict, each: Slice, workdir: epath.Path) -> list[dict]:
    """Three rows: the text encoders, all denoising steps, the autoencoder's decoder."""
    mesh = sharding.make_mesh(**config.mesh, devices=aot.devices(each))
    per_chip = config.plan.per_chip
    images = per_chip * each.chips if per_chip else config.sample.batch_size
    with jax.set_mesh(mesh), nn.logical_axis_rules(sharding.RULES):
        return [
            planned(config, each, mesh, case, workdir)
            for case in plan_sampling.cases(config, each, mesh, images)
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


def told(row: dict) -> str:
    """What a row's time is for, and the recipe's keys that a search found."""
    name = f"{row['slice']} {row['program']}"
    recipe = f"\n  {row['recipe']}" if "recipe" in row else ""
    if "needs" in row:
        return name + ": does not fit" + recipe
    shares = [f"{k} {v / row['compute']:.0%}" for k, v in row["shares"].items() if v]
    links = [f"{k} {v:.3g} ms" for k, v in row["links_by_axis"].items() if v > 0.005]
    beside = f"gathers overlapped {row['gathers_overlapped']:.0%}"
    return f"{name}: {', '.join([*shares, *links, beside])}{recipe}"


def shown(value) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)
