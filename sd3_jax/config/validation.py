"""Which values a config may hold: ranges and choices by key, then relations."""

import math
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from sd3_jax.errors import ConfigError, near
from sd3_jax.foreign_text import shown
from sd3_jax.sampling import watermark

FACTOR = {"latents": 8, "pixels": 1}  # image pixels along a latent's side
MODE_SCALE = 2 / (math.pi - 2)  # beyond it u -> t is not monotone (paper, sec. 3.1)
TABLE = 2**30  # numbers of a position table, 4 GiB; the recipes' largest has 90 million


def validate(config: ConfigDict) -> None:
    """Raise a ConfigError that names the first value out of place; absent keys pass."""
    values = dict(flatten(config))
    for rule, keys in RULES:
        for key in keys.split():
            value = values.get(key)
            if value is not None and not rule.holds(value):
                raise complaint(key, value, rule.wanted, rule.choices)

    if "model.depth" in values:  # the defaults of what is left open, as in the paper
        for key, default in (("model.width", 64), ("model.num_heads", 1)):
            if key in values and values[key] is None:
                values[key] = default * values["model.depth"]
    for relation, *keys in RELATIONS:
        if all(values.get(key) is not None for key in keys):
            wanted = relation(*(values[key] for key in keys))
            if wanted:
                raise complaint(keys[0], values[keys[0]], wanted)


