"""Textual inversion against diffusers' loader, and the files of other tools."""

import diffusers
import jax
import numpy as np
import pytest
import safetensors.numpy
import torch
from diffusers.loaders import TextualInversionLoaderMixin
from parity import convert, miniature

import sd3_jax
from sd3_jax.data.placeholders import PlaceholderTokenizer
from sd3_jax.distributed import sharding
from sd3_jax.errors import UserError
from sd3_jax.sampling import compiled

LENGTH = 16
WIDTHS = {"clip_l": 64, "clip_g": 64, "t5": 160}
KEYS = {"clip_l": "clip_l", "clip_g": "clip_g", "t5": "t5xxl"}
SUFFIXES = {"clip_l": "", "clip_g": "_2", "t5": "_3"}


def vectors(name, count=2, seed=0):
    generator = np.random.default_rng([seed, *name.encode()])
    return generator.normal(size=(count, WIDTHS[name])).astype(np.float32)


def write(path, **tensors):
    safetensors.numpy.save_file(tensors, path)
    return path


def style(path, seed=0, **counts):
    """A file in ComfyUI's names."""
    counts = counts or dict.fromkeys(WIDTHS, 2)
    named = {KEYS[k]: vectors(k, count, seed) for k, count in counts.items()}
    return write(path, **named)


@pytest.fixture(scope="module")
def bundle():
    mesh = sharding.make_mesh(fsdp=8)
    return sd3_jax.load(str(miniature.folder("sd3_medium")), mesh=mesh, dtype="float32")


class Pipe(TextualInversionLoaderMixin):
    """SD3's pipeline has no such loader: diffusers' own, for one encoder."""

    hf_device_map, components = None, {}


def theirs(texts, embeddings):
    """Context and pooled of diffusers with {token: {encoder: vectors}}."""
    folder = miniature.folder("sd3_medium")
    pipe = diffusers.StableDiffusion3Pipeline.from_pretrained(folder)
    prompts = {}
    for name, suffix in SUFFIXES.items():
        words = getattr(pipe, f"tokenizer{suffix}")
        model = getattr(pipe, f"text_encoder{suffix}")
        loader = Pipe()
        for token, by_encoder in embeddings.items():
            state = {token: torch.tensor(by_encoder[name])}
            loader.load_textual_inversion(state, tokenizer=words, text_encoder=model)
        for module in model.modules() if name != "t5" else ():
            # With the published 2 transformers would pool at the largest id, which
            # says itself that it cannot work with added tokens.
            if hasattr(module, "eos_token_id"):
                module.eos_token_id = words.eos_token_id
        converted = loader.maybe_convert_prompt(list(texts), words)
        prompts[f"prompt{suffix}"] = converted
    encoded = pipe.encode_prompt(
        **{"prompt_2": None, "prompt_3": None} | prompts,
        max_sequence_length=LENGTH,
        do_classifier_free_guidance=False,
    )
    return encoded[0], encoded[2]


def test_vectors_act_as_with_diffusers_loader(bundle, tmp_path):
    """Several vectors, two embeddings, over a mesh of eight devices."""
    style(tmp_path / "first.safetensors", clip_l=3, clip_g=2, t5=1)
    style(tmp_path / "second.safetensors", seed=1, clip_l=1, clip_g=1, t5=2)
    ours = bundle.load_embedding(tmp_path / "first.safetensors", "<one>")
    ours = ours.load_embedding(tmp_path / "second.safetensors", "<two>")
    counts = dict(clip_l=3, clip_g=2, t5=1), dict(clip_l=1, clip_g=1, t5=2)
    assert ours.embeddings == {"<one>": counts[0], "<two>": counts[1]}
    texts = ["a <one> fox, <two>", "<two> <one>!", "a red fox"]
    context, pooled = ours.encode_prompts(texts, LENGTH)
    embeddings = {
        token: {name: vectors(name, n, seed) for name, n in counts[seed].items()}
        for seed, token in enumerate(("<one>", "<two>"))
    }
    wanted = theirs(texts, embeddings)
    assert convert.error(context, wanted[0]) < 1e-4
    assert convert.error(pooled, wanted[1]) < 2e-5
    ids = ours.token_ids(texts[:1], LENGTH)
    comfy = ours.token_ids(["a embedding:<one> fox, embedding:<two>"], LENGTH)
    for name in ids:
        np.testing.assert_array_equal(comfy[name], ids[name])


