"""PyTorch's side of a case, with diffusers and transformers, as their users run it:
`python -m sd3_jax.tools.benchmark.torch_side`. No jax in this process."""

import gc
import os
import time
from collections.abc import Callable

import numpy as np
import safetensors.torch
import torch

from sd3_jax.tools.benchmark import cases, process_memory, side_worker
from sd3_jax.tools.benchmark.cases import Spec

GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if GPU else "cpu")


class Case:
    """A function of no arguments, compiled if spec["mode"] says so."""

    def __init__(self, spec: Spec):
        self.spec = spec
        inputs = {k: torch.from_numpy(x) for k, x in cases.inputs(spec).items()}
        # (b, h, w, c) → (b, c, h, w)
        inputs = {k: nchw(x).to(DEVICE) for k, x in inputs.items()}
        # PyTorch's embeddings want int64 ids.
        inputs = {k: x.long() if k == "ids" else x for k, x in inputs.items()}
        self.model = None if spec["kind"] == "matmul" else load(spec)
        self.function = MAKE[spec["kind"]](spec, self.model, inputs)
        self.training = spec["kind"] == "train"
        gc.collect()

    def about(self) -> dict:
        name = torch.cuda.get_device_name() if GPU else "cpu"
        threads = torch.get_num_threads()
        return {
            "platform": "gpu" if GPU else "cpu",
            "device": name,
            "threads": threads,
        }

    def first(self) -> dict:
        """torch.compile compiles in the first call, and it may again in the next."""
        start = time.perf_counter()
        steps = cases.CHECKED_STEPS if self.training else 1
        self.losses = []
        for _ in range(steps):
            self.call()
            self.losses.append(self.result)
        return {"first": time.perf_counter() - start}

    def call(self) -> None:
        with torch.enable_grad() if self.training else torch.inference_mode():
            self.result = self.function()
        if GPU:
            # CUDA calls return before they are done; the clock must not.
            torch.cuda.synchronize()

    def outputs(self) -> dict[str, np.ndarray]:
        if self.training:
            loss, norm = zip(*self.losses)
            return {"loss": np.array(loss), "grad_norm": np.array(norm)}
        return {k: nhwc(x.float()).cpu().numpy() for k, x in self.result.items()}

    def peak(self) -> int:
        return torch.cuda.max_memory_allocated() if GPU else process_memory.peak()

    def reset_peak(self) -> bool:
        gc.collect()
        if GPU:
            torch.cuda.reset_peak_memory_stats()
        return GPU or process_memory.reset()


def nchw(x: torch.Tensor) -> torch.Tensor:
    return x.permute(0, 3, 1, 2).contiguous() if x.ndim == 4 else x


def nhwc(x: torch.Tensor) -> torch.Tensor:
    return x.permute(0, 2, 3, 1) if x.ndim == 4 else x


def load(spec: Spec) -> torch.nn.Module:
    """The component with the file's weights, which are float32 in training."""
    model = build(spec["component"], spec["config"])
    state = safetensors.torch.load_file(spec["weights"])
    if spec["component"] == "t5":
        # T5's embedding has two names in transformers and one in the file.
        state["encoder.embed_tokens.weight"] = state["shared.weight"]
    missing, extra = model.load_state_dict(state, strict=False)
    if missing or extra:
        raise ValueError(f"weights: PyTorch misses {missing[:3]}, {extra[:3]}")
    dtype = torch.float32 if spec["kind"] == "train" else getattr(torch, spec["dtype"])
    model = model.to(DEVICE, dtype)
    if spec["kind"] != "train":
        # No dropout and no gradients, as users of the pipelines run it.
        return model.eval().requires_grad_(False)
    if spec["remat"] != "none":
        model.enable_gradient_checkpointing()
    return model.train()


def build(component: str, config: dict) -> torch.nn.Module:
    # Imported here: a case needs one of the two, and the other may not be installed.
    if component in ("denoiser", "vae"):
        import diffusers

        name = {"denoiser": "SD3Transformer2DModel", "vae": "AutoencoderKL"}[component]
        return getattr(diffusers, name).from_config(config)
    import transformers

    if component == "t5":
        return transformers.T5EncoderModel(transformers.T5Config(**config))
    config = transformers.CLIPTextConfig(**config)
    return transformers.CLIPTextModelWithProjection(config)


def compiled(spec: Spec, model: Callable) -> Callable:
    return torch.compile(model) if spec["mode"] == "compile" else model


def cast(spec: Spec, *tensors: torch.Tensor) -> list[torch.Tensor]:
    return [x.to(getattr(torch, spec["dtype"])) for x in tensors]


# The function of each kind, without arguments; it returns outputs by name


def matmul(spec, model, inputs) -> Callable:
    a, b = cast(spec, inputs["a"], inputs["b"])
    product = compiled(spec, torch.matmul)
    return lambda: {"ab": product(a, b)}


