"""Keys of sampling, and of the jobs that export weights."""

from sd3_jax.config.schema.key_rules import (
    BATCH,
    COUNT,
    FREE,
    HOOK,
    LAYERS,
    SEED,
    SWITCH,
    TURNS,
    UNIT,
    WATERMARK,
    Key,
    Rule,
    between,
    integer,
    number,
    one_of,
    sequence,
)
from sd3_jax.diffusion import guidance_schedules

SHIFT = number(
    "a number in [0.001, 1000], or 0: left open", lambda x: 1e-3 <= x <= 1e3 or x == 0
)
EMBEDDINGS = sequence(
    Rule(lambda x: isinstance(x, str), "a path"), "paths of embeddings"
)
METHODS = (
    *("cfg", "cfg_zero", "cfg_pp", "apg", "apg_x0", "tangential", "pag"),
    "autoguidance",
)
CACHES = ("first_block", "magcache", "taylorseer")
SCHEDULE = Rule(
    lambda x: isinstance(x, str) and guidance_schedules.is_schedule(x),
    "constant, linear, cosine, or T:FACTOR, T:FACTOR",
)
PIXELS = integer(0, 4096)
BORDER = sequence(
    PIXELS,
    "four numbers of pixels: left, top, right, bottom",
    lambda x: len(x) in (0, 4),
)
LORAS = sequence(Rule(lambda x: isinstance(x, str), "a path"), "paths of LoRAs")
# The tables of diffusion/solvers.py and grids.py, which import jax.
SOLVERS = (
    *("euler", "heun", "dpmpp_2m", "dpmpp_2m_flow", "dpmpp_3m_flow", "unipc_2"),
    *("unipc_3", "deis_2", "deis_3", "res_2m", "euler_ancestral", "dpmpp_2m_sde"),
    *("dpmpp_3m_sde", "lcm", "adaptive"),
)
GRIDS = (
    *("linear", "shifted", "released", "flow", "unipc", "sgm_uniform", "simple"),
    *("karras", "exponential", "beta"),
)