def test_published_rows_are_shared_and_other_prompts_unchanged(bundle, tmp_path):
    ours = bundle.load_embedding(style(tmp_path / "mine.safetensors"), "<s>")
    for name, table in ("clip_l", "tokens"), ("t5", "embedding"):
        before, after = (x.variables[name]["params"] for x in (bundle, ours))
        assert after[table] is before[table]
        added = after["added_tokens"]
        assert added.shape == (32, WIDTHS[name])
        assert added.sharding.spec == before[table].sharding.spec  # None, fsdp
        assert {x.data.shape[1] for x in added.addressable_shards} == {
            WIDTHS[name] // 8
        }
        np.testing.assert_array_equal(added[:2], vectors(name))
    assert bundle.embeddings == {} and ours.bank is not bundle.bank
    for x, y in zip(*(b.encode_prompts(["a fox"], LENGTH) for b in (ours, bundle))):
        np.testing.assert_allclose(x, y, atol=1e-5)


def test_weights_reach_each_vector_and_cuts_name_the_placeholder(bundle, tmp_path):
    ours = bundle.load_embedding(style(tmp_path / "mine.safetensors"), "<s>")
    weighed = ours.encode_prompts(["a (<s>:1.5) fox"], LENGTH, weighting="parentheses")
    plain = ours.encode_prompts(["a <s> fox"], LENGTH)
    moved = np.abs(np.asarray(weighed.context - plain.context))[0].max(-1)
    assert (moved[:77] > 1e-3).nonzero()[0].tolist() == [2, 3]
    assert (moved[77:] > 1e-3).nonzero()[0].tolist() == [1, 2]
    (cut,) = ours.tokens_cut("fox " * 15 + "<s>", LENGTH)
    assert cut == {"t5": "<s>"}


def test_a_second_embedding_is_no_new_program(bundle, tmp_path):
    ours = bundle.load_embedding(style(tmp_path / "one.safetensors"), "<one>")
    ours.encode_prompts(["a <one>"], LENGTH)
    count = compiled.encode_prompts._cache_size()
    more = ours.load_embedding(style(tmp_path / "two.safetensors", 1), "<two>")
    more.encode_prompts(["<two> <one>"], LENGTH)
    assert compiled.encode_prompts._cache_size() == count


def test_files_of_other_tools(bundle, tmp_path):
    """Names of tensors as each tool writes them, and the placeholder that follows."""
    two, clip, t5 = vectors("clip_l"), vectors("clip_l", 1), vectors("t5", 3)
    both = dict(clip_l=2, clip_g=2)
    cases = {  # file, tensors, placeholder in the file, counts
        # diffusers' textual_inversion.py: the placeholder, one vector or several.
        "learned_embeds": ({"<cat-toy>": clip[0]}, "<cat-toy>", dict(clip_l=1)),
        # and textual_inversion_sdxl.py, for the second encoder
        "learned_embeds_2": ({"<cat-toy>": two}, "<cat-toy>", dict(clip_g=2)),
        "t5_only": ({"<slow>": t5}, "<slow>", dict(t5=3)),
        # kohya's train_textual_inversion.py and sdxl_train_textual_inversion.py
        "kohya-one": ({"emb_params": two}, "kohya-one", dict(clip_l=2)),
        "kohya-xl": ({"clip_l": two, "clip_g": two}, "kohya-xl", both),
        # OneTrainer's StableDiffusion3EmbeddingSaver
        "onetrainer": (
            {"clip_l": two, "clip_g": two, "t5": t5},
            "onetrainer",
            both | dict(t5=3),
        ),
        # diffusers' pivotal tuning, before it took the names above
        "pivotal": ({"text_encoders_0": two, "text_encoders_1": two}, "pivotal", both),
    }
    for stem, (tensors, token, counts) in cases.items():
        path = write(tmp_path / f"{stem}.safetensors", **tensors)
        assert bundle.load_embedding(path).embeddings == {token: counts}, stem
    # A folder with diffusers' pair of files
    folder = tmp_path / "pair"
    folder.mkdir()
    for name in "learned_embeds", "learned_embeds_2":
        (tmp_path / f"{name}.safetensors").rename(folder / f"{name}.safetensors")
    pair = {"<cat-toy>": dict(clip_l=1, clip_g=2)}
    assert bundle.load_embedding(folder).embeddings == pair
    # or one after the other
    again = bundle.load_embedding(folder / "learned_embeds.safetensors")
    again = again.load_embedding(folder / "learned_embeds_2.safetensors")
    assert again.embeddings == pair
    # A placeholder for each vector, as diffusers' pivotal tuning is loaded
    split = bundle.load_embedding(tmp_path / "pivotal.safetensors", ["<s0>", "<s1>"])
    one_each = dict(clip_l=1, clip_g=1)
    assert split.embeddings == {"<s0>": one_each, "<s1>": one_each}


