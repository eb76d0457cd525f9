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
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from etils import epath
from ml_collections import ConfigDict

from sd3_jax import files
from sd3_jax.assembly import compatibility
from sd3_jax.config import validation
from sd3_jax.distributed import lock, processes, watchdog
from sd3_jax.errors import ConfigError, UserError
from sd3_jax.foreign_text import shown
from sd3_jax.jobs import train
from sd3_jax.monitoring import metrics
from sd3_jax.tools.study import run_result, run_scores, study_page, study_tables
from sd3_jax.training import run_checks

log = logging.getLogger(__name__)
WAIT = 5.0  # seconds between looks at what other processes have done
RESULT = "study.json"
SCORED = ("train.steps", "study.pictures")  # may change on resume, but scores may not


class Run(NamedTuple):
    """One training run: a variant, an option of the sweep, and a seed."""

    variant: str
    option: str
    seed: int

    @property
    def folder(self) -> str:
        parts = self.variant, self.option, f"seed{self.seed}"
        return "/".join(folder_name(part) for part in parts if part)


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
        variants = [parse(text) for text in config.study.variants]
        require_folders("variants", [name for name, _ in variants])
        require_folders("sweep", config.study.sweep)
        self.variants = dict(variants)
        if not self.variants:
            raise UserError(
                "config.study.variants = (): set at least one, as in"
                " configs/formulations.py"
            )
        self.options = tuple(config.study.sweep) or ("",)
        # A mistake in any run's settings is reported before anything is trained.
        for study_run in self.wanted():
            run_config = self.settings(study_run)
            for setting in config.study.settings:
                run_scores.sampling(run_config, setting)
            self.require_same_recipe(study_run, run_config)
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
        """A run's result with the scores that are asked for, None while some lack."""
        saved = self.saved(study_run)
        if saved is None or not saved.get("complete"):
            return None
        # An earlier call may have measured other sampler settings, or fewer.
        study = self.config.study
        scores = [
            x
            for x in saved["scores"]
            if x["weights"] in study.weights and x["setting"] in study.settings
        ]
        wanted = {(w, x) for w in study.weights for x in study.settings}
        measured = {(x["weights"], x["setting"]) for x in scores}
        return saved | {"scores": scores} if measured == wanted else None

    def saved(self, study_run: Run) -> dict | None:
        """The file of a run's result, as far as it is; UserError if of another run."""
        path = self.folder(study_run) / RESULT
        saved = run_result.read(path)
        if saved is not None:
            run_result.require_same(path, saved, self.head(study_run))
        return saved

    def head(self, study_run: Run) -> dict:
        return study_run._asdict() | {"settings": self.variants[study_run.variant]}

    def require_same_recipe(self, study_run: Run, config: ConfigDict) -> None:
        """UserError if a run's scores are of another recipe."""
        folder = self.folder(study_run)
        path, result = folder / "config.json", self.saved(study_run)
        # A run that has no scores yet goes on in `train`, which asks the same.
        if result is None or "scores" not in result or not path.exists():
            return
        saved, asked = files.read_object(path), config.to_dict()
        old, new = (dict(validation.leaves(x)) for x in (saved, asked))
        rows = [(key, old[key], new[key]) for key in SCORED if key in old]
        if rows := [row for row in rows if row[1] != row[2]]:
            changes = compatibility.spelled(rows)
            raise UserError(
                f"{folder} was measured with other settings: {changes}; give the old"
                " ones, or another --workdir"
            )
        # The other variants are no settings of this run.
        saved = {name: x for name, x in saved.items() if name != "study"}
        compatibility.compare(folder, saved, config)

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
        validation.validate(config)
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
        path = folder / RESULT
        keep: Callable[[dict], None] = lambda result: files.write_whole(
            path, json.dumps(result, indent=1).encode()
        )
        # Before the training: a run that was killed says whose the folder is.
        if (result := self.saved(study_run)) is None:
            keep(result := self.head(study_run))
        train.run(config, folder)
        validations = [x for x in metrics.read(folder) if x["kind"] == "val"]
        if not validations or validations[-1]["step"] < config.train.steps:
            return  # told to stop
        run_scores.measure(config, folder, validations, result, keep)


def parse(text: str) -> tuple[str, list[str]]:
    """Parses NAME: SETTINGS, such as "rf: flow.path=rf flow.density=uniform"."""
    name, colon, settings = text.partition(":")
    if not colon or not name.strip():
        raise ConfigError(
            f"config.study.variants: {text!r}: expected NAME: KEY=VALUE KEY=VALUE"
        )
    return name.strip(), settings.split()


def folder_name(text: str) -> str:
    return re.sub(r"[^\w(),.=+-]", "_", text)


def require_folders(key: str, names: Sequence[str]) -> None:
    """ConfigError if two names are equal or would share a folder, or one names none."""
    owners: dict[str, str] = {}
    for name in names:
        folder, fault = folder_name(name), ""
        if folder in (".", "..") or len(folder.encode()) > 255:
            fault = "cannot name a folder"
        elif folder in owners:
            other = owners[folder]
            fault = f'and "{shown(other)}" would share the folder {folder}'
            fault = "appears twice" if name == other else fault
        if fault:
            raise ConfigError(
                f'config.study.{key}: "{shown(name)}" {fault}: expected different names'
                " of letters, digits and _(),.=+- (all else becomes _), at most 255,"
                ' not ".."'
            )
        owners[folder] = name
