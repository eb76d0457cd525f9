"""Eight virtual devices, quick compilation, checked array annotations."""

import gc
import os
from pathlib import Path

# Before jax is imported. NPROC sizes XLA's thread pool. Each virtual device blocks a
# thread in every scan that it is inside of and in every collective that is in flight.
# With 16 threads for 8 devices, one device of a busy machine waited for ever.
os.environ["NPROC"] = "64"
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["XLA_FLAGS"] = " ".join(
    [
        os.environ.get("XLA_FLAGS", ""),
        "--xla_force_host_platform_device_count=8",
        "--xla_cpu_collective_call_terminate_timeout_seconds=60",
        # Programs are compiled more than run. Fusions that go through MLIR take more
        # than half of a step's compilation.
        "--xla_backend_optimization_level=0",
        "--xla_cpu_use_fusion_emitters=false",
    ]
)
CACHE = Path(__file__).parent / ".cache" / "jax"
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(CACHE))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.1")

import jax  # noqa: E402
import pytest  # noqa: E402
from jaxtyping import install_import_hook  # noqa: E402

# Not training: a TrainState holds arrays, and as often their shapes or shardings.
CHECKED = "diffusion models params weights data sampling evaluation reports pictures"
install_import_hook(
    [f"sd3_jax.{name}" for name in CHECKED.split()], "beartype.beartype"
)

from sd3_jax.tools.benchmark import process_memory  # noqa: E402

# Tracing makes many objects that live: looking for dead ones is a tenth of its time.
gc.set_threshold(50_000, 10, 10)

# Longest first, so that no worker sits at one alone in the end (see `make test`).
LONG = (
    *("test_chaos", "test_device_order", "jobs/test_train", "jobs/test_precompute"),
    *("jobs/test_sample", "jobs/test_study", "tools/plan/test_plan"),
    *("assembly/test_finetune_start", "launch/test_launch", "jobs/test_cloud"),
    *("parity/test_bundle", "parity/test_pipelines", "golden/test_golden"),
    *("models/test_backbones", "parity/test_lora", "training/test_lora"),
    *("training/test_finetuning", "sampling/test_sampler", "e2e/test_recipes"),
    *("evaluation/test_picture_scores", "evaluation/test_prompt_scores"),
    *("jobs/test_records", "jobs/test_compare", "assembly/test_compatibility"),
    *("jobs/test_convert", "parity/test_mmdit", "models/test_mmdit"),
    *("sampling/test_context", "test_bad_inputs", "config/test_values"),
    *("e2e/test_container", "test_docs"),
)
HERE = Path(__file__).parent
MOVED = [name for name in LONG if not (HERE / f"{name}.py").is_file()]
assert not MOVED, f"conftest.LONG names no file: {MOVED}"


def pytest_collection_modifyitems(items):
    def place(item):
        file = item.path.relative_to(HERE).with_suffix("").as_posix()
        return LONG.index(file) if file in LONG else len(LONG)

    items.sort(key=place)


ROOM = 4e9  # bytes that a worker may hold when it begins with a file


@pytest.fixture(scope="module", autouse=True)
def room():
    """Compiled programs are dropped before they fill a small machine's memory."""
    yield
    if process_memory.now() > ROOM:
        jax.clear_caches()
        gc.collect()
        process_memory.reset()  # gives the system what is free


@pytest.fixture
def key():
    return jax.random.key(0)


@pytest.fixture
def compilations():
    """The seconds of each compilation from here on, whatever is compiled."""
    seconds = []

    def listen(event, duration, **_):
        if event == "/jax/core/compile/backend_compile_duration":
            seconds.append(duration)

    jax.monitoring.register_event_duration_secs_listener(listen)
    jax.jit(lambda: 1)()
    assert seconds, "jax no longer reports compilations by this event"
    seconds.clear()
    yield seconds
    jax.monitoring.unregister_event_duration_listener(listen)