WRONG = {
    "width": (dict(clip_l=np.zeros((1, 63))), None, "vectors of width 63; expected 64"),
    "no such width": ({"<s>": np.zeros(768)}, None, "expected 64 .clip_l., 64"),
    "nan": ({"<s>": np.full(64, np.nan)}, None, "NaN or infinite"),
    "a model": ({"a.weight": np.zeros((4, 4))}, None, "no textual inversion"),
    "half known": (dict(clip_l=np.zeros(64), x=np.zeros(64)), None, "not known: x"),
    "output": (dict(clip_l=np.zeros(64), clip_l_out=np.zeros(64)), None, "output"),
    "axes": (dict(clip_l=np.zeros((1, 1, 64))), None, "expected .vectors, width."),
    "spaces": ({"a b": np.zeros(64)}, None, "without spaces"),
    "a word": ({"<s>": np.zeros(64)}, "fox", 'set token="<fox>"'),
    "many tokens": ({"<s>": np.zeros(64)}, ["<a>", "<b>"], "2 tokens for 1 vectors"),
}


@pytest.mark.parametrize("tensors, token, words", WRONG.values(), ids=WRONG)
def test_a_wrong_file_is_one_line(bundle, tmp_path, tensors, token, words):
    path = tmp_path / "wrong.safetensors"
    write(path, **{k: x.astype(np.float32) for k, x in tensors.items()})
    with pytest.raises(UserError, match=words) as error:
        bundle.load_embedding(path, token)
    assert "\n" not in str(error.value) and len(str(error.value)) < 400


def test_pickles_and_what_is_taken_are_refused(bundle, tmp_path):
    torch.save({"<s>": torch.zeros(64)}, tmp_path / "learned_embeds.bin")
    for path in tmp_path / "learned_embeds.bin", tmp_path:
        with pytest.raises(UserError, match="pickle, and loading one may run code"):
            bundle.load_embedding(path)
    with pytest.raises(UserError, match='embedding ".*nowhere'):
        bundle.load_embedding(tmp_path / "nowhere.safetensors")
    path = style(tmp_path / "mine.safetensors")
    ours = bundle.load_embedding(path)
    assert list(ours.embeddings) == ["mine"]
    with pytest.raises(UserError, match='"mine" is loaded already for clip_l'):
        ours.load_embedding(path)
    with pytest.raises(UserError, match="embeddings mine: no layout"):
        sd3_jax.save(ours, tmp_path / "out", "diffusers")


def test_load_takes_embeddings_before_it_reads_weights(tmp_path):
    path = style(tmp_path / "mine.safetensors", t5=2)
    source = str(miniature.folder("sd3_medium"))
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    options = dict(mesh=mesh, dtype="float32", only=("clip_l", "t5"))
    ours = sd3_jax.load(source, embeddings=[f"{path}=<s>"], **options)
    assert ours.embeddings == {"<s>": dict(t5=2)}
    with pytest.raises(UserError, match="has vectors for t5, but the text encoders"):
        options |= dict(only=("clip_l",))
        sd3_jax.load(source, embeddings={str(path): "<s>"}, **options)


def test_a_placeholder_is_no_part_of_another_word(bundle):
    words = PlaceholderTokenizer(bundle.tokenizers["clip_l"], {"sks": (600, 601)})
    ids = lambda text: words(text)["input_ids"]
    assert ids("a sks, sks")[2:4] == [600, 601] and ids("a sks, sks")[5:7] == [600, 601]
    assert not {600, 601} & {*ids("asks sksx")}
    assert words.decode([600, 601, *ids("fox")[1:-1]]) == "sks fox"
    cut = words("sks " * 9, truncation=True, max_length=6, padding="max_length")
    assert cut["input_ids"] == [ids("")[0], 600, 601, 600, 601, ids("")[-1]]
