"""Keys of data: what training reads, and the jobs that make and look at records."""

from sd3_jax.config.schema.key_rules import (
    BATCH,
    BELOW_ONE,
    COUNT,
    FEW,
    FREE,
    NAME,
    PATHS,
    POSITIVE,
    POSITIVE_FACTOR,
    SHARDS,
    SWITCH,
    TEXTS,
    UNIT,
    WEIGHT,
    Key,
    Rule,
    integer,
    is_utf8,
    one_of,
    sequence,
    some_of,
)

QUEUE = integer(0, 1_024)
MIX = sequence(
    WEIGHT,
    "three numbers in [0, 1e+09], not all 0: of single digits, pairs and numbers",
    lambda x: len(x) == 3 and sum(x) > 0,
)
SHARES = sequence(
    POSITIVE_FACTOR,
    "numbers in (0, 1e+09]; a set that is not to be drawn from is left out",
)
PREFIX = Rule(
    lambda x: is_utf8(x) and len(x) <= 1024,
    "a text in UTF-8 of at most 1024 characters, or nothing",
)

SOURCE = one_of("digits", "synthetic", "records")
SOURCE = SOURCE._replace(wanted=f"{SOURCE.wanted} (which precompute makes of pictures)")

DATA = dict(
    name=Key(
        "synthetic",
        SOURCE,
        "Source of examples: noise, drawn digits, or records that precompute wrote.",
    ),
    batch_size=Key(1024, BATCH, "Number of examples in a step, over all devices."),
    threads=Key(4, QUEUE, "Threads of each process that read examples."),
    prefetch=Key(8, QUEUE, "Number of batches that are read ahead."),
    mix=Key(
        (0.2, 0.5, 0.3), MIX, "Shares of single digits, pairs and numbers in digits."
    ),
    easy=Key(
        0,
        COUNT,
        "Number of first digit examples whose captions name pairs from left to right"
        " or top to bottom.",
    ),
    records=Key(
        (), SHARDS, "Shards to train on, or globs of them, for the source records."
    ),
    weights=Key(
        (), SHARES, "How often each of data.records is drawn from; (): all are one set."
    ),
    held_out=Key((), SHARDS, "Shards for validation only, or globs of them."),
    bad_records=Key(
        0.0,
        BELOW_ONE,
        "Share of records that may be bad and are passed over; 0: the first one ends"
        " the run.",
    ),
)
INGEST = dict(
    inputs=Key((), PATHS, "Folders of pictures, WebDataset tars and parquet files."),
    # The paper trains on half original, half synthetic captions (table 4).
    captions=Key(
        ("caption=0.5", "synthetic=0.5"),
        TEXTS,
        "Columns or functions package.module:function that give captions, each with"
        " its weight.",
    ),
    filters=Key(
        (),
        TEXTS,
        "Conditions that a picture must meet, such as aesthetic>=4.5 or"
        " package.module:function<0.2.",
    ),
    exclude=Key(
        (), PATHS, "Files duplicates.jsonl of dedup, whose pictures are left out."
    ),
    prefix=Key("", PREFIX, "Text before each caption, or alone if a picture has none."),
    uncaptioned=Key(
        "reject",
        one_of("keep", "reject"),
        "What happens to pictures without a caption; keep makes unconditional"
        " examples.",
    ),
    rejected=Key(
        "", FREE, "Column that names the other, worse picture of a preference."
    ),
)
PRECOMPUTE = dict(
    only=Key(
        ("vae", "clip_l", "clip_g", "t5"),
        some_of("vae", "clip_l", "clip_g", "t5"),
        "Encoders that precompute applies; training applies the rest, and () stores"
        " pictures.",
    ),
    # A part is what a kill costs, and leaves a shard for each bucket.
    part=Key(
        4_096,
        POSITIVE,
        "Number of pictures in a part, about: it is done whole or again.",
    ),
    threads=Key(4, FEW, "Threads that read and decode pictures."),
    held_out=Key(
        0.0, BELOW_ONE, "Share of the pictures that goes into validation shards."
    ),
)
DEDUP = dict(
    embed=Key(
        "hash", NAME, "Embedding: hash, SSCD's TorchScript, or package.module:function."
    ),
    threshold=Key(
        0.0, UNIT, "Least similarity of duplicates; 0: the embedding's default."
    ),
    clusters=Key(
        0, COUNT, "Number of clusters of the search; 0: by the number of pictures."
    ),
    probes=Key(4, POSITIVE, "Number of clusters that are searched for each picture."),
    batch_size=Key(64, BATCH, "Number of pictures that are embedded at a time."),
    threads=Key(4, FEW, "Threads that read and decode pictures."),
    pairs=Key(64, COUNT, "Number of pairs on the report."),
)
INSPECT = dict(
    records=Key(16, COUNT, "Number of records of each shard to read; 0: all."),
    pictures=Key(48, COUNT, "Number of pictures on the contact sheet."),
    shards=Key(
        False, SWITCH, "Print a row for each shard, even if there are more than 50."
    ),
)
