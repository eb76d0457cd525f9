"""config.json and run.json in the workdir: what a run is, for people and the report."""

import json
import logging
from collections.abc import Mapping
from typing import Any

import jax
from etils import epath
from jax.sharding import Mesh

import sd3_jax
from sd3_jax import tree
from sd3_jax.files import write_whole

log = logging.getLogger(__name__)


def describe_run(params: dict, *, flops: float, mesh: Mesh) -> dict[str, Any]:
    """Size, devices and versions of a run, as run.json has them."""
    by_model = {name: tree.count(x) for name, x in params.items()}
    return {
        "parameters": sum(by_model.values()),
        "parameters_by_model": by_model,
        "forward_flops_per_image": flops,
        "devices": jax.device_count(),
        "device_kind": jax.devices()[0].device_kind,
        "processes": jax.process_count(),
        "mesh": dict(mesh.shape),
        "versions": {"sd3_jax": sd3_jax.__version__, "jax": jax.__version__},
    }


def log_description(description: Mapping[str, Any], bucket_shares: str) -> None:
    """One line on parameters and devices, one on buckets if there are several."""
    by_model = description["parameters_by_model"].items()
    log.info(
        "%d parameters (%s) on %d x %s",
        description["parameters"],
        ", ".join(f"{name} {count}" for name, count in by_model),
        description["devices"],
        description["device_kind"],
    )
    if bucket_shares:
        log.info("buckets: %s", bucket_shares)


def write_description(
    workdir: epath.Path, settings: Mapping, description: Mapping
) -> None:
    """Process 0 writes config.json and run.json, each whole or not at all."""
    if jax.process_index() == 0:
        for name, content in ("config", settings), ("run", description):
            text = json.dumps(content, indent=2)
            write_whole(workdir / f"{name}.json", text.encode())
