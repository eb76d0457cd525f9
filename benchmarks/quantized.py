"""Products of eight bits: bounds on TPUs, errors by layer, and pictures.

    python benchmarks/quantized.py [bounds] [layers] [pictures]     # default: all

Writes the tables in benchmarks/quantized.md, of the parts that were run; their rows are
in runs/quantized too. `bounds` compiles for TPUs that are not there (libtpu), one to
two minutes a row. `pictures` trains configs/quickstart.py unless runs/quantized has it.
Each part is a process of its own.
"""

import json
import subprocess
import sys
import time
from pathlib import Path

import page_tables

HERE = Path(__file__).parent
RUNS = HERE.parent / "runs" / "quantized"
KINDS = "", "int8", "fp8", "int8_dynamic", "fp8_dynamic"
LARGE, MEDIUM = "sd35_large", "sd35_medium"
# One picture on eight chips: two halves of guidance, four chips for the tokens of each
# (benchmarks/latency.md). Eight pictures: a chip each.
OVER_TOKENS = {"data": 2, "context": 4, "fsdp": 1}
PROGRAMS = [  # model, slice, images at once, keys of the mesh
    (LARGE, "v5e-1", 1, {}),
    (LARGE, "v6e-1", 1, {}),
    (LARGE, "v6e-8", 8, {}),
    (LARGE, "v6e-1", 8, {}),
    (MEDIUM, "v5e-1", 1, {}),
    (MEDIUM, "v6e-1", 1, {}),
    (LARGE, "v5e-1", 8, {}),
    (LARGE, "v6e-8", 1, OVER_TOKENS),
    (MEDIUM, "v6e-8", 8, {}),
    (MEDIUM, "v5e-1", 8, {}),
    (MEDIUM, "v6e-1", 8, {}),
    (MEDIUM, "v6e-8", 1, OVER_TOKENS),
]


def main(words: list[str]) -> None:
    RUNS.mkdir(parents=True, exist_ok=True)
    for name in words or PARTS:
        script = [sys.executable, __file__, "--part", name]
        subprocess.run(
            script, check=True, cwd=HERE.parent, env=page_tables.environment()
        )
        write(HERE / "quantized.md", name)


# --- bounds


def bounds() -> list[list]:
    """Of the denoising loop with guidance at 1024 px, as compiled for each slice."""
    from sd3_jax.tools.plan import aot

    aot.prepare()
    path = RUNS / "bounds_planned.json"
    planned = json.loads(path.read_text()) if path.exists() else {}
    rows = []
    for model, name, images, mesh in PROGRAMS:
        plain = None
        for kind in ("", "int8_dynamic"):
            title = f"{model}, {name}, batch {images}, {kind}"
            if title not in planned:  # an interrupted run goes on
                planned[title] = plan(model, name, images, mesh, kind)
                path.write_text(json.dumps(planned, indent=1))
                print(title, {k: planned[title].get(k) for k in SHOWN}, flush=True)
            row = planned[title]
            plain = plain or row["step_ms"]
            rows.append([model, name, str(images), kind or "bfloat16", *cells(row)])
            rows[-1].append(f"{plain / row['step_ms']:.2f}")
    return rows


SHOWN = ("step_ms", "linear_ms", "attention_ms", "needs", "peak", "seconds")


def cells(row: dict) -> list[str]:
    memory = row.get("needs") or f"{row['peak']:.1f} GiB"
    times = [f"{row[k]:.4g}" for k in ("linear_ms", "attention_ms", "step_ms")]
    return [memory, *times, f"{row['picture_s']:.3g}"]


def plan(model: str, name: str, images: int, mesh: dict, kind: str) -> dict:
    """A program's bound; of one that does not fit, extrapolated from fewer blocks."""
    row = compiled(model, name, images, mesh, kind)
    if "needs" not in row:
        return row
    # Each block costs the same, so that two depths give all others.
    dual = 13 if model == "sd35_medium" else 0
    depths = 38 if dual == 0 else 24, dual + 3, dual + 7
    whole, few, more = depths
    rows = [compiled(model, name, images, mesh, kind, depth) for depth in (few, more)]
    grown = lambda k: rows[0][k] + (rows[1][k] - rows[0][k]) * (whole - few) / 4
    times = [k for k in rows[0] if k.endswith(("_ms", "_s"))]
    return {k: grown(k) for k in times} | {"needs": row["needs"]}


