"""The PyTorch side: a source's components as diffusers and transformers have them.

A single file goes through diffusers' own converters, not through our tables.
"""

from collections.abc import Callable
from pathlib import Path

import diffusers
import numpy as np
import safetensors.torch
import torch
import transformers
from diffusers.loaders import single_file_utils
from etils import epath

from sd3_jax.errors import UserError
from sd3_jax.weights.components import COMPONENTS
from sd3_jax.weights.gguf_header import is_gguf
from sd3_jax.weights.model_files import open_file
from sd3_jax.weights.safetensors import open_folder
from sd3_jax.weights.stored_tensor import QuantizedTensor, Tensors

for library in (diffusers, transformers):  # their advice and bars are not ours to give
    library.utils.logging.set_verbosity_error()
    library.utils.logging.disable_progress_bar()

CLASSES = {
    "denoiser": diffusers.SD3Transformer2DModel,
    "vae": diffusers.AutoencoderKL,
    "clip_l": transformers.CLIPTextModelWithProjection,
    "clip_g": transformers.CLIPTextModelWithProjection,
    "t5": transformers.T5EncoderModel,
}
CONFIGS = {
    "clip_l": transformers.CLIPTextConfig,
    "clip_g": transformers.CLIPTextConfig,
    "t5": transformers.T5Config,
}


def component(path: Path, name: str, config: dict) -> torch.nn.Module:
    """One component in float32, whatever its file holds."""
    if path.is_dir():
        folder = path / COMPONENTS[name].folder
        if not folder.is_dir():
            raise UserError(f"{path}: compare reads a diffusers folder or single file")
        _require_plain(path, open_folder(folder))
        return CLASSES[name].from_pretrained(folder).float().eval()
    _require_plain(path, open_file(path)[0])
    prefix = COMPONENTS[name].prefix
    # Only this component's tensors are read: a single file holds all of them.
    with safetensors.safe_open(path, "pt") as file:
        whole = {k: file.get_tensor(k) for k in file.keys() if k.startswith(prefix)}
        if not whole:  # a file of one component
            whole = {k: file.get_tensor(k) for k in file.keys()}
    whole = {k: x.float() for k, x in whole.items()}
    model, state = CONVERT.get(name, _text)(name, config, whole, prefix)
    missing, extra = model.load_state_dict(state, strict=False)
    # position_ids are buffers of older transformers, and no weights.
    if missing or any(not key.endswith("position_ids") for key in extra):
        raise UserError(f"{path}: {name}: PyTorch misses {missing[:3]}, {extra[:3]}")
    return model.eval()


def _require_plain(path: Path, tensors: Tensors) -> None:
    """UserError for quantized files, which PyTorch's modules do not read."""
    quantized = any(isinstance(x, QuantizedTensor) for x in tensors.values())
    if quantized or path.is_file() and is_gguf(epath.Path(path)):
        raise UserError(
            f"{path}: compare reads plain weights with PyTorch, and these are"
            " quantized; name the model in fp32, fp16 or bf16, or `convert` this one"
            " and compare the result"
        )


def _denoiser(name, config, state, prefix):
    state = single_file_utils.convert_sd3_transformer_checkpoint_to_diffusers(state)
    return diffusers.SD3Transformer2DModel.from_config(config), state


def _vae(name, config, state, prefix):
    model = diffusers.AutoencoderKL.from_config(config)
    return model, single_file_utils.convert_ldm_vae_checkpoint(state, model.config)


def _text(name, config, state, prefix):
    known = {k: v for k, v in config.items() if k != "architectures"}
    model = CLASSES[name](CONFIGS[name](**known))
    state = {k.removeprefix(prefix): x for k, x in state.items()}
    # T5's embedding is stored as "shared" too, and is set from it below.
    state = {k: x for k, x in state.items() if "embed_tokens" not in k}
    if name == "t5":
        state["encoder.embed_tokens.weight"] = state["shared.weight"]
    # Single files omit CLIP-L's projection: Stability's code takes the identity.
    if name == "clip_l" and "text_projection.weight" not in state:
        state["text_projection.weight"] = torch.eye(model.config.projection_dim)
    return model, state


