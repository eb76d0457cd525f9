"""Read and check published configurations in diffusers' and transformers' fields.

There is one table per class, with every field of that class. A field is honoured, or
restricted to the values that are implemented, or free, because nothing depends on it.
Configurations are compared with the tensors beside them before anything is traced.
"""

from collections.abc import Mapping
from typing import Any

from sd3_jax.errors import UserError
from sd3_jax.weights import inferred_sizes
from sd3_jax.weights.config_fields import (
    LEVELS,
    WIDTH,
    Field,
    all_of,
    as_json,
    count,
    counts,
    flag,
    free,
    only,
    or_null,
    real,
)
from sd3_jax.weights.inferred_sizes import HINT, INNER, T5_INNER, Shapes

WORDS, LAYERS = 2**20, 1024  # at most; no published model is near


# --- the tables

# Of weights that a library has quantized: those that bitsandbytes_layers reads.
QUANTIZATION, METHOD = "quantization_config", "bitsandbytes"
_READ = f"null or quant_method {METHOD}; name the model in bfloat16, or its GGUF"
_reads = lambda x: (
    x is None or isinstance(x, Mapping) and x.get("quant_method") == METHOD
)
WHOLE = {QUANTIZATION: Field(None, _READ, _reads, guard=True)}
DENOISER = WHOLE | {
    "_class_name": only("SD3Transformer2DModel"),
    "sample_size": count(128),
    "patch_size": count(2, 64),
    "in_channels": count(16),
    "out_channels": or_null(count(16)),  # null: as in_channels
    "num_layers": count(18, LAYERS),
    "attention_head_dim": count(64),
    "num_attention_heads": count(18),
    "joint_attention_dim": count(4096),
    "caption_projection_dim": count(1152),
    "pooled_projection_dim": count(2048),
    "pos_embed_max_size": count(96, 4096),  # tokens a side
    "dual_attention_layers": or_null(counts((), LAYERS, least=0, longest=LAYERS)),
    "qk_norm": only(None, "rms_norm"),
}
CONTROLNET = DENOISER | {
    "_class_name": only("SD3ControlNetModel"),
    "joint_attention_dim": or_null(count(4096)),  # null: of a single stream
    "pos_embed_max_size": or_null(count(96, 4096)),
    "extra_conditioning_channels": count(0, least=0),
    "pos_embed_type": only("sincos", None),
    "use_pos_embed": flag(True),
    "force_zeros_for_pooled_projection": flag(True),
    **free("control_type"),  # not diffusers': what the hints are
}
VAE = WHOLE | {
    "_class_name": only("AutoencoderKL"),
    "in_channels": only(3),
    "out_channels": only(3),
    "down_block_types": all_of("DownEncoderBlock2D"),
    "up_block_types": all_of("UpDecoderBlock2D"),
    "block_out_channels": counts((64,), WIDTH, least=1, longest=LEVELS),
    "layers_per_block": count(1, LAYERS),
    "act_fn": only("silu", "swish"),  # two names of one function
    "latent_channels": count(4),
    "norm_num_groups": count(32),
    "scaling_factor": real(0.18215, 1e-6, 1e6),  # the default is Stable Diffusion 1's
    "shift_factor": or_null(real(None, -1e6, 1e6)),
    "latents_mean": only(None),
    "latents_std": only(None),
    # SD3's has none; a file without the fields is of an older autoencoder that has.
    "use_quant_conv": only(False, default=True),
    "use_post_quant_conv": only(False, default=True),
    "mid_block_add_attention": flag(True),
    # For diffusers' tiling, and its choice of precision.
    **free("sample_size force_upcast"),
}
BLOCKS = (64, 64, 64, 64)
TAESD = WHOLE | {
    "_class_name": only("AutoencoderTiny"),
    "in_channels": only(3),
    "out_channels": only(3),
    "encoder_block_out_channels": counts(BLOCKS, WIDTH, least=1, longest=LEVELS),
    "decoder_block_out_channels": counts(BLOCKS, WIDTH, least=1, longest=LEVELS),
    "num_encoder_blocks": counts((1, 3, 3, 3), LAYERS, least=0, longest=LEVELS),
    "num_decoder_blocks": counts((3, 3, 3, 1), LAYERS, least=0, longest=LEVELS),
    "act_fn": only("relu"),
    "upsample_fn": only("nearest"),
    "upsampling_scaling_factor": only(2),
    "latent_channels": count(4),
    # Its latents are the denoiser's own.
    "scaling_factor": only(1.0, 1),
    "shift_factor": only(0.0, 0, None),
    # Of latents as bytes, of AutoencoderKL, and of diffusers' precision.
    **free("latent_magnitude latent_shift block_out_channels force_upcast"),
}
# What every configuration of transformers may have: bookkeeping, settings of training,
# of heads and of generation, which old versions wrote in full.
TRANSFORMERS = WHOLE | {
    # Each of these would change the computation.
    "pruned_heads": only({}, guard=True),
    "per_layer_config": only(None, guard=True),
    "is_decoder": only(False, guard=True),
    "add_cross_attention": only(False, guard=True),
    **free(
        "architectures transformers_version torch_dtype dtype torchscript use_bfloat16"
        " name_or_path chunk_size_feed_forward tf_legacy_loss tokenizer_class prefix"
        " output_attentions output_hidden_states output_past output_scores return_dict"
        " return_dict_in_generate use_cache initializer_factor initializer_range"
        " attention_dropout dropout dropout_rate classifier_dropout finetuning_task"
        " id2label label2id num_labels problem_type task_specific_params"
        # The tokenizer pads and ends; T5's ends are tied for its decoder's sake alone.
        " pad_token_id bos_token_id sep_token_id decoder_start_token_id"
        " is_encoder_decoder cross_attention_hidden_size tie_encoder_decoder"
        " scale_decoder_outputs"
        " tie_word_embeddings tie_last_hidden_states bad_words_ids"
        " begin_suppress_tokens diversity_penalty do_sample early_stopping"
        " encoder_no_repeat_ngram_size exponential_decay_length_penalty"
        " forced_bos_token_id forced_eos_token_id length_penalty max_length min_length"
        " no_repeat_ngram_size num_beam_groups num_beams num_return_sequences"
        " remove_invalid_values repetition_penalty suppress_tokens temperature top_k"
        " top_p typical_p gradient_checkpointing"
    ),
}
TOWER = TRANSFORMERS | {  # what CLIP's two have in common
    "hidden_act": only("quick_gelu", "gelu"),
    "layer_norm_eps": only(1e-5),  # LayerNorm's default in models/clip.py
    "projection_dim": count(512),
}
CLIP_TEXT = TOWER | {
    "model_type": only("clip_text_model"),
    "vocab_size": count(49408, WORDS),
    "hidden_size": count(512),
    "intermediate_size": count(2048),
    "num_hidden_layers": count(12, LAYERS, least=2),  # the last but one is read
    "num_attention_heads": count(8),
    "max_position_embeddings": count(77),
    "eos_token_id": count(49407, WORDS, least=0),  # files say 2: clip.LEGACY_EOS
}
CLIP_VISION = TOWER | {
    "model_type": only("clip_vision_model"),
    "hidden_size": count(768),
    "intermediate_size": count(3072),
    "num_hidden_layers": count(12, LAYERS),
    "num_attention_heads": count(12),
    "num_channels": only(3),
    "image_size": count(224),
    "patch_size": count(32),
}
T5 = TRANSFORMERS | {
    "model_type": only("t5"),
    "vocab_size": count(32128, WORDS),
    "d_model": count(512),
    "d_kv": count(64),
    "d_ff": count(2048),
    "num_layers": count(6, LAYERS),
    "num_heads": count(8),
    "relative_attention_num_buckets": only(32),  # T5Stack's defaults
    "relative_attention_max_distance": only(128),
    "layer_norm_epsilon": only(1e-6),
    "feed_forward_proj": only("gated-gelu", default="relu"),  # relu is T5 1.0's
    "is_gated_act": only(True, guard=True),
    "dense_act_fn": only("gelu_new", guard=True),
    **free("num_decoder_layers eos_token_id"),
}
# In SD3 the CLIPs' 77 tokens come before T5's: another length is not implemented.
SD3_TEXT = CLIP_TEXT | {"max_position_embeddings": only(77)}
TABLES = {
    "denoiser": DENOISER,
    "controlnet": CONTROLNET,
    "vae": VAE,
    "taesd": TAESD,
    "clip_l": SD3_TEXT,
    "clip_g": SD3_TEXT,
    "t5": T5,
    "clip_text": CLIP_TEXT,
    "clip_vision": CLIP_VISION,
}


