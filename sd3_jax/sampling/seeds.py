"""From seeds to one random key for each picture."""

from typing import Any

import jax
import numpy as np
from jax import Array
from jaxtyping import Key

from sd3_jax.errors import UserError
from sd3_jax.foreign_text import shown


def image_keys(prompts: int, seed: Any, per_prompt: int) -> Key[Array, " b"]:
    """One key for each picture, made of its seed and its number.

    With one seed, pictures are numbered through all prompts. With a seed for each
    prompt, numbers start at 0 for each, so that a row does not depend on the others.
    """
    shared = isinstance(seed, int | np.integer) and not isinstance(seed, bool)
    seeds = [seed] if shared else listed_seeds(seed)
    if not shared and len(seeds) != prompts:
        raise UserError(
            f"{len(seeds)} seeds for {prompts} prompts: expected one, or as many"
        )
    # The keys are made from uint32 arrays below, where a larger seed does not fit.
    if not all(0 <= s < 2**32 for s in seeds):
        raise UserError(f"seed {shown(seed)}: expected integers from 0 to {2**32 - 1}")
    numbers = prompts * per_prompt if shared else per_prompt
    # Prompt by prompt, in the order of the pictures.
    rows = [(s, number) for s in seeds for number in range(numbers)]
    # vmap makes all keys in one dispatch instead of two for each picture.
    make = lambda row: jax.random.fold_in(jax.random.key(row[0]), row[1])
    return jax.vmap(make)(np.array(rows, np.uint32))


def listed_seeds(seeds: Any) -> list[int]:
    """The seeds as a list of ints; UserError for floats, texts and other shapes."""
    seed_array = np.asarray(seeds)
    # A float such as 1e3 is refused: rounding it would pick some seed in silence.
    if seed_array.ndim != 1 or seed_array.dtype.kind not in "iu":
        raise UserError(f"seed {shown(seeds)}: expected an integer, or one a prompt")
    return seed_array.tolist()
