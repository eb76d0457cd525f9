"""Names of tensors in adapter files: the component, layer and role that each one means.

One table for each part of a name: PREFIXES for the component, ROLES for the role. The
layer's name in between is of diffusers' layout or the original one, with dots or with
underscores; adapter_files finds it in the model.
"""

import re
from collections.abc import Collection, Mapping
from typing import NamedTuple

from sd3_jax.errors import UserError, near
from sd3_jax.foreign_text import listed
from sd3_jax.weights.safetensors import Tensors

WRAPPED = "base_model.model."  # PEFT's prefix of all names that it saves
# Components by prefix. ComfyUI: comfy/lora.py (model_lora_keys_unet, _clip); kohya:
# networks/lora_sd3.py (LORA_PREFIX_...); OneTrainer: convert_sd3_lora.py, whose older
# files have underscores and whose newer ones ("omi") have ComfyUI-like names.
PREFIXES = {
    "transformer.": "denoiser",  # diffusers, and OneTrainer's omi
    "text_encoder.": "clip_l",
    "text_encoder_2.": "clip_g",
    "text_encoder_3.": "t5",
    "diffusion_model.": "denoiser",  # ComfyUI
    "model.diffusion_model.": "denoiser",
    "text_encoders.clip_l.transformer.": "clip_l",
    "text_encoders.clip_g.transformer.": "clip_g",
    "text_encoders.t5xxl.transformer.": "t5",
    "clip_l.transformer.": "clip_l",
    "clip_g.transformer.": "clip_g",
    "t5xxl.transformer.": "t5",
    "clip_l.": "clip_l",
    "clip_g.": "clip_g",
    "t5.": "t5",
    "lora_unet_": "denoiser",  # kohya; OneTrainer has a dot in some versions
    "lora_transformer_": "denoiser",
    "lora_transformer.": "denoiser",
    "lora_te1_": "clip_l",
    "lora_te2_": "clip_g",
    "lora_te3_": "t5",
    "lora_te1.": "clip_l",
    "lora_te2.": "clip_g",
    "lora_te3.": "t5",
}
LONGEST = 200  # characters of a name: patterns take longer for longer ones
LYCORIS = "lycoris_"  # of one model, like names without a prefix
# Beginnings of names without a prefix, with underscores for dots.
BARE = {
    ("text_model_", "encoder_layers_", "text_projection"): "clip",
    ("encoder_block_", "shared_"): "t5",
}
# Roles by their marks in names: of LoRA A, B and mid, and so on. A mark may be followed
# by PEFT's adapter name and by "weight" or "bias".
ROLES = {
    **dict.fromkeys(
        ("lora_A", "lora_down", "lora.down", "lora_linear_layer.down"), "A"
    ),
    **dict.fromkeys(("lora_B", "lora_up", "lora.up", "lora_linear_layer.up"), "B"),
    "lora_mid": "mid",  # LoCon: a convolution between A and B
    "lora_magnitude_vector": "magnitude",  # DoRA in PEFT
    "dora_scale": "dora_scale",
    **{f"lokr_{x}": f"lokr_{x}" for x in "w1 w1_a w1_b w2 w2_a w2_b t2".split()},
    **{f"hada_{x}": f"hada_{x}" for x in "w1_a w1_b w2_a w2_b t1 t2".split()},
    **dict.fromkeys(("diff", "w_norm"), "diff"),
    **dict.fromkeys(("diff_b", "b_norm"), "diff_b"),
    "set_weight": "weight",  # ComfyUI: the whole weight
    "alpha": "alpha",
}
MARKS = "|".join(map(re.escape, sorted(ROLES, key=len, reverse=True)))
NAME = re.compile(rf"(.+)\.({MARKS})((?:\.[^.]+)*)")
# A weight that PEFT saves whole, of modules_to_save or with bias="all".
WHOLE = re.compile(r"(.+?)(?:\.base_layer|\.modules_to_save\.[^.]+)?\.(weight|bias)")
# Before version 0.20 diffusers kept LoRAs in attention processors.
OLD = re.compile(r"(.+\.)to_(q|k|v|out)_lora\.(down|up)\.weight")
# Parts of names by which a tensor is of a method that is not implemented.
REFUSED = {
    "oft_": "OFT",
    "boft_": "BOFT",
    "vera_": "VeRA",
    "lora_E": "AdaLoRA",
    "lora_embedding_": "a LoRA of embeddings",
    "on_input": "IA3",
    "reshape_weight": "a change of shape",
    "bundle_emb.": "an embedding",
}
GLORA = re.compile(r"\.[ab][12]\.weight$")
# Models by parts of their names that SD3's do not have; the first that matches counts.
FOREIGN = {
    "Flux": r"double_blocks|single_blocks|single_transformer_blocks",
    "AuraFlow": r"joint_transformer_blocks|double_layers",
    "Stable Cascade": r"^lora_prior|^prior\.",
    "PixArt, Sana or LTX": r"adaln_single|caption_projection",
    "Qwen-Image": r"(img|txt)_(mod|mlp)\b|(img|txt)_mod_",
    "HunyuanVideo": r"token_refiner",
    "Lumina or Z-Image": r"noise_refiner|context_refiner",
    "Wan or another video model": r"blocks[._]\d+[._](self_attn|cross_attn|ffn)[._]",
    "Stable Diffusion XL": r"(blocks?|attentions)[._].*transformer_blocks[._][1-9]"
    r"|add_embedding|^lora_te2_.*resblocks",
    "Stable Diffusion 1, 2 or XL": r"(down|mid|up)_blocks?[._]"
    r"|(input|middle|output)_blocks?[._]|^lora_te_|^unet\.",
}


