"""The command line: from argv to a job, its checked config and its workdir.

Nothing here imports jax, so help and mistakes are answered at once.
"""

import difflib
import functools
import importlib
import importlib.util
import operator
import os
import re
import shlex
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from ml_collections import ConfigDict

from sd3_jax.config import help_pages, input_files
from sd3_jax.config.help_pages import usage
from sd3_jax.config.recipes import find, make_importable
from sd3_jax.config.validation import leaves, validate
from sd3_jax.config.value_text import hint, read
from sd3_jax.errors import ConfigError, UserError, near, nearest
from sd3_jax.jobs import JOBS
from sd3_jax.weights.source_names import REMOTE

ALIKE = 1.4  # keys that are suggested for a wrong one; see likeness
FLAGS = ("--config", "--workdir", "--help")


class Call(NamedTuple):
    job: str
    config: ConfigDict  # locked
    workdir: str


def parse(argv: Sequence[str]) -> Call:
    """Check the whole command line; a UserError says what is wrong with it."""
    words, flags = split(argv)
    job, recipe = next(iter(words), None), flags.pop("--config", "")
    asked, workdir = flags.pop("--help", None), flags.pop("--workdir", "")
    if job is not None and job not in JOBS:
        raise UserError(f'unknown job "{job}"{nearest(job, JOBS)}')
    if words[1:]:
        extra = f"unexpected argument {shlex.quote(words[1])}"
        raise UserError(f"{extra}; did you forget --? (or quotes around a value)")
    if asked is not None and not recipe:
        print_and_exit(help_pages.job_page(job) if job else usage())
    if job is None and asked is None:
        raise UserError(f"no job given; expected one of {', '.join(JOBS)}")
    if job is not None:
        recipe, workdir = recipe or JOBS[job].recipe, workdir or JOBS[job].workdir
    if not recipe:
        raise UserError(
            "no recipe given; set --config=RECIPE[:VARIANT], for example"
            " --config=quickstart:tiny"
        )
    config = load(recipe)
    for name, text in flags.items():
        override(config, name.removeprefix("--config."), text)
    if asked is not None:
        print_and_exit(help_pages.recipe_page(recipe, config, job))
    assert job is not None  # without a job, only --help comes as far as here
    validate(config)
    workdir = check_workdir(workdir)
    input_files.check(job, dict(leaves(config)))
    paths = {f"config.{key}": value for key, value in leaves(config)}
    input_files.require_drivers({"workdir": workdir} | paths)
    return Call(job, config, workdir)


def print_and_exit(page: str) -> NoReturn:
    print(page, flush=True)
    raise SystemExit(0)


# The words and the flags


def split(argv: Sequence[str]) -> tuple[list[str], dict[str, str]]:
    """Bare words, and flags by name; `--name value` is `--name=value`."""
    words, flags, rest = [], {}, list(argv)
    while rest:
        name, equals, value = rest.pop(0).partition("=")
        if name in ("-h", "--help"):
            flags["--help"] = value
        elif not name.startswith("-"):
            words.append(name + equals + value)
        elif name not in FLAGS and not name.startswith("--config."):
            raise UserError(f"unknown flag {name}{nearest_flag(name)}")
        elif not equals and (not rest or rest[0].startswith("--")):
            raise UserError(f"{name} has no value; expected {name}=VALUE")
        else:
            value = value if equals else rest.pop(0)
            if name in flags:
                values = f"{name}={flags[name]} and {name}={value}"
                raise UserError(f"a flag is set twice: {values}")
            flags[name] = value
    return words, flags


def nearest_flag(name):
    head, _, key = name.partition(".")
    if key:  # --confg.optim.lr, --optim.lr
        key = key if near(head, ["--config"]) else name.lstrip("-")
        return f'; did you mean "--config.{key}"?'
    return nearest(name, FLAGS)


def check_workdir(workdir):
    if not workdir:
        raise UserError("no workdir given; set --workdir=DIR")
    if workdir.startswith(REMOTE):
        return workdir
    if match := re.match(
        "([A-Za-z0-9]+):/+(.+)", workdir
    ):  # a path library made of gs://…
        scheme, rest = f"{match[1]}://", match[2]
        guess = f'; did you mean "{scheme}{rest}"?' if scheme in REMOTE else ""
        wanted = f"expected a folder, or a bucket of {', '.join(REMOTE)}"
        raise UserError(f"--workdir={workdir}: {wanted}{guess}")
    path = Path(os.path.abspath(os.path.expanduser(workdir)))
    for part in (path, *path.parents):
        if os.path.isfile(part):
            raise UserError(f"--workdir={workdir}: {part} is a file, expected a folder")
    return str(path)


# The recipe


