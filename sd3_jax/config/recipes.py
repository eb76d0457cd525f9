"""Where recipes lie: the user's files, and ours, in a repository or in a wheel."""

import ast
import importlib.util
import os
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path

from sd3_jax.errors import ConfigError, near, nearest
from sd3_jax.files import shipped


def find(name: str) -> Path:
    """The file that `quickstart`, `quickstart.py` or `configs/quickstart.py` means.

    A file of the working directory wins over one of its configs/, and that over ours.
    """
    path = Path(os.path.expanduser(name))
    if path.name and path.suffix != ".py":
        path = path.with_name(f"{path.name}.py")
    places = [Path.cwd() / path]
    if path.parent == Path():
        places.append(Path.cwd() / "configs" / path)
    if path.parent in (Path(), Path("configs")):
        places.append(shipped("configs") / path.name)
    for place in places:
        if os.path.isfile(place):
            return Path(os.path.abspath(place))
    known = {Path(other).stem: other for other in recipes()}
    match = near(path.stem, known)
    end = f'; did you mean "{known[match]}"?' if match else nearest("", recipes())
    raise ConfigError(f"recipe {name} not found{end}")


def recipes() -> dict[str, Path]:
    """The user's recipes and ours, by what one would type."""
    paths = {}
    for folder in (Path.cwd() / "configs", shipped("configs")):
        for path in sorted(folder.glob("[!_]*.py")):
            if path.stem != "base":
                paths.setdefault(f"configs/{path.name}", path)
    return paths


def summary(path: Path) -> str:
    """The first line of a recipe's docstring, without running it."""
    try:
        page = ast.get_docstring(ast.parse(path.read_text()))
    except (SyntaxError, ValueError):
        page = "(does not parse)"
    return (page or "").partition("\n")[0]


def make_importable(recipe: Path) -> None:
    """Let a recipe import others, `from configs import base`, and modules beside it.

    `configs` is one package of several folders: the one that holds the recipe, then the
    working directory's, then ours. All else is last in line, the working directory too:
    a grain.py in it must not hide the installed grain.
    """
    homes = [folder for folder in recipe.parents if folder.name == "configs"][:1]
    folders = [*homes, Path.cwd() / "configs", shipped("configs")]
    places = list(dict.fromkeys(str(folder) for folder in folders if folder.is_dir()))
    for name in [n for n in sys.modules if n.partition(".")[0] == "configs"]:
        del sys.modules[name]  # of another recipe's folders
    _import_package("configs", places)
    if sys.path and sys.path[0] in ("", os.getcwd()):  # `python -m` puts it there
        sys.path.append(sys.path.pop(0))
    theirs = [recipe.parent, recipe.parent.parent, *(home.parent for home in homes)]
    if recipe.parent == shipped("configs"):
        theirs = []
    for folder in (*theirs, Path.cwd()):
        if str(folder) not in sys.path:
            sys.path.append(str(folder))


def _import_package(name: str, folders: list[str]) -> None:
    init = Path(folders[0]) / "__init__.py"
    if init.is_file():
        spec = importlib.util.spec_from_file_location(
            name, init, submodule_search_locations=folders
        )
    else:
        spec = ModuleSpec(name, None, is_package=True)
        spec.submodule_search_locations = folders
    assert spec is not None  # None is for files of an unknown kind
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    if spec.loader is not None:
        spec.loader.exec_module(module)
