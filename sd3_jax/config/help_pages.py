"""The pages of `--help`: of all jobs, of one job, of a recipe's keys and values."""

import shlex
import textwrap

from ml_collections import ConfigDict

from sd3_jax.config import schema
from sd3_jax.config.recipes import recipes, summary
from sd3_jax.config.validation import leaves
from sd3_jax.config.value_text import show
from sd3_jax.errors import EXIT_CODES
from sd3_jax.jobs import JOBS

WIDTH = 100  # columns
RECIPE, WORKDIR = "--config=RECIPE[:VARIANT]", "--workdir=DIR"
FLAGS = {
    RECIPE: "a recipe's name or file, and a form of it",
    WORKDIR: "where the job reads and writes; gs://... too",
    "--config.KEY=VALUE": "another value for one of the recipe's keys",
    "": '--config.optim.lr=3e-4 or --config.sample.prompt="a red fox"',
    "--help": "this page; with --config, the recipe's keys and values",
}


def usage() -> str:
    """The page of `sd3-jax --help`: jobs, recipes, flags."""
    intro = """usage: sd3-jax JOB --config=RECIPE[:VARIANT] --workdir=DIR [flags]
   or: python -m sd3_jax.main JOB ...
   or: sd3-jax JOB --help"""
    tables = {
        "jobs": {name: job.help for name, job in JOBS.items()},
        "recipes": {name: summary(path) for name, path in recipes().items()},
        "flags": FLAGS,
        "exit codes": {str(code): text for code, text in EXIT_CODES.items()},
    }
    return "\n\n".join([intro, *(table(*item) for item in tables.items())])


def job_page(name: str) -> str:
    """The page of `sd3-jax JOB --help`: what it does, its flags, the keys it reads."""
    job = JOBS[name]
    defaults = {RECIPE: job.recipe, WORKDIR: job.workdir}
    needed = [f"[{flag}]" if value else flag for flag, value in defaults.items()]
    flags = {
        flag: f"{text}; else {defaults[flag]}" if defaults.get(flag) else text
        for flag, text in FLAGS.items()
    }
    does = f"{job.help[:1].upper()}{job.help[1:]}. {job.about}"
    keys = {x: schema.about(x) for x in schema.TOP_LEVEL if x in job.groups}
    reads = "It reads none of the recipe's keys."
    if keys:
        listing = f"sd3-jax {name} --help --config=RECIPE lists them, with their values"
        reads = f"{table('the keys and groups that it reads', keys)}\n  ({listing})"
    return "\n\n".join(
        [
            f"usage: sd3-jax {name} {' '.join(needed)} [flags]",
            textwrap.fill(does, WIDTH),
            table("flags", flags),
            reads,
            f"example:\n{textwrap.indent(job.example, '  ')}",
        ]
    )


def table(title: str, rows: dict[str, str]) -> str:
    """Below a title, names in a column with a text beside each."""
    wide = max(map(len, rows), default=0)
    lines = [f"  {name:{wide}}  {text}".rstrip() for name, text in rows.items()]
    return "\n".join([f"{title}:", *lines])


def recipe_page(recipe: str, config: ConfigDict, job: str | None = None) -> str:
    """A recipe's keys and values, each as the flag that sets it, with its sentence.

    Of a job, those that it reads; and any that only the recipe has, which it may.
    """
    values = dict(leaves(config))
    reads = f", of those that {job} reads" if job else ""
    lines = [f"{recipe} sets{reads} (* where it is not the default):"]
    group = None
    for key in in_order(values):
        top = key.partition(".")[0]
        if job and top in schema.TOP_LEVEL and top not in JOBS[job].groups:
            continue
        if parent(key) != group:
            group = parent(key)
            about = schema.about(group) if group in schema.GROUPS else ""
            lines += ["", f"{group}: {about}".removesuffix(": ")] if group else [""]
        lines += key_lines(key, values[key], config)
    return "\n".join(lines)


def in_order(values: dict) -> list[str]:
    """The schema's order; a group inside another follows it, the recipe's come last."""
    groups = list(dict.fromkeys(map(parent, schema.KEYS)))
    keys = [key for key in schema.KEYS if key in values]
    keys += [key for key in values if key not in schema.KEYS]
    place = lambda key: (*groups, parent(key)).index(parent(key))
    return sorted(keys, key=lambda key: (place(key), parent(key)))


def parent(key: str) -> str:
    return key.rpartition(".")[0]


def key_lines(key: str, value, config: ConfigDict) -> list[str]:
    """The flag, and below it what the key does; a key of a recipe has no sentence."""
    entry, flag = schema.KEYS.get(key), f"--config.{key}={flag_text(config, key)}"
    if entry is None:
        return [f"  {flag}"]
    text, changed = entry.about, value != entry.default
    if entry.rule.wanted.startswith(("one of", "some of")):
        text += f" {entry.rule.wanted[0].upper()}{entry.rule.wanted[1:]}."
    if changed and entry.default is not None:
        text += f" Default: {shlex.quote(show(entry.default))}."
    wrapped = textwrap.wrap(text, WIDTH - 6, break_on_hyphens=False)
    return [f"{'*' if changed else ' '} {flag}", *(f"      {line}" for line in wrapped)]


def flag_text(config: ConfigDict, key: str) -> str:
    """A value as a shell takes it; <int> for one that is not set."""
    *groups, name = key.split(".")
    for group in groups:
        config = config[group]
    if config[name] is None:
        return f"<{config.get_type(name).__name__}>"
    return shlex.quote(show(config[name]))
