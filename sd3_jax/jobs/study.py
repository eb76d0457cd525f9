"""Variants of a recipe, some seeds of each, compared as the paper compares (5.1, B.3).

    python -m sd3_jax.main study --config=configs/formulations.py:digits --workdir=...

WORKDIR/runs/VARIANT/SEED is a run as `train` makes it, with what `study` measured of it
in study.json; what is there is not done again. Any number of processes, each with its
own devices, may work in one workdir: each takes what no other is at. The tables are
printed and kept as study.md, study.json and study.html.
"""

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
    """One training: of a variant, with an option of the sweep, of a seed."""

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
            for one in left:
                if stop() or study.take(one):
                    break
            else:  # all that is left is at work elsewhere
                watchdog.expect("the runs of other processes", None)
                time.sleep(WAIT)
    results = study.results()
    if not results:
        log.info("stopped before any run was measured; the same call goes on")
        return
    told = study_tables.told(results)
    if left := len(study.left()):
        told = f"{told}\n\n{left} or more runs are still to come.\n"
    page = study_page.html(results, workdir)
    files.write_whole(workdir / "study.md", told.encode())
    files.write_whole(workdir / "study.html", page.encode())
    files.write_whole(workdir / RESULT, json.dumps(results, indent=1).encode())
    for name, svg in study_page.figures(results).items():
        files.write_whole(workdir / f"{name}.svg", svg.encode())
    print(told, workdir / "study.html", sep="\n")


class Study:
    """Which runs there are, which are done, and how one is done."""

    def __init__(self, config: ConfigDict, workdir: epath.Path):
        self.config, self.workdir = config, workdir
        self.variants = dict(map(parse, config.study.variants))
        if not self.variants:
            raise UserError(
                "config.study.variants = (): wanted some, as in configs/formulations.py"
            )
        self.options = tuple(config.study.sweep) or ("",)
        for one in self.wanted():  # mistakes are told of before anything is trained
            for setting in config.study.settings:
                run_scores.sampling(self.settings(one), setting)
        run_scores.check(config)

    def wanted(self) -> Iterator[Run]:
        """Of the sweep's options only seed 0 until all of a variant's are measured;
        then the other seeds of the best."""
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
        found = {x: self.result(Run(variant, x, 0)) for x in self.options}
        if not all(found.values()):
            return None
        return min(found, key=lambda x: study_tables.merit(found[x], self.by))

    @property
    def by(self) -> str:
        return self.config.study.by

    def left(self) -> list[Run]:
        return [one for one in self.wanted() if self.result(one) is None]

    def results(self) -> list[dict]:
        """Of the best option of each variant, or of all where a sweep is not over."""
        kept = []
        for one in self.wanted():
            best = self.best_option(one.variant)
            found = self.result(one)
            if found is not None:
                kept.append(found | {"best": best in (None, one.option)})
        return kept

    def result(self, one: Run) -> dict | None:
        path = self.folder(one) / RESULT
        found = json.loads(path.read_text()) if path.exists() else {}
        return found if found.get("complete") else None

    def folder(self, one: Run) -> epath.Path:
        return self.workdir / "runs" / one.folder

    def settings(self, one: Run) -> ConfigDict:
        config = self.config.copy_and_resolve_references()
        for text in (*self.variants[one.variant], *one.option.split()):
            run_scores.override(config, text, f"study of {one.variant}")
        config.seed = self.config.seed + one.seed
        config.train.prompts = ()
        validate(config)
        run_checks.require_trainable_dtype(config)
        return config

    def take(self, one: Run) -> bool:
        """Train and measure it, unless another process is at it."""
        folder = self.folder(one)
        held = lock.held(folder, "study")
        try:
            held.__enter__()
        except UserError as error:
            if "another job" not in str(error):
                raise
            return False
        try:
            if self.result(one) is None:
                done = len(list(self.wanted())) - len(self.left())
                words = f"{one.variant} {one.option}".strip()
                log.info("run %d: %s, seed %d", done + 1, words, one.seed)
                self.do(one, self.settings(one), folder)
        finally:
            held.__exit__(None, None, None)
        return True

    def do(self, one: Run, config: ConfigDict, folder: epath.Path) -> None:
        train.run(config, folder)
        validations = [x for x in metrics.read(folder) if x["kind"] == "val"]
        if not validations or validations[-1]["step"] < config.train.steps:
            return  # told to stop
        path = folder / RESULT
        about = one._asdict() | {"settings": self.variants[one.variant]}
        result = json.loads(path.read_text()) if path.exists() else about
        keep: Callable[[dict], None] = lambda result: files.write_whole(
            path, json.dumps(result, indent=1).encode()
        )
        run_scores.measure(config, folder, validations, result, keep)


def parse(text: str) -> tuple[str, list[str]]:
    """A name and the settings that make it: "rf: flow.path=rf flow.density=uniform"."""
    name, colon, settings = text.partition(":")
    if not colon or not name.strip():
        raise ConfigError(
            f"config.study.variants: {text!r}: wanted NAME: KEY=VALUE KEY=VALUE"
        )
    return name.strip(), settings.split()
