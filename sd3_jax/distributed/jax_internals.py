"""The parts of jax 0.10 without a public name that this package needs.

Nothing here is touched in a run of one process that no cluster started.
"""

import logging
from typing import Any

import jax

from sd3_jax.errors import UserError

log = logging.getLogger(__name__)
BY_HAND = "SD3_COORDINATOR, SD3_NUM_PROCESSES and SD3_PROCESS_ID"


def coordination_client() -> Any:
    """The coordination service's client, None in a run of one process."""
    if not jax.distributed.is_initialized():
        return None
    try:
        from jax._src import distributed

        return distributed.global_state.client
    except (ImportError, AttributeError) as error:
        raise UserError(
            f"jax {jax.__version__}: {error}: a run of several processes needs the"
            " client of its coordination service; install jax 0.10"
        ) from None


def detected_processes() -> int:
    """How many processes jax sees: on a TPU pod, under Slurm, Open MPI, Kubernetes."""
    try:
        from jax._src.clusters import ClusterEnv

        clusters = [
            cluster  # in jax's order of preference
            for cluster in ClusterEnv._cluster_types
            if not cluster.opt_in_only_method
        ]
        present = (cluster for cluster in clusters if cluster.is_env_present())
    except (ImportError, AttributeError) as error:
        log.warning(
            "jax %s: %s: other processes are not detected; for a run of several, set"
            " %s",
            *(jax.__version__, error, BY_HAND),
        )
        return 1
    return next((cluster.get_process_count() for cluster in present), 1)