# --- reading


def read(kind: str, config: Any, where: str = "") -> dict:
    """The configuration with defaults filled in.

    `where` is its file, for messages. Raises UserError, which names the field, for a
    value that is not accepted. Fields that no table has are kept: see `unknown`.
    """
    where = where or kind
    if not isinstance(config, Mapping):
        raise UserError(f"{where}: {as_json(config)}: expected a JSON object")
    table, values = TABLES[kind], dict(config)
    for name, field in table.items():
        if field is None:  # free
            continue
        value = config.get(name, field.default)
        if not field.guard:
            values[name] = value
        if not field.accepts(value):
            # A default may be what is wrong: say that the file does not have it.
            lack = "" if name in config else " (the default of a file without it)"
            raise UserError(
                f"{where}: {name} = {as_json(value)}{lack}: expected {field.allowed}"
            )
    for name, value, wanted in RULES[kind](values):
        raise UserError(f"{where}: {name} = {as_json(value)}: expected {wanted}")
    values.pop(QUANTIZATION, None)  # weights are dequantized while they are read
    return values


def unknown(kind: str, config: Mapping) -> list[str]:
    """Fields that nothing reads, for a warning. Those that begin with _ are notes."""
    return [k for k in config if k not in TABLES[kind] and not str(k).startswith("_")]


