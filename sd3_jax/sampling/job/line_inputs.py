"""What the line of a picture names: pictures, masks, ControlNets and LoRA files.

Headers are checked before weights are loaded; line_arrays reads the pixels.
"""

import functools
import hashlib
import os
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from etils import epath

from sd3_jax import files
from sd3_jax.data import images
from sd3_jax.errors import UserError, nearest
from sd3_jax.foreign_text import shown
from sd3_jax.sampling import argument_checks, cache_calibration
from sd3_jax.sampling.adapters import lora_adapters
from sd3_jax.sampling.control import PREPROCESS
from sd3_jax.weights import adapter_files, source_names
from sd3_jax.weights.components import COMPONENTS

CONTROL = {"scale": 1.0, "start": 0.0, "stop": 1.0}  # fields that are numbers
CONTROL_TEXTS = ("net", "image", "mask", "preprocess")
CHUNK = 2**22  # bytes of a file that are hashed at a time
Size = tuple[int, int]  # height, width


class Facts(NamedTuple):
    """What is known of a file before it is used; `size` is (0, 0) for no picture."""

    size: Size
    fingerprint: str


class Placed(NamedTuple):
    """The generated size, the size of the result, and the fingerprints of files."""

    generated: Size
    result: Size
    inputs: dict[str, str]


# --- paths, ControlNets and LoRAs of a line


def locate(text: str, folder: epath.PathLike) -> str:
    """A line's path as an absolute one; relative paths begin at `folder`."""
    if not text or files.remote(text):
        return text
    # An absolute path stays: joined to a folder it is itself.
    joined = epath.Path(folder) / os.path.expanduser(text)
    return files.absolute(os.fspath(joined))


def locate_source(text: str, folder: epath.PathLike, name: str) -> str:
    """The same for weights, which may be on the hub; UserError if they are missing."""
    path = locate(text, folder)
    if files.remote(path) or files.exists(path):
        return path
    if source_names.parse_absent(text) is None:
        raise UserError(f"{name} {shown(text, 300)}: no such file, folder or hub name")
    return text


def read_controls(value: Any, folder: epath.PathLike) -> list[dict]:
    """A line's "control" with absolute paths and without what is left open."""
    entries = [value] if isinstance(value, dict) else value
    if not isinstance(entries, list) or not all(isinstance(x, dict) for x in entries):
        raise UserError('control: expected a list of {"net": PATH, "image": PATH, …}')
    return [_control(x, folder, f"control {i}") for i, x in enumerate(entries)]


def _control(fields: dict, folder: epath.PathLike, name: str) -> dict:
    known = (*CONTROL_TEXTS, *CONTROL)
    for key in fields:
        if key not in known:
            raise UserError(f'{name}: unknown "{shown(key)}"{nearest(key, known)}')
    texts = {key: fields.get(key, "") for key in CONTROL_TEXTS}
    for key, text in texts.items():
        if not isinstance(text, str) or (key in ("net", "image") and not text):
            raise UserError(f'{name}: "{key}": expected a text')
    numbers = {
        key: argument_checks.number(f"{name}: {key}", fields.get(key, default))
        for key, default in CONTROL.items()
    }
    if not 0 <= numbers["start"] < numbers["stop"] <= 1:
        raise UserError(
            f"{name}: from start {numbers['start']:g} to stop {numbers['stop']:g}:"
            " expected shares of the steps, 0 <= start < stop <= 1"
        )
    if texts["preprocess"]:
        argument_checks.choice(f"{name}: preprocess", texts["preprocess"], PREPROCESS)
    texts["net"] = locate_source(texts["net"], folder, f"{name}: net")
    texts |= {key: locate(texts[key], folder) for key in ("image", "mask")}
    return {key: text for key, text in texts.items() if text} | numbers


def read_loras(value: Any, folder: epath.PathLike) -> list[str]:
    """A line's "lora", {path: weight} or a list of paths, as "path=weight"."""
    entries = list(value.items()) if isinstance(value, dict) else value
    entries = entries if isinstance(entries, list) else [entries]
    weights: dict[str, float] = {}
    for entry in entries:
        pair = isinstance(entry, list | tuple) and len(entry) == 2
        text, weight = entry if pair else (entry, 1.0)
        if not isinstance(text, str) or not text:
            raise UserError(
                f"lora {shown(repr(entry))}: expected a path, or {{path: weight}}"
            )
        if not pair:
            # A weight follows the last = of a path, but files may have one in their
            # names: what exists as a whole has no weight.
            here = lambda path: files.exists(locate(path, folder))
            text, weight = source_names.split_weight(text, here)
        path = locate_source(text, folder, "lora")
        if path in weights:
            raise UserError(f"lora {shown(text, 300)}: named twice; give one weight")
        weights[path] = argument_checks.number(f"lora {shown(text, 300)}", weight)
    # A list, as JSON gives it back: lines are compared when a job resumes.
    return [f"{path}={weight!r}" for path, weight in weights.items()]


