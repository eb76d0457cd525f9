"""Keys of the model: the denoiser, its text, its pictures, and what encodes them."""

from sd3_jax.config.schema.key_rules import (
    BATCH,
    BELOW_ONE,
    DEPTH,
    DTYPE,
    DTYPE_OR_HALF,
    FEW,
    FREE,
    LAYERS,
    RATE,
    SEED,
    SWITCH,
    WIDTH,
    Key,
    between,
    integer,
    one_of,
    sequence,
)
from sd3_jax.models.denoisers import DENOISERS

FACTOR = {"latents": 8, "pixels": 1}  # image pixels along a latent's side
TOKENS = integer(1, 2_048)
TABLE_SIDE = integer(1, 8_192)

TOP = dict(
    seed=Key(0, SEED, "Seed of initial weights, of the data order and of the noise."),
    weights=Key(
        "",
        FREE,
        "Released weights: paths or hub names, with commas; empty: the run in WORKDIR"
        " (inspect: rough previews; compare: small random models).",
    ),
    tokenizers=Key(
        "",
        FREE,
        "Folder or hub name of tokenizers; empty: the weights', else CLIP's and the"
        " hub's T5.",
    ),
)
MODEL = dict(
    name=Key(
        "mmdit",
        one_of(*DENOISERS),
        "Architecture of the denoiser.",
    ),
    depth=Key(24, DEPTH, "Number of blocks; in a U-Net, of each level."),
    # The paper's family has width = 64 depth, one head for each 64 (sec. 4).
    width=Key(None, WIDTH, "Width of a token; unset: 64 * depth.", kind=int),
    num_heads=Key(None, FEW, "Number of attention heads; unset: depth.", kind=int),
    patch=Key(2, FEW, "Side of a patch, in latents."),
    channels=Key(16, FEW, "Channels of a latent; 3 for pixels."),
    mlp_ratio=Key(
        4, RATE, "Width of the MLP's hidden layer over the width of a token."
    ),
    qk_norm=Key(True, SWITCH, "Normalize queries and keys with RMSNorm."),
    dual_blocks=Key(
        0,
        integer(0, 999),
        "How many of the first blocks have a second attention over the image alone; 13"
        " in SD3.5-medium.",
    ),
    weight_sets=Key(
        2,
        one_of(2, 3),
        "Sets of weights in an MMDiT: image and text (2), or image, CLIP and T5 (3;"
        " paper, sec. 5.2.3).",
    ),
    text_split=Key(77, TOKENS, "First text token of the third weight set."),
    pos_size=Key(192, TABLE_SIDE, "Side of the position table, in tokens."),
    pos_base=Key(
        64, TABLE_SIDE, "Number of tokens that span the position table's 16 units."
    ),
    multipliers=Key(
        (),
        sequence(FEW, "integers in [1, 1024], one for each level"),
        "Width of each level of a U-Net, as a multiple of width; (1, 2, 4, 4) in SD"
        " 2.1.",
    ),
    attended=Key(
        (), LAYERS, "Levels of a U-Net that have transformers; (0, 1, 2) in SD 2.1."
    ),
    pos_crop=Key(
        "center",
        one_of("center", "random"),
        "Which part of the position table a training picture gets; random in"
        " SD3.5-medium.",
    ),
    context_dim=Key(4096, WIDTH, "Width of a text token that enters the denoiser."),
    pooled_dim=Key(2048, WIDTH, "Width of the pooled text vector."),
    # Without a scaled loss, gradients of a mean over a batch underflow in float16.
    dtype=Key(
        "bfloat16",
        DTYPE_OR_HALF,
        "Dtype that the denoiser computes in; float16 is for sampling only.",
    ),
    remat=Key(
        "full",
        one_of("none", "mlp", "attention", "offload", "dots", "full"),
        "What the backward pass recomputes in each block to save memory.",
    ),
    # Unrolled blocks stack nothing for the backward pass (docs/explanation/speed.md).
    unroll=Key(
        1, DEPTH, "Number of blocks in a turn of the scan; on a CPU depth is best."
    ),
    attention=Key(
        "auto",
        one_of("auto", "xla", "dot_product", "splash"),
        "Attention kernel; auto picks by platform, dot_product is cuDNN's and splash"
        " is the TPU's.",
    ),
    context_attention=Key(
        "gather",
        one_of("gather", "ring", "ulysses", "auto"),
        "How tokens attend over mesh.context: every device gathers all keys and"
        " values, passes them round a ring, or gets all tokens of some heads"
        " (ulysses); auto picks by tokens, devices, heads and platform.",
    ),
)
TEXT_MODEL = dict(
    name=Key(
        "precomputed",
        one_of("bytes", "precomputed"),
        "Text model: released encoders' embeddings, or a byte tower that trains with"
        " the denoiser.",
    ),
    length=Key(154, TOKENS, "Number of text tokens."),
    # 0.464^3 = 10 %: all three encoders are dropped in a tenth of the examples.
    dropout=Key(
        0.464,
        BELOW_ONE,
        "Probability of dropping each text encoder's output in training (paper,"
        " appendix B.3).",
    ),
    width=Key(128, WIDTH, "Width of the byte tower."),
    depth=Key(2, DEPTH, "Number of blocks in the byte tower."),
    num_heads=Key(4, FEW, "Number of attention heads in the byte tower."),
    words=Key(
        16, TOKENS, "Number of tokens that the byte tower gives to the denoiser."
    ),
)
IMAGE = dict(
    autoencoder=Key(
        "latents",
        one_of(*FACTOR),
        "What the denoiser sees: latents of an autoencoder (8 pixels a side), or"
        " pixels.",
    ),
    height=Key(256, WIDTH, "Height of a picture, in pixels."),
    width=Key(256, WIDTH, "Width of a picture, in pixels."),
    buckets=Key(
        1, FEW, "Number of picture shapes of about height * width pixels; 1: one shape."
    ),
    aspect=Key(2.0, between(1, 100), "Largest ratio of a bucket's sides."),
)
ENCODE = dict(
    weights=Key(
        "",
        FREE,
        "Released weights that encode what the records lack, and prompts; convert adds"
        " them to a run; empty: none.",
    ),
    tokenizers=Key("", FREE, "Tokenizers of encode.weights, as config.tokenizers."),
    dtype=Key("bfloat16", DTYPE, "Dtype that the encoders compute in."),
    # Moments cost twice the bytes, and every epoch draws other latents from them.
    form=Key(
        "moments",
        one_of("moments", "latents"),
        "What precompute stores of a picture: the latents' moments, or one draw of"
        " latents.",
    ),
    rows=Key(8, BATCH, "Number of examples that a device encodes at a time."),
    latents_dtype=Key(
        "float16", DTYPE_OR_HALF, "Dtype of the moments or latents in a record."
    ),
    text_dtype=Key(
        "bfloat16", DTYPE_OR_HALF, "Dtype of the text embeddings in a record."
    ),
)
QUANTIZE = dict(
    denoiser=Key(
        "",
        one_of("", "int8", "fp8", "int8_dynamic", "fp8_dynamic"),
        "8-bit format of the denoiser's blocks; empty: none. The dynamic ones round"
        " activations too, by token, and multiply eight bits.",
    ),
    t5=Key("", one_of("", "int8", "fp8"), "8-bit format of T5's blocks; empty: none."),
)
