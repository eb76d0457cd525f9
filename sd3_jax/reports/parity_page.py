"""The page of `compare`: departures, layers, trajectories and pictures."""

import base64
import io
from typing import Any

import numpy as np
from etils import epath
from PIL import Image

from sd3_jax.reports import html_page, plots

COLUMNS = {
    "layer": "",
    "max |err| / std": "number",
    "relative L2": "number",
    "1 − cosine": "number",
    "bfloat16 L2": "number",
    "PyTorch's": "number",
}


def html(result: dict, workdir: epath.Path) -> str:
    parts = [head(result, workdir), *map(model, result["models"])]
    return html_page.document("Beside PyTorch", *parts)


def head(result: dict, workdir: epath.Path) -> html_page.Html:
    limit = result["tolerance"]
    rows = [
        row for m in result["models"] for part in m["parts"].values() for row in part
    ]
    worst = max(row["float32"]["largest"] for row in rows)
    verdict = "agrees" if result["passed"] else "departs"
    layers = len(rows)
    return html_page.join(
        [
            html_page.element("h1", f"sd3_jax {verdict}"),
            html_page.stats(
                [
                    (
                        "largest float32 error",
                        f"{worst:.1e}",
                        "of a standard deviation",
                    ),
                    ("allowed", f"{limit['float32']:.0e}", "of a standard deviation"),
                    ("layers compared", str(layers), ""),
                    ("models", str(len(result["models"])), ""),
                ]
            ),
            html_page.note(
                "Every layer of ours against PyTorch (diffusers, transformers) in"
                " float32 at the same inputs. In bfloat16 both sides are measured"
                f" against PyTorch in float32, and ours may be {limit['bfloat16']:g}"
                " times as far from it."
            ),
        ]
    )


def model(model_result: dict) -> html_page.Html:
    first = model_result["first_departure"]
    verdict = "No layer departs."
    if first:
        verdict = f"Departs first in {first['part']} at {first['layer']}."
    parts = [
        html_page.note(f"{verdict} {model_result['source']}"),
        figures(model_result),
    ]
    if "pictures" in model_result:
        parts.append(html_page.film(_film(model_result)))
    for name, rows in model_result["parts"].items():
        worst = max(row["float32"]["largest"] for row in rows)
        title = f"{name}: {len(rows)} rows, at most {worst:.1e}"
        # The part that departs is unfolded, and the denoiser always.
        away = bool(first) and first["part"] == name
        parts.append(
            html_page.details(title, table(rows), open=name == "denoiser" or away)
        )
    return html_page.section(model_result["name"], *parts)


def figures(model_result: dict) -> html_page.Html:
    parts = {k: v for k, v in model_result["parts"].items() if k != "trajectory"}
    curves = {k: [r["float32"]["largest"] for r in rows] for k, rows in parts.items()}
    caption = "largest error of each layer, in standard deviations of PyTorch's answer"
    panels = [html_page.panel("Layers, float32", plots.by_layer(curves), caption)]
    # The last row is the decoded picture, which is no step.
    steps = model_result["parts"].get("trajectory", [])[:-1]
    if steps:
        drifts = {
            "float32": [row["float32"]["relative"] for row in steps],
            "bfloat16": [row["bfloat16"]["relative"] for row in steps],
            "PyTorch in bfloat16": [row["theirs"]["relative"] for row in steps],
        }
        caption = "relative L2 of the latents after each step from PyTorch's in float32"
        plot = plots.over_steps_log(drifts)
        panels.append(html_page.panel("Trajectory", plot, caption))
    return html_page.panels(panels)


def table(rows: list[dict]) -> html_page.Html:
    return html_page.table(COLUMNS, ([row["layer"], *_numbers(row)] for row in rows))


def _numbers(row: dict) -> list[str]:
    wide = row["float32"]
    values = [wide["largest"], wide["relative"], wide["angle"]]
    values += [row["bfloat16"]["relative"], row["theirs"]["relative"]]
    return [f"{x:.1e}" for x in values]


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
    for name, data in model_result["pictures"].items():
        picture = html_page.image(base64.b64decode(data), name, limit=400_000)
        yield f"{model_result['name']} {name}".replace(" ", "-"), picture, name
