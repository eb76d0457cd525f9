"""Blocks in one scan, so that program size does not grow with depth, with remat."""

from collections.abc import Callable
from typing import Any

import jax
from flax import linen as nn

# Outputs of a block's matrix products, except fc1's, which are four times as wide. The
# gradients of the gates need the outputs of attention and of fc2.
KEPT = ("qkv", "attention", "projected", "fed")
# Collection of what blocks show of their inside: see Block.observe in mmdit.py.
OBSERVED = "observed"
policies = jax.checkpoint_policies
REMAT = {  # what a block keeps for its backward pass
    "none": None,  # everything
    "mlp": policies.save_only_these_names(*KEPT, "mlp"),  # no product runs twice
    "attention": policies.save_only_these_names(*KEPT),  # fc1 runs twice
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
    """A scan of body(block, carry, *inputs) -> (carry, out) over `length` layers.

    Call the result as (block, carry, *inputs); the block's parameters get a first axis
    "layers". `remat` is a key of REMAT, `unroll` the layers an iteration runs.
    """
    if remat != "none":
        # In a loop XLA cannot merge the backward's recomputation with the forward pass.
        # Fully unrolled it could (CSE), and would keep everything.
        body = nn.remat(body, policy=REMAT[remat], prevent_cse=unroll >= length)
    return nn.scan(
        body,
        variable_axes={"params": 0, "intermediates": 0, OBSERVED: 0},
        split_rngs={"params": True},
        in_axes=in_axes,
        length=length,
        unroll=unroll,
        metadata_params={nn.PARTITION_NAME: "layers"},
    )


def stacked(function: Callable, length: int) -> Callable:
    """function(block, x) for `length` layers at once, all on the same x.

    For what every block computes from the condition: one large product before the scan
    instead of a small one in each layer. Outputs have a first axis (length, ...).
    """
    return nn.vmap(
        function,
        variable_axes={"params": 0},
        split_rngs={"params": True},
        in_axes=None,
        axis_size=length,
        metadata_params={nn.PARTITION_NAME: "layers"},
    )
