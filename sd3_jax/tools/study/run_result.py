"""The study.json of one run of a study: read, with its fields checked."""

import json
from typing import Any

from etils import epath

from sd3_jax.errors import UserError
from sd3_jax.foreign_text import shown

NUMBER = (int, float)
HEAD = {"variant": str, "option": str, "seed": int, "settings": list}
MEASURED = {
    **{"loss": NUMBER, "step": int, "path_of_flow": str},
    **{"parameters": NUMBER, "flops": NUMBER, "validation": list, "scores": list},
}
VALIDATION = {"loss": NUMBER, "step": int}
SCORE = {
    **{"weights": str, "setting": str, "steps": int, "cfg": NUMBER},
    **{"score": NUMBER, "fid": NUMBER, "path": NUMBER},
}


def read(path: epath.Path) -> dict[str, Any] | None:
    """A run's result, or None if there is none; UserError if it is damaged."""
    if not path.exists():
        return None
    try:
        # NaN, of a run that diverged, is a result too, so it is not refused here.
        result = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise _damaged(path, f"is not JSON ({shown(error)})") from None
    except IsADirectoryError:
        raise _damaged(path, "is a folder") from None
    _require(path, "the file", result, HEAD)
    # The scores come one by one; before the first there is only the head.
    if "scores" in result or result.get("complete"):
        _require(path, "the file", result, MEASURED)
        for name, kinds in (("validation", VALIDATION), ("scores", SCORE)):
            if not result[name] and result.get("complete"):
                raise _damaged(path, f"has an empty {name}")
            for row in result[name]:
                _require(path, f"a row of {name}", row, kinds)
        for row in result["validation"]:
            losses = {k: NUMBER for k in row if k.startswith("loss")}
            _require(path, "a row of validation", row, losses)
    return result


def require_same(path: epath.Path, saved: dict[str, Any], asked: dict) -> None:
    """UserError if a result is of another variant, option or settings than `asked`."""
    for key in ("variant", "option", "settings"):
        if saved[key] != asked[key]:
            was, now = (shown(_text(x[key]), 200) for x in (saved, asked))
            raise UserError(
                f"{path} is of another run than the variant {shown(asked['variant'])}:"
                f" its {key} was {was!r}, asked is {now!r}; give"
                " the variant another name or another --workdir"
            )


def _text(value):
    return " ".join(map(str, value)) if isinstance(value, list) else value


def _require(path, where, row, kinds):
    if not isinstance(row, dict):
        raise _damaged(path, f"has no JSON object where {where} is expected")
    for name, kind in kinds.items():
        if not isinstance(row.get(name), kind):
            raise _damaged(path, f"has no right {name!r} in {where}")


def _damaged(path, fault):
    return UserError(
        f"{path}: a run's result that {fault}: delete this file, and the same call"
        " measures the run again"
    )
