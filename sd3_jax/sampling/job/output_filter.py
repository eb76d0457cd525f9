"""What `sample` does to pictures before they are written: a filter and a watermark.

    config.sample.filter = "package.module:function"
    function(images u8 (n, h, w, 3), prompts) -> n times None or False, True or a reason

A flagged picture becomes black, with the watermark if there is one, and its line of
JSON, also inside the PNG, has "filtered": reason. A filter that fails ends the job, so
that no unfiltered picture is written.
"""

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from sd3_jax import hooks
from sd3_jax.distributed import processes
from sd3_jax.errors import UserError
from sd3_jax.evaluation.scorers import answers
from sd3_jax.foreign_text import shown
from sd3_jax.sampling.images import watermark


class Safety(NamedTuple):
    filter: str  # the function's name, "" for none
    function: Callable | None
    mark: str  # "" for none

    def facts(self) -> dict[str, str]:
        """Filter and watermark for a picture's line, if they are set."""
        named = {"filter": self.filter, "watermark": self.mark}
        return {name: value for name, value in named.items() if value}

    def flags(self, images: np.ndarray, prompts: Sequence[str]) -> list[str]:
        """Why each picture is flagged, or ""; each process filters its share.

        Every process has the same pictures, makes this call and gets all answers.
        """
        if self.function is None:
            return [""] * len(images)
        # The filter may be slow, so each process asks about its share and all get all
        # answers.
        ask = functools.partial(_flags, self.function, images, prompts)
        return processes.shared(ask, len(images))

    def finished(self, image: np.ndarray, flag: str) -> np.ndarray:
        """The picture as it is written: u8 (h, w, 3)."""
        image = np.zeros_like(image) if flag else image
        return watermark.embed(image, self.mark) if self.mark else image


def load(filter: str, mark: str, sides: Sequence[tuple[int, int]]) -> Safety:
    """UserError if the function is missing, or pictures are too small for a mark."""
    height, width = min(sides, key=min)
    if mark and min(height, width) < watermark.SIDE:
        setting = f'config.sample.watermark = "{mark}": {width} x {height} pixels'
        raise UserError(f"{setting}; the sides must be {watermark.SIDE} or more")
    # Imported before any weight is loaded.
    function = hooks.guarded("sample.filter", filter) if filter else None
    return Safety(filter, function, mark)


def _flags(function, images, prompts, rows: list[int]) -> list[str]:
    arguments = images[rows], [prompts[i] for i in rows]
    verdicts = answers(function, "flags", len(rows), *arguments)
    return [_flag(value, function.__name__) for value in verdicts]


def _flag(value, name: str) -> str:
    if value is None or isinstance(value, bool | np.bool_):
        return "flagged" if value else ""
    # A function may return True or a reason; any other type is likely a mistake, and a
    # picture must not pass by it.
    if not isinstance(value, str):
        wanted = "expected None, False, True or a reason a picture"
        raise UserError(f"{name} returned {shown(repr(value))}; {wanted}")
    return shown(value, 300)
