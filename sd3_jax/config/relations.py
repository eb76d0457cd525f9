"""Relations between keys: what one may be, given the values of others.

A relation takes the values of its keys. It returns the rule for the first of them,
to complete "expected …" in an error, or a false value if all is well.
"""

import math

from sd3_jax.config.schema.model_schema import FACTOR
from sd3_jax.config.schema.training_schema import OPTIMIZERS

TABLE = 2**30  # numbers of a position table, 4 GiB; the recipes' largest has 90 million


def unit(autoencoder, patch, multipliers=()):
    """Pixels of which a picture's sides are multiples; each level of a U-Net halves."""
    return FACTOR[autoencoder] * patch * 2 ** max(0, len(multipliers) - 1)


def side(pixels, autoencoder, patch, pos_size, multipliers):
    token, by = unit(autoencoder, patch), unit(autoencoder, patch, multipliers)
    if not multipliers and pixels > token * pos_size:
        return f"at most {token * pos_size}, config.model.pos_size = {pos_size} tokens"
    if pixels % by:
        pixel = "1 pixel" if FACTOR[autoencoder] == 1 else "8 pixels"
        factors = f"{pixel} a latent, {patch} latent{'s' * (patch > 1)} a patch"
        if multipliers:
            factors += f", halved {len(multipliers) - 1} times"
        return f"a multiple of {by} ({factors}); the nearest is {multiple(pixels, by)}"


BUCKETED = (
    *("image.aspect", "image.buckets", "image.height", "image.width"),
    *("image.autoencoder", "model.patch", "model.pos_size", "model.multipliers"),
)


def bucket_side(
    aspect, count, height, width, autoencoder, patch, pos_size, multipliers
):
    token = unit(autoencoder, patch)
    longest = math.sqrt(height * width * aspect) / token
    if count > 1 and not multipliers and longest > pos_size:
        most = pos_size**2 * token**2 / (height * width)
        return f"at most {most:.3g}: config.model.pos_size = {pos_size} tokens a side"


def colours(channels, autoencoder):
    if autoencoder == "pixels" and channels != 3:
        return '3 (red, green, blue) with config.image.autoencoder = "pixels"'


def divisible(by):
    return lambda x, unit: (
        x % unit
        and f"a multiple of config.{by} = {unit}; the nearest is {multiple(x, unit)}"
    )


def multiple(x, unit):
    """The multiple of unit nearest to x, and not 0."""
    return max(1, round(x / unit)) * unit


def only_mmdit(value):
    """For a key that only the MMDiT reads: elsewhere it must keep this value."""

    def relation(setting, name):
        if name != "mmdit" and setting != value:
            shown = f'"{value}"' if isinstance(value, str) else value
            return f'{shown}, or config.model.name = "mmdit", not "{name}"'

    return relation


def odd(depth, name):
    if name == "uvit" and depth % 2 == 0:
        return f"an odd number for a uvit, such as {depth + 1} (skips join two halves)"


def levels(multipliers, name):
    if name == "unet" and not multipliers:
        return "some for a unet, such as (1, 2, 4, 4)"
    if name != "unet" and multipliers:
        return f'(), or config.model.name = "unet", not "{name}"'


def attended(places, name, multipliers):
    if name != "unet" and places:
        return f'(), or config.model.name = "unet", not "{name}"'
    if places and max(places) >= len(multipliers):
        return (
            f"levels below {len(multipliers)}, the length of config.model.multipliers"
        )


def quarters(width, name):
    if name != "unet" and width % 4:
        reason = "sines and cosines of two axes"
        return f"a multiple of 4, {reason}; the nearest is {multiple(width, 4)}"


def dual_blocks(blocks, depth):
    if blocks > depth - 1:
        return f"at most {depth - 1}, one less than config.model.depth = {depth}"


