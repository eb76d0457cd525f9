"""Load user functions by name: "package.module:function"."""

import importlib
import pkgutil
import sysconfig
import traceback
from collections.abc import Callable, Iterable
from importlib.util import find_spec
from pathlib import PurePath

from sd3_jax.errors import UserError, near, prefixed
from sd3_jax.foreign_text import shown


def load(name: str) -> Callable:
    """The function of that name; UserError if it or its module cannot be found."""
    path, colon, attribute = name.partition(":")
    if not (colon and all(part.isidentifier() for part in path.split("."))):
        raise UserError(
            f'{shown(name)}: not a function; expected "package.module:function"'
        )
    value = _module(path)
    for part in attribute.split("."):
        if not hasattr(value, part):
            choices = [attr for attr in dir(value) if not attr.startswith("_")]
            hint = _did_you_mean(part, choices)
            raise UserError(f'{shown(name)}: {path} has no "{shown(part)}"{hint}')
        value = getattr(value, part)
    if not callable(value):
        kind = type(value).__name__
        raise UserError(f"{shown(name)} is of type {kind}, expected a function")
    return value


def guarded(key: str, name: str) -> Callable:
    """The function that config.`key` names, with its exceptions as UserErrors.

    The one-line message names the config key, the exception and the line of the user's
    code that raised it.
    """
    with prefixed(f"config.{key}"):
        function = load(name)

    def call(*args):
        try:
            return function(*args)
        except UserError:
            raise
        except Exception as error:
            place = traceback.extract_tb(error.__traceback__)[-1]
            where = f"{PurePath(place.filename).name}:{place.lineno}"
            reason = shown(f"{type(error).__name__}: {error}", 300)
            raise UserError(f"{call.__name__}: {reason} ({where})") from error

    call.__name__ = f"config.{key} = {name}"
    return call


def _module(path: str):
    try:
        return importlib.import_module(path)
    except ModuleNotFoundError as error:
        # A module that the user's own module imports is another fault: say so.
        missing = error.name or ""
        if missing != path and not path.startswith(f"{missing}."):
            raise UserError(f"{path}: cannot be imported: {error}") from None
        parent, _, last = missing.rpartition(".")
        hint = _did_you_mean(last, _modules(parent))
        raise UserError(
            f'no module "{shown(missing)}"{hint or "; is its folder in PYTHONPATH?"}'
        ) from None
    except Exception as error:  # whatever the user's module does when it is imported
        reason = f"{type(error).__name__}: {error}"
        raise UserError(f"{path}: cannot be imported: {shown(reason, 200)}") from error


def _modules(parent: str) -> list[str]:
    spec = find_spec(parent) if parent else None
    if parent and not (spec and spec.submodule_search_locations):
        return []
    places = spec.submodule_search_locations if spec else None
    modules = pkgutil.iter_modules(places)
    # A name alone is meant for a module of the user's, not for an installed package.
    return [x.name for x in modules if parent or not _installed(x.module_finder)]


def _installed(finder) -> bool:
    place = getattr(finder, "path", "")
    packages = sysconfig.get_path("stdlib"), "site-packages", "dist-packages"
    return any(part in place for part in packages)


def _did_you_mean(name: str, choices: Iterable[str]) -> str:
    match = near(name, choices)
    return f'; did you mean "{match}"?' if match else ""