def flatten(config: ConfigDict, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every group, as a dict, and every leaf, by its dotted key."""
    for name, value in config.items():
        key = f"{prefix}{name}"
        if isinstance(value, ConfigDict):
            yield key, value.to_dict()
            yield from flatten(value, f"{key}.")
        else:
            yield key, value


def leaves(tree: ConfigDict | dict, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every leaf by its dotted key, and no group."""
    for name, value in tree.items():
        if isinstance(value, ConfigDict | dict):
            yield from leaves(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def complaint(key, value, wanted, choices=()):
    guess = near(str(value), choices)
    hint = f'; did you mean "{guess}"?' if guess else ""
    value = f'"{shown(value, 1_000)}"' if isinstance(value, str) else value
    return ConfigError(f"config.{key} = {value}: wanted {wanted}{hint}")


class Rule(NamedTuple):
    holds: Any  # of a value; nan is in no range
    wanted: str
    choices: tuple[str, ...] = ()


def integer(low, high, also=()):
    is_int = lambda x: isinstance(x, int) and not isinstance(x, bool)
    other = "".join(f" or {x}" for x in also)
    return Rule(
        lambda x: is_int(x) and (low <= x <= high or x in also),
        f"an integer in [{low}, {high}]{other}",
    )


def number(wanted, holds):
    is_number = lambda x: isinstance(x, int | float) and not isinstance(x, bool)
    return Rule(lambda x: is_number(x) and holds(x), wanted)


def one_of(*choices):
    names = ", ".join(map(str, choices)).lstrip(", ")
    is_one = lambda x: any(isinstance(x, type(c)) and x == c for c in choices)
    return Rule(is_one, f"one of {names}", tuple(map(str, choices)))


def sequence(rule, wanted, holds=lambda x: True):
    """Of a tuple or a list, each item of which keeps the rule."""
    is_one = lambda x: isinstance(x, tuple | list)
    return Rule(lambda x: is_one(x) and all(map(rule.holds, x)) and holds(x), wanted)


def some_of(*names):
    return sequence(one_of(*names), f"some of {', '.join(names)}")


def is_regex(text):
    try:
        re.compile(text)
    except re.error:
        return False
    return True


def is_utf8(text):
    """A text without halves of surrogate pairs, which stand for bytes of other
    encodings on a command line: no record, log or page could hold it."""
    return isinstance(text, str) and not re.search("[\ud800-\udfff]", text)


def above_zero(high):
    return number(f"a number in (0, {high:g}]", lambda x: 0 < x <= high)


def between(low, high):
    return number(f"a number in [{low:g}, {high:g}]", lambda x: low <= x <= high)


# Every key has an upper bound: far above any use, and below what overflows 32 bits, a
# float32 or a C library's argument after minutes of compiling.
INT32 = 2**31 - 1
POSITIVE = integer(1, INT32)
COUNT = integer(0, INT32)
DEPTH = integer(1, 1_000)
WIDTH = integer(1, 2**16)  # of a layer, and of a picture in pixels
FEW = integer(1, 1_024)  # heads, channels, threads
BATCH = integer(1, 2**20)
SEED = integer(0, 2**32 - 1)  # jax keeps 32 bits and drops the rest in silence
AXIS = integer(1, 2**20, also=(-1,))
RATE = above_zero(100)
WEIGHT = between(0, 1e9)
FACTORS = above_zero(1e9)
SCALE = between(-1_000, 1_000)
CLIP = number(
    "a number in [0, 1e+09] (0 or inf: none)", lambda x: 0 <= x <= 1e9 or x == math.inf
)
SHIFT = number(
    "a number in [0.001, 1000], or 0: left open", lambda x: 1e-3 <= x <= 1e3 or x == 0
)
BELOW_ONE = number("a number in [0, 1)", lambda x: 0 <= x < 1)
UNIT = number("a number in [0, 1]", lambda x: 0 <= x <= 1)
LAYERS = sequence(integer(0, 999), "layers by number, 0 being the first")
LEVELS = sequence(FEW, "integers in [1, 1024], one for each level")
NAME = Rule(lambda x: isinstance(x, str) and x.strip(), "a name")
TEXT = Rule(is_utf8, "a text in UTF-8")
TEXTS = sequence(TEXT, "texts in UTF-8, with commas between")
PREFIX = Rule(
    lambda x: is_utf8(x) and len(x) <= 1024,
    "a text in UTF-8 of at most 1024 characters, or nothing",
)
HOOK = Rule(
    lambda x: is_utf8(x) and (not x or ":" in x),
    '"package.module:function", or nothing',
)
NPZ = Rule(
    lambda x: isinstance(x, str) and (not x or x.endswith(".npz")),
    "a path that ends with .npz, or nothing",
)
IGNORED = some_of("case", "punctuation", "space")
REGEX = Rule(lambda x: is_utf8(x) and is_regex(x), "a regular expression")
MARK = Rule(
    lambda x: isinstance(x, str) and (not x or watermark.fits(x)),
    f"at most {watermark.LENGTH} bytes of text that prints",
)
MIX = sequence(
    WEIGHT,
    "three numbers in [0, 1e+09], not all 0: of single digits, pairs and numbers",
    lambda x: len(x) == 3 and sum(x) > 0,
)
OPTIMIZERS = ("adamw", "muon", "lion", "adafactor", "prodigy", "schedule_free")
PARTS = some_of("vae", "clip_l", "clip_g", "t5")
WRITERS = some_of("wandb", "mlflow")
PATHS = sequence(NAME, "paths of shards, or globs of them")
LORAS = sequence(Rule(lambda x: isinstance(x, str), "a path"), "paths of LoRAs")
MODES = some_of("eager", "compile")
TIMED = some_of("forward", "train")
SIZES = sequence(WIDTH, "integers in [1, 65536]")
DEPTHS = sequence(DEPTH, "integers in [1, 1000]")
KINDS = sequence(one_of("ema", "params"), "ema, params or both", lambda x: len(x) > 0)
WEIGHTS = sequence(
    FACTORS,
    "numbers in (0, 1e+09]; a set that is not to be drawn from is left out",
)

RULES = (
    (SEED, "seed sample.seed"),
    (NAME, "data.name"),
    (one_of("mmdit", "dit", "crossdit", "uvit", "unet"), "model.name"),
    (one_of("bytes", "precomputed"), "text.name"),
    (one_of("rf", "edm", "eps/cos", "v/cos", "eps/linear", "v/linear"), "flow.path"),
    (DEPTH, "model.depth model.unroll text.depth"),
    (WIDTH, "model.width model.context_dim model.pooled_dim text.width"),
    (FEW, "model.num_heads model.patch model.channels text.num_heads"),
    (integer(1, 2_048), "model.text_split text.length text.words"),
    (integer(1, 8_192), "model.pos_size model.pos_base"),
    (integer(0, 999), "model.dual_blocks"),
    (LEVELS, "model.multipliers"),
    (LAYERS, "model.attended"),
    (RATE, "model.mlp_ratio"),
    (one_of(2, 3), "model.weight_sets"),
    (one_of("float32", "bfloat16", "float16"), "model.dtype"),
    (
        one_of("none", "mlp", "attention", "offload", "dots", "full"),
        "model.remat",
    ),
    (one_of("auto", "xla", "dot_product", "splash"), "model.attention"),
    (BELOW_ONE, "text.dropout"),
    (one_of(*FACTOR), "image.autoencoder"),
    (WIDTH, "image.height image.width"),
    (FEW, "image.buckets"),
    (between(1, 100), "image.aspect"),
    (one_of("center", "random"), "model.pos_crop"),
    (one_of("moments", "latents"), "encode.form"),
    (
        one_of("float32", "bfloat16", "float16"),
        "encode.latents_dtype encode.text_dtype",
    ),
    (one_of("float32", "bfloat16"), "encode.dtype"),
    (PATHS, "ingest.inputs ingest.exclude"),
    (TEXTS, "ingest.captions ingest.filters"),
    (PREFIX, "ingest.prefix"),
    (one_of("keep", "reject"), "ingest.uncaptioned"),
    (PARTS, "precompute.only"),
    (POSITIVE, "precompute.part"),
    (FEW, "precompute.threads dedup.threads"),
    (BATCH, "encode.rows eval.rows"),
    (BELOW_ONE, "precompute.held_out"),
    (integer(0, 10**15), "precompute.plan"),
    (NAME, "dedup.embed"),
    (UNIT, "dedup.threshold"),
    (COUNT, "dedup.clusters dedup.pairs inspect.records inspect.pictures"),
    (POSITIVE, "dedup.probes"),
    (one_of("uniform", "logit_normal", "mode", "cosmap", "linear"), "flow.density"),
    (between(-100, 100), "flow.mean"),
    (between(-1, MODE_SCALE), "flow.mode_scale"),
    (between(1e-3, 1_000), "flow.std flow.shift"),
    (one_of(*OPTIMIZERS), "optim.name"),
    (one_of("float32", "bfloat16"), "optim.mu_dtype"),
    (one_of("constant", "cosine", "linear"), "optim.schedule"),
    (RATE, "optim.lr optim.muon_lr optim.eps"),
    (BELOW_ONE, "optim.b1 optim.b2 ema.decay data.bad_records"),
    (between(0, 100), "optim.weight_decay"),
    (CLIP, "optim.clip"),
    (COUNT, "optim.warmup"),
    (BATCH, "optim.accumulate"),
    (POSITIVE, "ema.every"),
    (one_of("full", "lora"), "tune.method"),
    (one_of("flow", "dpo"), "tune.objective"),
    (one_of("constant", "(1-t)^2"), "tune.weight"),
    (WIDTH, "tune.rank"),
    (WEIGHT, "tune.alpha tune.prior"),
    (FACTORS, "tune.beta"),
    (REGEX, "tune.targets"),
    (AXIS, "mesh.data mesh.fsdp mesh.context mesh.tensor"),
    (BATCH, "data.batch_size dedup.batch_size sample.batch_size"),
    (integer(0, 1_024), "data.threads data.prefetch"),
    (COUNT, "data.easy"),
    (PATHS, "data.records data.held_out"),
    (WEIGHTS, "data.weights"),
    (MIX, "data.mix"),
    (POSITIVE, "train.steps train.log_every train.eval_every train.sample_every"),
    (WRITERS, "train.writers"),
    (TEXTS, "train.prompts train.changes eval.scores plan.slices compare.prompts"),
    (TEXTS, "eval.compbench_scorers"),
    (POSITIVE, "checkpoint.every checkpoint.keep checkpoint.keep_every"),
    (COUNT, "profile.start train.skip_nonfinite"),
    (above_zero(1e7), "train.stuck_after"),
    (integer(1, 10_000), "profile.steps sample.steps eval.few_steps"),
    (integer(1, 100_000), "sample.per_prompt eval.per_prompt"),
    (one_of("", "euler", "heun", "dpmpp_2m", "dpmpp_2m_flow", "lcm"), "sample.solver"),
    (one_of("", "linear", "shifted", "released", "flow"), "sample.grid"),
    (one_of("ema", "params"), "sample.weights"),
    (FACTORS, "compare.tolerance compare.bfloat16"),
    (between(0, 1_000), "sample.cfg"),
    (SHIFT, "sample.shift"),
    (UNIT, "sample.cfg_start sample.cfg_stop sample.rescale"),
    (UNIT, "sample.skip_start sample.skip_stop"),
    (SCALE, "sample.skip_scale"),
    (integer(1, 512), "sample.max_length"),
    (COUNT, "sample.step"),
    (integer(0, 999), "sample.clip_skip"),
    (integer(0, 2**20), "plan.per_chip"),
    (LAYERS, "sample.skip_layers"),
    (one_of("train", "sample"), "plan.job"),
    (DEPTH, "plan.tries"),
    (one_of("diffusers", "original", "orbax"), "convert.to"),
    (one_of("", "float32", "float16", "bfloat16"), "convert.dtype"),
    (one_of("", "int8", "fp8"), "quantize.denoiser quantize.t5"),
    (POSITIVE, "eval.examples"),
    (integer(1, 10**6), "eval.pictures"),  # their captions are in memory, all at once
    (integer(0, 2**20), "eval.batch_size"),
    (one_of("tune", "test"), "eval.split"),
    (PATHS, "eval.real"),
    (NAME, "eval.features"),
    (NPZ, "eval.statistics"),
    (HOOK, "eval.detector eval.colour eval.ocr sample.filter"),
    (LORAS, "sample.lora"),
    (IGNORED, "eval.ocr_ignore"),
    (MARK, "sample.watermark"),
    (TEXTS, "study.variants study.sweep study.settings"),
    (one_of("loss", "score", "fid"), "study.by"),
    (DEPTH, "study.seeds"),
    (POSITIVE, "study.pictures"),
    (KINDS, "study.weights"),
    (MODES, "benchmark.against"),
    (one_of("float32", "bfloat16"), "benchmark.dtype"),
    (TEXTS, "benchmark.cases benchmark.apart"),
    (integer(1, 10_000), "benchmark.repeats benchmark.scaling.repeats"),
    (integer(0, 10_000), "benchmark.warmup benchmark.startup"),
    (between(0, 3_600), "benchmark.pause"),
    (BELOW_ONE, "benchmark.worse"),
    (TIMED, "benchmark.scaling.kinds"),
    (SIZES, "benchmark.scaling.tokens benchmark.vae.channels"),
    (DEPTHS, "benchmark.scaling.depths"),
    (DEPTH, "benchmark.scaling.depth benchmark.scaling.unroll benchmark.vae.layers"),
    (WIDTH, "benchmark.matmul benchmark.scaling.width benchmark.scaling.batch"),
    (FEW, "benchmark.scaling.num_heads"),
    *(
        (rule, f"benchmark.{name}.{key}")
        for name in ("t5", "clip")
        for rule, keys in (
            (DEPTH, "depth"),
            (FEW, "num_heads"),
            (WIDTH, "width mlp length batch"),
            (integer(1, 2**20), "vocab"),
        )
        for key in keys.split()
    ),
)


def unit(autoencoder, patch, multipliers=()):
    """Pixels of which a picture's sides are multiples; each level of a U-Net halves."""
    return FACTOR[autoencoder] * patch * 2 ** max(0, len(multipliers) - 1)


def side(pixels, autoencoder, patch, pos_size, multipliers):
    token, by = unit(autoencoder, patch), unit(autoencoder, patch, multipliers)
    if not multipliers and pixels > token * pos_size:
        return f"at most {token * pos_size}, config.model.pos_size = {pos_size} tokens"
    if pixels % by:
        made = f"{FACTOR[autoencoder]} pixels a latent, {patch} latents a patch"
        if multipliers:
            made += f", halved {len(multipliers) - 1} times"
        return f"a multiple of {by} ({made}); the nearest is {multiple(pixels, by)}"


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
        return '3, red, green and blue, for config.image.autoencoder = "pixels"'


def divisible(by):
    return lambda x, unit: (
        x % unit
        and f"a multiple of config.{by} = {unit}; the nearest is {multiple(x, unit)}"
    )


def multiple(x, unit):
    """The multiple of unit nearest to x, and not 0."""
    return max(1, round(x / unit)) * unit


def only_mmdit(value):
    """Of a key that the other denoisers know nothing of, and would ignore."""

    def relation(given, name):
        if name != "mmdit" and given != value:
            shown = f'"{value}"' if isinstance(value, str) else value
            return f'{shown}, or config.model.name = "mmdit", not "{name}"'

    return relation


def odd(depth, name):
    if name == "uvit" and depth % 2 == 0:
        return f"an odd number for a uvit, such as {depth + 1}: skips join two halves"


def levels(multipliers, name):
    if name == "unet" and not multipliers:
        return "some for a unet, such as (1, 2, 4, 4)"
    if name != "unet" and multipliers:
        return f'(), or config.model.name = "unet", not "{name}"'


def attended(places, name, multipliers):
    if name != "unet" and places:
        return f'(), or config.model.name = "unet", not "{name}"'
    if places and max(places) >= len(multipliers):
        return f"levels below {len(multipliers)}, those of config.model.multipliers"


def quarters(width, name):
    if name != "unet" and width % 4:
        made = "sines and cosines of two axes"
        return f"a multiple of 4, {made}; the nearest is {multiple(width, 4)}"


def dual_blocks(blocks, depth):
    if blocks > depth - 1:
        return f"at most {depth - 1}, one less than config.model.depth = {depth}"


def table_size(pos_size, width):
    if pos_size**2 * width > TABLE:
        most = math.isqrt(TABLE // width)
        return f"at most {most}, for config.model.width = {width}"


def reached(start, steps):
    if start > steps:
        return f"at most config.train.steps = {steps} (0: no trace)"


def interval(start, stop):
    if start > stop:
        return f"at most config.sample.cfg_stop = {stop}"


def released_only(given, weights):
    if given and not weights:
        return "(), or released weights for them in config.weights"


def schedule_free_rate(schedule, name):
    if name == "schedule_free" and schedule != "constant":
        return '"constant", which config.optim.name = "schedule_free" takes alone'


def schedule_free_b1(b1, name):
    if name == "schedule_free" and b1 == 0:
        return '> 0 for config.optim.name = "schedule_free", which divides by it'


def has_moment(dtype, name):
    if name in ("prodigy", "schedule_free") and dtype != "float32":
        having = ", ".join(OPTIMIZERS[:4])
        return f'"float32", or one of {having} in config.optim.name, not "{name}"'


def lora_only(source, method):
    if source and method != "lora":
        return f'"", or config.tune.method = "lora", not "{method}"'


def trained_only(step, weights):
    if step and weights:
        return "0, for config.weights are no run's checkpoint"


def wide(kind, dtype):
    if kind and dtype == "float16":  # sums of whole numbers up to 127 are too large
        return '"", or config.model.dtype = "bfloat16"'


def weighted(weights, paths):
    if weights and len(weights) != len(paths):
        return f"none, or one for each of config.data.records, which are {len(paths)}"


READS = {  # what text.name and image.autoencoder must be to read data.name
    "digits": ("bytes", "pixels"),
    "synthetic": ("precomputed", "latents"),
}


def read_from(place, *sources):
    """Of a key that says how examples are read, if they are of one of these."""

    def relation(given, data):
        wanted = READS[data][place] if data in sources else given
        if given != wanted:
            return f'"{wanted}", which config.data.name = "{data}" has'

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


def known(data, text):
    if data not in (*READS, "records") and text == "bytes":
        return f"one of {', '.join(READS)}, records"


def canvas(side, data):
    if data == "digits" and side < 8:
        return "at least 8, a digit's side"


def split(at, sets, text, length, words):
    tokens = words if text == "bytes" else length
    if sets == 3 and at >= tokens:
        return (
            f"less than the {tokens} tokens of text, for config.model.weight_sets = 3"
        )


def one_rest(mesh):
    if list(mesh.values()).count(-1) > 1:
        return "-1, what is left, for one axis at most"


SIDED = "image.autoencoder", "model.patch", "model.pos_size", "model.multipliers"
# The function says what is wanted of the first key, given the others, or nothing.
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
    (dual_blocks, "model.dual_blocks", "model.depth"),
    (table_size, "model.pos_size", "model.width"),
    (reached, "profile.start", "train.steps"),
    (interval, "sample.cfg_start", "sample.cfg_stop"),
    (one_rest, "mesh"),
    (weighted, "data.weights", "data.records"),
    (released_only, "sample.lora", "weights"),
    (trained_only, "sample.step", "weights"),
    (lora_only, "tune.lora", "tune.method"),
    (wide, "quantize.denoiser", "model.dtype"),
    (known, "data.name", "text.name"),
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
