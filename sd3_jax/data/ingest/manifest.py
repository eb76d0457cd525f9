"""The progress of precompute: a file for each finished part, and the sum of all."""

import json
import logging
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from typing import Any

from etils import epath

from sd3_jax import files
from sd3_jax.data import records
from sd3_jax.data.ingest import input_changes, prepare
from sd3_jax.data.ingest.items import Rejected
from sd3_jax.data.ingest.prepare import Ready
from sd3_jax.data.records import Record
from sd3_jax.data.shards import Writer
from sd3_jax.errors import UserError
from sd3_jax.files import write_whole

log = logging.getLogger(__name__)
SPLITS = ("train", "val")
COUNTS = ("rejected", "captions", "cut")  # fields of a part's report, counts by name
REPORT = {"kept", "uncaptioned", "seconds", "shards", *COUNTS}
THREADS = 32  # that read the reports of parts; a bucket takes a request for each


class PartWriter(ExitStack):
    """The shards of a part, one for each bucket and split.

    An exception leaves none of them: shards get their names when the writer is left,
    and `Manifest.clear_unfinished` removes those of a part that is not done.
    """

    def __init__(self, workdir: epath.Path, number: int):
        super().__init__()
        self.folder, self.number = workdir / "records", number
        self._writers, self._sources = {}, Counter()  # writers by bucket and split
        self.uncaptioned = 0

    def write(self, ready: Ready, tensors: dict[str, Any]) -> None:
        """Write a record to its shard; BadRecord, and nothing written, if it is bad."""
        record = Record(
            tensors,
            source=ready.source,
            caption=ready.caption,
            size=ready.size,
            crop=ready.crop,
            caption_from=ready.caption_from,
        )
        # Encoded before a shard is opened: a shard without records is an error.
        data = records.encode(record)
        key = bucket, split = str(ready.bucket), SPLITS[ready.held_out]
        if key not in self._writers:
            writer = Writer(self.folder / f"{split}-{self.number:05d}-{bucket}.arecord")
            self._writers[key] = self.enter_context(writer)
        self._writers[key].add(data)
        # Counted after the write: what is refused is counted as rejected.
        self._sources[ready.caption_from] += bool(ready.caption_from)
        self.uncaptioned += not ready.caption

    def about(self) -> dict[str, Any]:
        """Counts by bucket, split and caption, and the shards, which must be whole."""
        by_bucket, shards = {}, []
        by_name = lambda entry: entry[1].path.name
        for (bucket, split), writer in sorted(self._writers.items(), key=by_name):
            by_bucket.setdefault(bucket, dict.fromkeys(SPLITS, 0))[split] = writer.count
            shard = {"name": writer.path.name, "records": writer.count}
            shards.append(shard | {"bytes": writer.bytes})
        return {
            "kept": by_bucket,
            "captions": dict(sorted((+self._sources).items())),
            "uncaptioned": self.uncaptioned,
            "shards": shards,
        }


