"""Scores of prompts' pictures by the user's functions: GenEval, typography, CompBench.

Every process calls the functions with its share of each batch, so they must be on every
host; all processes get all verdicts. An error in a function is reported on one line.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from etils import epath
from jax.sharding import Mesh
from ml_collections import ConfigDict

from sd3_jax import hooks
from sd3_jax.assembly import model_parts
from sd3_jax.distributed import processes, watchdog
from sd3_jax.errors import UserError, prefixed
from sd3_jax.evaluation import compbench, geneval, scorers, typography
from sd3_jax.evaluation.scorers import Asked, Score, Scorer, Verdict
from sd3_jax.sampling.job import prompt_file, row_batches, sampler


class Benchmark(NamedTuple):
    name: str  # as its rows call it
    asked: list[Asked]
    scorer: Scorer
    rows: Callable[[Sequence[Asked], Sequence[Verdict]], list[Score]]


def check(config: ConfigDict) -> None:
    """UserError, before anything is sampled, if a file or a function is missing."""
    for name in config.eval.scores:
        if name in BENCHMARKS:
            BENCHMARKS[name](config)


def score(
    name: str,
    config: ConfigDict,
    parts: model_parts.Parts | None,
    mesh: Mesh,
    params: Any,
) -> dict:
    """The benchmark's rows, and a row for each prompt with the reasons of failures."""
    bench, asked = benchmark(name, config)
    sample = sampler.sampler_for(config, parts, mesh, params)
    verdicts = judge(sample, asked, bench.scorer, config.sample.batch_size)
    return {
        "scores": [row.finite() for row in bench.rows(asked, verdicts)],
        "prompts": scorers.prompts(asked, verdicts, bench.name),
    }


def benchmark(name: str, config: ConfigDict) -> tuple[Benchmark, list[Asked]]:
    """The benchmark, and its prompts, each repeated config.eval.per_prompt times."""
    bench = BENCHMARKS[name](config)
    return bench, [
        question for question in bench.asked for _ in range(config.eval.per_prompt)
    ]


def judge(
    sample: sampler.SampleCaptions, asked: Sequence[Asked], scorer: Scorer, size: int
) -> list[Verdict]:
    """Verdicts on one picture for each question, sampled `size` at a time."""
    prompts = [question.prompt for question in asked]
    verdicts = []
    for images in row_batches.sample_in_batches(
        sample, prompts, range(len(prompts)), size
    ):
        watchdog.expect("scores of a batch of pictures", watchdog.LONG)
        # Verdicts arrive in order, so their number is the place of this batch.
        batch = asked[len(verdicts) : len(verdicts) + len(images)]
        judge_rows = functools.partial(_share, scorer, batch, images)
        verdicts += processes.shared(judge_rows, len(batch))
    # They went through JSON, those of this process too, and are lists by now.
    return [Verdict(*verdict) for verdict in verdicts]


def _share(scorer, asked, images: np.ndarray, rows: list[int]) -> list[Verdict]:
    return scorer([asked[i] for i in rows], images[rows])


def _geneval(config: ConfigDict) -> Benchmark:
    asked = _read(
        config, "geneval", "GenEval's evaluation_metadata.jsonl", geneval.parse
    )
    includes = [part for question in asked for part in question.wanted["include"]]
    # A file without colour prompts needs no function that names colours.
    coloured = any("color" in part for part in includes)
    detect = _hook(config, "detector")
    colour = _hook(config, "colour") if coloured or config.eval.colour else None
    return Benchmark("GenEval", asked, geneval.scorer(detect, colour), geneval.rows)


def _typography(config: ConfigDict) -> Benchmark:
    wanted = "a file of prompts with their text in quotes"
    asked = _read(config, "typography", wanted, typography.parse)
    scorer = typography.scorer(_hook(config, "ocr"), tuple(config.eval.ocr_ignore))
    return Benchmark("typography", asked, scorer, typography.rows)


def _compbench(config: ConfigDict) -> Benchmark:
    key, specs = "eval.compbench_scorers", config.eval.compbench_scorers
    with prefixed(f"config.{key}"):
        names = compbench.names(specs)
    if not names:
        raise UserError(
            f"config.{key}: no entry; expected color=package.module:function, …"
        )
    functions, asked = {}, []
    for category, name in names.items():
        # guarded: an exception in the user's code becomes a one-line UserError.
        functions[category] = hooks.guarded(key, name)
        parse = functools.partial(compbench.parse, category=category)
        file, wanted = compbench.file(category), "T2I-CompBench's folder of prompts"
        asked += _read(config, "compbench", wanted, parse, file)
    scorer = compbench.scorer(functions)
    return Benchmark("T2I-CompBench", asked, scorer, compbench.rows)


def _read(
    config: ConfigDict, key: str, wanted: str, parse: Callable, file: str = ""
) -> list[Asked]:
    """All prompts of the file or folder that config.eval.`key` names.

    An invalid line is an error, because skipping it would change the score.
    """
    setting = config.eval[key]
    # Only the benchmarks in config.eval.scores need their files.
    if not setting:
        raise UserError(
            f'config.eval.scores: "{key}" needs config.eval.{key}: {wanted}'
        )
    path = epath.Path(setting) / file if file else epath.Path(setting)
    asked, name = [], f"config.eval.{key} = {path}"
    for number, line in enumerate(prompt_file.text_lines(path, name), 1):
        try:
            asked += [parse(line.strip())] if line.strip() else []
        except UserError as error:
            raise UserError(f"{name}, line {number}: {error}") from None
    if not asked:
        raise UserError(f"{name}: holds no prompt")
    return asked


def _hook(config: ConfigDict, key: str) -> Callable:
    name = config.eval[key]
    if not name:
        message = f"config.eval.{key}: not a function"
        raise UserError(
            f'{message}; expected "package.module:function" (docs/how-to/evaluate.md)'
        )
    return hooks.guarded(f"eval.{key}", name)


BENCHMARKS = {"geneval": _geneval, "typography": _typography, "compbench": _compbench}
SCORES = {name: functools.partial(score, name) for name in BENCHMARKS}
