"""How jobs go through pictures of other hands: the parts of the input, and in order."""

from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice

from ml_collections import ConfigDict

from sd3_jax.data import captions, ingest, prepare
from sd3_jax.data.captions import Caption
from sd3_jax.data.ingest import Item, Part
from sd3_jax.errors import UserError
from sd3_jax.outside import shown

PARTS, FILES = 8, 256  # of the input, and of each of these, that are looked at first


def planned(config: ConfigDict, **options) -> list[Part]:
    """The parts of config.ingest.inputs; a UserError names the key."""
    if not config.ingest.inputs:
        raise UserError(
            "config.ingest.inputs = (): wanted folders of pictures, tars or parquet"
            " files, or globs of them"
        )
    try:
        return ingest.plan(config.ingest.inputs, **options)
    except UserError as error:
        raise UserError(f"config.ingest.inputs: {error}") from None


def require_captions(
    parts: Sequence[Part], wanted: Sequence[Caption], *, prefix: str = ""
) -> None:
    """UserError if a caption that is named is in none of the first pictures of some
    parts, or if none of them has any: before anything is encoded, no picture opened."""
    columns, having, rejected = Counter(), Counter(), Counter()
    pictures = captioned = 0
    for part in parts[:: -(-len(parts) // PARTS) or 1]:
        for item in islice(ingest.items(part), FILES):
            if not isinstance(item, Item):
                rejected[prepare.reasons(item.reason)] += 1
                continue
            names = captions.having(item.columns, wanted)
            pictures += 1
            captioned += bool(names)
            having.update(names)
            filled = {name: x is not None for name, x in item.columns.items()}
            columns.update(filled)  # counts where it is not null
    there = ", ".join(f"{shown(name)} ({n:,})" for name, n in columns.most_common(12))
    told = f"of the {pictures:,} pictures that were looked at, whose columns are"
    told += f" {there or 'none'}"
    plain = [each.name for each in wanted if not each.function]
    lost = [n for n in plain if not having[n] and n not in captions.STANDING]
    mean = "or, to take what has no caption as it is, --config.ingest.uncaptioned=keep"
    if pictures and lost:
        raise UserError(
            f"config.ingest.captions: {shown(lost[0])} is in none {told}; wanted one of"
            ' these; --config.ingest.prefix="…" for one text in all captions;'
            f" {mean}"
        )
    words = "caption", "file_name", "metadata", "sidecar", "line"
    left_over = [
        f"{n:,} {why}"
        for why, n in rejected.items()
        if any(word in why for word in words)
    ]
    if len(plain) == len(wanted) and pictures and not captioned:
        if left_over or not prefix:
            also = f"; rejected: {'; '.join(left_over[:3])}" if left_over else ""
            raise UserError(
                f"config.ingest.captions: no caption in any {told}{also}. Wanted"
                " a.txt, a.caption, a.json or a.jpg.txt beside a.jpg, a metadata.jsonl"
                " or .csv, or the name of a column;"
                f' --config.ingest.prefix="…" for one text for all; {mean}'
            )


def in_order(
    pool: ThreadPoolExecutor, function: Callable, things: Iterable, ahead: int
) -> Iterator:
    """function(thing) of each, in their order, `ahead` of them at a time."""
    running = deque()
    try:
        for thing in things:
            running.append(pool.submit(function, thing))
            if len(running) > ahead:
                yield running.popleft().result()
        while running:
            yield running.popleft().result()
    finally:
        for one in running:
            one.cancel()