# --- headers


class Looked:
    """Facts of files, each read once."""

    def __init__(self):
        # Lines often share a picture, such as one mask for all: it is opened and hashed
        # once.
        self.picture: Callable[[str], Facts] = functools.cache(_picture_facts)
        self.lora: Callable[[str], Facts] = functools.cache(_lora_facts)
        self.curve: Callable[[str], Facts] = functools.cache(_curve_facts)


def _picture_facts(path: str) -> Facts:
    data = images.read_bytes(path)
    # Hashed as bytes: pictures of equal pixels in other files count as others.
    size = images.upright_size(images.open_header(data, path))
    return Facts(size, hashlib.sha256(data).hexdigest()[:12])


def _lora_facts(path: str) -> Facts:
    (opened,) = lora_adapters.opened([(path, 1.0)], tuple(COMPONENTS), COMPONENTS)
    digest = hashlib.sha256()
    # With the configuration: another lora_alpha there is another picture.
    for part in adapter_files.files_of(opened.path):
        with part.open("rb") as file:
            while data := file.read(CHUNK):
                digest.update(data)
    return Facts((0, 0), digest.hexdigest()[:12])


def _curve_facts(path: str) -> Facts:
    model, ratios, _ = cache_calibration.read(path)
    digest = hashlib.sha256(model.encode() + ratios.tobytes())
    return Facts((0, 0), digest.hexdigest()[:12])


def place(settings: Mapping[str, Any], looked: Looked, *, sized: bool) -> Placed:
    """Sizes by the headers of a line's pictures; UserError if they do not agree.

    `sized` says that the line sets height and width itself.
    """
    image, mask = settings.get("image"), settings.get("mask")
    crops = settings.get("crop_to_mask", -1) >= 0
    left, top, right, bottom = settings.get("outpaint") or (0, 0, 0, 0)
    controls = settings.get("control") or ()
    inputs = {}

    def look(path: str) -> Size:
        facts = looked.picture(path)
        inputs[path] = facts.fingerprint
        return facts.size

    _require_together(settings, crops)
    size = settings["height"], settings["width"]
    resized = bool(settings.get("resize"))
    # --- the picture to change gives the size, or else a ControlNet's hint
    # One of them alone: all others have to agree with it anyway.
    paths = [image] if image else [control["image"] for control in controls[:1]]
    result = size
    for path in paths:
        sides = look(path)
        if not resized:
            result = (sides[0] + top + bottom, sides[1] + left + right)
            if sized and result != size and not crops:
                raise UserError(
                    f"height {size[0]}, width {size[1]}: {path} makes a picture of"
                    f" {_by(result)} pixels; remove them, or set resize to crop or"
                    " stretch"
                )
    # A crop is painted at the config's size, and pasted into a picture of any size.
    generated = size if crops else result
    # --- all others agree with it
    if image and mask and look(mask) != look(image) and not resized:
        raise UserError(
            f"mask {mask} of {_by(look(mask))} pixels: must equal the size of the"
            f" image, {_by(look(image))}"
        )
    for control in controls:
        for key in ("image", "mask"):
            path = control.get(key)
            if path and look(path) != generated and not resized:
                raise UserError(
                    f"control's {key} {path} of {_by(look(path))} pixels: must equal"
                    f" the size of the picture, {_by(generated)}; or set resize"
                )
    for text in settings.get("lora") or ():
        path = lora_adapters.named(text)[0]
        inputs[path] = looked.lora(path).fingerprint
    if path := settings.get("cache_calibration"):
        inputs[path] = looked.curve(path).fingerprint
    return Placed(generated, result, inputs)


def _require_together(settings: Mapping[str, Any], crops: bool) -> None:
    image, mask = settings.get("image"), settings.get("mask")
    border = settings.get("outpaint")
    for name in ("mask", "outpaint"):
        if settings.get(name) and not image:
            raise UserError(f"{name} without image; give image, the picture to repaint")
    if settings.get("control") and crops:
        raise UserError("crop_to_mask with control: the hints are of another area")
    if not image:
        return
    if crops and not mask and not border:
        raise UserError("crop_to_mask without mask; give mask, white where to repaint")
    # The API refuses the same; here it is known before weights are loaded, and with the
    # line's number.
    blurs = settings.get("mask_blur", 0) > 0 and (mask or border)
    if blurs and not settings.get("paste", True) and not crops:
        raise UserError("mask_blur without paste; set paste to true")


def _by(size: Size) -> str:
    return f"{size[0]} x {size[1]}"