class Name(NamedTuple):
    """What a tensor's name means; `adapter` is PEFT's, where it was left in names."""

    component: str
    module: str
    role: str
    adapter: str | None = None


def parse(
    where: str, tensors: Tensors, *, whole: Collection[str] = ()
) -> dict[str, Name]:
    """The Name of each tensor.

    `whole` names components of which weights may be saved whole. Raises UserError with
    the number of the unknown names and the first ten.
    """
    refuse_foreign(where, tensors)
    # One name with a prefix is enough: then names without one are faults and no guess
    # is made.
    bare = not any(component_of(name.removeprefix(WRAPPED))[0] for name in tensors)
    # Names without a prefix are all of one component: PEFT saves one model.
    owner = _owner(tensors) if bare else ""
    names, faults = {}, {}
    for key in tensors:
        name = _parse(key, owner, whole)
        if isinstance(name, str):
            faults[key] = name
        else:
            names[key] = name
    if faults:
        raise UserError(
            f"{where}: {len(faults)} of its {len(tensors)} tensors cannot be applied:"
            f" {listed((f'{key} ({fault})' for key, fault in faults.items()), '; ')}"
        )
    return names


def component_of(name: str) -> tuple[str, str]:
    """(component, rest of the name) by the name's prefix; ("", name) without one."""
    # The longest prefix: "clip_l.transformer." begins with "clip_l.".
    starts = [prefix for prefix in PREFIXES if name.startswith(prefix)]
    if not starts:
        return "", name.removeprefix(LYCORIS)
    prefix = max(starts, key=len)
    return PREFIXES[prefix], name.removeprefix(prefix)


def refuse_foreign(where: str, names: Collection[str]) -> None:
    """UserError if names are of an adapter of another model than SD3."""
    for model, pattern in FOREIGN.items():
        matching = [name for name in names if re.search(pattern, name)]
        if matching:
            raise UserError(
                f"{where}: is an adapter of {model} ({listed(matching[:1])}); expected"
                " one of Stable Diffusion 3 or 3.5"
            )


def _parse(key: str, owner: str, whole: Collection[str]) -> Name | str:
    """The Name, or why there is none."""
    if len(key) > LONGEST:
        return f"expected at most {LONGEST} characters"
    for mark, method in REFUSED.items():
        if mark in key:
            return f"{method} is not supported"
    # By a pattern, since a1 or b2 may be a part of any name.
    if GLORA.search(key):
        return "GLoRA is not supported"
    component, rest = component_of(key.removeprefix(WRAPPED))
    component = component or owner
    if not component:
        prefix = key.partition(".")[0]
        guess = near(prefix, [start.rstrip("._") for start in PREFIXES])
        hint = f'; did you mean "{guess}"?' if guess else ""
        return f"of no known component{hint}"
    rest = _modern(rest, component)
    if match := NAME.fullmatch(rest):
        return _with_role(component, *match.groups())
    if (match := WHOLE.fullmatch(rest)) and component in whole:
        return Name(component, *match.groups())
    return "unknown; expected a name such as MODULE.lora_A.weight"


def _with_role(component: str, module: str, mark: str, end: str) -> Name | str:
    role, rest = ROLES[mark], end.split(".")[1:]
    last = rest.pop() if rest and rest[-1] in ("weight", "bias") else "weight"
    if last == "bias":  # PEFT's lora_bias=True
        role = f"{role}_bias"
    # PEFT puts at most its adapter's name between the mark and the end.
    if len(rest) > 1 or role.endswith("_bias") and role != "B_bias":
        return "unknown; expected a name such as MODULE.lora_A.weight"
    if role == "diff" and module.endswith(".bias"):  # ComfyUI: of any tensor
        module, role = module.removesuffix(".bias"), "diff_b"
    return Name(component, module, role, rest[0] if rest else None)


def _modern(name: str, component: str) -> str:
    """A name of diffusers' attention processors as that of the linear map."""
    name = name.replace(".processor.", ".")
    if not (match := OLD.fullmatch(name)):
        return name
    before, which, side = match.groups()
    if component != "denoiser":
        # transformers' CLIP names its maps q_proj and out_proj where diffusers has to_q
        # and to_out.0.
        last = {"out": "out_proj"}.get(which, f"{which}_proj")
    else:
        last = "to_out.0" if which == "out" else f"to_{which}"
    return f"{before}{last}.lora.{side}.weight"


def _owner(tensors: Mapping) -> str:
    """The component of a file whose names have no prefix.

    Both CLIPs have the same names: the width decides between them.
    """
    flat = {
        key.removeprefix(WRAPPED).removeprefix(LYCORIS).replace(".", "_"): x
        for key, x in tensors.items()
    }
    owners = {
        owner
        for starts, owner in BARE.items()
        if any(name.startswith(starts) for name in flat)
    }
    if "clip" not in owners:
        return owners.pop() if owners else "denoiser"
    # A's inputs are as wide as the tower, but for fc2's, which are the MLP's.
    inputs = [
        x.shape[-1]
        for name, x in flat.items()
        if re.search(r"(?<!fc2)_(lora_A|lora\S*down)", name) and len(x.shape) > 1
    ]
    outputs = [x.shape[0] for name, x in flat.items() if "fc2_lora_B" in name]
    # CLIP-L is 768 wide, CLIP-G 1280. Without a LoRA's matrices the largest axis of any
    # other tensor has to do: CLIP-L's is its MLP's, 3072.
    sizes = inputs + outputs
    if not sizes:
        largest = max((max(x.shape, default=0) for x in flat.values()), default=0)
        return "clip_g" if largest % 1280 == 0 and largest else "clip_l"
    return "clip_g" if min(sizes) > 1024 else "clip_l"