def load(recipe: str) -> ConfigDict:
    """The locked config that `RECIPE[:VARIANT]` describes."""
    name, _, variant = recipe.partition(":")
    path = find(name)
    make_importable(path)
    spec = importlib.util.spec_from_file_location("recipe", path)
    assert spec is not None and spec.loader is not None  # `find` returns .py files
    module = importlib.util.module_from_spec(spec)
    call_recipe(name, path, spec.loader.exec_module, module)
    if not hasattr(module, "get_config"):
        raise ConfigError(
            f"{name} has no function get_config(variant), which every recipe defines"
        )
    variants = getattr(module, "VARIANTS", ())
    if variant and variant not in variants:
        wanted = nearest(variant, variants) or "; the recipe has none"
        raise ConfigError(f'{name} has no variant "{variant}"{wanted}')
    config = call_recipe(name, path, module.get_config, *filter(None, [variant]))
    if not isinstance(config, ConfigDict):
        kind = type(config).__name__
        raise ConfigError(f"{name}: get_config returned {kind}, expected a ConfigDict")
    require_same_keys(name, path, config)
    return config.lock()


def require_same_keys(name: str, path: Path, config: ConfigDict) -> None:
    """A recipe has base's keys, which jobs read, and groups of its own if it likes.

    Any other key would be read by nobody.
    """
    # configs.base may be one in the recipe's own folder.
    base = call_recipe(name, path, importlib.import_module, "configs.base")
    if not hasattr(base, "get_config"):
        raise ConfigError(
            f"{base.__file__} hides configs/base.py of sd3_jax: rename it"
        )
    ours, theirs = base.get_config(), dict(leaves(config))
    known = dict(leaves(ours))
    for key in sorted(set(theirs) - set(known)):
        head, _, rest = key.partition(".")
        if head in ours or not rest or difflib.get_close_matches(head, ours, 1, 0.8):
            raise ConfigError(f"{name}: {unknown_key_message(ours, key, known)}")
    for key in sorted(set(known) - set(theirs)):
        raise ConfigError(
            f"{name}: config.{key} is missing; a recipe has all keys of configs/base.py"
        )


def call_recipe(name, path, function, *args):
    """function(*args); if the recipe fails, say at which of its lines, and how."""
    try:
        return function(*args)
    except Exception as error:
        frames = traceback.extract_tb(error.__traceback__)
        line = [frame.lineno for frame in frames if Path(frame.filename) == path]
        where = f"{name}:{line[-1]}" if line else name
        if isinstance(error, SyntaxError) and not line:
            where = f"{name}:{error.lineno}"
        message = " ".join(str(getattr(error, "msg", error)).split())
        kind = type(error).__name__
        raise ConfigError(f"{where} raised {kind}: {message}") from error


# The overrides


def override(config: ConfigDict, key: str, text: str) -> None:
    """config.key = text, read as the type that the key has."""
    known = dict(leaves(config))
    if key not in known:
        raise ConfigError(unknown_key_message(config, key, known))
    holder, name = place(config, key)
    kind = holder.get_type(name)
    try:
        holder[name] = read(text, kind, holder[name])
    except (KeyError, ValueError):
        wanted = "true or false" if kind is bool else kind.__name__
        complaint = f"config.{key} = {text}: expected {wanted}{hint(text, kind)}"
        raise ConfigError(complaint) from None


def place(config: ConfigDict, key: str) -> tuple[ConfigDict, str]:
    """The group that holds a key, and the key's name in it."""
    *groups, name = key.split(".")
    holder: Any = functools.reduce(operator.getitem, groups, config)
    return holder, name


def unknown_key_message(config, key, known):
    """No such key: the nearest one, or what there is in its group."""
    group, name = config, "config"
    for part in key.split("."):
        if part not in group or not isinstance(group[part], ConfigDict):
            break
        group, name = group[part], f"{name}.{part}"
    if name == f"config.{key}":
        return f"{name} is a group; expected one of its keys, {', '.join(group)}"
    best = max(known, key=lambda other: likeness(key, other), default=None)
    if best is not None and likeness(key, best) > ALIKE:
        return f'unknown key config.{key}; did you mean "config.{best}"?'
    return f"unknown key config.{key}; {name} has {', '.join(group)}"


def likeness(a, b):
    """How alike two keys are, in whole and in their last part: 0 to 3."""
    ratio = lambda a, b: difflib.SequenceMatcher(None, a, b).ratio()
    x, y = a.rpartition(".")[2], b.rpartition(".")[2]
    return ratio(a, b) + (
        2 if is_short_for(x, y) or is_short_for(y, x) else ratio(x, y)
    )


def is_short_for(x, y):
    """batch and bs are short for batch_size."""
    initials = "".join(word[:1] for word in y.split("_"))
    return f"{y}_".startswith(f"{x}_") or x == initials
