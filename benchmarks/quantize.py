"""Eight bits for the blocks' matrices: errors, memory, and loading.

    python benchmarks/quantize.py [error] [memory] [load]     # default: all

Writes the tables in benchmarks/quantize.md, of the parts that were run; what was found
is in runs/quantize too. `memory` compiles for a TPU that is not there (libtpu), `load`
takes 4.2 GB of disk. Each is a process of its own. benchmarks/quantized.py has
products of eight bits, and pictures.
"""

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import page_tables

HERE = Path(__file__).parent
RUNS = HERE.parent / "runs" / "quantize"
KINDS = "", "int8", "fp8"
# MMDiT's matrices of more than eight bits, all layers of them together.
STACK = r"(bf16|f32)\[23,(1536|6144|24),[\d,]*(1536|64|6144)\]"
NAMES = {"": "none", "int8": "int8", "fp8": "fp8"}


def main(words: list[str]) -> None:
    RUNS.mkdir(parents=True, exist_ok=True)
    for name in words or PARTS:
        script = [sys.executable, __file__, "--part", name]
        subprocess.run(
            script, check=True, cwd=HERE.parent, env=page_tables.environment()
        )
        write(HERE / "quantize.md", name)


def error() -> list[list]:
    """Of the velocity, of random weights, against float32's without rounding."""
    import jax
    import jax.numpy as jnp

    from sd3_jax import tree
    from sd3_jax.models.mmdit import MMDiT
    from sd3_jax.models.t5 import T5Encoder
    from sd3_jax.params import quantization

    keys = jax.random.split(jax.random.key(0), 6)
    given = (
        jax.random.normal(keys[0], (4, 32, 32, 16)),
        jnp.array([0.1, 0.4, 0.7, 0.95]),
        jax.random.normal(keys[1], (4, 154, 1024)),
        jax.random.normal(keys[2], (4, 512)),
    )
    sizes = dict(depth=8, width=512, num_heads=8, pos_size=32, pos_base=16)
    mmdit = lambda dtype: MMDiT(**sizes, dtype=dtype, remat="none")
    t5 = lambda dtype: T5Encoder(4096, 8, 512, 8, 64, 1280, dtype=dtype)
    ids = (jax.random.randint(keys[3], (4, 77), 0, 4096),)

    def row(name, model, args, made):
        run = lambda dtype: jax.jit(
            lambda p: model(dtype).apply({"params": p}, *args).astype(jnp.float32)
        )
        wanted = run(jnp.float32)(made)
        cells = []
        for dtype in jnp.float32, jnp.bfloat16:
            velocity = run(dtype)
            for kind in KINDS:
                own = quantization.quantized(made, kind) if kind else made
                found = velocity(own)
                off = jnp.linalg.norm(found - wanted) / jnp.linalg.norm(wanted)
                cells.append(f"{100 * float(off):.2f} %" if off else "0")
        return [name, *cells]

    def weights(model, args, std=None):
        """Drawn anew with this deviation, norms and biases about what they were."""
        made = tree.unbox(jax.jit(model(jnp.float32).init)(keys[4], *args)["params"])
        leaves, treedef = jax.tree.flatten(made)
        if std is None:  # T5 does not divide by the root of a head's size: its q has
            kernel = made["stack"]["blocks"]["to_qkv"]["kernel"]
            scaled = kernel.at[:, :, 0].multiply(64**-0.5)
            made["stack"]["blocks"]["to_qkv"]["kernel"] = scaled
            return made
        noise = [
            std * jax.random.normal(key, x.shape)
            for key, x in zip(jax.random.split(keys[5], len(leaves)), leaves)
        ]
        drawn = [n if x.ndim > 2 else x + n for x, n in zip(leaves, noise)]
        return jax.tree.unflatten(treedef, drawn)

    rows = [
        row(f"MMDiT, std {std}", mmdit, given, weights(mmdit, given, std))
        for std in (0.02, 0.03, 0.04, 0.05)
    ]
    return [*rows, row("T5, as at birth", t5, ids, weights(t5, ids))]