PIPELINE = (
    *("transformer", "vae", "text_encoder", "text_encoder_2", "text_encoder_3"),
    *("tokenizer", "tokenizer_2", "tokenizer_3"),
)
CONVERT: dict[str, Callable] = {"denoiser": _denoiser, "vae": _vae}


def captured(
    module: torch.nn.Module, call: Callable, wanted: dict[str, tuple[str, Callable]]
) -> dict[str, np.ndarray]:
    """Runs call(module); for each label, pick(output) of its submodule."""
    taken, handles = {}, []
    named = dict(module.named_modules())
    # Forward hooks see every submodule's output without changing the model.
    for label, (submodule, pick) in wanted.items():
        # Default arguments bind this iteration's values.
        def hook(_, __, answer, label=label, pick=pick):
            taken[label] = pick(answer).detach().float().numpy()

        handles.append(named[submodule].register_forward_hook(hook))
    with torch.no_grad():
        call(module)
    for handle in handles:
        handle.remove()
    return {label: taken[label] for label in wanted}


def nhwc(x: torch.Tensor) -> torch.Tensor:
    return x.permute(0, 2, 3, 1)


def nchw(x: np.ndarray, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.tensor(np.asarray(x)).permute(0, 3, 1, 2).contiguous().to(dtype)


def pipeline(**parts) -> diffusers.StableDiffusion3Pipeline:
    """diffusers' pipeline of these parts; the others, which it wants too, are None."""
    absent = dict.fromkeys(PIPELINE)
    return diffusers.StableDiffusion3Pipeline(**absent | parts)


def encoded(
    modules: dict[str, torch.nn.Module], tokenizers: dict, texts: list[str], length: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """diffusers' encode_prompt: (context, pooled)."""
    pipe = pipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
        text_encoder=modules.get("clip_l"),
        text_encoder_2=modules.get("clip_g"),
        text_encoder_3=modules.get("t5"),
        tokenizer=tokenizers.get("clip_l"),
        tokenizer_2=tokenizers.get("clip_g"),
        tokenizer_3=tokenizers.get("t5"),
    )
    with torch.no_grad():
        context, _, pooled, _ = pipe.encode_prompt(
            texts,
            None,
            None,
            device="cpu",
            max_sequence_length=length,
            do_classifier_free_guidance=False,
        )
    return context, pooled


def trajectory(
    denoiser: torch.nn.Module,
    vae: torch.nn.Module,
    scheduler: dict,
    cond: tuple,
    uncond: tuple,
    noise: np.ndarray,
    *,
    steps: int,
    scale: float,
) -> tuple[np.ndarray, np.ndarray]:
    """(latents after each step (n, b, h, w, c), images): diffusers' own loop."""
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler.from_config(scheduler)
    pipe = pipeline(transformer=denoiser, vae=vae, scheduler=scheduler)
    pipe.set_progress_bar_config(disable=True)
    visited = []

    def keep(pipe, i, t, kwargs):
        visited.append(nhwc(kwargs["latents"]).float().numpy())
        return {}

    # The pipeline keeps its latents in this dtype, as users get it.
    dtype = denoiser.dtype
    (context, pooled), (no_context, no_pooled) = cond, uncond
    factor = pipe.vae_scale_factor
    images = pipe(
        prompt_embeds=context.to(dtype),
        pooled_prompt_embeds=pooled.to(dtype),
        negative_prompt_embeds=no_context.to(dtype),
        negative_pooled_prompt_embeds=no_pooled.to(dtype),
        height=noise.shape[1] * factor,
        width=noise.shape[2] * factor,
        num_inference_steps=steps,
        guidance_scale=scale,
        latents=nchw(noise, dtype),
        callback_on_step_end=keep,
        output_type="np",
    ).images
    return np.stack(visited), images
