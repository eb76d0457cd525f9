"""LoRA files by name, beside the weights of the components that they adapt."""

import logging
import math
from collections.abc import Mapping, Sequence

import jax
import numpy as np
from etils import epath
from flax import linen as nn
from jax import Array
from jax.sharding import NamedSharding, PartitionSpec

from sd3_jax.errors import UserError
from sd3_jax.models import lora
from sd3_jax.pipelines import sources
from sd3_jax.weights import adapters
from sd3_jax.weights import lora as files

log = logging.getLogger(__name__)


def named(text: str) -> tuple[str, float]:
    """Where a LoRA lies and its weight: "path=0.8", or "path", which is times 1.

    What is there by the whole name, such as "step=1000", has no weight in its name;
    "step=1000=0.5" weighs it.
    """
    path, equals, number = text.rpartition("=")
    if not equals or epath.Path(text).expanduser().exists():
        return text, 1.0
    try:
        weight = float(number)
    except ValueError:  # the name has that sign in it
        return text, 1.0
    if not math.isfinite(weight):
        raise UserError(f"LoRA {text}: weight {number}: wanted a finite number")
    return path, weight


def attached(
    variables: Mapping[str, dict],
    modules: Mapping[str, nn.Module],
    given: Sequence[str],
    *,
    wanted: Sequence[str],
) -> dict[str, dict]:
    """Variables by component with what `given` names beside their kernels, added up.

    Each is a file, a folder with one or a hub name, with its weight. Of components
    that are not `wanted` nothing is read; one that is and is not here is an error.
    """
    made = dict(variables)
    for text in given:
        source, weight = named(text)
        path = sources.resolve(source, adapters.WANTED, what="LoRA")
        for name, pairs in adapters.read(path).items():
            if name not in wanted:
                continue
            if name not in made:
                raise UserError(
                    f"{path} adapts {name}, and the weights have only"
                    f" {', '.join(made)}; name a file that has it after a comma"
                )
            params = made[name]["params"]
            found = files.load(pairs, name, modules[name], params, weight=weight)
            params = lora.attach(params, _placed(found, params))
            made[name] = made[name] | {"params": params}
            log.info(
                "%s: %d linear maps of %s, times %g", path, len(pairs), name, weight
            )
    return made


def _placed(found: dict, params: dict) -> dict:
    """a and b as their kernels lie, along the axes that they share with these."""
    kernels, made = lora.kernels(params), {}
    for path, pair in lora.modules(found, "a"):
        kernel = kernels[path]
        mesh, spec = kernel.sharding.mesh, tuple(kernel.sharding.spec)
        spec += (None,) * (kernel.ndim - len(spec))
        specs = lora.layout(path, kernel.ndim).shapes(spec, None)
        made[path] = {
            name: _put(pair[name], NamedSharding(mesh, PartitionSpec(*own)))
            for name, own in zip("ab", specs)
        }
    return lora.nested(made)


def _put(x: np.ndarray, where: NamedSharding) -> Array:
    """Every process has the same x, and keeps its own shards."""
    return jax.make_array_from_callback(x.shape, where, lambda index: x[index])
