"""The page of `compare`: departures, layers, trajectories and pictures."""

import base64
import io
from typing import Any

import numpy as np
from PIL import Image

from sd3_jax.reports import html_page, plots


def html(result: dict) -> str:
    models = result["models"]
    rows = [row for m in models for part in m["parts"].values() for row in part]
    return html_page.render(
        "compare.html",
        passed=result["passed"],
        limit=result["tolerance"],
        worst=max(row["float32"]["largest"] for row in rows),
        layers=len(rows),
        models=[m | {"panels": panels(m), "film": list(_film(m))} for m in models],
    )


def panels(model_result: dict) -> list[html_page.Panel]:
    parts = {k: v for k, v in model_result["parts"].items() if k != "trajectory"}
    curves = {k: [r["float32"]["largest"] for r in rows] for k, rows in parts.items()}
    caption = "Largest error of each layer, in standard deviations of PyTorch's output."
    drawn = [html_page.Panel("Layers, float32", plots.by_layer(curves), caption)]
    # The last row is the decoded picture, which is no step.
    steps = model_result["parts"].get("trajectory", [])[:-1]
    if steps:
        drifts = {
            "float32": [row["float32"]["relative"] for row in steps],
            "bfloat16": [row["bfloat16"]["relative"] for row in steps],
            "PyTorch in bfloat16": [row["theirs"]["relative"] for row in steps],
        }
        caption = (
            "Relative L2 distance of the latents from those of PyTorch in float32."
        )
        plot = plots.over_steps_log(drifts)
        drawn.append(html_page.Panel("Trajectory", plot, caption))
    return drawn


def pictures(images: dict[str, Any]) -> dict[str, str]:
    """(h, w, 3) in [0, 1] by name as PNGs in base64, small ones enlarged."""
    return {name: _png(image) for name, image in images.items()}


def _png(image: np.ndarray) -> str:
    # bfloat16 images become float32 first: 255 steps do not fit in 8 bits of mantissa.
    pixels = np.rint(np.clip(np.asarray(image, np.float32), 0, 1) * 255).astype(
        np.uint8
    )
    times = max(1, 192 // max(pixels.shape[:2]))
    buffer = io.BytesIO()
    picture = Image.fromarray(pixels)
    size = picture.width * times, picture.height * times
    # Nearest neighbour: a small random model's pixels are shown as they are.
    picture.resize(size, Image.Resampling.NEAREST).save(buffer, "png")
    return base64.b64encode(buffer.getvalue()).decode()


def _film(model_result: dict):
    for name, data in model_result.get("pictures", {}).items():
        caption = name.replace("ours", "sd3_jax").replace("theirs", "PyTorch")
        alt = f"{caption}, {model_result['name']}"
        picture = html_page.picture(base64.b64decode(data), alt, limit=400_000)
        yield f"{model_result['name']} {name}".replace(" ", "-"), picture, caption
