"""Keys of training: objective, optimizer, fine-tuning, mesh, loop, checkpoints."""

import math

from sd3_jax.config.schema.key_rules import (
    BATCH,
    BELOW_ONE,
    COUNT,
    DTYPE,
    FREE,
    POSITIVE,
    POSITIVE_FACTOR,
    RATE,
    REGEX,
    SWITCH,
    TEXTS,
    TURNS,
    WEIGHT,
    WIDTH,
    Key,
    above_zero,
    between,
    integer,
    number,
    one_of,
    some_of,
)

MODE_SCALE = 2 / (math.pi - 2)  # beyond it u -> t is not monotone (paper, sec. 3.1)
OPTIMIZERS = ("adamw", "muon", "lion", "adafactor", "prodigy", "schedule_free")
CLIP = number(
    "a number in [0, 1e+09] (0 or inf: none)", lambda x: 0 <= x <= 1e9 or x == math.inf
)
AXIS = integer(1, 2**20, also=(-1,))

FLOW = dict(
    path=Key(
        "rf",
        one_of("rf", "edm", "eps/cos", "v/cos", "eps/linear", "v/linear"),
        "Formulation: what the network regresses, and on which schedule"
        " (docs/explanation/formulations.md).",
    ),
    density=Key(
        "logit_normal",
        one_of("uniform", "logit_normal", "mode", "cosmap", "linear"),
        "Distribution of the training times t.",
    ),
    mean=Key(0.0, between(-100, 100), "Mean of logit(t) for the density logit_normal."),
    std=Key(
        1.0, between(1e-3, 1_000), "Standard deviation of logit(t) for logit_normal."
    ),
    mode_scale=Key(
        1.29, between(-1, MODE_SCALE), "Scale of the density mode (paper, sec. 3.1)."
    ),
    shift=Key(1.0, between(1e-3, 1_000), "Shift of times to more noise; 1: none."),
)
OPTIM = dict(
    name=Key("adamw", one_of(*OPTIMIZERS), "Optimizer (docs/how-to/train.md)."),
    lr=Key(1e-4, RATE, "Learning rate after the warm-up."),
    b1=Key(0.9, BELOW_ONE, "Decay of the first moment."),
    b2=Key(0.999, BELOW_ONE, "Decay of the second moment."),
    # With QK-norm, a small epsilon is what keeps bfloat16 stable (paper, sec. 5.3.2).
    eps=Key(1e-15, RATE, "Number that is added to the root of the second moment."),
    mu_dtype=Key("float32", DTYPE, "Dtype of the first moment."),
    weight_decay=Key(
        0.0,
        between(0, 100),
        "Decoupled decay of matrices and embeddings; biases, scales and tables have"
        " none.",
    ),
    clip=Key(1.0, CLIP, "Largest global norm of a gradient; 0 or inf: no clipping."),
    schedule=Key(
        "constant",
        one_of("constant", "cosine", "linear"),
        "Learning rate after the warm-up; cosine and linear fall to lr / 50 at"
        " train.steps.",
    ),
    warmup=Key(
        1_000, COUNT, "Number of steps over which the learning rate rises from 0."
    ),
    muon_lr=Key(
        0.02, RATE, "Learning rate of the matrices that muon updates; all else has lr."
    ),
    accumulate=Key(
        1, BATCH, "Number of parts that a batch is computed in, to save memory."
    ),
)
EMA = dict(  # paper, appendix B.3
    decay=Key(
        0.99, BELOW_ONE, "Decay of the average of the weights, at each of its updates."
    ),
    # Before the first such step the average follows every step (docs/how-to/train.md).
    every=Key(100, POSITIVE, "Number of steps between updates of the average."),
)
TUNE = dict(
    base=Key(
        "",
        FREE,
        "Weights to start from: released ones, a run's workdir or"
        " RUN/checkpoints/STEP; empty: random.",
    ),
    method=Key(
        "full",
        one_of("full", "lora"),
        "What trains: all weights, or a LoRA on those of the base.",
    ),
    text=Key(True, SWITCH, "Train the byte tower too, if all weights train."),
    lora=Key("", FREE, "LoRA file to start from, of rank tune.rank; empty: a new one."),
    rank=Key(16, WIDTH, "Rank of the LoRA."),
    alpha=Key(0.0, WEIGHT, "The LoRA's update is scaled by alpha / rank; 0: by 1."),
    targets=Key(
        "attn",
        REGEX,
        "Regex that is searched in the paths of linear layers; those that match are"
        " adapted, all if it is empty.",
    ),
    objective=Key(
        "flow", one_of("flow", "dpo"), "Loss: flow matching, or DPO on preferences."
    ),
    # The published 5000 is for means over a latent, as in diffusers, not for sums.
    beta=Key(
        5_000.0,
        POSITIVE_FACTOR,
        "Beta of DPO, for errors that are means over a latent.",
    ),
    weight=Key(
        "constant",
        one_of("constant", "(1-t)^2"),
        "Weight of DPO's errors over t; (1-t)^2 makes them errors in the noise.",
    ),
    prior=Key(
        0.0,
        WEIGHT,
        "Weight of the loss on the last of data.records, the class in DreamBooth; 0:"
        " none.",
    ),
)
MESH = dict(
    data=Key(1, AXIS, "Devices that split only the batch; -1: all that are left."),
    fsdp=Key(-1, AXIS, "Devices that split batch and weights; -1: all that are left."),
    context=Key(1, AXIS, "Devices that split the tokens; -1: all that are left."),
    tensor=Key(1, AXIS, "Devices that split heads and MLPs; -1: all that are left."),
)
TRAIN = dict(
    steps=Key(
        500_000,
        POSITIVE,
        "Step at which training ends, and with it the schedule of optim.lr.",
    ),
    log_every=Key(50, POSITIVE, "Number of steps between lines of metrics."),
    eval_every=Key(5_000, POSITIVE, "Number of steps between validations."),
    sample_every=Key(
        5_000, POSITIVE, "Number of steps between samples of train.prompts."
    ),
    prompts=Key(
        (),
        TEXTS,
        "Prompts sampled during training, and by sample if it gets no prompt.",
    ),
    skip_nonfinite=Key(
        0,
        COUNT,
        "Number of steps with a non-finite loss or gradient that a run skips before it"
        " stops.",
    ),
    stuck_after=Key(
        900.0,
        above_zero(1e7),
        "Seconds that a step or a save may take; after that the run stops.",
    ),
    max_hours=Key(
        0.0,
        between(0, 1e5),
        "Hours after which this process saves a checkpoint and stops; 0: no limit.",
    ),
    writers=Key(
        (),
        some_of("wandb", "mlflow", also=" (TensorBoard's files are always written)"),
        "Services that get the metrics too.",
    ),
    changes=Key(
        (), TEXTS, "Keys in which a resumed run may differ from its checkpoint."
    ),
)
CHECKPOINT = dict(
    every=Key(1_000, POSITIVE, "Number of steps between checkpoints."),
    keep=Key(3, POSITIVE, "Number of newest checkpoints to keep."),
    keep_every=Key(
        50_000, POSITIVE, "Checkpoints whose step this divides are kept for good."
    ),
)
PROFILE = dict(
    start=Key(
        0, COUNT, "First step of an xprof trace in WORKDIR/profile; 0: no trace."
    ),
    steps=Key(3, TURNS, "Number of steps in the trace."),
)
