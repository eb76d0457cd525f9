"""The watermark: its PSNR, what it survives, and whether one is seen where none is.

    python benchmarks/watermark.py            # minutes; the table of watermark.md
    python benchmarks/watermark.py --n 10     # pictures a size

Pictures are square crops of scikit-learn's two photographs and matplotlib's portrait,
scaled to the size; marks are random letters.
"""

import argparse
import io

import numpy as np
from matplotlib import cbook
from PIL import Image
from sklearn.datasets import load_sample_images

from sd3_jax.sampling.images import watermark

LETTERS = list("abcdefghijklmnopqrstuvwxyz")
LANCZOS = Image.Resampling.LANCZOS


def photographs() -> list[np.ndarray]:
    with cbook.get_sample_data("grace_hopper.jpg") as file:
        portrait = np.array(Image.open(file).convert("RGB"))
    return [*load_sample_images().images, portrait]


def crops(count: int, size: int, seed: int) -> list[np.ndarray]:
    rng, photos, made = np.random.default_rng(seed), photographs(), []
    for i in range(count):
        photo = photos[i % len(photos)]
        side = int(rng.uniform(0.4, 1) * min(photo.shape[:2]))
        y, x = (int(rng.integers(n - side + 1)) for n in photo.shape[:2])
        made.append(scaled(photo[y : y + side, x : x + side], size))
    return made


def scaled(image: np.ndarray, size: int) -> np.ndarray:
    return np.asarray(Image.fromarray(image).resize((size, size), LANCZOS))


def saved(image: np.ndarray, kind: str, quality: int) -> np.ndarray:
    file = io.BytesIO()
    Image.fromarray(image).save(file, kind, quality=quality)
    return np.asarray(Image.open(file).convert("RGB"))


CHANGES = {
    "PNG": lambda x: x,
    "JPEG 90": lambda x: saved(x, "JPEG", 90),
    "JPEG 75": lambda x: saved(x, "JPEG", 75),
    "JPEG 50": lambda x: saved(x, "JPEG", 50),
    "JPEG 30": lambda x: saved(x, "JPEG", 30),
    "WebP 75": lambda x: saved(x, "WEBP", 75),
    "x 0.75": lambda x: scaled(x, len(x) * 3 // 4),
    "x 0.5": lambda x: scaled(x, len(x) // 2),
    "x 1.5": lambda x: scaled(x, len(x) * 3 // 2),
    "x 0.75, JPEG 75": lambda x: saved(scaled(x, len(x) * 3 // 4), "JPEG", 75),
    "brighter by 20 %": lambda x: np.uint8(np.clip(x * 1.2, 0, 255)),
    "1 % cropped off": lambda x: x[len(x) // 100 :, len(x) // 100 :],
}


def main(sizes: list[int], count: int, unmarked: int) -> None:
    print("| pixels | PSNR, dB |", " | ".join(CHANGES), "|")
    print("|---" * (len(CHANGES) + 2) + "|")
    rng = np.random.default_rng(0)
    for size in sizes:
        quality, kept = [], {name: [] for name in CHANGES}
        for image in crops(count, size, size):
            text = "".join(rng.choice(LETTERS, watermark.LENGTH))
            marked = watermark.embed(image, text)
            off = np.mean((image.astype(np.float64) - marked) ** 2)
            quality.append(10 * np.log10(255**2 / off))
            for name, change in CHANGES.items():
                changed = change(marked)
                found = watermark.errors(changed, text), watermark.read(changed) == text
                kept[name].append(found)
        means = [np.mean(kept[name], 0) for name in CHANGES]
        cells = [f"{100 * read:.0f} % ({100 * errors:.2f} %)" for errors, read in means]
        psnr = f"{np.mean(quality):.1f}, least {np.min(quality):.1f}"
        print(f"| {size} | {psnr} |", " | ".join(cells), "|", flush=True)
    found = [watermark.read(image) for image in crops(unmarked, 256, 1)]
    print(f"read in {len(found) - found.count(None)} of {unmarked} without a mark")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sizes", type=int, nargs="*", default=[256, 512, 1024])
    parser.add_argument("--n", type=int, default=60)
    parser.add_argument("--unmarked", type=int, default=5_000)
    given = parser.parse_args()
    main(given.sizes, given.n, given.unmarked)
