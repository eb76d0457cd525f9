"""No caption is zeros, as dropout leaves it; a caption is read as a prompt is."""

import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from sd3_jax.data import prompt_text, records, tokenizers
from sd3_jax.sampling.text import prompts
from sd3_jax.sampling.text.prompts import Conditioning


class Ones(nn.Module):
    """A tower to which even no text says something, as any with a bias."""

    @nn.compact
    def __call__(self, ids):
        b, length = ids.shape
        return jnp.ones((b, length, 3)), jnp.ones((b, 2))


def test_the_tower_of_bytes_says_nothing_of_no_caption():
    batch = tokenizers.bytes_of(["", "a fox", records.clean(" \n")], 8)
    context, pooled = prompts.trained(Ones()).encode({}, batch)
    np.testing.assert_array_equal(pooled, [[0, 0], [1, 1], [0, 0]])
    assert not context[::2].any() and (context[1] == 1).all()


def test_nulled_is_null_for_some():
    cond = Conditioning(jnp.ones((2, 4, 3), jnp.bfloat16), jnp.full((2, 5), jnp.nan))
    found = prompts.nulled(cond, jnp.array([False, False]))
    for x, wanted in zip(found, prompts.null(cond)):
        assert x.dtype == wanted.dtype and (x == wanted).all()
    assert prompts.nulled(cond, jnp.array([True, False])).context[0].all()


@pytest.mark.parametrize("end", ["\n", "\r\n", "\n\n", "\x0b", "\u2028", "\u2029\n"])
def test_the_end_of_a_line_is_no_part_of_a_caption(end):
    ids = lambda text: tokenizers.bytes_of([text], 16)["ids_bytes"]
    wanted = ids(prompt_text.checked("a fox"))
    for text in (
        f"a fox{end}",
        prompt_text.checked(f"a fox{end}"),
        records.clean(f"a fox{end}"),
    ):
        np.testing.assert_array_equal(ids(text), wanted)
    inner = records.clean(f"a{end}fox{end}")
    np.testing.assert_array_equal(ids(inner), ids(prompt_text.checked(f"a{end}fox")))
