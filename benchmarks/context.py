"""Large pictures over a mesh's context axis, beside one device: memory and results.

    python benchmarks/context.py                      # 2048²; runs both, minutes, 8 GB
    python benchmarks/context.py --no-run --width 1536 --heads 24     # compiles only
    python benchmarks/context.py --tpu v5e:2x2 --width 512 --heads 8 --depth 4

Random weights on virtual CPU devices, or for TPUs that are not there by their compiler.
"""

import argparse
import math
import os
import sys
import time
from typing import Any, NamedTuple

PARTS = "sample", "decode", "encode"
# What XLA's library fusions hold on CPUs is not in the analysis of a program's memory.
COUNTED = {"xla_cpu_experimental_ynn_fusion_type": ""}
SIZES = dict(width=64, heads=2, depth=2, channels=(16, 32, 64, 64), text=333)


class Program(NamedTuple):
    """A part of the pipeline on a mesh: `jitted(*static, *abstract, **options)`."""

    jitted: Any
    static: tuple
    abstract: tuple
    options: dict
    mesh: Any

    def compile(self, **options):
        from sd3_jax.sampling import compiled

        with compiled.on(self.mesh):
            low = self.jitted.lower(*self.static, *self.abstract, **self.options)
            return low.compile(**options)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--side", type=int, default=2048, help="in pixels")
    for name in ("width", "heads", "depth", "text"):
        parser.add_argument(f"--{name}", type=int, default=SIZES[name])
    parser.add_argument("--channels", type=int, nargs="+", default=SIZES["channels"])
    parser.add_argument("--devices", type=int, default=4)
    parser.add_argument("--parts", nargs="+", default=PARTS[:2], choices=PARTS)
    parser.add_argument("--no-run", dest="run", action="store_false")
    parser.add_argument("--tpu", help="a topology, such as v5e:2x2; compiles only")
    args = parser.parse_args()
    found = devices(args.devices, args.tpu)
    sizes = {name: getattr(args, name) for name in SIZES}
    dtype = "bfloat16" if args.tpu else "float32"
    for part in args.parts:
        peaks, results = [], []
        for n in (1, args.devices):
            made = program(part, mesh(found[:n]), args.side, dtype=dtype, **sizes)
            compiled = made.compile(compiler_options={} if args.tpu else COUNTED)
            peaks.append(peak(compiled))
            print(f"{part}, {n} devices: {peaks[-1] / 1e6:.0f} MB each")
            for line in sent(compiled, made.mesh):
                print("   ", line)
            if args.run and not args.tpu:
                results.append(run(made))
        print(f"{part}: {peaks[1] / peaks[0]:.3f} of one device's memory")
        if results:
            print(f"{part}: {apart(*results):.1e} of its std from one device's")
    return 0


