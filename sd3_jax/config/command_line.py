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
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from ml_collections import ConfigDict

import sd3_jax
from sd3_jax.config import (
    help_pages,
    input_files,
    schema,
    unknown_keys,
    unread_keys,
)
from sd3_jax.config.help_pages import usage
from sd3_jax.config.recipes import find, make_importable
from sd3_jax.config.validation import complaint, leaves, validate
from sd3_jax.config.value_text import hint, read
from sd3_jax.errors import ConfigError, UserError, nearest
from sd3_jax.jobs import JOBS
from sd3_jax.weights.source_names import REMOTE


class Call(NamedTuple):
    job: str
    config: ConfigDict  # locked
    workdir: str


def parse(argv: Sequence[str]) -> Call:
    """Check the whole command line; a UserError says what is wrong with it."""
    words, flags = split(argv)
    if "--version" in flags:
        print_and_exit(f"sd3-jax {sd3_jax.__version__}")
    if words[:1] == ["help"]:  # `sd3-jax help JOB` is `sd3-jax JOB --help`
        words, flags = words[1:], {"--help": ""} | flags
    job, recipe = next(iter(words), None), flags.pop("--config", "")
    asked, workdir = flags.pop("--help", None), flags.pop("--workdir", "")
    if job is not None and job not in JOBS:
        raise UserError(f'unknown job "{job}"{nearest(job, JOBS)}')
    if words[1:] and job is not None and JOBS[job].action:
        flags = flags | {f"--config.{JOBS[job].action}": read_action(words, flags)}
        words = words[:1]
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
    keys = [name.removeprefix("--config.") for name in flags]
    unread_keys.check(job, keys, dict(leaves(config)))
    return Call(job, config, workdir)


def read_action(words: Sequence[str], flags: Mapping[str, str]) -> str:
    """The second word of a command such as `vote export`."""
    key = JOBS[words[0]].action
    choices = schema.KEYS[key].rule.choices
    if words[1] not in choices or words[2:]:
        extra = words[1] if words[1] not in choices else words[2]
        raise UserError(
            f"{words[0]}: unexpected argument {shlex.quote(extra)}"
            f"{nearest(extra, choices)}"
        )
    if f"--config.{key}" in flags:
        raise UserError(
            f"{words[0]} {words[1]} sets config.{key}; remove --config.{key}"
        )
    return words[1]


def print_and_exit(page: str) -> NoReturn:
    print(page, flush=True)
    raise SystemExit(0)


# The words and the flags


def split(argv: Sequence[str]) -> tuple[list[str], dict[str, str]]:
    """Bare words, and flags by name; `--name value` is `--name=value`."""
    words, flags, rest = [], {}, list(argv)
    while rest:
        name, equals, value = rest.pop(0).partition("=")
        if name in ("-h", "--help", "-V", "--version"):
            flags["--help" if name in ("-h", "--help") else "--version"] = value
        elif not name.startswith("-"):
            words.append(name + equals + value)
        elif name not in unknown_keys.FLAGS and not name.startswith("--config."):
            raise UserError(f"unknown flag {name}{unknown_keys.of_flag(name)}")
        elif not equals and (not rest or rest[0].startswith("--")):
            raise UserError(f"{name} has no value; expected {name}=VALUE")
        else:
            value = value if equals else rest.pop(0)
            if name in flags:
                values = f"{name}={flags[name]} and {name}={value}"
                raise UserError(f"a flag is set twice: {values}")
            flags[name] = value
    return words, flags


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
            raise ConfigError(f"{name}: {unknown_keys.of_key(ours, key)}")
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
        if message := assignment_message(error):
            raise ConfigError(f"{where}: {message}") from error
        if isinstance(error, SyntaxError) and not line:
            where = f"{name}:{error.lineno}"
        message = " ".join(str(getattr(error, "msg", error)).split())
        kind = type(error).__name__
        raise ConfigError(f"{where} raised {kind}: {message}") from error


def assignment_message(error: Exception) -> str:
    """What is wrong with a recipe's `c.optim.lrr = 3`; "" if it failed elsewhere.

    ml_collections prints the whole group and names no key of it in full.
    """
    if not isinstance(error, AttributeError | KeyError | TypeError):
        return ""
    for frame, _ in traceback.walk_tb(error.__traceback__):
        values = frame.f_locals
        group, key = values.get("self"), values.get("attribute", values.get("key"))
        if not isinstance(group, ConfigDict) or not isinstance(key, str):
            continue
        names = {*group}  # tells which of the groups it is
        prefix = next((g for g, x in schema.GROUPS.items() if {*x.keys} == names), None)
        if prefix is None and {*schema.TOP_LEVEL} <= names:
            prefix = ""
        if prefix is None:
            return ""
        full = f"{prefix}.{key}".lstrip(".")
        if key not in names:
            return unknown_keys.of_key(schema.defaults(), full)
        if full in schema.KEYS and "value" in values:
            return str(complaint(full, values["value"], schema.KEYS[full].rule))
    return ""


# The overrides


def override(config: ConfigDict, key: str, text: str) -> None:
    """config.key = text, read as the type that the key has."""
    if key not in dict(leaves(config)):
        raise ConfigError(unknown_keys.of_key(config, key))
    holder, name = place(config, key)
    kind = holder.get_type(name)
    try:
        holder[name] = read(text, kind, holder[name])
    except (KeyError, ValueError):
        wanted = "true or false" if kind is bool else kind.__name__
        if key in schema.KEYS:  # and not one of the recipe's own
            wanted = schema.KEYS[key].rule.wanted
        complaint = f"config.{key} = {text}: expected {wanted}{hint(text, kind)}"
        raise ConfigError(complaint) from None


def place(config: ConfigDict, key: str) -> tuple[ConfigDict, str]:
    """The group that holds a key, and the key's name in it."""
    *groups, name = key.split(".")
    holder: Any = functools.reduce(operator.getitem, groups, config)
    return holder, name
