"""Near-duplicates: what the built-in fingerprints find and mistake, and the search.

    python benchmarks/dedup.py pictures                # recall and false pairs, minutes
    python benchmarks/dedup.py pictures --split tune   # the set thresholds were set on
    python benchmarks/dedup.py pictures --split fresh --folder DIR  # crops of others
    python benchmarks/dedup.py hashes                  # by pdqhash and imagehash
    python benchmarks/dedup.py digits                  # a hard set, all distinct
    python benchmarks/dedup.py search --n 100000       # random vectors, planted pairs

Distinct pictures are crops of scikit-learn's two photographs. `tune` and `test` are
halves of them, by different seeds: no pixel is in both. `portrait` is matplotlib's,
`fresh` a folder's pictures, by name.
"""

import argparse
import io
import itertools
import resource
import time
from collections import Counter
from pathlib import Path

import numpy as np
from PIL import Image, ImageEnhance

from sd3_jax.tools.dedup import duplicates, fingerprints

SEEDS = {"tune": 1, "test": 2, "portrait": 3, "fresh": 4}
SIDES = 64, 260  # of crops, in pixels
APART = 0.3  # of intersection over union: crops below it are distinct


def photographs(split: str, folder: str = "") -> list[np.ndarray]:
    """The left halves to tune on, the right ones to test with; (h, w, 3) uint8."""
    if split == "fresh":
        paths = sorted(Path(folder).iterdir())
        return [np.array(Image.open(path).convert("RGB")) for path in paths]
    if split == "portrait":
        from matplotlib import cbook

        with cbook.get_sample_data("grace_hopper.jpg") as file:
            return [np.array(Image.open(file).convert("RGB"))]
    from sklearn.datasets import load_sample_images

    found = load_sample_images().images
    half = lambda x: x.shape[1] // 2
    cut = {"tune": lambda x: x[:, : half(x)], "test": lambda x: x[:, half(x) :]}
    return [np.ascontiguousarray(cut[split](x)) for x in found]


