"""Keys of serve."""

import re

from sd3_jax.config.schema.key_rules import (
    FREE,
    NAME,
    TEXTS,
    Key,
    Rule,
    above_zero,
    between,
    integer,
    one_of,
    sequence,
    some_of,
)
from sd3_jax.config.schema.sampling_schema import SOLVERS

SIDE = "[1-9][0-9]{0,4}"
SIZES = sequence(
    Rule(
        lambda x: isinstance(x, str) and bool(re.fullmatch(f"{SIDE}x{SIDE}", x)),
        "WIDTHxHEIGHT",
    ),
    "sizes such as 1024x1024, with commas between",
)
SOME_SOLVERS = sequence(one_of(*SOLVERS), f"some of {', '.join(SOLVERS)}")
SECONDS = above_zero(86_400)
BYTES = integer(1, 2**31)

SERVE = dict(
    host=Key("127.0.0.1", NAME, "Address to listen at; 0.0.0.0: all of the machine."),
    port=Key(8000, integer(0, 65_535), "Port to listen at; 0: a free one."),
    model=Key(
        "", FREE, "Name of the model at /v1/models; empty: that of its folder or file."
    ),
    sizes=Key(
        (),
        SIZES,
        "Sizes that are offered, as WIDTHxHEIGHT; (): image.height and width.",
    ),
    solvers=Key(
        (),
        SOME_SOLVERS,
        "More solvers whose programs are compiled at start; (): none.",
    ),
    kinds=Key(
        ("generate",),
        some_of("generate", "image", "mask"),
        "What programs are compiled for: prompts alone, a picture to change, and one"
        " with a mask.",
    ),
    unwarmed=Key(
        "refuse",
        one_of("refuse", "compile"),
        "What happens to a request whose program was not compiled at start.",
    ),
    wait_ms=Key(
        20.0, between(0, 60_000), "Milliseconds that a picture waits for company."
    ),
    queue=Key(256, integer(1, 2**20), "Number of pictures that may wait; then 429."),
    max_n=Key(10, integer(1, 4096), "Largest number of pictures of a request."),
    max_steps=Key(100, integer(1, 1_000), "Largest number of steps of a request."),
    prompt_bytes=Key(4096, integer(1, 2**20), "Largest prompt in bytes."),
    body_bytes=Key(2**25, BYTES, "Largest request in bytes, uploads included."),
    all_bodies=Key(2**28, BYTES, "Bytes of all requests that are being read."),
    pixels=Key(2**24, integer(1, 2**26), "Largest number of pixels of an upload."),
    request_s=Key(300.0, SECONDS, "Seconds from a request to its answer; then 504."),
    read_s=Key(30.0, SECONDS, "Seconds in which a request must have arrived."),
    drain_s=Key(
        60.0, SECONDS, "Seconds after SIGTERM in which waiting pictures are painted."
    ),
    open_requests=Key(1000, integer(1, 2**16), "Number of requests at once; then 503."),
    partial_images=Key(
        0,
        integer(0, 3),
        "Largest number of previews of a picture in a stream; 0: none, and programs"
        " without them.",
    ),
    kept=Key(
        64, integer(0, 2**20), "Number of newest pictures that are kept for their URLs."
    ),
    keys_file=Key(
        "", FREE, "File of API keys, one a line; empty: the API needs no key."
    ),
    cors=Key((), TEXTS, "Origins whose pages may call the API; (): none."),
    proxies=Key(
        "127.0.0.1",
        FREE,
        "Addresses of proxies whose X-Forwarded headers are believed.",
    ),
)