class Manifest:
    """DIR/parts: 00012.json once part 12 is done, with its rejected files beside it."""

    def __init__(self, workdir: epath.Path, parts: int):
        self.workdir, self.parts = workdir, parts
        self.folder = workdir / "parts"

    def done(self) -> set[int]:
        """Numbers of the finished parts."""
        return self._finished(path.name for path in files.children(self.folder))

    def _finished(self, names: Iterable[str]) -> set[int]:
        """Numbers of the parts whose reports are among the names of a listing."""
        numbers = [n[:-5] for n in names if n.endswith(".json") and n[:-5].isdigit()]
        return {int(number) for number in numbers if int(number) < self.parts}

    def add(
        self, number: int, report: dict, rejected: list[Rejected], sources: list[list]
    ) -> None:
        """Mark a part as done; `sources` are its rows of `input_changes`.

        All its shards must have their names by now.
        """
        # 00012.json comes last: it makes the part count, so all else must be there. A
        # kill before it leaves files that the next run writes over.
        lines = "".join(f"{json.dumps(row)}\n" for row in sources).encode()
        write_whole(input_changes.path(self.workdir, number), lines)
        rows = [json.dumps(row._asdict(), ensure_ascii=False) for row in rejected]
        # Names that are not valid text cannot be written as UTF-8.
        text = "".join(f"{row}\n" for row in rows).encode("utf-8", "replace")
        write_whole(self.folder / f"{number:05d}.rejected.jsonl", text)
        sizes = {"sources": len(lines), "rejected": len(text)}
        # Reasons are counted by what they have in common; each in full is in the file.
        reasons = Counter(prepare.reason_kind(row.reason) for row in rejected)
        report = report | {"rejected": dict(sorted(reasons.items())), "sizes": sizes}
        write_whole(self.report_path(number), json.dumps(report).encode())

    def report_path(self, number: int) -> epath.Path:
        """Where a part's report is, which counts the part as finished."""
        return self.folder / f"{number:05d}.json"

    def damaged(self) -> dict[int, str]:
        """What is wrong with finished parts whose files are missing or changed.

        By number. Reads each part's report, and lists the folders once.
        """
        shard_sizes = files.sizes(self.workdir / "records")
        part_sizes = files.sizes(self.folder)
        numbers = sorted(self._finished(part_sizes))

        def fault(number: int) -> str:
            path = self.report_path(number)
            data = files.read_bytes(path)
            try:
                report = files.parse_object(path, data)
            except UserError as error:
                return str(error)
            if absent := sorted(REPORT - report.keys()):
                return f"{path}: it lacks {absent[0]}"
            return self._fault(number, report, shard_sizes, part_sizes)

        with ThreadPoolExecutor(THREADS) as threads:
            faults = dict(zip(numbers, threads.map(fault, numbers)))
        return {number: text for number, text in faults.items() if text}

    def _fault(self, number: int, report: dict, shards: dict, parts: dict) -> str:
        """Which file of a part is missing or has another size; "" if none.

        `shards` and `parts` have the bytes of what is in records/ and parts/, by name.
        """
        # Parts of earlier versions do not say sizes: their files need only be there.
        for shard in report["shards"]:
            path = self.workdir / "records" / shard["name"]
            if text := _difference(path, shards, shard.get("bytes")):
                return text
        sizes = report.get("sizes", {"rejected": None})
        for kind, size in sizes.items():
            path = self.folder / f"{number:05d}.{kind}.jsonl"
            if text := _difference(path, parts, size):
                return text
        return ""

    def forget(self, faults: dict[int, str]) -> None:
        """Make these parts count as unfinished; logs why, a line for each."""
        if faults:  # first what says that all is done
            (self.workdir / "manifest.json").unlink(missing_ok=True)
        for number, text in faults.items():
            log.warning("%s: part %d is made again", text, number)
            self.report_path(number).unlink(missing_ok=True)

    def clear_unfinished(self) -> list[int]:
        """Remove what a killed job left of unfinished parts; returns their numbers."""
        done = self.done()
        # A part's shards may be whole while its file in parts/ is missing: a kill
        # between the two. They are made again, so that counts and shards agree.
        for path in files.children(self.workdir / "records"):
            # The middle of "train-00012-512x768.arecord"; other files are left alone.
            number = path.name.split("-")[1] if path.name.count("-") >= 2 else ""
            unfinished = number.isdigit() and int(number) not in done
            if unfinished or path.name.endswith(".partial"):
                path.unlink(missing_ok=True)
        return [number for number in range(self.parts) if number not in done]

    def total(self) -> dict[str, Any]:
        """The sum of all parts, in which every file of the input is counted once."""
        by_bucket, shards, counts = {}, [], Counter()
        counters = {name: Counter() for name in COUNTS}
        for number in range(self.parts):
            report = json.loads(self.report_path(number).read_text())
            for bucket, by_split in report["kept"].items():
                by_bucket.setdefault(bucket, Counter()).update(by_split)
            for name, total in counters.items():
                total.update(report[name])
            for name in ("uncaptioned", "seconds"):
                counts[name] += report[name]
            shards += report["shards"]
        records = sum(sum(x.values()) for x in by_bucket.values())
        rejected = sum(counters["rejected"].values())
        return {
            "files": records + rejected,
            "records": records,
            "kept": {name: dict(by_bucket[name]) for name in sorted(by_bucket)},
            "rejected": dict(counters["rejected"].most_common()),
            "captions": dict(counters["captions"].most_common()),
            "uncaptioned": counts["uncaptioned"],
            "cut": dict(+counters["cut"]),
            "host_seconds": round(counts["seconds"], 1),
            "shards": shards,
        }

    def rejected(self) -> Iterator[str]:
        """The JSON lines of all rejected files, in the order of the input."""
        for number in range(self.parts):
            path = self.folder / f"{number:05d}.rejected.jsonl"
            yield from path.read_text().splitlines()


def _difference(path: epath.Path, sizes: dict[str, int], written: int | None) -> str:
    """How a file differs from what was written; "" if it does not.

    `sizes` has the bytes of its folder's files. `written` is the size that the part's
    report states; None takes any.
    """
    if (size := sizes.get(path.name)) is None:
        return f"{path} is missing"
    if written is not None and size != written:
        return f"{path} has {size:,} bytes of {written:,}"
    return ""
