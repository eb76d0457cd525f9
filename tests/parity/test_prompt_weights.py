"""Weighted prompts against the rules of ComfyUI and compel, with transformers."""

import dataclasses
import math

import diffusers
import numpy as np
import pytest
import torch
from parity import convert, miniature

import sd3_jax
from sd3_jax.distributed import sharding
from sd3_jax.errors import UserError
from sd3_jax.params.adapters import Factors
from sd3_jax.sampling.adapters.adapter_bank import Bank
from sd3_jax.sampling.text import weighted_prompts

LENGTH = 16
ENCODERS = {"clip_l": "", "clip_g": "_2", "t5": "_3"}


@pytest.fixture(scope="module")
def bundle():
    mesh = sharding.make_mesh(fsdp=8)
    return sd3_jax.load(
        str(miniature.folder("sd35_medium")), mesh=mesh, dtype="float32"
    )


@pytest.fixture(scope="module")
def pipe():
    folder = miniature.folder("sd35_medium")
    return diffusers.StableDiffusion3Pipeline.from_pretrained(folder)


class Encoder:
    """One of the pipeline's encoders, and its tokenizer, by encoder's length."""

    def __init__(self, pipe, name):
        self.model = getattr(pipe, f"text_encoder{ENCODERS[name]}")
        self.words = getattr(pipe, f"tokenizer{ENCODERS[name]}")
        self.length = LENGTH if name == "t5" else 77
        *self.prefix, self.end = self.words("")["input_ids"]

    def tokens(self, pieces):
        """(id, weight, piece) of each place: pieces by themselves, as both tools do."""
        body = [
            (i, weight, number)
            for number, (text, weight) in enumerate(pieces)
            for i in self.words(text)["input_ids"][len(self.prefix) : -1]
        ][: self.length - len(self.prefix) - 1]
        row = [(i, 1.0, -1) for i in self.prefix] + body + [(self.end, 1.0, -1)]
        pad = (self.words.pad_token_id, 1.0, -1)
        return row + [pad] * (self.length - len(row))

    @torch.no_grad()
    def states(self, row, hidden=()):
        """States of a row of tokens, with the piece `hidden` masked out."""
        ids = torch.tensor([[i for i, _, _ in row]])
        mask = torch.tensor([[0 if number in hidden else 1 for _, _, number in row]])
        output = self.model(ids, mask if hidden else None, output_hidden_states=True)
        t5 = "T5" in type(self.model).__name__
        states = output.last_hidden_state if t5 else output.hidden_states[-2]
        return states[0].numpy(), None if t5 else output.text_embeds[0].numpy()

    def lerped(self, row, hidden=()):
        """The rule of both tools: each token from the empty prompt's on, by weight."""
        empty = self.states(self.tokens([]))[0]
        states, pooled = self.states(row, hidden)
        weights = np.array([weight for _, weight, _ in row])[:, None]
        return empty + weights * (states - empty), pooled


def comfy(encoder, pieces):
    return encoder.lerped(encoder.tokens(pieces))


def compel(encoder, pieces):
    """And a blend with the prompt that lacks each piece of weight below 1."""
    row = encoder.tokens(pieces)
    states, pooled = encoder.lerped(row)
    total, share = states, 1.0
    for number, (_, weight) in enumerate(pieces):
        if weight < 1:
            part = math.tan((1 - max(weight, 1e-5)) * math.pi / 2)
            total = total + part * encoder.lerped(row, {number})[0]
            share += part
    return total / share, pooled


def context_of(pipe, rule, pieces):
    (left, l), (right, g), (t5, _) = [rule(Encoder(pipe, x), pieces) for x in ENCODERS]
    clip = np.concatenate([left, right], 1)
    clip = np.pad(clip, [(0, 0), (0, t5.shape[1] - clip.shape[1])])
    return np.concatenate([clip, t5]), np.concatenate([l, g])


CASES = {
    "comfy": (
        "parentheses",
        ["a (red:1.4) fox", "[the (fox:-0.5)] in the (rain)", "a fox"],
        [
            [("a", 1), ("red", 1.4), ("fox", 1)],
            [("the", 1 / 1.1), ("fox", -0.5 / 1.1), ("in the", 1), ("rain", 1.1)],
            [("a fox", 1)],
        ],
    ),
    "compel": (
        "compel",
        ["a red++ fox", "(the fox)0.4 in (the)0 rain-", "(a fox)1.5 + b-"],
        [
            [("a", 1), ("red", 1.21), ("fox", 1)],
            [("the fox", 0.4), ("in", 1), ("the", 0), ("rain", 0.9)],
            [("a fox", 1.5), ("+", 1), ("b", 0.9)],
        ],
    ),
}


@pytest.mark.parametrize("tool", CASES)
def test_weights_act_as_in_the_tool(bundle, pipe, tool):
    weighting, prompts, pieces = CASES[tool]
    context, pooled = bundle.encode_prompts(prompts, LENGTH, weighting=weighting)
    rule = {"comfy": comfy, "compel": compel}[tool]
    for i, row in enumerate(pieces):
        wanted_context, wanted_pooled = context_of(pipe, rule, row)
        assert convert.error(context[i], torch.tensor(wanted_context)) < 1e-4
        assert convert.error(pooled[i], torch.tensor(wanted_pooled)) < 2e-5


