"""Keys of plan, compare and benchmark."""

from sd3_jax.config.schema.key_rules import (
    BELOW_ONE,
    DEPTH,
    DTYPE,
    FEW,
    FREE,
    POSITIVE_FACTOR,
    SOME_TEXTS,
    SWITCH,
    TEXTS,
    TURNS,
    WIDTH,
    Key,
    between,
    integer,
    one_of,
    sequence,
    some_of,
)

NONE_OR_TURNS = integer(0, 10_000)
SIZES = sequence(WIDTH, "integers in [1, 65536], one or more", lambda x: len(x) > 0)
DEPTHS = sequence(DEPTH, "integers in [1, 1000], one or more", lambda x: len(x) > 0)

PLAN = dict(
    slices=Key(
        ("v5e-256",),
        SOME_TEXTS,
        "TPU slices to compile for, such as v5p-128, v6e-256, tpu7x-128; 2xv5e-256 is"
        " two slices.",
    ),
    job=Key(
        "train",
        one_of("train", "sample"),
        "What to plan: a training step, or sampling (text encoders, denoising,"
        " decoding).",
    ),
    per_chip=Key(
        0,
        integer(0, 2**20),
        "Number of images for each chip; 0: from data.batch_size or sample.batch_size.",
    ),
    search=Key(
        True, SWITCH, "Search over mesh, images per chip and remat, if per_chip is 0."
    ),
    tries=Key(
        4, DEPTH, "Largest number of programs that a search compiles for a slice."
    ),
    flags=Key(
        "launch/flags",
        FREE,
        "Folder of compiler flags for each TPU generation; empty: the compiler's"
        " defaults.",
    ),
    hlo=Key(False, SWITCH, "Keep the text of the compiled programs."),
)
COMPARE = dict(
    prompts=Key(
        ("a red fox in the rain", "Foxes, 3 of them!", ""),
        SOME_TEXTS,
        "Prompts that both sides encode.",
    ),
    tolerance=Key(
        1e-4,
        POSITIVE_FACTOR,
        "Largest error of a layer in float32, in standard deviations of its output.",
    ),
    bfloat16=Key(
        2.0,
        POSITIVE_FACTOR,
        "Largest error of a layer in bfloat16, as a multiple of PyTorch's error.",
    ),
)


def tower(depth: int, width: int, num_heads: int, mlp: int, vocab: int) -> dict:
    """Sizes of a text encoder that is timed."""
    return dict(
        depth=Key(depth, DEPTH, "Number of blocks."),
        width=Key(width, WIDTH, "Width of a token."),
        num_heads=Key(num_heads, FEW, "Number of attention heads."),
        mlp=Key(mlp, WIDTH, "Width of the MLP's hidden layer."),
        vocab=Key(vocab, integer(1, 2**20), "Number of tokens in the vocabulary."),
        length=Key(77, WIDTH, "Number of tokens in a text."),
        batch=Key(4, WIDTH, "Number of texts."),
    )


SCALING = dict(  # ours alone: time over tokens, and over depth
    kinds=Key(
        ("forward",),
        some_of("forward", "train"),
        "Programs to time over tokens and over depth; (): none.",
    ),
    tokens=Key((256, 512, 1024, 2048, 4096), SIZES, "Numbers of image tokens to time."),
    depths=Key(
        (4, 8, 16, 24), DEPTHS, "Depths to time, at the first of scaling.tokens."
    ),
    width=Key(512, WIDTH, "Width of a token."),
    num_heads=Key(8, FEW, "Number of attention heads."),
    depth=Key(4, DEPTH, "Number of blocks, over all of scaling.tokens."),
    batch=Key(4, WIDTH, "Number of pictures."),
    # A loop keeps a deep model's program short.
    unroll=Key(1, DEPTH, "Number of blocks in one turn of the scan."),
    repeats=Key(5, TURNS, "Number of timed turns."),
)
BENCHMARK = dict(
    cases=Key(
        (),
        TEXTS,
        "Cases to time, each a kind and what differs from the config: train side=256"
        " batch=4; (): none.",
    ),
    against=Key(
        ("eager",), some_of("eager", "compile"), "Modes of PyTorch to compare with."
    ),
    dtype=Key("float32", DTYPE, "Dtype that both sides compute in."),
    repeats=Key(7, TURNS, "Number of timed turns of each side."),
    warmup=Key(2, NONE_OR_TURNS, "Number of turns before those that are timed."),
    # In it the other side's threads, which spin for work, fall asleep.
    pause=Key(0.3, between(0, 3_600), "Seconds of rest before a turn."),
    apart=Key(
        (), TEXTS, "Kinds of cases whose two sides do not fit into memory together."
    ),
    matmul=Key(
        2048, WIDTH, "Side of the matrices whose product measures the machine's peak."
    ),
    vae=dict(
        channels=Key(
            (128, 256, 512, 512), SIZES, "Channels of each level of the autoencoder."
        ),
        layers=Key(
            2, DEPTH, "Number of residual blocks in a level of the autoencoder."
        ),
    ),
    t5=tower(depth=8, width=512, num_heads=8, mlp=1024, vocab=32_128),
    clip=tower(depth=12, width=768, num_heads=12, mlp=3072, vocab=49_408),
    scaling=SCALING,
    startup=Key(
        3, NONE_OR_TURNS, "How often imports and first steps are timed; 0: never."
    ),
    guard=Key("", FREE, "Earlier benchmark.json whose ratios must hold; empty: none."),
    worse=Key(0.15, BELOW_ONE, "Share by which a ratio may be worse than the guard's."),
)
