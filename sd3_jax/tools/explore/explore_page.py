"""The page of one picture: latents by step, attention by word, norms by block."""

import io
from collections.abc import Sequence

import matplotlib
import numpy as np
from jaxtyping import Float, UInt8
from numpy import ndarray
from PIL import Image

from sd3_jax.reports import html_page, plots
from sd3_jax.tools.explore.exploration import Moment

SIDE, PREVIEW = 512, 240  # pixels of a picture's longer side, and of a latent's
MOST = 2**20  # bytes of a picture in the page
FRAMES = 8  # previews of latents, at most


def html(
    prompt: str,
    image: UInt8[ndarray, "H W 3"],
    previews: Sequence[tuple[int, float, UInt8[ndarray, "h w 3"]]],
    moments: Sequence[Moment],
    facts: Sequence[tuple[str, str]],
) -> str:
    """The page. `previews` are (step, t, rough picture of the latents), noise first;
    `facts` are the settings as (name, value)."""
    # Evenly spaced, with both ends: the noise and the result.
    chosen = np.rint(np.linspace(0, len(previews) - 1, min(FRAMES, len(previews))))
    strip = [
        (_picture(rgb, f"latents after {step} steps", PREVIEW), f"t = {t:.3f}")
        for step, t, rgb in (previews[int(i)] for i in chosen)
    ]
    estimates = [
        (_picture(x.estimate, f"estimate at step {x.step}", PREVIEW), _when(x))
        for x in moments
    ]
    words = [
        {
            "word": word,
            "maps": [
                (_picture(heat(x.words[word], image), f"{word}, {_when(x)}", SIDE),)
                + (f"{_when(x)}: {x.words[word].mean():.2%}",)
                for x in moments
            ],
        }
        for word in (moments[0].words if moments else ())
    ]
    return html_page.render(
        "explore.html",
        prompt=prompt,
        picture=_picture(image, prompt[:200] or "the picture", 2 * SIDE),
        facts=facts,
        strip_figures=strip,
        estimates=estimates,
        words=words,
        panels=panels(moments),
    )


def panels(moments: Sequence[Moment]) -> list[html_page.Panel]:
    """Curves over the blocks, one for each moment."""
    rms = "root mean square"
    drawn = [
        html_page.Panel(
            "Image stream",
            _by_block({_when(x): x.image_rms for x in moments}, rms, log="y"),
            "Size of the image tokens after each block.",
        ),
        html_page.Panel(
            "Text stream",
            _by_block({_when(x): x.text_rms for x in moments}, rms, log="y"),
            "Size of the text tokens after each block. The last block has none.",
        ),
    ]
    for group in moments[0].shares:
        shares = {_when(x): x.shares[group] for x in moments}
        caption = f"Share of the image tokens' attention to {group}'s tokens."
        plot = _by_block(shares, "share of attention")
        drawn.append(html_page.Panel(f"Attention to {group}", plot, caption))
    return drawn


def _by_block(
    values: dict[str, Float[ndarray, " layers"]], label: str, *, log: str = ""
) -> str:
    lines = {
        name: (list(range(1, len(line) + 1)), line.tolist())
        for name, line in values.items()
    }
    return plots.curves(lines, "block", label, log=log, first=list(lines)[-1])


def heat(
    attention: Float[ndarray, "rows columns"], image: UInt8[ndarray, "H W 3"]
) -> UInt8[ndarray, "H W 3"]:
    """The picture in grey under an attention map, from its least to its largest."""
    height, width = image.shape[:2]
    least, most = float(attention.min()), float(attention.max())
    # By its own range: a word's share of the attention is a few per cent at most, and
    # would be black on a scale to 1.
    share = (attention - least) / max(most - least, 1e-12)
    bytes_ = Image.fromarray(np.rint(255 * share).astype(np.uint8))
    share = np.asarray(bytes_.resize((width, height), Image.Resampling.BILINEAR)) / 255
    grey = image.mean(-1, keepdims=True) / 255 * np.ones(3)
    colours = matplotlib.colormaps["inferno"](share)[..., :3]
    weight = 0.8 * share[..., None]
    mixed = (1 - weight) * 0.7 * grey + weight * colours
    return np.rint(255 * np.clip(mixed, 0, 1)).astype(np.uint8)


def _when(moment: Moment) -> str:
    return f"step {moment.step + 1}, t = {moment.t:.2f}"


def _picture(image: UInt8[ndarray, "h w 3"], alt: str, side: int) -> html_page.Picture:
    picture = Image.fromarray(image)
    scale = side / max(picture.size)
    size = [max(1, round(scale * x)) for x in picture.size]
    # Small latents are shown as the squares that they are.
    method = Image.Resampling.NEAREST if scale > 1 else Image.Resampling.LANCZOS
    buffer = io.BytesIO()
    picture.resize(size, method).save(buffer, "webp", quality=88)
    return html_page.picture(buffer.getvalue(), alt, limit=MOST)