# --- rules between fields: each yields (field, value, what is wanted) for a fault


def _denoiser_rules(c: dict):
    if c["out_channels"] is None:
        c["out_channels"] = c["in_channels"]
    # Normalised in place, so that what follows sees a number and a list.
    c["dual_attention_layers"] = dual = list(c["dual_attention_layers"] or ())
    inner = c["num_attention_heads"] * c["attention_head_dim"]
    if inner % 4 or inner > WIDTH:  # the table of positions has sin and cos of x and y
        words = f"num_attention_heads x it a multiple of 4, at most {WIDTH}"
        yield "attention_head_dim", c["attention_head_dim"], words
    joint = c["joint_attention_dim"] is not None
    if joint and c["caption_projection_dim"] != inner:
        words = f"num_attention_heads x attention_head_dim = {inner}"
        yield "caption_projection_dim", c["caption_projection_dim"], words
    # The model has two scans: dual blocks first, then the others.
    if dual != list(range(len(dual))):
        yield "dual_attention_layers", dual, "the first layers, [0, 1, …]"


def _mmdit_rules(c: dict):
    yield from _denoiser_rules(c)
    if c["out_channels"] != c["in_channels"]:
        yield "out_channels", c["out_channels"], f"in_channels = {c['in_channels']}"
    # The last block is not of the scans, and has no dual attention.
    if len(c["dual_attention_layers"]) >= c["num_layers"]:
        words = f"fewer than num_layers = {c['num_layers']}"
        yield "dual_attention_layers", c["dual_attention_layers"], words


def _controlnet_rules(c: dict):
    yield from _denoiser_rules(c)
    if len(c["dual_attention_layers"]) > c["num_layers"]:
        words = f"at most num_layers = {c['num_layers']}"
        yield "dual_attention_layers", c["dual_attention_layers"], words
    if c["joint_attention_dim"] is None:  # its image tokens are the denoiser's
        if c["use_pos_embed"]:
            words = (
                "false, because joint_attention_dim is null: a single stream has none"
            )
            yield "use_pos_embed", True, words
        return
    for name, wanted in ("use_pos_embed", True), ("pos_embed_type", "sincos"):
        if c[name] != wanted:
            yield (
                name,
                c[name],
                f"{as_json(wanted)}, because joint_attention_dim is not null",
            )
    if c["pos_embed_max_size"] is None:
        yield (
            "pos_embed_max_size",
            None,
            "a number, because joint_attention_dim is not null",
        )


def _vae_rules(c: dict):
    levels, groups = c["block_out_channels"], c["norm_num_groups"]
    if not levels or any(n % groups for n in levels):
        words = f"multiples of norm_num_groups = {groups}"
        yield "block_out_channels", levels, words
    for name in "down_block_types", "up_block_types":
        if len(c[name]) != len(levels):
            yield (
                name,
                c[name],
                f"one for each of block_out_channels = {as_json(levels)}",
            )