def devices(count: int, tpu: str | None) -> list:
    os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ["NPROC"] = "64"  # XLA's threads: several for each device
    os.environ["XLA_FLAGS"] = (
        f"--xla_force_host_platform_device_count={count}"
        # Devices that share a core may come to a collective minutes apart.
        " --xla_cpu_collective_call_terminate_timeout_seconds=1200"
        " --xla_cpu_collective_call_warn_stuck_timeout_seconds=1200"
    )
    os.environ |= {"TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
    import jax
    from jax.experimental import topologies

    if tpu is None:
        return jax.devices()
    return topologies.get_topology_desc(platform="tpu", topology_name=tpu).devices


def mesh(devices):
    from sd3_jax.distributed import sharding

    return sharding.make_mesh(fsdp=1, context=len(devices), devices=devices)


def program(
    part, mesh, side, *, width, heads, depth, channels, text, dtype="float32"
) -> Program:
    """Two guided Euler steps of one picture, or the autoencoder's half of it."""
    import jax
    import jax.numpy as jnp
    from jax.sharding import NamedSharding, PartitionSpec

    from sd3_jax import tree
    from sd3_jax.distributed import sharding
    from sd3_jax.models.mmdit import MMDiT
    from sd3_jax.models.vae import VAE
    from sd3_jax.sampling import autoencoder_programs, compiled
    from sd3_jax.sampling.text.prompts import Conditioning

    everywhere = NamedSharding(mesh, PartitionSpec())
    put = lambda *shape, dtype=jnp.float32: jax.ShapeDtypeStruct(
        shape, dtype, sharding=everywhere
    )
    small = lambda *shape: jnp.zeros(shape)
    dtype = jnp.dtype(dtype)

    def variables(module, *example):
        boxed = jax.eval_shape(module.init, jax.random.key(0), *example)
        shape = lambda x, s: jax.ShapeDtypeStruct(x.shape, dtype, sharding=s)
        return jax.tree.map(shape, tree.unbox(boxed), sharding.shardings(boxed, mesh))

    h = side // 8
    if part == "sample":
        model = MMDiT(depth, width, heads, dtype=dtype, remat="none")
        example = small(1, 2, 2, 16), small(1), small(1, 1, 64), small(1, 64)
        cond = Conditioning(put(1, text, 64), put(1, 64))
        keys = put(1, dtype=jax.random.key(0).dtype)
        told = put(3), put(), (put(), put()), put()
        inputs = compiled.Inputs(keys, cond, cond, *told)
        static = (compiled.Plan(model, ("euler",), (h, h, 16), guided=True),)
        given = variables(model, *example), inputs
        return Program(compiled.sample, static, given, {}, mesh)
    module = VAE(channels=tuple(channels), layers=1, groups=8, dtype=dtype)
    weights = variables(module, small(1, 8, 8, 3))
    options = dict(scaling=1.5, shift=0.06)
    if part == "decode":
        given = weights, put(1, h, h, 16)
        return Program(autoencoder_programs.decode, (module,), given, options, mesh)
    given = weights, put(1, side, side, 3), None
    return Program(autoencoder_programs.encode_image, (module,), given, options, mesh)


def peak(compiled) -> int:
    """Bytes of a device."""
    m = compiled.memory_analysis()
    used = m.argument_size_in_bytes + m.temp_size_in_bytes + m.output_size_in_bytes
    return used - m.alias_size_in_bytes


def sent(compiled, mesh) -> list[str]:
    """Collectives of at least 1 MB, those that send most first."""
    from sd3_jax.tools.plan import hlo, link_traffic

    found = link_traffic.collectives(hlo.parse(compiled.as_text()), mesh.shape)
    return [
        f"{x.kind} {x.shape} x {n}, {x.wire * n / 1e6:.1f} MB: {x.source[-60:]}"
        for x, n in sorted(found, key=lambda pair: -pair[0].wire * pair[1])
        if x.wire * n >= 1e6
    ]


def run(made: Program):
    """What it computes of seeded weights and inputs, on the host."""
    import jax
    import numpy as np

    from sd3_jax.sampling import compiled

    start = time.perf_counter()
    weights, *inputs = made.abstract
    given = jax.tree.map(weight, weights), *jax.tree.map(normal, inputs)
    if made.jitted is compiled.sample:
        given = given[0], settings(given[1])
    place = lambda x, like: jax.device_put(x, like.sharding)
    given = jax.tree.map(place, given, made.abstract)
    with compiled.on(made.mesh):
        result = np.asarray(made.jitted(*made.static, *given, **made.options))
    print(f"    ran in {time.perf_counter() - start:.0f} s")
    return result


def settings(inputs):
    """A grid of t's and a guidance, which are no random numbers."""
    import numpy as np

    number = lambda x: np.float32(x)
    return inputs._replace(
        grid=np.linspace(1, 0, 3, dtype=np.float32),
        scale=number(4),
        interval=(number(0), number(1)),
        rescale=number(0),
    )


def weight(like):
    """Of the size that keeps a layer's output near its input's."""
    fan = math.prod(like.shape[:-1]) if len(like.shape) > 1 else 1
    return normal(like) * fan**-0.5


def normal(like):
    import jax
    import numpy as np

    if jax.dtypes.issubdtype(like.dtype, jax.dtypes.prng_key):
        return jax.random.split(jax.random.key(0), *like.shape)
    rng = np.random.default_rng(math.prod(like.shape))
    return rng.standard_normal(like.shape, np.float32)


def apart(a, b) -> float:
    """The largest difference, over the standard deviation."""
    return float(abs(b - a).max() / a.std())


if __name__ == "__main__":
    sys.exit(main())
