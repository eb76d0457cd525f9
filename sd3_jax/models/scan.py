"""Blocks in one scan, so that a program does not grow with depth, and their remat."""

from collections.abc import Callable
from typing import Any

import jax
from flax import linen as nn

# A block's products except fc1's, of four times the width. Those out of attention and
# fc2 are wanted by their gates' gradients.
KEPT = ("qkv", "attention", "projected", "fed")
policies = jax.checkpoint_policies
REMAT = {  # by what is kept of a block for its backward pass
    "none": None,  # all
    "mlp": policies.save_only_these_names(*KEPT, "mlp"),
    "attention": policies.save_only_these_names(*KEPT),
    "offload": policies.save_and_offload_only_these_names(
        names_which_can_be_saved=[],
        names_which_can_be_offloaded=[*KEPT],
        offload_src="device",
        offload_dst="pinned_host",
    ),
    "dots": policies.dots_with_no_batch_dims_saveable,
    "full": policies.nothing_saveable,  # nothing
}


def scanned(
    body: Callable,
    length: int,
    *,
    remat: str = "none",
    unroll: int = 1,
    in_axes: Any = nn.broadcast,
) -> Callable:
    """body(block, carry, *inputs) -> (carry, out), `length` times in a row.

    Call it with a block, whose parameters get a first axis "layers".
    """
    if remat != "none":
        # Of a loop XLA cannot take the backward's computations for the forward's. With
        # none left it would, and keep all.
        body = nn.remat(body, policy=REMAT[remat], prevent_cse=unroll >= length)
    return nn.scan(
        body,
        variable_axes={"params": 0, "intermediates": 0},
        split_rngs={"params": True},
        in_axes=in_axes,
        length=length,
        unroll=unroll,
        metadata_params={nn.PARTITION_NAME: "layers"},
    )


def stacked(function: Callable, length: int) -> Callable:
    """function(block, x) of `length` layers at once, on the same x: what every block
    computes of it, before the scan."""
    return nn.vmap(
        function,
        variable_axes={"params": 0},
        split_rngs={"params": True},
        in_axes=None,
        axis_size=length,
        metadata_params={nn.PARTITION_NAME: "layers"},
    )
