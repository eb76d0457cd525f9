"""Our own format of a released model: an orbax tree per component, and bundle.json.

A later run reads each shard straight into its mesh, without renaming tensors.
"""

import json
from typing import Any

import jax
import jax.numpy as jnp
from etils import epath
from orbax.checkpoint import v1 as ocp

from sd3_jax import files, tree
from sd3_jax.errors import UserError, explained
from sd3_jax.foreign_text import parse_json
from sd3_jax.params import quantization
from sd3_jax.params.parametrization import is_leaf

FILE = "bundle.json"
VERSION = 1  # raised when an older reader would misread a folder
LEFT = ocp.PLACEHOLDER  # a leaf that load leaves out


def save(path: epath.PathLike, variables: dict[str, Any], configs: dict) -> None:
    """Write every component's variables and configuration; all processes must call."""
    path = epath.Path(path)
    with explained(f"cannot write {path}"):
        for name, arrays in variables.items():
            ocp.save(path / name, arrays, overwrite=True)
        # Last: a folder counts as a model once it has bundle.json.
        if jax.process_index() == 0:
            head = {"version": VERSION, "components": configs}
            # So that `dtypes` needs no orbax.
            head["dtypes"] = {k: _dtypes(x) for k, x in variables.items()}
            (path / FILE).write_text(json.dumps(head, indent=2))


def _dtypes(variables: Any) -> dict[str, str]:
    leaves = jax.tree_util.tree_leaves_with_path(variables)
    return {tree.path_name(path): x.dtype.name for path, x in leaves}


def dtypes(path: epath.PathLike, name: str) -> dict[tuple[str, ...], str]:
    """Stored dtype of each leaf of a component, by path."""
    stored = _head(epath.Path(path) / FILE)["dtypes"][name]
    return {tuple(leaf.split("/")): dtype for leaf, dtype in stored.items()}


def configs(path: epath.PathLike) -> dict[str, dict]:
    """Configurations of the components in a folder; UserError if it is damaged."""
    return _head(epath.Path(path) / FILE)["components"]


def _head(path: epath.Path) -> dict:
    try:
        head = parse_json(files.read_bytes(path))
        version, _ = head["version"], (dict(head["components"]), dict(head["dtypes"]))
        newer = version > VERSION  # a TypeError if it is no number
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: damaged: {error!r}") from None
    if newer:
        raise UserError(
            f"{path}: version {version}, but this version of sd3_jax reads up to"
            f" {VERSION}: install a newer one"
        )
    return head


def load(path: epath.PathLike, name: str, abstract: Any) -> Any:
    """A component's variables in the shardings and dtypes of `abstract`.

    Leaves that are LEFT there are not read. Raises UserError if orbax cannot read.
    """
    with explained(f"cannot read {path}/{name}"):
        return ocp.load(epath.Path(path) / name, abstract)


def load_quantized(path: epath.PathLike, name: str, shapes: Any) -> Any:
    """`load` whose eight-bit leaves are read and rounded one at a time."""
    # orbax reads whole leaves: those to be rounded are left out of the first read, then
    # read as stored and rounded one by one, so that only one is in full precision.
    places, treedef = jax.tree_util.tree_flatten_with_path(shapes, is_leaf=is_leaf)
    leaves = [LEFT if is_leaf(x) else x for _, x in places]
    read = lambda abstract: jax.tree.leaves(
        load(path, name, jax.tree.unflatten(treedef, abstract)),
        is_leaf=lambda x: x is LEFT,
    )
    leaves, stored = read(leaves), dtypes(path, name)
    for i, (at, x) in enumerate(places):
        if is_leaf(x):
            dtype = jnp.dtype(stored[tree.names(at)])
            # Rounded on the devices, from the dtype that the folder has; the result may
            # rest on the host.
            place = x.sharding.with_memory_kind("device")
            whole = jax.ShapeDtypeStruct(x.shape, dtype, sharding=place)
            alone = [LEFT] * len(places)  # all but one are left out
            alone[i] = whole
            axes = [axis for axis, size in enumerate(x.scale.shape) if size == 1]
            leaf = quantization.quantize_placed(read(alone)[i], type(x), axes)
            leaves[i] = jax.device_put(leaf, jax.tree.map(lambda y: y.sharding, x))
    return jax.tree.unflatten(treedef, leaves)