def table_size(pos_size, width):
    if pos_size**2 * width > TABLE:
        most = math.isqrt(TABLE // width)
        return f"at most {most} with config.model.width = {width}"


def reached(start, steps):
    if start > steps:
        return f"at most config.train.steps = {steps} (0: no trace)"


def interval(start, stop):
    if start > stop:
        return f"at most config.sample.cfg_stop = {stop}"


def guide_needed(guide, method):
    if method == "autoguidance" and not guide:
        return f'weaker weights for config.sample.guidance_method = "{method}"'


def released_only(loras, weights):
    if loras and not weights:
        return "(), or released weights for them in config.weights"


def weights_only(syntax, weights):
    if syntax and not weights:
        return '"", or released weights for it in config.weights'


def encoded_only(embeddings, weights, encoders):
    if embeddings and not weights and not encoders:
        return (
            "(), or text encoders for them in config.weights or config.encode.weights"
        )


def schedule_free_rate(schedule, name):
    if name == "schedule_free" and schedule != "constant":
        return '"constant" with config.optim.name = "schedule_free"'


def schedule_free_b1(b1, name):
    if name == "schedule_free" and b1 == 0:
        return '> 0 for config.optim.name = "schedule_free", which divides by it'


def has_moment(dtype, name):
    if name in ("prodigy", "schedule_free") and dtype != "float32":
        names = ", ".join(OPTIMIZERS[:4])
        return f'"float32", or one of {names} in config.optim.name, not "{name}"'


def lora_only(source, method):
    if source and method != "lora":
        return f'"", or config.tune.method = "lora", not "{method}"'


def trained_only(step, weights):
    if step and weights:
        return "0, because config.weights is not a run's checkpoint"


def wide(kind, dtype):
    if kind and dtype == "float16":  # which sums of integers up to 127 overflow
        return '"", or config.model.dtype = "bfloat16"'


def weighted(weights, paths):
    if weights and len(weights) != len(paths):
        return f"none, or one for each of the {len(paths)} config.data.records"


READS = {  # what text.name and image.autoencoder must be to read data.name
    "digits": ("bytes", "pixels"),
    "synthetic": ("precomputed", "latents"),
}


def read_from(place, *sources):
    """For a key that must suit data.name, where that is one of these sources."""

    def relation(setting, data):
        expected = READS[data][place] if data in sources else setting
        if setting != expected:
            return f'"{expected}", which config.data.name = "{data}" has'

    return relation


def prefers(objective, data, path):
    if objective == "dpo" and data not in ("records", "synthetic"):
        return f'"flow", or records of preferences, not config.data.name = "{data}"'
    if objective == "dpo" and path != "rf":
        return f'"flow", or config.flow.path = "rf", not "{path}"'


def prior(weight, objective, data, shares):
    if not weight:
        return None
    if objective != "flow":
        return f'0, or config.tune.objective = "flow", not "{objective}"'
    if data not in ("records", "synthetic"):
        return f'0, or records, not config.data.name = "{data}"'
    if data == "records" and len(shares) < 2:
        return (
            "0, or in config.data.records the class's pictures last, and config.data."
            "weights for each, such as 1,1"
        )


def canvas(side, data):
    if data == "digits" and side < 8:
        return "at least 8, a digit's side"


def split(at, sets, text, length, words):
    tokens = words if text == "bytes" else length
    if sets == 3 and at >= tokens:
        return (
            f"less than the {tokens} tokens of text with config.model.weight_sets = 3"
        )


def one_rest(mesh):
    if list(mesh.values()).count(-1) > 1:
        return "-1, what is left, for one axis at most"


def token_model(method, name):
    if method != "gather" and name == "unet":
        return (
            '"gather" for a unet, whose convolutions are not cut by tokens, or'
            " another config.model.name"
        )


def gives_totals(method, kernel):
    if method in ("ring", "auto") and kernel == "dot_product":
        return (
            '"gather" or "ulysses" with config.model.attention = "dot_product", which'
            " gives no log-denominators to merge"
        )


SIDED = "image.autoencoder", "model.patch", "model.pos_size", "model.multipliers"
# In this order: the first that fails is the error.
RELATIONS = (
    (levels, "model.multipliers", "model.name"),
    (attended, "model.attended", "model.name", "model.multipliers"),
    (side, "image.height", *SIDED),
    (side, "image.width", *SIDED),
    (divisible("model.num_heads"), "model.width", "model.num_heads"),
    (quarters, "model.width", "model.name"),
    (divisible("text.num_heads"), "text.width", "text.num_heads"),
    (divisible("optim.accumulate"), "data.batch_size", "optim.accumulate"),
    (schedule_free_rate, "optim.schedule", "optim.name"),
    (schedule_free_b1, "optim.b1", "optim.name"),
    (has_moment, "optim.mu_dtype", "optim.name"),
    (only_mmdit(0), "model.dual_blocks", "model.name"),
    (only_mmdit(2), "model.weight_sets", "model.name"),
    (only_mmdit("center"), "model.pos_crop", "model.name"),
    (odd, "model.depth", "model.name"),
    (token_model, "model.context_attention", "model.name"),
    (gives_totals, "model.context_attention", "model.attention"),
    (dual_blocks, "model.dual_blocks", "model.depth"),
    (table_size, "model.pos_size", "model.width"),
    (reached, "profile.start", "train.steps"),
    (interval, "sample.cfg_start", "sample.cfg_stop"),
    (guide_needed, "sample.guide", "sample.guidance_method"),
    (one_rest, "mesh"),
    (weighted, "data.weights", "data.records"),
    (released_only, "sample.lora", "weights"),
    (weights_only, "sample.prompt_weighting", "weights"),
    (encoded_only, "sample.embeddings", "weights", "encode.weights"),
    (trained_only, "sample.step", "weights"),
    (lora_only, "tune.lora", "tune.method"),
    (wide, "quantize.denoiser", "model.dtype"),
    (prefers, "tune.objective", "data.name", "flow.path"),
    (prior, "tune.prior", "tune.objective", "data.name", "data.weights"),
    (read_from(0, "digits", "synthetic"), "text.name", "data.name"),
    (read_from(1, "digits", "synthetic"), "image.autoencoder", "data.name"),
    (colours, "model.channels", "image.autoencoder"),
    (bucket_side, *BUCKETED),
    (canvas, "image.height", "data.name"),
    (canvas, "image.width", "data.name"),
    (
        split,
        *("model.text_split", "model.weight_sets"),
        *("text.name", "text.length", "text.words"),
    ),
)
