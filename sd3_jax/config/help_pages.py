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
OPTIONS = {
    RECIPE: "recipe (name or file), and its variant",
    WORKDIR: "folder or bucket of the job (gs://...)",
    "--config.KEY=VALUE": "override a key of the recipe: --config.optim.lr=3e-4",
    "-V, --version": "show the version",
    "-h, --help": "show this page; with --config, the recipe's keys and values",
}
SECTIONS = {  # jobs in the order in which a user meets them
    "Train and sample": "train sample serve evaluate report",
    "Prepare data": "precompute dedup inspect",
    "Work with weights": "convert compare explore",
    "Plan and measure": "plan study benchmark calibrate vote",
}
EXAMPLES = """\
  Train a small model in minutes, then sample from it:
    sd3-jax train  --config=quickstart --workdir=runs/quickstart
    sd3-jax sample --config=quickstart --workdir=runs/quickstart

  Sample released weights:
    sd3-jax sample --config=released --workdir=runs/fox --config.weights=PATH \\
        --config.sample.prompt="a red fox"

  Try a recipe at a tiny size first:
    sd3-jax train --config=sd3_2b:tiny --workdir=runs/tiny"""


def usage() -> str:
    """The page of `sd3-jax --help`: jobs, recipes, options, examples."""
    names = [section.split() for section in SECTIONS.values()]
    wide = max(map(len, JOBS))
    jobs = "\n\n".join(
        table(f"  {title}", {f"  {name:{wide}}": JOBS[name].help for name in section})
        for title, section in zip(SECTIONS, names)
    )
    return "\n\n".join(
        [
            "Train, sample and evaluate Stable Diffusion 3 in JAX.",
            f"Usage: sd3-jax JOB {RECIPE} {WORKDIR} [--config.KEY=VALUE ...]\n"
            "       sd3-jax JOB --help [--config=RECIPE]",
            f"Jobs:\n{jobs}",
            table("Recipes", {path.stem: summary(path) for path in recipes().values()}),
            table("Options", OPTIONS),
            f"Examples:\n{EXAMPLES}",
            table("Exit codes", {str(code): text for code, text in EXIT_CODES.items()}),
            "Run `sd3-jax JOB --help` for one job, and"
            " `sd3-jax JOB --help --config=RECIPE` for its keys.",
        ]
    )


def job_page(name: str) -> str:
    """The page of `sd3-jax JOB --help`: what it does, its options and its keys."""
    job = JOBS[name]
    defaults = {RECIPE: job.recipe, WORKDIR: job.workdir}
    needed = [f"[{flag}]" if value else flag for flag, value in defaults.items()]
    options = {
        flag: f"{text} [default: {defaults[flag]}]" if defaults.get(flag) else text
        for flag, text in OPTIONS.items()
    }
    if job.action:
        needed.insert(0, "[ACTION]")
        actions = ", ".join(schema.KEYS[job.action].rule.choices)
        options = {"ACTION": f"one of {actions}"} | options
    does = f"{job.help[:1].upper()}{job.help[1:]}. {job.about}"
    keys = {}
    for group in schema.TOP_LEVEL:
        names = [x.partition(".")[2] for x in job.groups if x.startswith(f"{group}.")]
        if names or group in job.groups:
            only = f": only {', '.join(names)}" if names else ""
            keys[group] = f"{schema.about(group)}{only}"
    reads = "This job reads none of the recipe's keys."
    if keys:
        listing = f"sd3-jax {name} --help --config=RECIPE"
        reads = f"{table('Keys and groups of keys', keys)}\n\n  Show all: {listing}"
    return "\n\n".join(
        [
            textwrap.fill(does, WIDTH),
            f"Usage: sd3-jax {name} {' '.join(needed)} [--config.KEY=VALUE ...]",
            table("Options", options),
            reads,
            f"Example:\n{textwrap.indent(job.example, '  ')}",
        ]
    )


def table(title: str, rows: dict[str, str]) -> str:
    """Below a title, names in a column with a text beside each."""
    wide = max(map(len, rows), default=0)
    below = " " * (wide + 4)
    fill = textwrap.TextWrapper(WIDTH, subsequent_indent=below, break_on_hyphens=False)
    lines = [
        fill.fill(f"  {name:{wide}}  {text}".rstrip()) for name, text in rows.items()
    ]
    return "\n".join([f"{title}:", *lines])


def recipe_page(recipe: str, config: ConfigDict, job: str | None = None) -> str:
    """A recipe's keys and values, each as the flag that sets it, with its sentence.

    With a job, only those that it reads, and any that only the recipe has.
    """
    values = dict(leaves(config))
    reads = f" that {job} reads" if job else ""
    lines = [f"Keys of {recipe}{reads} (* differs from the default):"]
    group = None
    for key in in_order(values):
        top = key.partition(".")[0]
        if job and top in schema.TOP_LEVEL and not JOBS[job].reads(key):
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