def compiled(model, name, images, mesh_keys, kind, depth=0) -> dict:
    from configs import released
    from sd3_jax.distributed import sharding
    from sd3_jax.jobs import plan as job
    from sd3_jax.sampling import compiled as programs
    from sd3_jax.tools.plan import aot, sampling_programs, slices

    config = released.get_config(model)
    config.plan.update(job="sample", hlo=True)
    config.mesh.update(mesh_keys)
    config.quantize.denoiser = kind
    config.model.context_attention = "auto"
    config.model.depth = depth or config.model.depth
    tpu_slice = slices.find(name)
    mesh = sharding.make_mesh(**config.mesh, devices=aot.devices(tpu_slice))
    with programs.on(mesh):
        share = images / tpu_slice.devices
        steering = sampling_programs.guidance(config)
        args = config, tpu_slice, mesh, images, steering, share
        case = sampling_programs.denoise(*args)
        row = job.planned(config, tpu_slice, mesh, case, RUNS)
    if "needs" in row:
        return {"needs": row["needs"]}
    # The largest floor, over the steps; the forecast is another matter.
    least = max(row[floor] for floor in ("serial", "hbm", "links", "other_slices"))
    steps = config.sample.steps
    by_kind = {k: row["shares"].get(k, 0.0) for k in ("matmul", "attention")}
    return {
        "step_ms": least / steps,
        "linear_ms": by_kind["matmul"] / steps,
        "attention_ms": by_kind["attention"] / steps,
        "picture_s": least / 1e3 / images,
        "peak": row["peak"],
        "seconds": row["seconds"],
        "shares": row["shares"],
        "unknown": row["unknown"],
        "products": row["products"],
    }


# --- errors by layer


def layers() -> list[list]:
    """Of the image's stream after each block of MMDiT-X, against float32's.

    A block's own error is that of what it adds, on inputs without error.
    """
    import jax
    import jax.numpy as jnp

    from sd3_jax.models.mmdit import Block

    keys = jax.random.split(jax.random.key(0), 4)
    sizes = dict(width=1536, num_heads=24, dtype=jnp.float32)
    streams = (
        jax.random.normal(keys[0], (1, 256, 1536)),
        jax.random.normal(keys[1], (1, 154, 1536)),
    )
    c = jax.nn.silu(jax.random.normal(keys[2], (1, 1536)))
    block = {dual: Block(dual=dual, **sizes) for dual in (True, False)}

    def run(module, streams):
        return module(streams, module.modulations(c))

    def step(dual, dtype):
        module = block[dual].clone(dtype=dtype)
        cast = lambda x: x.astype(dtype)
        return jax.jit(
            lambda params, streams: module.apply(
                {"params": params}, jax.tree.map(cast, streams), method=run
            )
        )

    plan = [True, True, True, False, False, False]
    weights = [drawn(block[d], run, streams, i) for i, d in enumerate(plan)]
    norm = lambda x: float(jnp.linalg.norm(x.astype(jnp.float32)))
    columns, total, inputs = {}, {}, [streams]
    exact = {dual: step(dual, jnp.float32) for dual in (True, False)}
    for dual, params in zip(plan, weights):
        inputs.append(exact[dual](params, inputs[-1]))
    for kind in ("bfloat16", *KINDS[1:]):
        dtype = jnp.bfloat16 if kind == "bfloat16" else jnp.float32
        steps = {dual: step(dual, dtype) for dual in (True, False)}
        x, cells = streams, []
        for i, (dual, params) in enumerate(zip(plan, weights)):
            params = rounded(params, kind)
            alone = steps[dual](params, inputs[i])[0] - inputs[i + 1][0]
            x = steps[dual](params, x)
            own = norm(alone) / norm(inputs[i + 1][0] - inputs[i][0])
            after = norm(x[0] - inputs[i + 1][0]) / norm(inputs[i + 1][0])
            cells.append(f"{100 * own:.2f} / {100 * after:.2f} %")
        total[kind] = costs(steps[False], rounded(weights[-1], kind), inputs[-2])
        columns[kind] = cells
        print(kind, cells, total[kind], flush=True)
    names = [f"{i + 1}{', dual' if dual else ''}" for i, dual in enumerate(plan)]
    rows = [[name, *(columns[k][i] for k in columns)] for i, name in enumerate(names)]
    for label, i in ("MB of a block", 0), ("CPU ms of a block", 1):
        rows.append([label, *(f"{total[kind][i]:.0f}" for kind in columns)])
    return rows


def drawn(module, run, streams, number: int) -> dict:
    """Weights of deviation 0.03 (adaLN's too, which are zero at birth), norms of 1."""
    import jax

    from sd3_jax import tree

    key = jax.random.key(number)
    shapes = jax.eval_shape(lambda: module.init(key, streams, method=run))["params"]
    leaves, treedef = jax.tree.flatten(tree.unbox(shapes))
    keys = jax.random.split(key, len(leaves))
    normal = lambda k, x: 0.03 * jax.random.normal(k, x.shape)
    filled = [normal(k, x) + (x.shape == (64,)) for k, x in zip(keys, leaves)]
    return jax.tree.unflatten(treedef, filled)


def rounded(params: dict, kind: str) -> dict:
    import jax
    import jax.numpy as jnp

    from sd3_jax.params import quantization

    if kind == "bfloat16":
        return jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
    return quantization.quantized({"block": params}, kind)["block"] if kind else params


