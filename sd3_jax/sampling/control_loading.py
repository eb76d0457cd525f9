"""Files of ControlNets become a ControlBundle on a mesh."""

import dataclasses
import logging

import jax.numpy as jnp
from etils import epath
from jax.sharding import Mesh

from sd3_jax.models.controlnet import ControlNet
from sd3_jax.sampling import control as hints
from sd3_jax.sampling import placement as placements
from sd3_jax.sampling.bundle import Bundle
from sd3_jax.sampling.bundle_loading import retyped
from sd3_jax.sampling.control import ControlBundle
from sd3_jax.weights import components, controlnet_keys, hub, sources
from sd3_jax.weights.components import CONTROLNET

log = logging.getLogger(__name__)


def load_control(path_or_hub_name: epath.PathLike, bundle: Bundle) -> ControlBundle:
    """A diffusers folder, one .safetensors file or a hub name, for this bundle.

    A single-stream net takes the embedding of patches from the bundle's denoiser.
    """
    filenames = ["config.json", *hub.weights(CONTROLNET.stem)]
    path = sources.resolve(path_or_hub_name, filenames, label="ControlNet")
    part = sources.control(path)
    module = CONTROLNET.build(part.config, jnp.dtype(bundle.dtype))
    # Checked before the weights are read: nets of other models fail inside the program.
    denoiser = bundle.part("denoiser")
    hints.require_fit(path, module, part.config, denoiser, bundle.configs["denoiser"])
    if module.borrowed:  # its positions are the denoiser's too
        module = dataclasses.replace(module, pos_size=denoiser.pos_size)
    shapes = _control_shapes(part, module, bundle.mesh, bundle.dtype)
    # A net rests where its denoiser does.
    shapes = placements.at_rest(shapes, bundle.placement)
    variables = part.read(CONTROLNET, module, shapes)
    if module.borrowed:
        # The same arrays, not copies: the embedding takes no memory a second time.
        denoiser_variables = bundle.variables["denoiser"]
        variables["params"]["patch_embed"] = denoiser_variables["params"]["patch_embed"]
        if "buffers" in denoiser_variables:
            variables["buffers"] = denoiser_variables["buffers"]
    # Not before: what a net's files hold does not depend on it.
    method = denoiser.context_attention
    module = dataclasses.replace(module, context_attention=method)
    net = ControlBundle(module, variables, part.config)
    if module.borrowed and controlnet_keys.CONTROL_TYPE not in part.config:
        message = "%s does not define its hints: they are encoded as for blur and depth"
        log.warning(f'{message}; for canny pass ControlInput(preprocess="canny")', path)
    return net


def load_stored_control(path: epath.Path, mesh: Mesh) -> ControlBundle:
    """A ControlNet without a denoiser, in the dtypes of its file, for conversion."""
    part = sources.control(path)
    # The compute dtype does not matter here, for the net is written and never run.
    module = CONTROLNET.build(part.config, jnp.dtype("float32"))
    shapes = _control_shapes(part, module, mesh, "float32")
    # In the dtypes of the file, so that a conversion rounds nothing.
    shapes = retyped(shapes, part.dtypes(CONTROLNET, module, shapes))
    return ControlBundle(module, part.read(CONTROLNET, module, shapes), part.config)


def _control_shapes(part: sources.Part, module: ControlNet, mesh: Mesh, dtype: str):
    """Shapes of the tensors that the net's file holds."""
    # A borrowed patch embedding is not in the net's file: it is the denoiser's.
    shapes = components.abstract(CONTROLNET, module, part.config, mesh, dtype)
    return controlnet_keys.without_borrowed(module, shapes)