def forward(spec, model, inputs) -> Callable:
    x, context, pooled = cast(
        spec, inputs["latents"], inputs["context"], inputs["pooled"]
    )
    model, timestep = compiled(spec, model), 1000 * inputs["t"]

    def run():
        outputs = model(x, context, pooled, timestep, return_dict=False)
        return {"velocity": outputs[0]}

    return run


def train(spec, model, inputs) -> Callable:
    """As diffusers' own trainers: autocast over float32 weights, fused AdamW."""
    from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

    optim = spec["optim"]
    adamw = torch.optim.AdamW(
        model.parameters(),
        lr=optim["lr"],
        betas=(optim["b1"], optim["b2"]),
        eps=optim["eps"],
        weight_decay=optim["weight_decay"],
        fused=True,
    )
    # multi_avg_fn updates all parameters by foreach kernels, the fast way in PyTorch.
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(spec["ema"]))
    run, dtype = compiled(spec, model), getattr(torch, spec["dtype"])
    x0, noise, t = inputs["latents"], inputs["noise"], inputs["t"]
    context, pooled = inputs["context"], inputs["pooled"]
    clip = optim["clip"] or float("inf")

    def step():
        s = t[:, None, None, None]
        xt = (1 - s) * x0 + s * noise
        with torch.autocast(DEVICE.type, dtype, enabled=dtype != torch.float32):
            v = run(xt, context, pooled, 1000 * t, return_dict=False)[0]
        loss = torch.nn.functional.mse_loss(v.float(), noise - x0)
        adamw.zero_grad(set_to_none=True)
        loss.backward()
        # Returns the norm before clipping, which ours reports too.
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
        adamw.step()
        average.update_parameters(model)
        return loss.item(), norm.item()

    return step


def sample(spec, model, inputs) -> Callable:
    """diffusers' own loop: StableDiffusion3Pipeline on given embeddings."""
    import diffusers

    diffusers.utils.logging.set_verbosity_error()
    parts = ("vae", "text_encoder", "text_encoder_2", "text_encoder_3")
    tokenizers = ("tokenizer", "tokenizer_2", "tokenizer_3")
    pipe = diffusers.StableDiffusion3Pipeline(
        transformer=model,
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=spec["shift"]),
        **dict.fromkeys(parts + tokenizers),
    )
    pipe.set_progress_bar_config(disable=True)
    pipe.transformer = compiled(spec, model)
    names = ("latents", "context", "pooled", "no_context", "no_pooled")
    noise, context, pooled, no_context, no_pooled = cast(
        spec, *(inputs[name] for name in names)
    )

    def run():
        outputs = pipe(
            prompt_embeds=context,
            pooled_prompt_embeds=pooled,
            negative_prompt_embeds=no_context,
            negative_pooled_prompt_embeds=no_pooled,
            height=cases.FACTOR * spec["height"],
            width=cases.FACTOR * spec["width"],
            num_inference_steps=spec["steps"],
            guidance_scale=spec["cfg"],
            # The pipeline may write into its latents.
            latents=noise.clone(),
            output_type="latent",
        )
        return {"latents": outputs.images}

    return run


def vae_encode(spec, model, inputs) -> Callable:
    (image,) = cast(spec, inputs["image"])
    encode = compiled(spec, model.encode)

    def run():
        # The mean and not a draw, since the two sides draw differently.
        z = encode(2 * image - 1).latent_dist.mean
        return {"latents": (z - cases.SHIFT) * cases.SCALING}

    return run


def vae_decode(spec, model, inputs) -> Callable:
    (latents,) = cast(spec, inputs["latents"])
    decode = compiled(spec, model.decode)

    def run():
        image = decode(latents / cases.SCALING + cases.SHIFT, return_dict=False)[0]
        return {"image": (image / 2 + 0.5).clamp(0, 1)}

    return run


def t5_states(spec, model, inputs) -> Callable:
    model = compiled(spec, model)
    return lambda: {"states": model(inputs["ids"])[0]}


def clip_states(spec, model, inputs) -> Callable:
    """The layer before the last and the projection, which SD3 reads."""
    model = compiled(spec, model)

    def run():
        outputs = model(inputs["ids"], output_hidden_states=True)
        return {"states": outputs.hidden_states[-2], "pooled": outputs[0]}

    return run


MAKE = {
    "matmul": matmul,
    "forward": forward,
    "train": train,
    "sample": sample,
    "vae_encode": vae_encode,
    "vae_decode": vae_decode,
    "t5": t5_states,
    "clip": clip_states,
}


if __name__ == "__main__":
    # PyTorch would take one thread for each physical core, jax takes all allowed ones.
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    side_worker.serve(Case)
