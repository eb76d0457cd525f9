"""How jobs go through pictures of other hands: the parts of the input, and in order."""

from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import NamedTuple

from ml_collections import ConfigDict

from sd3_jax.data.ingest import captions, input_parts, listing, prepare
from sd3_jax.data.ingest.captions import Caption
from sd3_jax.data.ingest.input_parts import Item, Part
from sd3_jax.data.ingest.items import Value
from sd3_jax.data.shards import expand
from sd3_jax.errors import UserError
from sd3_jax.foreign_text import shown

WORDS = "caption", "file_name", "metadata", "sidecar", "line", "column"  # in reasons
PARTS, FILES = 8, 256  # of the input, and of each of these, that are looked at first


def planned(config: ConfigDict, *, known: Iterable[str] = (), **options) -> list[Part]:
    """The parts of config.ingest.inputs; a UserError names the key.

    An input that is one of the `known` paths by another name goes by the known one: the
    names of its sources follow from it.
    """
    if not config.ingest.inputs:
        raise UserError(
            "config.ingest.inputs = (): wanted folders of pictures, tars or parquet"
            " files, or globs of them"
        )
    try:
        paths = [path for one in config.ingest.inputs for path in expand(one)]
        spelled = {listing.resolved(path): path for path in known}
        paths = [spelled.get(listing.resolved(path), path) for path in paths]
        return input_parts.plan(paths, **options)
    except UserError as error:
        raise UserError(f"config.ingest.inputs: {error}") from None


class Survey(NamedTuple):
    """The first items of some parts, counted; no picture is opened."""

    pictures: int
    captioned: int
    columns: Counter[str]  # where they are not null
    captions: Counter[str]  # of those that are asked for
    kinds: dict[str, Counter[str]]  # by column, of values that are no text
    rejected: Counter[str]  # by reason
    reasons: dict[str, str]  # the first in full, with its source

    @property
    def looked_at(self) -> str:
        names = self.columns.most_common(12)
        there = ", ".join(f"{shown(name)} ({n:,})" for name, n in names) or "none"
        return (
            f"of the {self.pictures:,} pictures that were looked at, whose columns are"
            f" {there}"
        )


def survey(parts: Sequence[Part], specs: Sequence[Caption]) -> Survey:
    columns, caption_counts, rejected = Counter(), Counter(), Counter()
    kinds, reasons = defaultdict(Counter), {}
    pictures = captioned = 0
    for part in parts[:: -(-len(parts) // PARTS) or 1]:
        for item in islice(input_parts.items(part), FILES):
            if not isinstance(item, Item):
                reason = prepare.reasons(item.reason)
                rejected[reason] += 1
                reasons.setdefault(reason, f"{item.source}: {item.reason}")
                continue
            names = captions.having(item.columns, specs)
            pictures += 1
            captioned += bool(names)
            caption_counts.update(names)
            columns.update({name: x is not None for name, x in item.columns.items()})
            for name, value in item.columns.items():
                if value is not None and not isinstance(value, str):
                    kinds[name][_kind(value)] += 1
    counts = pictures, captioned, columns, caption_counts
    return Survey(*counts, kinds, rejected, reasons)


def require_captions(
    parts: Sequence[Part], specs: Sequence[Caption], *, prefix: str = ""
) -> None:
    """UserError if a caption that is named is in none of the first pictures of some
    parts, or if none of them has any: before anything is encoded, no picture opened."""
    seen = survey(parts, specs)
    about_captions = [why for why in seen.rejected if any(x in why for x in WORDS)]
    left_over = [f"{seen.rejected[why]:,} {why}" for why in about_captions]
    if not seen.pictures:
        if about_captions:
            raise UserError(
                "config.ingest.inputs: no picture can be taken of the first files:"
                f" rejected {'; '.join(left_over[:3])}. The first is"
                f" {seen.reasons[about_captions[0]]}"
            )
        return
    plain = [each.name for each in specs if not each.function]
    lost = [x for x in plain if not seen.captions[x] and x not in captions.STANDING]
    if lost and (counts := seen.kinds.get(lost[0])):
        raise UserError(
            f"config.ingest.captions: {shown(lost[0])} holds {_counted(counts)}, and no"
            f" text, in any {seen.looked_at}; wanted a column of texts, or of lists of"
            " texts; package.module:function makes a text of other values"
        )
    mean = "or, to take what has no caption as it is, --config.ingest.uncaptioned=keep"
    if lost:
        raise UserError(
            f"config.ingest.captions: {shown(lost[0])} is in none {seen.looked_at};"
            ' wanted one of these; --config.ingest.prefix="…" for one text in all'
            f" captions; {mean}"
        )
    if len(plain) < len(specs) or seen.captioned or (prefix and not left_over):
        return
    also = f"; rejected: {'; '.join(left_over[:3])}" if left_over else ""
    usual = [x for x in seen.kinds if x.lower() in captions.USUAL]
    also += "".join(f"; {shown(x)} holds {_counted(seen.kinds[x])}" for x in usual)
    raise UserError(
        f"config.ingest.captions: no caption in any {seen.looked_at}{also}. Wanted"
        " a.txt, a.caption, a.json or a.jpg.txt beside a.jpg, a metadata.jsonl or .csv,"
        ' or the name of a column; --config.ingest.prefix="…" for one text for all;'
        f" {mean}"
    )


def _counted(counts: Counter[str]) -> str:
    return ", ".join(f"{kind} ({n:,})" for kind, n in counts.most_common())


def _kind(value: Value) -> str:
    """What a value is, in the words of JSON."""
    if isinstance(value, list):
        return "lists of " + "/".join(sorted({_kind(x) for x in value}) or ["nothing"])
    names = {bool: "booleans", dict: "objects", str: "texts", type(None): "nulls"}
    return names.get(type(value), "numbers")


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
