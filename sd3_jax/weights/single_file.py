"""Split a single file into components, by the names that tools write.

Names are those of Stability's files; of ComfyUI, kohya's scripts and A1111, which use
other prefixes; of diffusers; and of OpenCLIP. Every tensor belongs to a component, or
is listed in UNREAD, or the file is refused.
"""

import functools
import logging
import re
from collections.abc import Callable, Collection, Mapping
from typing import NamedTuple

from etils import epath

from sd3_jax.errors import UserError
from sd3_jax.foreign_text import listed
from sd3_jax.weights import text_keys, unsupported_formats
from sd3_jax.weights.components import COMPONENTS
from sd3_jax.weights.safetensors import Tensors

log = logging.getLogger(__name__)
CLIPS = ("clip_l", "clip_g")
WIDTHS = {768: "clip_l", 1280: "clip_g"}  # identify a CLIP without a prefix
# Prefixes by component, in order: a longer one comes before what it begins with.
PREFIXES = {
    "model.diffusion_model.": "denoiser",
    "diffusion_model.": "denoiser",
    "first_stage_model.": "vae",
    "vae.": "vae",
    "text_encoders.clip_l.": "clip_l",
    "text_encoders.clip_g.": "clip_g",
    "text_encoders.t5xxl.": "t5",
    "clip_l.": "clip_l",
    "clip_g.": "clip_g",
    "t5xxl.": "t5",
    "text_encoder.": "clip_l",  # diffusers' folders, merged into one file
    "text_encoder_2.": "clip_g",
    "text_encoder_3.": "t5",
    "model.": "denoiser",
}
# Names without a prefix, as a component's own file has them. encoder.* is the
# autoencoder's or T5's, so the next part of the name decides.
BARE = {
    r"(joint_blocks|transformer_blocks|pos_embed|x_embedder|t_embedder|y_embedder"
    r"|context_embedder|time_text_embed|final_layer|norm_out|proj_out)\b": "denoiser",
    r"(en|de)coder\.(conv_in|conv_out|conv_norm_out|norm_out|mid|mid_block|down|up"
    r"|down_blocks|up_blocks)\b|(post_)?quant_conv\."
    r"|(en|de)coder\.(layers\.)?\d+\.(conv\.\d+\.)?(weight|bias)$": "vae",  # TAESD
    r"(text_model|text_projection|token_embedding|positional_embedding|ln_final"
    r"|transformer\.resblocks|vision_model|visual|visual_projection)\b": "clip",
    r"(en|de)coder\.(block|final_layer_norm|embed_tokens)\b|(shared|lm_head)\.": "t5",
    r"transformer\.": "denoiser",  # diffusers' folder, after transformer.resblocks
}
# Tensors that files hold and nothing reads: the name without its prefix, and why.
CLIP_UNREAD = {
    r"(text_model\.embeddings\.)?position_ids": "the numbers 0, 1, 2, …",
    r"logit_scale|logit_bias": "a factor of CLIP's loss",
    r"input_resolution|context_length|vocab_size|attn_mask": "sizes, and a mask that"
    " follows from them",
    r"(vision_model|visual|visual_projection)\..*|visual\w*": "CLIP's image tower",
}
UNREAD = {
    "denoiser": {
        r"model_ema\.(decay|num_updates|diffusion_model\w*)": "an average of"
        " the weights, which are in the file too",
        r"(model\.)?model_sampling\.sigmas|denoiser\.(log_)?sigmas": "noise levels,"
        " which the scheduler computes",
        r"(model\.)?(betas|logvar|lvlb_weights|alphas_cumprod(_prev)?|posterior_\w+"
        r"|(sqrt|log)_\w*alphas_cumprod)": "the schedule of"
        " another kind of model, which A1111 and LDM add to any file",
    },
    "vae": {r"loss\..*": "the discriminator that it was trained with"},
    "clip_l": CLIP_UNREAD
    | {r"text_projection(\.weight)?": "SD3 takes CLIP-L's vector unprojected"},
    "clip_g": CLIP_UNREAD,
    "t5": {
        r"encoder\.embed_tokens\.weight": "shared.weight once more",
        r"logit_scale": "ComfyUI saves one with each encoder",
        r"decoder\..*|lm_head\..*": "the half of T5 that writes",
    },
}
# OpenCLIP's names as transformers', in which inferred_sizes knows a CLIP's shapes.
OPEN_CLIP_NAMES = {
    "transformer.resblocks.": "text_model.encoder.layers.",
    ".mlp.c_fc.": ".mlp.fc1.",
    "token_embedding.": "text_model.embeddings.token_embedding.",
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
}


