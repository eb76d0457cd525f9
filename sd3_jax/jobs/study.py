"""Variants of a recipe, some seeds of each, compared as the paper compares (5.1, B.3).

    python -m sd3_jax.main study --config=configs/formulations.py:digits --workdir=...

WORKDIR/runs/VARIANT/SEED is a run of `train` with its measurements in study.json;
finished runs are not repeated. Any number of processes, each with its own devices, may
share a workdir: each takes a run that no other works on. The tables are printed and
written to study.md, study.json and study.html.
"""

import contextlib
import json
import logging
import re
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

from etils import epath
from ml_collections import ConfigDict

from sd3_jax import files
from sd3_jax.config.validation import validate
from sd3_jax.distributed import lock, processes, watchdog
from sd3_jax.errors import ConfigError, UserError
from sd3_jax.jobs import train
from sd3_jax.monitoring import metrics
from sd3_jax.tools.study import run_scores, study_page, study_tables
from sd3_jax.training import run_checks

log = logging.getLogger(__name__)
WAIT = 5.0  # seconds between looks at what other processes have done
RESULT = "study.json"


class Run(NamedTuple):
    """One training run: a variant, an option of the sweep, and a seed."""

    variant: str
    option: str
    seed: int

    @property
    def folder(self) -> str:
        parts = self.variant, self.option, f"seed{self.seed}"
        return "/".join(re.sub(r"[^\w(),.=+-]", "_", part) for part in parts if part)


def run(config: ConfigDict, workdir: epath.PathLike) -> None:
    workdir = epath.Path(workdir)
    study = Study(config, workdir)
    with processes.stopping() as stop:
        while not stop() and (left := study.left()):
            # Another process may hold a run's lock; the next free one is taken.
            for study_run in left:
                if stop() or study.take(study_run):
                    break
            else:  # all that is left is at work elsewhere
                watchdog.expect("the runs of other processes", None)
                time.sleep(WAIT)
    results = study.results()
    # A stop signal may come before the first measurement; there is nothing to tabulate.
    if not results:
        log.info(
            "stopped before any run was measured; run the same command to continue"
        )
        return
    tables = study_tables.markdown(results)
    if left := len(study.left()):
        tables = f"{tables}\n\n{left} or more runs remain.\n"
    page = study_page.html(results, workdir)
    files.write_whole(workdir / "study.md", tables.encode())
    files.write_whole(workdir / "study.html", page.encode())
    files.write_whole(workdir / RESULT, json.dumps(results, indent=1).encode())
    for name, svg in study_page.figures(results).items():
        files.write_whole(workdir / f"{name}.svg", svg.encode())
    print(tables, workdir / "study.html", sep="\n")


class Study:
    """The runs of a study: which exist, which are done, and how to do one."""

    def __init__(self, config: ConfigDict, workdir: epath.Path):
        self.config, self.workdir = config, workdir
        self.variants = dict(map(parse, config.study.variants))
        if not self.variants:
            raise UserError(
                "config.study.variants = (): set at least one, as in"
                " configs/formulations.py"
            )
        self.options = tuple(config.study.sweep) or ("",)
        # A mistake in any run's settings is reported before anything is trained.
        for study_run in self.wanted():
            for setting in config.study.settings:
                run_scores.sampling(self.settings(study_run), setting)
        run_scores.check(config)

    def wanted(self) -> Iterator[Run]:
        """First seed 0 of all options of the sweep; then, for each variant whose
        options are all measured, the other seeds of the best option."""
        for variant in self.variants:
            for option in self.options:
                yield Run(variant, option, 0)
        for variant in self.variants:
            option = self.best_option(variant)
            if option is not None:
                for seed in range(1, self.config.study.seeds):
                    yield Run(variant, option, seed)

    def best_option(self, variant: str) -> str | None:
        if len(self.options) == 1:
            return self.options[0]
        results = {x: self.result(Run(variant, x, 0)) for x in self.options}
        if not all(results.values()):
            return None
        by = self.config.study.by
        return min(results, key=lambda x: study_tables.merit(results[x], by))

    def left(self) -> list[Run]:
        return [x for x in self.wanted() if self.result(x) is None]

    def results(self) -> list[dict]:
        """Results with "best": whether a run has its variant's best option so far."""
        rows = []
        for study_run in self.wanted():
            best = self.best_option(study_run.variant)
            result = self.result(study_run)
            if result is not None:
                rows.append(result | {"best": best in (None, study_run.option)})
        return rows

    def result(self, study_run: Run) -> dict | None:
        path = self.folder(study_run) / RESULT
        saved = json.loads(path.read_text()) if path.exists() else {}
        return saved if saved.get("complete") else None

    def folder(self, study_run: Run) -> epath.Path:
        return self.workdir / "runs" / study_run.folder

    def settings(self, study_run: Run) -> ConfigDict:
        config = self.config.copy_and_resolve_references()
        # The option comes after the variant, so it may override it.
        for text in (*self.variants[study_run.variant], *study_run.option.split()):
            run_scores.override(config, text, f"study of {study_run.variant}")
        config.seed = self.config.seed + study_run.seed
        # Samples during training would cost time in every run and are not scored.
        config.train.prompts = ()
        # The variant's settings are checked together, as if they were the recipe's.
        validate(config)
        run_checks.require_trainable_dtype(config)
        return config

    def take(self, study_run: Run) -> bool:
        """Trains and measures a run; False if another process works on it."""
        folder = self.folder(study_run)
        with contextlib.ExitStack() as stack:
            try:
                stack.enter_context(lock.held(folder, "study"))
            except UserError as error:
                # A lock that is taken means "try the next run", and is no error.
                if "another job" not in str(error):
                    raise
                return False
            # Asked again under the lock: another process may have finished the run
            # meanwhile.
            if self.result(study_run) is None:
                done = len(list(self.wanted())) - len(self.left())
                words = f"{study_run.variant} {study_run.option}".strip()
                log.info("run %d: %s, seed %d", done + 1, words, study_run.seed)
                self.do(study_run, self.settings(study_run), folder)
        return True

    def do(self, study_run: Run, config: ConfigDict, folder: epath.Path) -> None:
        train.run(config, folder)
        validations = [x for x in metrics.read(folder) if x["kind"] == "val"]
        if not validations or validations[-1]["step"] < config.train.steps:
            return  # told to stop
        path = folder / RESULT
        about = study_run._asdict() | {"settings": self.variants[study_run.variant]}
        result = json.loads(path.read_text()) if path.exists() else about
        keep: Callable[[dict], None] = lambda result: files.write_whole(
            path, json.dumps(result, indent=1).encode()
        )
        run_scores.measure(config, folder, validations, result, keep)


def parse(text: str) -> tuple[str, list[str]]:
    """Parses NAME: SETTINGS, such as "rf: flow.path=rf flow.density=uniform"."""
    name, colon, settings = text.partition(":")
    if not colon or not name.strip():
        raise ConfigError(
            f"config.study.variants: {text!r}: expected NAME: KEY=VALUE KEY=VALUE"
        )
    return name.strip(), settings.split()