def test_each_encoder_has_its_own_weights_and_pooled_has_none(bundle):
    prompt = sd3_jax.Prompt("a (red:1.5) fox", "a red fox", "a red fox")
    weighed = bundle.encode_prompts([prompt], LENGTH, weighting="parentheses")
    plain = bundle.encode_prompts(["a red fox"], LENGTH)
    moved = np.abs(np.asarray(weighed.context - plain.context))[0]
    assert moved[2, :64].max() > 0.1  # CLIP-L's channels at "red"
    assert moved[:77, 64:].max() < 1e-4 and moved[77:].max() < 1e-4
    assert moved[[0, 1, *range(3, 77)], :64].max() < 1e-4
    np.testing.assert_allclose(weighed.pooled, plain.pooled, atol=2e-5)


def test_off_brackets_are_text_and_weights_of_one_change_nothing(bundle):
    ids = bundle.token_ids(["a (red:1.5) fox++"], LENGTH)
    words = bundle.tokenizers["clip_l"].decode(ids["ids_clip_l"][0])
    assert "( red : 1 . 5 )" in words and "+" in words
    for weighting, prompt in ("parentheses", r"a (red:1) \(fox\)"), ("compel", "a fox"):
        text = {"a fox": "a fox"}.get(prompt, "a red (fox)")
        weighed = bundle.encode_prompts([prompt], LENGTH, weighting=weighting)
        for ours, plain in zip(weighed, bundle.encode_prompts([text], LENGTH)):
            np.testing.assert_array_equal(ours, plain)


def test_another_weight_is_no_new_program(bundle):
    encode = lambda *texts: bundle.encode_prompts(
        list(texts), LENGTH, weighting="compel"
    )
    encode("a (red)1.5 fox", "a fox++")
    encode("a (red)0.5 fox", "a fox++")  # with masks
    count = weighted_prompts.states._cache_size()
    encode("(a)0.3 (red)0.5 fox-", "foxes")
    encode("a fox", "a (red)1.1 fox")
    assert weighted_prompts.states._cache_size() == count


def test_rows_may_have_adapters_of_their_own(bundle):
    """The empty prompt that weights start from has those of its row."""
    path = ("blocks", "fc2", "kernel")
    shape = bundle.variables["clip_l"]["params"]["blocks"]["fc2"]["kernel"].shape
    draw = np.random.default_rng(0).standard_normal
    layers, inputs, outputs = shape
    pair = draw((layers, inputs, 2)), draw((layers, 2, outputs)) / 8
    change = Factors(*(x.astype(np.float32) for x in pair))
    adapted = dataclasses.replace(bundle, bank=Bank())
    adapted.load_adapter({"clip_l": {path: change}}, "style")
    encode = lambda texts, sets: adapted.encode_prompts(
        texts, LENGTH, weighting="parentheses", adapters=sets
    )
    prompts, sets = ["a (red:1.4) fox", "(the:0.5) fox"], [{"style": 1}, {"style": 0}]
    both = encode(prompts, sets)
    for i in range(2):
        alone = encode([prompts[i]], sets[i])
        np.testing.assert_allclose(both.context[i], alone.context[0], atol=2e-5)
    plain = bundle.encode_prompts(prompts, LENGTH, weighting="parentheses")
    moved = np.abs(np.asarray(both.context - plain.context)).max((1, 2))
    assert moved[0] > 0.1 and moved[1] < 2e-5


def test_generate_reads_weights_of_both_prompts(bundle):
    run = dict(height=64, width=64, steps=1, max_sequence_length=LENGTH)
    run |= dict(output="latents", prompt_weighting="parentheses")
    plain, positive, negative = (
        np.asarray(sd3_jax.generate(bundle, a, negative_prompts=b, **run))
        for a, b in (("fox", "rain"), ("(fox:1.5)", "rain"), ("fox", "(rain:1.5)"))
    )
    assert np.abs(plain - positive).max() > 1e-3 < np.abs(plain - negative).max()
    with pytest.raises(UserError, match="character 6: a weight"):
        sd3_jax.generate(bundle, "a (b:c)", **run)
    with pytest.raises(UserError, match='prompt_weighting "round".*parentheses'):
        sd3_jax.generate(bundle, "a", **run | dict(prompt_weighting="round"))
    encoded = bundle.encode_prompts("a", LENGTH)
    with pytest.raises(UserError, match="with embeddings; pass texts"):
        sd3_jax.generate(bundle, encoded, **run)


def test_what_is_cut_is_listed_and_logged_once(bundle, caplog):
    long = "the red fox in " * 25 + "rain"
    (cut, short) = bundle.tokens_cut([long, "a fox"], LENGTH)
    assert short == {} and set(cut) == {"clip_l", "clip_g", "t5"}
    assert all(words.endswith("rain") for words in cut.values())
    assert len(cut["clip_l"].split()) + 75 == 101
    caplog.clear()
    for prompts in [long, "a fox"], [long, long], ["a fox", long]:
        bundle.encode_prompts(prompts, LENGTH)
    assert [line.split(";")[0] for line in caplog.messages] == [
        "CLIP reads 77 tokens: cuts 1 of 2 prompts, of 105 at most",
        "T5 reads 16 tokens: cuts 1 of 2 prompts, of 106 at most",
    ]
    weighed = bundle.tokens_cut(f"({long}:1.2)", LENGTH, weighting="parentheses")
    assert weighed[0]["clip_l"] == cut["clip_l"]