def memory() -> list[list]:
    """Of SD3 2B's denoising and of the text encoders, as compiled for one chip."""
    from sd3_jax.tools.plan import aot, slices

    aot.prepare()
    import jax
    from flax import linen as nn

    from configs import sd3_2b
    from sd3_jax.distributed import sharding
    from sd3_jax.tools.plan import sampling_programs

    each = slices.find("v5e-1")
    mesh = sharding.make_mesh(devices=aot.devices(each))

    def compiled(side, cfg, kind, text=False):
        config = sd3_2b.get_config(str(side))
        config.quantize.update(denoiser=kind, t5=kind)
        config.sample.update(cfg=cfg, max_length=77)
        with jax.set_mesh(mesh), nn.logical_axis_rules(sharding.RULES):
            cases = sampling_programs.cases(config, each, mesh, 1)
            case = next(x for x in cases if x.name == ("text" if text else "denoise"))
            made = aot.compile(case.lower(), aot.flags("launch/flags", each, "sample"))
        wide = re.search(STACK, made.text)
        assert bool(wide) != bool(kind) or text, wide  # the CLIPs have stacks as well
        return made.memory

    programs = {
        "MMDiT 2B, 1024², 1 row": (1024, 1.0),
        "MMDiT 2B, 1024², 2 rows": (1024, 5.0),
        "MMDiT 2B, 256², 1 row": (256, 1.0),
        "MMDiT 2B, 256², 2 rows": (256, 5.0),
        "CLIP-L, CLIP-G and T5-XXL, 1 row": (256, 1.0, True),
    }
    rows = []
    for name, (side, cfg, *text) in programs.items():
        plain = None
        for kind in KINDS:
            found = compiled(side, cfg, kind, *text)
            arguments, held = found["arguments"], found["temporaries"]
            plain = plain or arguments + held
            cells = [f"{x:.3f}" for x in (arguments, held, arguments + held)]
            share = f"{(arguments + held) / plain:.3f}"
            rows.append([name, NAMES[kind], *cells, share])
            print(rows[-1], flush=True)
    return rows


def load() -> list[list]:
    """Peak resident memory of loading SD3-medium's file of 4.17 GB, as load_memory."""
    sys.path.insert(0, str(HERE))
    import load_memory

    rows = []
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "sd3_medium.safetensors"
        load_memory.child("write", path, 24)
        for kind in KINDS:
            script = [sys.executable, __file__, "--load", str(path), kind]
            done = subprocess.run(script, check=True, stdout=subprocess.PIPE)
            got = json.loads(done.stdout.splitlines()[-1])
            sizes = [f"{got[name] / 1e9:.2f}" for name in ("import", "bytes", "peak")]
            rows.append([NAMES[kind], *sizes, f"{got['seconds']:.0f}"])
    return rows


def load_one(path: str, kind: str) -> None:
    import time

    import jax
    import load_memory

    import sd3_jax

    imported, start = load_memory.peaks()[0], time.perf_counter()
    bundle = sd3_jax.load(path, quantize={"denoiser": kind})
    leaves = jax.block_until_ready(jax.tree.leaves(bundle.variables))
    seconds = time.perf_counter() - start
    size = sum(x.nbytes for x in leaves)
    told = {"import": imported, "bytes": size, "peak": load_memory.peaks()[0]}
    print(json.dumps(told | {"seconds": seconds}))


PARTS = {"error": error, "memory": memory, "load": load}
HEADS = {
    "error": "weights, float32 none, float32 int8, float32 fp8, bfloat16 none,"
    " bfloat16 int8, bfloat16 fp8",
    "memory": "program, eight bits, arguments GB, temporaries GB, sum GB, of none's",
    "load": "eight bits, after import GB, parameters GB, peak GB, s",
}


def write(path: Path, name: str) -> None:
    """The part's table into its place."""
    rows = json.loads((RUNS / f"{name}.json").read_text())
    page_tables.fill(path, name, page_tables.table(HEADS[name].split(", "), rows))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--part"]:
        found = PARTS[sys.argv[2]]()
        (RUNS / f"{sys.argv[2]}.json").write_text(json.dumps(found))
    elif sys.argv[1:2] == ["--load"]:
        load_one(*sys.argv[2:])
    else:
        main(sys.argv[1:])