SAMPLE = dict(
    prompt=Key("", FREE, "The prompt; empty: those of prompts_file, or train.prompts."),
    prompts_file=Key("", FREE, "File of prompts, one a line, or .jsonl; empty: none."),
    negative=Key("", FREE, "The negative prompt; empty: the unconditional text."),
    steps=Key(28, TURNS, "Number of solver steps."),
    # What these three leave open is the scheduler's of released weights; for a run of
    # ours it is euler, released and 3.0.
    solver=Key(
        "",
        one_of("", *SOLVERS),
        "Solver; empty: that of the weights' scheduler, or euler.",
    ),
    grid=Key(
        "",
        one_of("", *GRIDS),
        "Grid of times; empty: that of the weights' scheduler, or released.",
    ),
    shift=Key(0.0, SHIFT, "Shift of the grid to more noise; 0: the scheduler's, or 3."),
    cfg=Key(
        5.0,
        between(0, 1_000),
        "Scale of classifier-free guidance; 1 or less: none, and one pass of the"
        " network a step.",
    ),
    cfg_start=Key(0.0, UNIT, "Least t at which guidance acts."),
    cfg_stop=Key(1.0, UNIT, "Largest t at which guidance acts."),
    rescale=Key(
        0.0,
        UNIT,
        "How far guidance is rescaled to the standard deviation without it (Lin et al."
        " 2023); 0: not.",
    ),
    guidance_method=Key(
        "cfg",
        one_of(*METHODS),
        "Method of guidance, whose scale is cfg (docs/how-to/solvers_and_guidance.md).",
    ),
    guidance_options=Key(
        "", FREE, 'Numbers of the method, such as "eta=0, threshold=10"; empty: usual.'
    ),
    guidance_schedule=Key(
        "constant",
        SCHEDULE,
        "Guidance over t: constant, linear, cosine, or factors of cfg - 1 at times,"
        ' such as "1:0.5, 0.3:2".',
    ),
    guide=Key(
        "",
        FREE,
        "Weaker weights for autoguidance: a released model, or the step of an earlier"
        " checkpoint of the run; empty: none.",
    ),
    cache=Key(
        "",
        one_of("", *CACHES),
        "Step cache, which leaves the blocks out in some steps"
        " (docs/how-to/sample_faster.md); empty: none.",
    ),
    cache_options=Key(
        "", FREE, 'Numbers of the cache, such as "threshold=0.1"; empty: usual.'
    ),
    cache_calibration=Key(
        "", FREE, "File that calibrate wrote, for magcache; empty: none."
    ),
    seed=Key(
        0,
        SEED,
        "Seed of the noise. Picture n has the seed seed + n with released weights; with"
        " a run's checkpoint, n is folded into the seed.",
    ),
    per_prompt=Key(1, integer(1, 100_000), "Number of pictures for each prompt."),
    batch_size=Key(
        64, BATCH, "Number of pictures that are generated at a time, over all devices."
    ),
    placement=Key(
        "all",
        one_of("all", "sequential"),
        "Where released weights are: all on the devices, or in host memory until they"
        " are used (docs/how-to/safety_and_memory.md).",
    ),
    weights=Key(
        "ema", one_of("ema", "params"), "Weights of a run: the average, or the last."
    ),
    step=Key(0, COUNT, "Step of the checkpoint to read; 0: the newest."),
    lora=Key(
        (), LORAS, "LoRA files for released weights: path, or path=0.8 with a weight."
    ),
    embeddings=Key(
        (),
        EMBEDDINGS,
        "Textual inversion files for text encoders: path, or path=<token> with another"
        " placeholder.",
    ),
    prompt_weighting=Key(
        "",
        one_of("", "parentheses", "compel"),
        "Weights in prompts, for released weights: parentheses for (word:1.3), compel"
        " for word++; empty: brackets and signs are text.",
    ),
    filter=Key(
        "",
        HOOK,
        "Function that flags pictures, which are then written black"
        " (docs/how-to/safety_and_memory.md); empty: none.",
    ),
    watermark=Key("", WATERMARK, "Invisible text in all pictures; empty: none."),
    max_length=Key(
        256, integer(1, 512), "Number of T5's tokens, for released weights."
    ),
    clip_skip=Key(0, integer(0, 999), "Number of CLIP's last layers to skip."),
    skip_layers=Key(
        (),
        LAYERS,
        "Blocks left out by skip-layer guidance, for released weights; 7, 8, 9 suit"
        " SD3.5-medium; (): none.",
    ),
    skip_scale=Key(2.8, between(-1_000, 1_000), "Scale of skip-layer guidance."),
    skip_start=Key(
        0.01, UNIT, "Share of the steps after which skip-layer guidance begins."
    ),
    skip_stop=Key(
        0.2, UNIT, "Share of the steps after which skip-layer guidance ends."
    ),
    image=Key("", FREE, "The picture to change, with released weights; empty: none."),
    images=Key(
        "",
        FREE,
        "Folder of pictures to change, each by the prompt in the text file of its name,"
        " or all by sample.prompt; empty: none.",
    ),
    strength=Key(0.6, UNIT, "Share of the steps that change a picture."),
    resize=Key(
        "",
        one_of("", "crop", "stretch"),
        "How pictures get config.image's height and width; empty: they keep theirs.",
    ),
    mask=Key("", FREE, "Mask, white where the picture is repainted; empty: none."),
    paste=Key(True, SWITCH, "Whether pixels outside the mask stay as they are."),
    mask_blur=Key(0.0, between(0, 4096), "Blur of the mask in pixels (Gaussian)."),
    mask_padding=Key(0, PIXELS, "Number of pixels by which the mask grows."),
    crop_to_mask=Key(
        -1,
        integer(-1, 4096),
        "Pixels around the masked area that is cut out, painted at config.image's"
        " height and width and pasted back; -1: the whole picture is painted.",
    ),
    outpaint=Key(
        (), BORDER, "Border to paint: left, top, right, bottom pixels; (): none."
    ),
    format=Key("png", one_of("png", "webp", "jpg"), "Format of the picture files."),
    quality=Key(
        95, integer(1, 100), "Quality of webp and jpg; a webp of 100 is lossless."
    ),
)
# A keyword of Python, which dict() does not take.
SAMPLE["from"] = Key(
    "", FREE, "A picture of this job to repeat, by the settings in it; empty: none."
)
CONVERT = dict(
    to=Key(
        "diffusers",
        one_of("diffusers", "original", "orbax"),
        "Layout to write: a diffusers folder, Stability's single file, or our own.",
    ),
    out=Key(
        "", FREE, "Path to write, which must be new; empty: a path in the workdir."
    ),
    lora_format=Key(
        "",
        one_of("", "diffusers", "peft", "kohya", "comfyui"),
        "Names in which to write an adapter alone: the one of sample.lora, or else the"
        " LoRA that the run trained; empty: write the whole model.",
    ),
    dtype=Key(
        "",
        one_of("", "float32", "float16", "bfloat16"),
        "Dtype to write; empty: as it was, and float32 for an adapter.",
    ),
)
