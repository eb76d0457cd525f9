"""Miniature diffusers pipelines of the three published kinds, with random weights.

The tests use them, and `compare` without weights.
"""

from pathlib import Path

import diffusers
import torch
import transformers

from sd3_jax.tools.parity import tiny_tokenizers

KINDS = {
    "sd3_medium": dict(),
    "sd35_medium": dict(qk_norm="rms_norm", dual_attention_layers=(0, 1)),
    "sd35_large": dict(qk_norm="rms_norm"),
}


def pipeline(kind: str, scratch: Path) -> diffusers.StableDiffusion3Pipeline:
    """A pipeline with heads of 64, as the original layout needs; random parameters."""
    # Modules draw their first weights when they are built; randomise replaces them all.
    torch.manual_seed(0)
    parts = dict(
        transformer=transformer(**KINDS[kind]),
        vae=vae(),
        text_encoder=clip("quick_gelu", seed=2),
        text_encoder_2=clip("gelu", seed=3),
        text_encoder_3=t5(),
    )
    tiny_tokenizers.save(scratch)
    words = {
        name: transformers.AutoTokenizer.from_pretrained(scratch / name)
        for name in ("tokenizer", "tokenizer_2", "tokenizer_3")
    }
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    return diffusers.StableDiffusion3Pipeline(**parts, **words, scheduler=scheduler)


def transformer(**options):
    model = diffusers.SD3Transformer2DModel(
        sample_size=32,
        num_layers=4,
        attention_head_dim=64,
        num_attention_heads=1,
        joint_attention_dim=160,
        caption_projection_dim=64,
        pooled_projection_dim=128,
        pos_embed_max_size=24,
        **options,
    )
    return randomise(model, seed=1)


def vae():
    model = diffusers.AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(32, 32, 64, 64),
        layers_per_block=1,
        latent_channels=16,
        norm_num_groups=32,
        sample_size=64,
        scaling_factor=1.5305,
        shift_factor=0.0609,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )
    return randomise(model, seed=4)


def clip(activation: str, seed: int):
    config = transformers.CLIPTextConfig(
        vocab_size=tiny_tokenizers.CLIP_VOCAB,
        hidden_size=64,
        intermediate_size=96,
        projection_dim=64,
        num_hidden_layers=3,
        num_attention_heads=1,
        hidden_act=activation,
        eos_token_id=2,  # as in the published files
        bos_token_id=0,
        pad_token_id=1,
    )
    return randomise(transformers.CLIPTextModelWithProjection(config), seed)


def t5():
    config = transformers.T5Config(
        vocab_size=tiny_tokenizers.T5_VOCAB,
        d_model=160,
        d_kv=16,
        d_ff=192,
        num_layers=2,
        num_heads=3,
        feed_forward_proj="gated-gelu",
    )
    model = randomise(transformers.T5EncoderModel(config), seed=5)
    with torch.no_grad():  # T5 does not divide by the root of the head's size
        for block in model.encoder.block:
            block.layer[0].SelfAttention.q.weight.mul_(config.d_kv**-0.5)
    return model


def randomise(module, seed=0):
    """Every parameter of a torch module again: none is zero, none is one."""
    generator = torch.Generator().manual_seed(seed)
    draw = lambda p: torch.randn(p.shape, generator=generator)
    with torch.no_grad():
        for name, p in module.named_parameters():
            # Zeros and ones would hide swapped or missing tensors: scales become random
            # too.
            if p.ndim > 1:
                p.copy_(draw(p) * p[0].numel() ** -0.5)
            elif name.endswith("bias"):
                p.copy_(0.2 * draw(p))
            else:
                p.copy_(1 + 0.3 * draw(p))
    return module