def costs(step, params: dict, streams) -> tuple[float, float]:
    """MB of a block's parameters, floats as bfloat16, and ms of a call on this CPU, the
    least of five."""
    import jax

    leaves = jax.tree.leaves(params)
    size = sum(x.size * min(2, x.dtype.itemsize) for x in leaves) / 1e6
    times = []
    for _ in range(5):
        begin = time.perf_counter()
        jax.block_until_ready(step(params, streams))
        times.append(1e3 * (time.perf_counter() - begin))
    return size, min(times)


# --- pictures


def pictures() -> list[list]:
    """Scores, losses and pictures of one run of quickstart in each precision."""
    import numpy as np

    from sd3_jax import main as cli
    from sd3_jax import pictures as sheets

    workdir = RUNS / "quickstart"
    flags = ["--config=configs/quickstart.py", f"--workdir={workdir}"]
    if not (workdir / "checkpoints" / "1200").exists():
        assert cli.main(["train", *flags]) == 0
    rows, shown, exact = [], [], None
    for kind in ("float32", "bfloat16", *KINDS[1:]):
        dtype = "bfloat16" if kind == "bfloat16" else "float32"
        eight = kind if kind in KINDS else ""
        own = f"--config.model.dtype={dtype}", f"--config.quantize.denoiser={eight}"
        assert cli.main(["evaluate", *flags, *own]) == 0
        scores = json.loads((workdir / "scores.json").read_text())
        images, velocity, seconds = painted(workdir, dtype, eight)
        exact = exact or (images.astype(float), velocity)
        off = np.linalg.norm(velocity - exact[1]) / np.linalg.norm(exact[1])
        square = np.square(images - exact[0]).mean((1, 2, 3))
        psnr = 10 * np.log10(255**2 / np.maximum(square, 1e-9))
        cells = [f"{100 * x['score']:.1f} %" for x in scores["scores"]]
        cells += [f"{scores['val_loss']['loss']:.4f}", f"{100 * off:.2f} %"]
        same = "" if square.any() else "the same"
        cells += [same or f"{np.median(psnr):.1f} / {psnr.min():.1f}", f"{seconds:.1f}"]
        rows.append([kind, *cells])
        shown.extend(sheets.enlarged(x) for x in images[:8])
        print(rows[-1], flush=True)
    sheets.save_png(
        sheets.grid(np.stack([np.asarray(x) for x in shown]), columns=8),
        HERE / "quantized.png",
    )
    return rows


def painted(workdir: Path, dtype: str, kind: str):
    """Pictures of all prompts, velocities at 64 times, and a call's seconds."""
    import jax
    import numpy as np
    from flax import linen as nn

    from configs import quickstart
    from sd3_jax.assembly import model_parts
    from sd3_jax.distributed import sharding
    from sd3_jax.sampling.job.sampler import TrainedSampler

    config, mesh = quickstart.get_config(), sharding.make_mesh()
    config.quantize.denoiser, config.model.dtype = kind, dtype
    parts, captions = model_parts.build_parts(config), config.train.prompts
    draw = np.random.default_rng(0).standard_normal
    sizes = parts.shape, (4, config.model.context_dim), (config.model.pooled_dim,)
    xt, *cond = (draw((64, *size), np.float32) for size in sizes)
    args = xt, np.linspace(0.02, 0.98, 64, dtype=np.float32), *cond
    with jax.set_mesh(mesh), nn.logical_axis_rules(sharding.RULES):
        params, _ = model_parts.trained_params(config, parts, str(workdir), mesh)
        run = jax.jit(lambda p: parts.denoiser.apply({"params": p}, *args))
        velocity = np.asarray(run(params["denoiser"]))
        paint = TrainedSampler(config, parts, mesh)
        paint(params, captions, range(len(captions)))
        begin = time.perf_counter()
        images = np.asarray(paint(params, captions, range(len(captions))))
    return images, velocity, time.perf_counter() - begin


PARTS = {"bounds": bounds, "layers": layers, "pictures": pictures}
HEADS = {
    "layers": "block, bfloat16, int8, fp8, int8_dynamic, fp8_dynamic",
    "pictures": "eight bits, single digits, their variety, scorer on real scans,"
    " validation loss, velocity off, PSNR dB median / least, CPU s",
    "bounds": "model, slice, batch, products, memory, linear ms, attention ms,"
    " bound ms a step, bound s a picture, times bfloat16",
}


def write(path: Path, name: str) -> None:
    """The part's table into its place."""
    rows = json.loads((RUNS / f"{name}.json").read_text())
    page_tables.fill(path, name, page_tables.table(HEADS[name].split(", "), rows))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--part"]:
        rows = PARTS[sys.argv[2]]()
        (RUNS / f"{sys.argv[2]}.json").write_text(json.dumps(rows))
    else:
        main(sys.argv[1:])
