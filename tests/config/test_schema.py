"""Every key once: with an allowed default, in help and in the reference."""

import ast
import importlib.util
import shlex
import textwrap
from functools import cache
from pathlib import Path

import pytest

from configs import base
from sd3_jax import main
from sd3_jax.config import key_page, schema
from sd3_jax.config.validation import leaves
from sd3_jax.jobs import JOBS

ROOT = Path(__file__).parents[2]


def test_a_config_has_the_schema_s_keys_and_a_value_of_its_own():
    config, other = base.get_config(), base.get_config()
    assert {key for key, _ in leaves(config)} == schema.KEYS.keys()
    assert {*config} == {*schema.TOP_LEVEL} and config.is_locked
    config.model.width, config.benchmark.t5.depth = 64, 2
    assert other.model.width is None and other.benchmark.t5.depth == 8


@pytest.mark.parametrize("key", schema.KEYS)
def test_a_key_has_a_default_that_is_allowed_and_one_sentence(key):
    entry = schema.KEYS[key]
    assert entry.default is not None or entry.kind is not None
    assert entry.default is None or entry.rule.holds(entry.default)
    assert entry.about[0] == entry.about[0].upper() and entry.about.endswith(".")
    assert not any(mark in entry.about for mark in ("|", "\n", "  "))


def test_the_reference_of_keys_is_what_the_schema_makes():
    again = f"python -m sd3_jax.config.key_page > {key_page.PAGE}"
    assert (ROOT / key_page.PAGE).read_text() == key_page.page(), again


@pytest.mark.parametrize("name", JOBS)
def test_a_job_s_own_page_of_help(name, capsys):
    with pytest.raises(SystemExit) as stop:
        main.parse([name, "--help"])
    page, job = capsys.readouterr().out, JOBS[name]
    assert stop.value.code == 0 and max(map(len, page.splitlines())) <= 100
    assert f"\nUsage: sd3-jax {name} " in page
    assert all(f"  {group.partition('.')[0]} " in page for group in job.groups)
    assert all(group.partition(".")[2] in page for group in job.groups)
    assert page.endswith(f"Example:\n{textwrap.indent(job.example, '  ')}\n")
    program, *words = shlex.split(job.example.replace("\\\n", ""))
    assert program == "sd3-jax" and words[0] == name
    with pytest.raises(SystemExit):  # its recipe and keys are there
        main.parse([*words, "--help"])


# What a job imports and does not run; each is true of the code that the job calls.
RESTORED = "a checkpoint's own replaces it when a run is restored"
TRAINER = "in modules of training, of which this job calls other functions"
RELEASED = "in the loader of released weights, for what this job does not load"
PAINTER = "in the sampler of released weights, beside that of the run in training"
UNREAD = {
    "train": dict(weights=PAINTER, tokenizers=PAINTER),
    "sample": dict(optim=TRAINER, data=TRAINER, eval=TRAINER, tune=RESTORED),
    "serve": dict(
        **dict.fromkeys(("optim", "data", "eval"), TRAINER),
        tune=RESTORED,
        train="in the reader of prompts, which come with requests here",
    ),
    "calibrate": dict(optim=TRAINER, data=TRAINER, eval=TRAINER, tune=RESTORED),
    "evaluate": dict(
        **dict.fromkeys(("optim", "train"), TRAINER),
        tune=RESTORED,
        ingest="in the reader of pictures, which gets eval.real here",
    ),
    "study": dict(
        weights="a study scores its own runs",
        ingest="in the reader of pictures, which gets eval.real here",
    ),
    "convert": dict(
        **dict.fromkeys(("seed", "optim", "data", "train", "eval"), TRAINER),
        tune=RESTORED,
        quantize=RELEASED,
    ),
    "precompute": dict.fromkeys(("data", "optim", "tune", "train", "eval"), TRAINER),
    "plan": dict.fromkeys(("encode", "eval"), TRAINER) | dict(weights=PAINTER),
}


@pytest.mark.parametrize("name", JOBS)
def test_a_job_lists_the_groups_that_its_modules_read(name):
    read, seen, todo = set(), set(), [f"sd3_jax.jobs.{name}"]
    while todo:
        module = todo.pop()
        if module not in seen:
            seen.add(module)
            groups, imported = looked_up(module)
            read |= groups
            todo += imported
    if "sd3_jax.sampling.job.prompt_lines" in seen:
        read.add("image")  # by the names of LINE_SETTINGS
    listed = {group.partition(".")[0] for group in JOBS[name].groups}
    unread = {*UNREAD.get(name, ())}
    assert read == listed | unread and not listed & unread


@pytest.mark.parametrize("name", JOBS)
def test_a_job_s_single_keys_exist(name):
    job = JOBS[name]
    single = {group for group in job.groups if "." in group} | {*job.unread}
    assert single <= schema.KEYS.keys()
    assert not {x for x in single - {*job.unread} if x.partition(".")[0] in job.groups}
    assert all(x.partition(".")[0] in job.groups for x in job.unread)


@cache
def looked_up(module: str) -> tuple[set[str], set[str]]:
    """The `config.GROUP`s of a module's code, and the modules of ours it imports."""
    tree = ast.parse(Path(importlib.util.find_spec(module).origin).read_text())
    groups, imported = set(), set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and node.attr in schema.TOP_LEVEL:
            of = node.value  # config.data, self.config.data
            if "config" in (getattr(of, "id", ""), getattr(of, "attr", "")):
                groups.add(node.attr)
        elif isinstance(node, ast.ImportFrom) and node.module.startswith("sd3_jax"):
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            imported |= {name if is_module(name) else node.module for name in names}
    return groups, imported - {"sd3_jax"}


@cache
def is_module(name: str) -> bool:
    path = ROOT.joinpath(*name.split("."))
    return path.with_suffix(".py").is_file() or (path / "__init__.py").is_file()
