"""Keys of evaluation: the scores, their pictures and prompts, and studies."""

from sd3_jax.config.schema.key_rules import (
    BATCH,
    DEPTH,
    FREE,
    HOOK,
    NAME,
    PATHS,
    POSITIVE,
    SOME_TEXTS,
    TEXTS,
    TURNS,
    Key,
    Rule,
    integer,
    one_of,
    sequence,
    some_of,
)

NPZ = Rule(
    lambda x: isinstance(x, str) and (not x or x.endswith(".npz")),
    "a path that ends with .npz, or nothing",
)
KINDS = sequence(one_of("ema", "params"), "ema, params or both", lambda x: len(x) > 0)
SETTINGS = (  # the paper's grid, appendix B.3
    *("steps=50 cfg=1", "steps=50 cfg=2.5", "steps=50 cfg=5"),
    *("steps=5 cfg=5", "steps=10 cfg=5", "steps=25 cfg=5"),
)

EVAL = dict(
    examples=Key(
        1_024, POSITIVE, "Number of held-out examples for the validation loss."
    ),
    batch_size=Key(
        0, integer(0, 2**20), "Size of a validation batch; 0: data.batch_size."
    ),
    scores=Key(
        ("val_loss",),
        TEXTS,
        "Scores to compute: val_loss, digits, clip_score, fid, kid, precision_recall,"
        " geneval, typography, compbench.",
    ),
    # Their captions are in memory, all at once.
    pictures=Key(
        240, integer(1, 10**6), "Number of pictures to score; in digits, of each kind."
    ),
    split=Key(
        "test",
        one_of("tune", "test"),
        "Split of the digits' prompts: test to report, tune to choose settings by.",
    ),
    few_steps=Key(
        5, TURNS, "Number of solver steps of the digits' second, quick score."
    ),
    prompts_file=Key(
        "", FREE, "File of captions, one a line; empty: the held-out ones."
    ),
    clip=Key("", FREE, "CLIP's folder, file or hub name."),
    features=Key(
        "clip",
        NAME,
        "Features of FID, KID, precision and recall: clip, pixels,"
        " package.module:function, or Inception's *.pt.",
    ),
    real=Key(
        (),
        PATHS,
        "Real pictures: folders, tars, parquet files, or one .npz of statistics; ():"
        " the held-out ones.",
    ),
    statistics=Key(
        "", NPZ, "File that keeps the real pictures' statistics; empty: none."
    ),
    rows=Key(8, BATCH, "Number of pictures that a device puts through CLIP at a time."),
    per_prompt=Key(
        4, integer(1, 100_000), "Number of pictures for each prompt of a benchmark."
    ),
    geneval=Key("", FREE, "GenEval's evaluation_metadata.jsonl."),
    detector=Key(
        "",
        HOOK,
        "Function that detects objects, for geneval (docs/how-to/evaluate.md).",
    ),
    colour=Key("", HOOK, "Function that names the colour of objects, for geneval."),
    typography=Key(
        "", FREE, "File of prompts with their text in quotes, one a line, or .jsonl."
    ),
    ocr=Key("", HOOK, "Function that reads text in pictures, for typography."),
    ocr_ignore=Key(
        ("space",),
        some_of("case", "punctuation", "space"),
        "Differences from the text asked for that do not count.",
    ),
    compbench=Key("", FREE, "T2I-CompBench's folder of prompts."),
    compbench_scorers=Key(
        (), TEXTS, "Functions by category: color=package.module:function."
    ),
)
STUDY = dict(
    variants=Key((), TEXTS, "Variants of the recipe, as NAME: KEY=VALUE KEY=VALUE."),
    sweep=Key((), TEXTS, "Settings that each variant is tried with; the best is kept."),
    by=Key(
        "loss",
        one_of("loss", "score", "fid"),
        "What the sweep chooses by: validation loss, score or FID.",
    ),
    seeds=Key(3, DEPTH, "Number of seeds of each variant."),
    settings=Key(SETTINGS, SOME_TEXTS, "Settings of config.sample to sample with."),
    weights=Key(("ema", "params"), KINDS, "Weights of each run that are scored."),
    pictures=Key(1_000, POSITIVE, "Number of pictures for each setting."),
)
