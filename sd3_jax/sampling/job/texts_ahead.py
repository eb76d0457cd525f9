"""Texts of the next batches, encoded together, for encoders that leave the devices."""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from sd3_jax.diffusion import guidance
from sd3_jax.diffusion.guidance_methods import METHODS
from sd3_jax.errors import UserError
from sd3_jax.sampling import arguments
from sd3_jax.sampling.bundle import Bundle
from sd3_jax.sampling.job import task_arguments
from sd3_jax.sampling.job.prompt_file import Task
from sd3_jax.sampling.text.prompts import Conditioning

PICTURES = 256  # encoded ahead; in bfloat16 5 MB each with their negative prompts


class TextsAhead:
    """Embeddings by batch, in host memory, of the batches that are painted next."""

    def __init__(self, bundle: Bundle):
        self.bundle = bundle
        self._encoded: dict[tuple[int, ...], dict[str, Any]] = {}

    def encode(self, batches: Sequence[Sequence[Task]]) -> None:
        """Encodes batches as they will be painted, in place of those before."""
        # Dropped before the next are encoded: only one set is in memory.
        self._encoded = {}
        for tasks in batches:
            # LoRAs of lines are loaded with their batch, and may change the encoders.
            if "lora" in tasks[0].settings:
                continue
            try:
                self._encoded[_key(tasks)] = _embeddings(self.bundle, tasks)
            except UserError:
                pass  # painting the batch finds the same fault, and reports its lines

    def arguments(self, tasks: Sequence[Task]) -> dict[str, Any]:
        """generate's arguments in place of the texts; {} for tasks not encoded."""
        return self._encoded.get(_key(tasks), {})


def _key(tasks: Sequence[Task]) -> tuple[int, ...]:
    return tuple(task.index for task in tasks)


def _embeddings(bundle: Bundle, tasks: Sequence[Task]) -> dict[str, Any]:
    call = task_arguments.generate_arguments(tasks)
    method = call["guidance_method"]
    guided = guidance.guides(call["guidance"], method)
    # Some methods, such as PAG, compare with a perturbed network and read no negative.
    guided = guided and METHODS[method].against == "uncond"
    # In batches of the size that is painted, whose programs round alike.
    cond, uncond = arguments.encoded(
        bundle,
        call["prompts"],
        call["negative_prompts"],
        length=call["max_sequence_length"],
        per_prompt=1,
        clip_skip=call["clip_skip"],
        guided=guided,
        weighting=call["prompt_weighting"],
    )
    texts = {"prompts": _on_host(cond), "prompt_weighting": None}
    # Without guidance the negative texts, which are not read, stay for the warning.
    return texts | ({"negative_prompts": _on_host(uncond)} if guided else {})


def _on_host(texts: Conditioning) -> Conditioning:
    return jax.tree.map(np.asarray, texts)
