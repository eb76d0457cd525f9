"""Components and configurations as a caller of `load` names them."""

import os
from collections.abc import Collection, Mapping
from typing import Any

from etils import epath

from sd3_jax import files
from sd3_jax.errors import UserError, nearest, prefixed
from sd3_jax.foreign_text import shown
from sd3_jax.weights.components import COMPONENTS, Component


def component_name(name: str) -> str:
    """Our name of a component, of which diffusers' folder is a name too."""
    # Users of diffusers say "transformer" and "text_encoder_3".
    by_folder = {component.folder: ours for ours, component in COMPONENTS.items()}
    if name not in COMPONENTS and name not in by_folder:
        choices = [*COMPONENTS, *(x for x in by_folder if x not in COMPONENTS)]
        raise UserError(f'component "{shown(name)}"{nearest(name, choices)}')
    return by_folder.get(name, name)


def component_names(only: Any) -> tuple[str, ...]:
    """Our names of the components in `only`; one name alone is a text."""
    only = (only,) if isinstance(only, str) else only
    if not isinstance(only, Collection) or not all(isinstance(x, str) for x in only):
        raise UserError(f"only {shown(repr(only))}: expected names of components")
    with prefixed("only"):
        return tuple(map(component_name, only))


def read_config(config: Any, component: Component) -> dict:
    """A component's configuration: a mapping, a .json file, or a folder that has it."""
    if isinstance(config, Mapping):
        config = dict(config)
    elif isinstance(config, str | os.PathLike):
        path = epath.Path(config).expanduser()
        # A diffusers folder has one for each component.
        names = "config.json", f"{component.folder}/config.json"
        places = path, *[path / name for name in names]
        file = next((x for x in places if x.exists() and not x.is_dir()), None)
        if file is None:
            raise UserError(
                f'config "{shown(path)}": expected a config.json, or a folder with one,'
                f" or with {component.folder}/config.json"
            )
        config = files.read_object(file)
    else:
        raise UserError(
            f"config {shown(repr(config))}: expected a dictionary of diffusers' fields,"
            " or a path to a config.json"
        )
    return config.get("text_config", config)  # of a whole CLIP