def _taesd_rules(c: dict):
    widths = c["encoder_block_out_channels"], c["decoder_block_out_channels"]
    # As in diffusers, which registers this field for its pipelines.
    c["block_out_channels"] = list(widths[1])
    for half, levels in zip(("encoder", "decoder"), widths):
        # A block's width is that of its level's input: diffusers has no way between.
        if len({*levels}) != 1:
            yield f"{half}_block_out_channels", levels, "equal numbers"
        if len(c[f"num_{half}_blocks"]) != len(levels):
            words = f"one for each of {half}_block_out_channels = {as_json(levels)}"
            yield f"num_{half}_blocks", c[f"num_{half}_blocks"], words
    if len(widths[0]) != len(widths[1]):
        yield "encoder_block_out_channels", widths[0], f"{len(widths[1])} levels"


def _heads_rules(c: dict):
    heads, width = c["num_attention_heads"], c["hidden_size"]
    if width % heads:
        yield "num_attention_heads", heads, f"a divisor of hidden_size = {width}"


def _clip_rules(c: dict):
    yield from _heads_rules(c)
    eos, words = c["eos_token_id"], c["vocab_size"]
    if eos >= words:
        yield "eos_token_id", eos, f"one below vocab_size = {words}"


def _vision_rules(c: dict):
    yield from _heads_rules(c)
    if c["image_size"] % c["patch_size"]:
        words = f"a multiple of patch_size = {c['patch_size']}"
        yield "image_size", c["image_size"], words


def _t5_rules(c: dict):
    if c["num_heads"] * c["d_kv"] > WIDTH:
        yield "d_kv", c["d_kv"], f"num_heads x d_kv of at most {WIDTH}"


RULES = {
    "denoiser": _mmdit_rules,
    "controlnet": _controlnet_rules,
    "vae": _vae_rules,
    "taesd": _taesd_rules,
    "clip_l": _clip_rules,
    "clip_g": _clip_rules,
    "t5": _t5_rules,
    "clip_text": _clip_rules,
    "clip_vision": _vision_rules,
}


def agree(kind: str, config: dict, tensors: Shapes, layout: str, where: str) -> None:
    """UserError if the tensors contradict a configuration from `read`.

    A missing tensor contradicts nothing: loading lists it.
    """
    said = config | _products(kind, config)
    for name, (value, reason) in inferred_sizes.measured(
        kind, tensors, layout, where
    ).items():
        if isinstance(value, list):
            same = list(said[name]) == value
        else:
            same = said[name] == value
        if not same:
            raise UserError(
                f"{where}: {name} = {as_json(said[name])}: expected {as_json(value)},"
                f" because {reason}"
            )


def _products(kind: str, c: dict) -> dict[str, int]:
    """Products of two fields, which shapes tell."""
    if kind == "t5":
        return {T5_INNER: c["num_heads"] * c["d_kv"]}
    if kind not in ("denoiser", "controlnet"):
        return {}
    extra = c.get("extra_conditioning_channels", 0)
    return {
        INNER: c["num_attention_heads"] * c["attention_head_dim"],
        HINT: c["in_channels"] + extra,
    }


def fit(configs: Mapping[str, dict], source: str) -> None:
    """UserError if components are of different models.

    The text encoders' widths and the latent channels must be what the denoiser takes.
    """
    if "denoiser" not in configs:
        return
    denoiser = configs["denoiser"]
    pooled, context = denoiser["pooled_projection_dim"], denoiser["joint_attention_dim"]
    clips = [configs[name] for name in ("clip_l", "clip_g") if name in configs]
    for name, most in ("hidden_size", context), ("projection_dim", pooled):
        size = sum(config[name] for config in clips)  # side by side, then zeros
        if size > most:
            raise UserError(
                f"{source}: the text encoders are of another model: {name} of both"
                f" CLIPs is {size}; must be at most that of the denoiser, {most}"
            )
    # Zeros stand in for CLIP-L, and their number is known of the pooled vector alone.
    clip_g = {} if "clip_l" in configs else configs.get("clip_g", {})
    if clip_g.get("hidden_size") != clip_g.get("projection_dim"):
        raise UserError(
            f"{source}: the width of the missing clip_l is not known, because clip_g's"
            " hidden_size and projection_dim differ; add clip_l"
        )
    for part, name, wanted in (
        ("t5", "d_model", context),
        ("vae", "latent_channels", denoiser["in_channels"]),
    ):
        if part in configs and configs[part][name] != wanted:
            raise UserError(
                f"{source}: {part} is of another model: {name} = {configs[part][name]};"
                f" must be {wanted} as in the denoiser"
            )
