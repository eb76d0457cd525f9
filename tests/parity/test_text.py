"""The text encoders and what is made of them, against transformers and diffusers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from parity import convert, miniature

from sd3_jax.weights import components, text_keys

KINDS = {"clip_l": ("quick_gelu", 2), "clip_g": ("gelu", 3)}


def build(name, theirs, **changes):
    component = components.COMPONENTS[name]
    config = theirs.config.to_dict() | changes
    ours = component.build(config, jnp.float32)
    args = component.example(ours, config)
    shapes = jax.eval_shape(ours.init, jax.random.key(0), *args)
    table, state = component.table(ours), theirs.state_dict()
    weights = convert.from_torch(shapes, table, state, ignore=ignored(state))
    return ours, weights


def ignored(state):
    return [key for key in state if key.endswith(text_keys.IGNORED)]


def clip_ids(b=3):
    ids = np.random.default_rng(0).integers(1, 500, (b, 77)).astype(np.int32)
    largest = miniature.tiny_tokenizers.CLIP_VOCAB - 1
    for row, end in zip(ids, (5, 40, 76)):
        row[end:] = largest
    ids[1, 50] = 7  # after the end: nobody is to look
    return ids


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("skip", [0, 1])
def test_clip(name, skip):
    theirs = miniature.clip(*KINDS[name]).eval()
    ours, weights = build(name, theirs)
    run = jax.jit(lambda w, ids: ours.apply(w, ids, clip_skip=skip))
    hidden, pooled = run(weights, jnp.asarray(clip_ids()))
    wanted = theirs(torch.tensor(clip_ids()).long(), output_hidden_states=True)
    states = wanted.hidden_states[-(skip + 2)]
    assert convert.error(hidden, states) < 2e-5
    assert convert.error(pooled, wanted.text_embeds) < 2e-5


def test_clip_that_knows_its_end(name="clip_l"):
    """A config whose eos_token_id is not 2 takes the first place of that id."""
    theirs = miniature.clip(*KINDS[name]).eval()
    end = 300
    theirs.config.eos_token_id = end
    for module in theirs.modules():
        if hasattr(module, "eos_token_id"):
            module.eos_token_id = end
    ids = clip_ids()
    ids[ids == end] = 1
    ids[:, (11, 30)] = end
    ours, weights = build(name, theirs)
    _, pooled = jax.jit(ours.apply)(weights, jnp.asarray(ids))
    wanted = theirs(torch.tensor(ids).long()).text_embeds
    assert convert.error(pooled, wanted) < 2e-5


def test_clips_two_activations_differ():
    theirs = miniature.clip(*KINDS["clip_l"]).eval()
    wanted = theirs(torch.tensor(clip_ids()).long()).text_embeds
    ours, weights = build("clip_l", theirs, hidden_act="gelu")
    _, pooled = jax.jit(ours.apply)(weights, jnp.asarray(clip_ids()))
    assert convert.error(pooled, wanted) > 1e-3


@pytest.mark.parametrize("length", [77, 200])
def test_t5(length):
    theirs = miniature.t5().eval()
    ours, weights = build("t5", theirs)
    ids = np.random.default_rng(1).integers(0, 38, (2, length)).astype(np.int32)
    ids[0, 9:] = 0  # padding, which is attended to
    states = jax.jit(ours.apply)(weights, jnp.asarray(ids))
    wanted = theirs(torch.tensor(ids).long())[0]
    assert convert.error(states, wanted) < 2e-5
