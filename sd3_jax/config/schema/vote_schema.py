"""Keys of vote."""

import re

from sd3_jax.config.schema.key_rules import (
    BELOW_ONE,
    FREE,
    TEXTS,
    Key,
    Rule,
    integer,
    one_of,
    some_of,
)

HOST = Rule(
    lambda x: isinstance(x, str) and bool(re.fullmatch(r"[\w.:-]+", x)),
    "a host name or an address",
)
ACTIONS = ("serve", "results", "export")  # words after `sd3-jax vote`

VOTE = dict(
    do=Key(
        "serve",
        one_of(*ACTIONS),
        "What the job does; `sd3-jax vote export` sets it to export.",
    ),
    sources=Key(
        (),
        TEXTS,
        "Folders of pictures to compare, two or more, such as runs/a or base=runs/a;"
        " (): those of WORKDIR's vote.",
    ),
    prompts=Key(
        "",
        FREE,
        "File of prompts with categories: PartiPrompts.tsv, .jsonl or a prompt a line;"
        " empty: all prompts of the sources.",
    ),
    questions=Key(
        ("prompt", "aesthetics"),
        some_of("prompt", "aesthetics", "typography"),
        "Questions for each pair; export uses the votes on these.",
    ),
    voters=Key(
        (),
        TEXTS,
        "Names of voters, each of whom gets a secret link; (): anyone may vote under a"
        " name of their choice.",
    ),
    again=Key(
        0.0,
        BELOW_ONE,
        "Share of pairs that a voter judges twice, which measures consistency.",
    ),
    host=Key("127.0.0.1", HOST, "Address that the page is served at."),
    port=Key(8765, integer(0, 65_535), "Port of the page; 0: any that is free."),
    held_out=Key(0.1, BELOW_ONE, "Share of prompts that export holds out."),
)
