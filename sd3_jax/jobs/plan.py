"""What a run would be on TPU slices that are not there: its own step, compiled by the
TPU's own compiler for each."""

import json
import logging
import math
import os
import re
import time
from typing import Any

import jax
from etils import epath
from flax import linen as nn
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from sd3_jax import sharding
from sd3_jax.errors import UserError
from sd3_jax.jobs import train
from sd3_jax.metrics import write_whole
from sd3_jax.models import splash
from sd3_jax.plan import bounds, hlo, slices
from sd3_jax.plan.slices import Slice

log = logging.getLogger(__name__)
ENVIRONMENT = {  # before libtpu is loaded: there is no TPU to ask
    "TPU_SKIP_MDS_QUERY": "1",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_STDERR_LOG_LEVEL": "4",
    "TPU_MIN_LOG_LEVEL": "4",
}
AGAIN = {"attention": 1 / 3, "offload": 1 / 3, "full": 1.0}  # fc1 is 4 of 12 d^2
COLUMNS = {
    "slice": "slice",
    "batch": "batch/chip",
    "arguments": "args GB",
    "temporaries": "temp GB",
    "peak": "peak GB",
    "capacity": "of GB",
    "tflop": "TFLOP/chip",
    "compute": "compute ms",
    "links": "links ms",
    "mfu": "bound MFU",
    "rate": "images/s/chip",
    "binds": "binds",
}


def run(config: ConfigDict, workdir: epath.PathLike) -> int:
    """Prints a row a slice; writes workdir/plan.json, and plan-SLICE.hlo if asked."""
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    jax.config.update("jax_platforms", "cpu")
    workdir = epath.Path(workdir)
    workdir.mkdir(parents=True, exist_ok=True)
    found = [slices.find(name) for name in config.plan.slices]
    rows = [plan(config, each, workdir) for each in found]
    write_whole(workdir / "plan.json", json.dumps(rows, indent=2).encode())
    print(*table(rows), workdir / "plan.json", sep="\n")
    return 0


def plan(config: ConfigDict, each: Slice, workdir: epath.Path) -> dict[str, Any]:
    """A slice's row: what the compiled step needs, and what bounds it."""
    devices = topology(each)
    mesh = sharding.make_mesh(**config.mesh, devices=devices)
    config = config.copy_and_resolve_references()
    if config.plan.per_chip:
        config.data.batch_size = config.plan.per_chip * each.chips
    row = {
        "slice": each.name,
        "mesh": dict(mesh.shape),
        "batch": config.data.batch_size / each.chips,
        "capacity": each.generation.hbm / slices.GB,
    }
    with jax.set_mesh(mesh), nn.logical_axis_rules(sharding.RULES):
        made = train.program(config, mesh)
        begin = time.perf_counter()
        try:
            compiled = lowered(config, made, mesh).compile()
        except jax.errors.JaxRuntimeError as error:
            return row | {"needs": too_large(error)}
        row["seconds"] = round(time.perf_counter() - begin, 1)
    log.info("%s compiled in %.0f s", each.name, row["seconds"])
    text = compiled.as_text()
    if config.plan.hlo:
        write_whole(workdir / f"plan-{each.name}.hlo", text.encode())
    return row | memory(compiled) | floors(config, made, each, mesh, text)


def topology(each: Slice):
    try:
        return topologies.get_topology_desc(
            platform="tpu", topology_name=each.topology
        ).devices
    except Exception as error:
        reason = str(error).splitlines()[0][:200]
        raise UserError(
            f"no TPU compiler for {each.topology} ({reason}); wanted pip install libtpu"
        ) from None


def lowered(config: ConfigDict, made: train.Program, mesh: Mesh):
    key = jax.eval_shape(lambda: jax.random.key(0))
    placed = NamedSharding(mesh, PartitionSpec())
    key = jax.ShapeDtypeStruct(key.shape, key.dtype, sharding=placed)
    return made.step.lower(made.abstract, key, train.example(config, mesh), {})


def too_large(error: Exception) -> str:
    """As the compiler tells it: "21.30G of 15.75G"."""
    size = r"([\d.]+[KMGT])"
    forms = rf"\({size}\) exceeds available HBM \({size}\)", rf"Used {size} of {size}"
    told = next(filter(None, (re.search(form, str(error)) for form in forms)), None)
    if told is None:
        raise error
    return f"{told[1]} of {told[2]}"


def memory(compiled) -> dict[str, float]:
    """GB of a device."""
    m = compiled.memory_analysis()
    sizes = {
        "arguments": m.argument_size_in_bytes,
        "temporaries": m.temp_size_in_bytes,
        "peak": m.argument_size_in_bytes
        + m.temp_size_in_bytes
        + m.output_size_in_bytes
        - m.alias_size_in_bytes
        + m.generated_code_size_in_bytes,
    }
    return {name: size / slices.GB for name, size in sizes.items()}


def floors(config, made: train.Program, each: Slice, mesh: Mesh, text: str) -> dict:
    """What a step takes at least, in ms, and which of it binds."""
    model, chip = made.parts.denoiser, each.generation
    h, w, _ = made.parts.shape
    tokens, words = h * w // model.patch**2, config.text.length
    total = made.parts.flops
    both = tokens + words
    size = splash.block(both, splash.MOST[chip.kind])
    padded = -(-both // size) * size
    work = bounds.work(model, tokens=tokens, text=words, padded=padded, total=total)
    images = config.data.batch_size / each.devices
    again = AGAIN.get(model.remat, 0.0)
    head = model.width // model.num_heads
    compute = bounds.compute(work, chip, head=head, again=again)
    found = hlo.collectives(text, mesh.shape)
    sent = bounds.wire(found)
    params = sum(math.prod(x.shape) for x in jax.tree.leaves(made.abstract.params))
    copies = mesh.shape["data"]
    least = bounds.least_wire(params, mesh.shape["fsdp"], copies)
    times = {
        "compute": 1e3 * images * compute.total,
        "links": 1e3 * sum(sent.values()) / chip.link_rate,
    }
    binds = max(times, key=times.get)
    step = times[binds] / 1e3
    return {
        "parameters": params,
        "tflop": 3 * total * images * chip.devices / 1e12,
        **times,
        "shares": {k: v * images * 1e3 for k, v in compute._asdict().items()},
        "sent_bytes": sent,
        "sent_over_least": sum(sent.values()) / least if least else None,
        "mfu": 3 * total * images / chip.peak / step,
        "rate": images * chip.devices / step,
        "binds": binds,
    }


def table(rows: list[dict]) -> list[str]:
    cells = [list(COLUMNS.values())]
    for row in rows:
        if "needs" in row:
            told = f"does not fit: needs {row['needs']} HBM"
            cells.append([row["slice"], f"{row['batch']:g}", told])
        else:
            cells.append([shown(row[name]) for name in COLUMNS])
    columns = [[row[i] for row in cells if len(row) > 3] for i in range(len(COLUMNS))]
    wide = [max(map(len, column)) for column in columns]
    return ["  ".join(f"{cell:>{n}}" for cell, n in zip(row, wide)) for row in cells]


def shown(value) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)
