"""Configurations of the text encoders and the autoencoder of all released models.

Fields are those of transformers and diffusers.
"""

# eos_token_id 2 is what the files say; clip.LEGACY_EOS tells what it means.
CLIP = dict(vocab_size=49408, max_position_embeddings=77, eos_token_id=2)
CONFIGS = {
    "clip_l": CLIP
    | dict(
        hidden_size=768,
        intermediate_size=3072,
        num_hidden_layers=12,
        num_attention_heads=12,
        hidden_act="quick_gelu",  # OpenAI's weights
        projection_dim=768,
    ),
    "clip_g": CLIP
    | dict(
        hidden_size=1280,
        intermediate_size=5120,
        num_hidden_layers=32,
        num_attention_heads=20,
        hidden_act="gelu",  # OpenCLIP's bigG
        projection_dim=1280,
    ),
    "t5": dict(
        vocab_size=32128,
        d_model=4096,
        d_kv=64,
        d_ff=10240,  # of the gate and of the value each
        num_layers=24,
        num_heads=64,
        feed_forward_proj="gated-gelu",
    ),
    "vae": dict(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(128, 256, 512, 512),
        layers_per_block=2,
        latent_channels=16,  # SD1 and SDXL have 4
        scaling_factor=1.5305,
        shift_factor=0.0609,  # latents are (z - shift) * scaling
        use_quant_conv=False,
        use_post_quant_conv=False,
    ),
}