class PartTensors(NamedTuple):
    """A component's tensors, by names without prefix, and the layout of these names.

    `measured` has them by the names that inferred_sizes knows; `table`, if not None,
    replaces the component's key table.
    """

    tensors: Tensors
    measured: Tensors
    layout: str
    table: Callable | None = None


def split(
    path: epath.Path,
    tensors: Tensors,
    whole: Collection[str] = (),
    *,
    clip: str | None = None,
) -> dict[str, PartTensors]:
    """The components in a file. Raises UserError for a tensor of none.

    Of components in `whole`, which we wrote, UNREAD tensors are read as well. `clip` is
    the encoder that names without a prefix belong to; by default the width tells.
    """
    # --- a component and a bare name for each tensor
    unsupported_formats.refuse_others(path, tensors)
    groups: dict[str, Tensors] = {}
    unplaced = []
    for key, tensor in tensors.items():
        name, bare_key = place(key)
        if name is None:  # it may still stand beside a component: see _is_unread
            unplaced.append(key)
            continue
        group = groups.setdefault(name, {})
        if bare_key in group:
            raise UserError(
                f"{path}: {key}: its part has {bare_key} twice, under two prefixes;"
                " remove one of them"
            )
        group[bare_key] = tensor
    # --- set aside what nothing reads; a component of nothing else is not there
    if clip is not None and "clip" in groups:
        groups[clip] = groups.get(clip, {}) | groups.pop("clip")
    else:
        groups = _clips_by_width(path, groups, unplaced)
    parts, unread = {}, {}
    for name in COMPONENTS:
        patterns = {} if name in whole else UNREAD[name]
        if part := _read(name, groups.get(name, {}), patterns, unread):
            parts[name] = part
        else:
            unplaced += groups.get(name, {})
    # --- every tensor is accounted for, or the file is refused
    unknown = [key for key in unplaced if not _is_unread(key, parts, unread)]
    if not parts:
        raise UserError(
            f"{path}: not a model of this family; it holds {listed(unknown)}; expected"
            f" names that begin with {', '.join(_usual())}"
        )
    if unknown:
        raise UserError(
            f"{path}: {len(unknown)} tensors belong to no known part:"
            f" {listed(unknown)}; expected names that begin with {', '.join(_usual())}"
        )
    # Not in silence: the log lists what was left out, and why.
    for reason, keys in unread.items():
        log.info("%s: skipped %s (%s)", path.name, listed(keys), reason)
    return {name: _part(name, part) for name, part in parts.items()}


def place(key: str) -> tuple[str | None, str]:
    """(component, name in it) of a tensor.

    The component is "clip" where the width decides, and None for an unknown name.
    """
    for prefix, name in PREFIXES.items():
        if key.startswith(prefix):
            bare_key = key.removeprefix(prefix)
            if prefix == "model." and _matches(bare_key, UNREAD["denoiser"]):
                return None, key
            # Text encoders are "transformer." below their prefix, except in OpenCLIP's
            # names, which have "transformer.resblocks." of their own.
            wrapped = name not in ("denoiser", "vae")  # in ComfyUI's and Stability's
            if wrapped and not bare_key.startswith("transformer.resblocks."):
                bare_key = bare_key.removeprefix("transformer.")
            return name, bare_key
    for pattern, name in BARE.items():
        if match := re.match(pattern, key):
            return name, key[match.end() :] if match[0] == "transformer." else key
    return None, key


