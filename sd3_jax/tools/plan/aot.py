"""Compiles programs for TPU slices without a TPU, by libtpu's compiler."""

import os
import re
import tempfile
import time
from collections.abc import Callable
from importlib import metadata
from typing import NamedTuple

import jax
from etils import epath
from jax.experimental import topologies
from jax.sharding import Mesh

from sd3_jax.errors import UserError
from sd3_jax.files import shipped
from sd3_jax.tools.plan.slices import GB, Slice

FLAGS = "launch/flags"  # a folder of the user's, or ours, wherever it is installed
ENVIRONMENT = {  # before libtpu is loaded: there is no TPU to ask
    "TPU_SKIP_MDS_QUERY": "1",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # several processes may plan at once
    "TPU_ACCELERATOR_TYPE": "v5litepod-1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_STDERR_LOG_LEVEL": "4",
    "TPU_MIN_LOG_LEVEL": "4",
}


class TooLarge(Exception):
    """The program does not fit in HBM: "21.30G of 15.75G"."""


class Case(NamedTuple):
    """A program and the work that it must do on one device."""

    name: str
    lower: Callable
    seconds: dict[str, float] | None  # of products, by what for; None: as compiled
    flops: float  # of the model alone; 0: as compiled
    images: float
    parameters: int
    turns: int | None = None  # of the loop whose trip count is data
    weights: float = 0.0  # GiB on a device
    forwards: float | None = None  # of the denoiser for an image
    mesh: Mesh | None = None  # if it is another than the job's


class Compiled(NamedTuple):
    """A program's text, after all of XLA's passes, and its memory on a device in GB."""

    text: str
    memory: dict[str, float]
    seconds: float


def prepare() -> None:
    # setdefault, so that a user's own settings of libtpu win.
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    # libtpu compiles without being a backend: arrays live on the CPU.
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_enable_compilation_cache", False)  # no client could read it


def compiler() -> str:
    """The versions of the compiler and jax; UserError without libtpu."""
    try:
        version = metadata.version("libtpu")
    except metadata.PackageNotFoundError:
        raise UserError(
            "plan needs libtpu, the TPU compiler; run pip install libtpu"
        ) from None
    return f"libtpu {version}, jax {jax.__version__}"


def devices(tpu_slice: Slice) -> list:
    try:
        return topologies.get_topology_desc(
            platform="tpu",
            topology_name=tpu_slice.topology,
            wrap=tpu_slice.wrap,
            num_slices=tpu_slice.slices,
        ).devices
    except Exception as error:
        reason = str(error).splitlines()[0][:200]
        raise UserError(
            f"no TPU compiler for {tpu_slice.topology} ({reason}); run pip install"
            " --upgrade libtpu"
        ) from None


def flags(folder: str, tpu_slice: Slice, job: str) -> dict[str, str]:
    """The compiler flags that launch/ would set: those of the generation, and those of
    the generation and the job if there is such a file."""
    if not folder:
        return {}
    path = epath.Path(folder) / f"{tpu_slice.kind}.env"
    if folder == FLAGS and not path.exists():
        path = epath.Path(shipped(FLAGS)) / path.name
    if not path.exists():
        raise UserError(
            f'config.plan.flags = "{folder}": {path} does not exist; expected'
            f' "{FLAGS}", the flags of sd3_jax, another folder, or "" for the defaults'
            " of the compiler"
        )
    paths = [path, path.with_name(f"{tpu_slice.kind}.{job}.env")]
    text = "\n".join(path.read_text() for path in paths if path.exists())
    # Commented flags are not set by the launchers either.
    text = re.sub(r"(?m)^#.*", "", text)
    return dict(re.findall(r"--(xla_\w+)=([^\s\"\\]+)", text))


def compile(lowered, options: dict[str, str]) -> Compiled:
    """Compiles a lowered program; TooLarge if it exceeds HBM."""
    begin = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        # Of programs that use the SparseCores as_text() fails, the dump does not.
        dump = {"xla_dump_to": folder, "xla_dump_hlo_as_text": True}
        try:
            program = lowered.compile(compiler_options=options | dump)
        # XLA reports a program that exceeds HBM as an error whose text has the sizes.
        except jax.errors.JaxRuntimeError as error:
            raise TooLarge(too_large(error)) from None
        # One program, one module: more than one file would be an error worth a
        # traceback.
        (path,) = epath.Path(folder).glob("*.after_optimizations.txt")
        # Read before the temporary folder is deleted.
        text = path.read_text()
    return Compiled(text, memory(program), time.perf_counter() - begin)


def too_large(error: Exception) -> str:
    size = r"([\d.]+[KMGT])"
    forms = (
        rf"\({size}\) exceeds available HBM \({size}\)",
        rf"Used {size} of {size} hbm",  # and not of vmem or smem
    )
    match = next(filter(None, (re.search(form, str(error)) for form in forms)), None)
    if match is None:
        raise error
    return f"{match[1]} of {match[2]}"


def memory(compiled) -> dict[str, float]:
    m = compiled.memory_analysis()
    sizes = {
        "arguments": m.argument_size_in_bytes,
        "temporaries": m.temp_size_in_bytes,
        # Outputs that alias donated arguments are the same bytes, so they count once.
        "peak": m.argument_size_in_bytes
        + m.temp_size_in_bytes
        + m.output_size_in_bytes
        - m.alias_size_in_bytes
        + m.generated_code_size_in_bytes,
    }
    return {name: size / GB for name, size in sizes.items()}
