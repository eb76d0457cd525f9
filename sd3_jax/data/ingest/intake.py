"""How jobs read config.ingest.inputs: plan parts, check captions, map in order."""

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
from sd3_jax.errors import UserError, prefixed
from sd3_jax.foreign_text import shown

# Reasons with one of these words say that a caption was lost, not a picture.
WORDS = "caption", "file_name", "metadata", "sidecar", "line", "column"
PARTS, FILES = 8, 256  # that a survey looks at: parts, spread over all; files of each


def plan_inputs(
    config: ConfigDict, *, planned_paths: Iterable[str] = (), **options
) -> list[Part]:
    """Plan the parts of config.ingest.inputs; a UserError names the key.

    An input that is another spelling of one of `planned_paths` goes by that one,
    since the names of its sources follow from it.
    """
    if not config.ingest.inputs:
        raise UserError(
            "config.ingest.inputs = (): set it to folders of pictures, tars or parquet"
            " files, or globs of them"
        )
    with prefixed("config.ingest.inputs"):
        paths = [path for pattern in config.ingest.inputs for path in expand(pattern)]
        planned_path_of = {listing.resolved(path): path for path in planned_paths}
        paths = [planned_path_of.get(listing.resolved(path), path) for path in paths]
        return input_parts.plan(paths, **options)


class Survey(NamedTuple):
    """Counts of the first items of a few parts, from columns alone."""

    pictures: int
    captioned: int
    columns: Counter[str]  # items in which a column is not null
    captions: Counter[str]  # items that have a requested caption
    kinds: dict[str, Counter[str]]  # by column, types of values that are not text
    rejected: Counter[str]  # by reason
    reasons: dict[str, str]  # the first item of each reason, and the reason in full

    @property
    def looked_at(self) -> str:
        names = self.columns.most_common(12)
        listed = ", ".join(f"{shown(name)} ({n:,})" for name, n in names) or "none"
        return f"of the {self.pictures:,} pictures examined, whose columns are {listed}"


def survey(parts: Sequence[Part], specs: Sequence[Caption]) -> Survey:
    """Count what the first files of up to PARTS parts hold; opens no picture."""
    columns, caption_counts, rejected = Counter(), Counter(), Counter()
    kinds, reasons = defaultdict(Counter), {}
    pictures = captioned = 0
    # Spread over the input, whose parts may come from different sources. The step is
    # rounded up, so that no more than PARTS are opened; for no parts it must not be 0.
    for part in parts[:: -(-len(parts) // PARTS) or 1]:
        for item in islice(input_parts.items(part), FILES):
            if not isinstance(item, Item):
                reason = prepare.reason_kind(item.reason)
                rejected[reason] += 1
                reasons.setdefault(reason, f"{item.source}: {item.reason}")
                continue
            names = captions.available(item.columns, specs)
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
    """UserError if no picture of a survey has a caption, or a named one is in none.

    Called before anything is encoded: a wrong column would otherwise cost a whole run.
    """
    counted = survey(parts, specs)
    about_captions = [why for why in counted.rejected if any(x in why for x in WORDS)]
    rejections = [f"{counted.rejected[why]:,} {why}" for why in about_captions]
    # Nothing but rejected files: an error only if captions are why.
    if not counted.pictures:
        if about_captions:
            raise UserError(
                "config.ingest.inputs: no usable picture in the first files: rejected"
                f" {'; '.join(rejections[:3])}. The first is"
                f" {counted.reasons[about_captions[0]]}"
            )
        return
    # A function may caption anything; only columns can be missing.
    column_names = [caption.name for caption in specs if not caption.function]
    required = [x for x in column_names if x not in captions.STANDING]
    missing = [name for name in required if not counted.captions[name]]
    if missing and (counts := counted.kinds.get(missing[0])):
        raise UserError(
            f"config.ingest.captions: {shown(missing[0])} holds {_counted(counts)} and"
            f" no text in any {counted.looked_at}; expected a column of texts or of"
            " lists of texts, or package.module:function to make a text of other values"
        )
    keep = "to keep pictures without a caption, set --config.ingest.uncaptioned=keep"
    if missing:
        raise UserError(
            f"config.ingest.captions: {shown(missing[0])} is in none"
            f" {counted.looked_at}; expected one of these, or"
            f' --config.ingest.prefix="…" for one text in all captions; {keep}'
        )
    has_function = len(column_names) < len(specs)
    if has_function or counted.captioned or (prefix and not rejections):
        return
    details = f"; rejected: {'; '.join(rejections[:3])}" if rejections else ""
    usual = [x for x in counted.kinds if x.lower() in captions.USUAL]
    details += "".join(
        f"; {shown(x)} holds {_counted(counted.kinds[x])}" for x in usual
    )
    raise UserError(
        f"config.ingest.captions: no caption in any {counted.looked_at}{details}."
        " Expected a.txt, a.caption, a.json or a.jpg.txt beside a.jpg, a"
        " metadata.jsonl or .csv, or the name of a column; or"
        f' --config.ingest.prefix="…" for one text for all; {keep}'
    )


def _counted(counts: Counter[str]) -> str:
    return ", ".join(f"{kind} ({n:,})" for kind, n in counts.most_common())


def _kind(value: Value) -> str:
    """The type of a value, in the words of JSON."""
    if isinstance(value, list):
        return "lists of " + "/".join(sorted({_kind(x) for x in value}) or ["nothing"])
    names = {bool: "booleans", dict: "objects", str: "texts", type(None): "nulls"}
    return names.get(type(value), "numbers")


def in_order(
    pool: ThreadPoolExecutor, function: Callable, items: Iterable, ahead: int
) -> Iterator:
    """Map items in a pool, results in the items' order, at most `ahead` in flight."""
    # Not pool.map, which consumes all items before it yields the first result.
    running = deque()
    try:
        for item in items:
            running.append(pool.submit(function, item))
            if len(running) > ahead:
                yield running.popleft().result()
        while running:
            yield running.popleft().result()
    finally:
        for future in running:
            future.cancel()