def _clips_by_width(
    path: epath.Path, groups: dict[str, Tensors], unplaced: list[str]
) -> dict[str, Tensors]:
    """`groups` with "clip" replaced by CLIP-L or CLIP-G; UserError for other widths.

    Both have the same names, so only the width tells them apart, never the file's name.
    Where a prefix tells, the width must agree.
    """
    for name in CLIPS:
        width = _width(groups.get(name, {}))
        if WIDTHS.get(width, name) != name:
            raise UserError(
                f"{path}: {name} is {width} wide, the width of {WIDTHS[width]}; its"
                f" names must begin with text_encoders.{WIDTHS[width]}."
            )
    alone = groups.pop("clip", {})  # without a prefix
    # Nothing but what CLIP's files hold beside the text tower.
    if all(_matches(key, CLIP_UNREAD) for key in alone):
        unplaced += alone
        return groups
    width = _width(alone)
    if width is None:
        raise UserError(
            f"{path}: holds part of a CLIP, without its token_embedding:"
            f" {listed(alone)}"
        )
    if width not in WIDTHS:
        raise UserError(
            f"{path}: a CLIP of width {width}: expected 768 (CLIP-L) or 1280 (CLIP-G),"
            " or names that begin with text_encoders.clip_l. or text_encoders.clip_g."
        )
    name = WIDTHS[width]
    if twice := groups.get(name, {}).keys() & alone.keys():
        raise UserError(
            f"{path}: {name} has {min(twice)} twice, with and without prefix"
        )
    return groups | {name: groups.get(name, {}) | alone}


def _width(clip: Tensors) -> int | None:
    """The width of a CLIP by its token embedding (vocab, width), or None."""
    for key in (
        "text_model.embeddings.token_embedding.weight",
        "token_embedding.weight",
    ):
        if key in clip and len(clip[key].shape) == 2:
            return clip[key].shape[1]
    return None


def _read(
    name: str, tensors: Tensors, patterns: Mapping[str, str], unread: dict[str, list]
) -> Tensors:
    """A component without the tensors that nothing reads; {} if none is left.

    Adds those to `unread`, by reason.
    """
    part = {k: x for k, x in tensors.items() if not _matches(k, patterns)}
    shared = with_shared(tensors).get("shared.weight")
    if name == "t5" and part and shared is not None:
        part["shared.weight"] = shared
    for key in tensors if part else ():
        if reason := _matches(key, patterns):
            unread.setdefault(f"{name}: {reason}", []).append(key)
    return part


def with_shared(t5: Tensors) -> Tensors:
    """T5's tensors with its embedding as shared.weight."""
    # PyTorch ties two names to one tensor, and tools keep either of them.
    if text_keys.SHARED in t5 or text_keys.EMBED_TOKENS not in t5:
        return t5
    return t5 | {text_keys.SHARED: t5[text_keys.EMBED_TOKENS]}


def _is_unread(key: str, parts: Mapping, unread: dict[str, list]) -> bool:
    """Whether a tensor of no component is one that tools save beside one that is there.

    Adds it to `unread` if so.
    """
    for name in parts:
        if reason := _matches(key, UNREAD[name]):
            unread.setdefault(f"{name}: {reason}", []).append(key)
            return True
    return False


def _matches(key: str, patterns: Mapping[str, str]) -> str | None:
    """The reason of the first pattern that matches the whole name."""
    return next((why for p, why in patterns.items() if re.fullmatch(p, key)), None)


def _usual() -> list[str]:
    return [component.prefix for component in COMPONENTS.values()]


def _part(name: str, tensors: Tensors) -> PartTensors:
    # The layout is told by names that only one of the two has.
    begins = lambda *starts: any(key.startswith(starts) for key in tensors)
    if name in CLIPS and begins("transformer.resblocks."):
        projected = name != "clip_l"
        table = functools.partial(text_keys.open_clip_table, projected=projected)
        # Sizes are inferred by transformers' names, values read by OpenCLIP's.
        measured = {_renamed(key): x for key, x in tensors.items()}
        return PartTensors(tensors, measured, "original", table)
    of_diffusers = {
        "denoiser": begins("transformer_blocks.") and not begins("joint_blocks."),
        "vae": begins("encoder.down_blocks.", "decoder.up_blocks.", "decoder.layers."),
    }.get(name)
    return PartTensors(tensors, tensors, "diffusers" if of_diffusers else "original")


def _renamed(key: str) -> str:
    for open_clip, transformers in OPEN_CLIP_NAMES.items():
        key = key.replace(open_clip, transformers)
    return key