def crops(photos, count: int, seed: int) -> tuple[list[np.ndarray], np.ndarray]:
    """Crops anywhere, and (photo, top, left, bottom, right) of each; none is within
    half of another's area and size, so that there is nothing between two and alike."""
    rng, boxes = np.random.default_rng(seed), []
    for _ in range(count * 200):
        photo = int(rng.integers(len(photos)))
        h, w = np.exp(rng.uniform(*np.log(SIDES), 2)).astype(int)
        h, w = np.clip((h, w), max(h, w) // 2, None)
        height, width = photos[photo].shape[:2]
        if h > height or w > width:
            continue
        top, left = rng.integers(height - h + 1), rng.integers(width - w + 1)
        box = np.array([photo, top, left, top + h, left + w])
        if not boxes or overlaps(box, np.array(boxes)).max() < 0.6:
            boxes.append(box)
        if len(boxes) == count:
            break
    return [photos[p][t:b, l:r] for p, t, l, b, r in boxes], np.array(boxes)


def overlaps(box, others):
    """Intersection over union with each of the others; 0 in another photograph."""
    low = np.maximum(box[1:3], others[:, 1:3])
    high = np.minimum(box[3:], others[:, 3:])
    shared = np.prod(np.clip(high - low, 0, None), axis=1)
    area = lambda x: np.prod(x[..., 3:] - x[..., 1:3], axis=-1)
    return (box[0] == others[:, 0]) * shared / (area(box) + area(others) - shared)


def recompressed(kind):
    def change(rng, picture):
        file = io.BytesIO()
        Image.fromarray(picture).save(file, kind, quality=int(rng.integers(30, 91)))
        return np.array(Image.open(file).convert("RGB"))

    return change


def resized(rng, picture):
    scale = np.exp(rng.uniform(np.log(0.5), np.log(2)))
    size = [max(16, round(scale * side)) for side in picture.shape[1::-1]]
    filters = Image.Resampling.BILINEAR, Image.Resampling.LANCZOS
    return np.array(Image.fromarray(picture).resize(size, filters[rng.integers(2)]))


def cropped(rng, picture):
    """Up to 5 % off each side, from all, some or one of them."""
    h, w = picture.shape[:2]
    off = rng.uniform(0, 0.05, 4) * (rng.random(4) < 0.75)
    top, bottom, left, right = np.floor(off * (h, h, w, w)).astype(int)
    return picture[top : h - bottom, left : w - right]


def brightened(rng, picture):
    image = Image.fromarray(picture)
    return np.array(ImageEnhance.Brightness(image).enhance(rng.uniform(0.9, 1.1)))


SINGLE = {
    "jpeg": recompressed("jpeg"),
    "webp": recompressed("webp"),
    "resize": resized,
    "crop": cropped,
    "brightness": brightened,
}
CHANGES = {(name,): (change,) for name, change in SINGLE.items()} | {
    pair: tuple(SINGLE[name] for name in pair)
    for pair in itertools.permutations(SINGLE, 2)
    if set(pair) != {"jpeg", "webp"}
}


def planted(pictures, seed, changes=tuple(CHANGES)):
    """(index, name, picture): every picture under every change."""
    for index, picture in enumerate(pictures):
        for name in changes:
            rng = np.random.default_rng([seed, index, list(CHANGES).index(name)])
            made = picture
            for change in CHANGES[name]:
                made = change(rng, made)
            yield index, " + ".join(name), made


class Found:
    """Distinct pictures and changed ones, and what the hash makes of them."""

    def __init__(self, pictures, boxes, changed):
        self.count, self.of = len(pictures), np.array([i for i, _, _ in changed])
        self.names = [name for _, name, _ in changed]
        start = time.perf_counter()
        everything = pictures + [picture for _, _, picture in changed]
        self.prints = fingerprints.prints(everything)
        self.print_s = (time.perf_counter() - start) / len(everything)
        self.apart = np.triu([overlaps(box, boxes) < APART for box in boxes], 1)
        start = time.perf_counter()
        self.planted = self.alike(np.stack([self.of, self.changed()], 1))
        self.pair_s = (time.perf_counter() - start) / max(1, len(self.of))

    def changed(self):
        return self.count + np.arange(len(self.of))

    def alike(self, pairs):
        """Likeness, or 0 where the descriptors are too far apart to be looked at."""
        x = self.prints.descriptors
        near = np.einsum("md,md->m", *(x[i] for i in pairs.T)) >= fingerprints.LOOSE
        made = np.zeros(len(pairs), np.float32)
        made[near] = fingerprints.likeness(self.prints, pairs[near])
        return made

    def recall(self, threshold=fingerprints.THRESHOLD) -> float:
        return float((self.planted >= threshold).mean())

    def distinct(self) -> int:
        return int(self.apart.sum())

    def looked_at(self):
        """Distinct pairs that the loose threshold lets through, and how alike."""
        x = self.prints.descriptors[: self.count]
        pairs = np.argwhere(self.apart & (x @ x.T >= fingerprints.LOOSE))
        return pairs, fingerprints.likeness(self.prints, pairs)

    def mistaken(self, threshold=fingerprints.THRESHOLD) -> int:
        return int((self.looked_at()[1] >= threshold).sum())


def pictures(args) -> None:
    """Recall by change, false pairs by threshold, and the worst of both."""
    made, boxes = crops(
        photographs(args.split, args.folder), args.count, SEEDS[args.split]
    )
    changed = list(planted(made, SEEDS[args.split]))
    found = Found(made, boxes, changed)
    pairs, alike = found.looked_at()
    print(f"{len(made)} crops, {len(changed)} changed, split {args.split}")
    print(f"{1e3 * found.print_s:.2f} ms a print, {1e3 * found.pair_s:.2f} ms a pair")
    print(f"{found.distinct()} distinct pairs, {len(pairs)} above the loose cosine")
    for threshold in (0.8, 0.85, 0.9, fingerprints.THRESHOLD, 0.94, 0.96):
        false = int((alike >= threshold).sum())
        share = f"{false / found.distinct():.4%}"
        print(f"threshold {threshold}: {found.recall(threshold):.4f}, {false} {share}")
    lost = found.planted < fingerprints.THRESHOLD
    total, missed = Counter(found.names), Counter(np.array(found.names)[lost])
    for name in total:
        print(f"  {name}: {1 - missed[name] / total[name]:.4f}")
    flat = lambda i: f"{boxes[i].tolist()} std {made[i].std((0, 1)).mean():.1f}"
    for i, count in Counter(found.of[lost].tolist()).most_common(5):
        print(f"  {count} of {len(CHANGES)} lost of {flat(i)}")
    for at in np.argsort(-alike)[:5]:
        print(f"  {alike[at]:.3f}: {' and '.join(map(flat, pairs[at]))}")


def library_hashes():
    """name -> bits of a picture, of the libraries (pip install pdqhash imagehash)."""
    import imagehash
    import pdqhash

    of = lambda hash_, **sizes: lambda image: hash_(image, **sizes).hash.ravel()
    return {
        "pdqhash": lambda image: pdqhash.compute(np.array(image))[0].astype(bool),
        "phash, 64 bits": of(imagehash.phash),
        "phash, 256 bits": of(imagehash.phash, hash_size=16),
        "dhash, 256 bits": of(imagehash.dhash, hash_size=16),
        "whash, 256 bits": of(imagehash.whash, hash_size=16),
    }


def hashes(args) -> None:
    """The libraries' recall on the same pictures.

    Each hash has the loosest threshold, in bits that may differ, with no more false
    pairs on this very split than the built-in one; then a row of fixed thresholds.
    """
    made, boxes = crops(
        photographs(args.split, args.folder), args.count, SEEDS[args.split]
    )
    changed = list(planted(made, SEEDS[args.split]))
    found = Found(made, boxes, changed)
    names, false = np.array(found.names), found.mistaken()
    report_hash("built-in", found.planted >= fingerprints.THRESHOLD, names, false)
    images = [Image.fromarray(x) for x in made + [picture for *_, picture in changed]]
    for name, compute in library_hashes().items():
        start = time.perf_counter()
        bits = np.array([compute(image) for image in images])
        ms = 1e3 * (time.perf_counter() - start) / len(images)
        x = 1 - 2 * bits.astype(np.float32)  # products of signs count equal bits
        between = np.round((bits.shape[1] - x[: found.count] @ x[: found.count].T) / 2)
        distances = np.sort(between[found.apart])
        away = (bits[found.of] != bits[found.changed()]).sum(1)
        most = distances[false] - 1  # ties may leave fewer false pairs than allowed
        title = f"{name}, {ms:.2f} ms, at most {most:g} of {bits.shape[1]}"
        report_hash(title, away <= most, names, int((distances <= most).sum()))
        for share in (0.1, 0.15, 0.2, 0.25, 0.3, 0.35):
            most = int(share * bits.shape[1])
            mistaken = (distances <= most).sum()
            print(f"   {most} bits: {(away <= most).mean():.4f}, {mistaken}")


def report_hash(title, is_found, names, false) -> None:
    by_change = {name: is_found[names == name].mean() for name in SINGLE}
    worst = min((is_found[names == name].mean(), name) for name in dict.fromkeys(names))
    print(f"{title}: recall {is_found.mean():.4f}, {false} false pairs;")
    print("  ", ", ".join(f"{name} {value:.4f}" for name, value in by_change.items()))
    print(f"   worst: {worst[1]} {worst[0]:.4f}", flush=True)


def scanned(scans):
    """Prints of digits (n, 8, 8) in [0, 16], made 64 x 64."""
    scans = (scans * 15.9).astype(np.uint8)
    big = [
        Image.fromarray(x).resize((64, 64), Image.Resampling.BILINEAR) for x in scans
    ]
    return fingerprints.prints([np.array(x.convert("RGB")) for x in big])


def digits(args) -> None:
    """Handwritten digits: no two are one scan, though a writer's follow each other."""
    from sklearn.datasets import load_digits

    found = load_digits()
    scans = found.images[: args.count]
    prints = scanned(scans)
    pairs, _ = duplicates.pairs(prints.descriptors, threshold=fingerprints.LOOSE)
    alike = fingerprints.likeness(prints, pairs)
    n = len(scans)
    for threshold in (0.9, fingerprints.THRESHOLD, 0.94, 0.96, 0.98):
        over = pairs[alike >= threshold]
        gone = duplicates.choose(n, over, alike[alike >= threshold], np.zeros(n))
        same = int((found.target[over[:, 0]] == found.target[over[:, 1]]).sum())
        share = f"{len(over) / (n * (n - 1) / 2):.3%}"
        print(f"{threshold}: {len(over)} {share}, {same} of one digit, {len(gone)} go")


def search(args) -> None:
    """Random unit vectors; each of the last tenth has a neighbour at cosine 0.9."""
    rng, n, m = np.random.default_rng(0), args.n, args.n // 10
    unit = lambda x: x / np.linalg.norm(x, axis=1, keepdims=True)
    x = unit(rng.standard_normal((n, args.d), np.float32))
    aside = rng.standard_normal((m, args.d), np.float32)
    aside = unit(aside - (aside * x[:m]).sum(1, keepdims=True) * x[:m])
    x[n - m :] = 0.9 * x[:m] + np.sqrt(1 - 0.81) * aside
    before, start = resource.getrusage(resource.RUSAGE_SELF), time.perf_counter()
    options = dict(clusters=args.clusters, probes=args.probes)
    found, _ = duplicates.pairs(x, threshold=args.threshold, **options)
    wall, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_SELF)
    processor = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    right = int((found[:, 1] - found[:, 0] == n - m).sum())
    clusters = args.clusters or duplicates.default_clusters(n)
    print(f"{n} x {args.d}, {clusters} clusters, {args.probes} probes: {wall:.1f} s,")
    print(
        f"{processor:.1f} s of processors, recall {right / m:.4f}, {len(found)} pairs"
    )
    print(
        f"peak {after.ru_maxrss / 2**20:.2f} GB, {x.nbytes / 2**30:.2f} of it vectors"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    verbs = parser.add_subparsers(required=True)
    for verb, count in ((pictures, 600), (hashes, 600), (digits, 1797)):
        sub = verbs.add_parser(verb.__name__)
        sub.set_defaults(run=verb)
        sub.add_argument("--count", type=int, default=count)
        if verb is not digits:
            sub.add_argument("--split", choices=SEEDS, default="test")
            sub.add_argument("--folder", default="", help="of pictures, for fresh")
    sub = verbs.add_parser("search")
    sub.set_defaults(run=search)
    for name, value in dict(n=100_000, d=512, clusters=0, probes=4).items():
        sub.add_argument(f"--{name}", type=int, default=value)
    sub.add_argument("--threshold", type=float, default=0.85)
    args = parser.parse_args()
    if getattr(args, "split", "") == "fresh" and not args.folder:
        parser.error("--split fresh: expected --folder, of pictures")
    args.run(args)


if __name__ == "__main__":
    main()
