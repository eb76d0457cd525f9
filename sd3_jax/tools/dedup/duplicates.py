"""Near-duplicates by embedding: which pairs are alike, and which pictures to remove.

After the SD3 paper's appendix E.2 and E.3: k-means clusters, a range search within each
and a threshold. The paper puts 10^9 pictures into 16,000 clusters, half the root of
their number.
"""

import hashlib
import logging
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int64
from numpy import ndarray

from sd3_jax.errors import UserError

log = logging.getLogger(__name__)
FEW = 10_000  # up to here all are compared with all, without faiss
SAMPLE = 256  # vectors a cluster that the clusters are found by
ROUNDS = 10  # of k-means
SEED = 0  # of its sample and start
ROWS = 1024  # of a block of products, against at most COLUMNS: 16 MB
COLUMNS = 4096
MOST = 128  # pairs with earlier ones that an item keeps, a cluster
COPIES = 16  # of one vector that count in full; what others there are meet only these
SLACK = 1e-5  # of cosines, whose last bits depend on the threads of a product


class Duplicate(NamedTuple):
    """A removed item, the kept item that it resembles most, and their similarity."""

    index: int
    kept: int
    similarity: float


def pairs(
    embeddings: Float[ndarray, "n d"],
    *,
    threshold: float,
    clusters: int = 0,
    probes: int = 4,
) -> tuple[Int64[ndarray, "m 2"], Float[ndarray, " m"]]:
    """Sorted pairs (i, j), i < j, with a cosine of at least `threshold`; the cosines.

    Two items are compared if they share one of the `probes` clusters nearest to each.
    With one cluster all are compared. `clusters` of 0 is one for up to 10,000 vectors,
    else half the root of their number. An item has at most MOST pairs with earlier
    items in a cluster, the first and the most similar; items to keep should come first.
    """
    rows, groups = _distinct(_units(embeddings))
    n = len(rows)
    clusters = min(clusters or default_clusters(n), n)
    codes, left_out = [np.zeros(0, np.int64)], 0
    for members in _clustered(rows, clusters, min(probes, clusters)):
        for i, j, dropped in _within(rows, members, threshold - SLACK):
            codes.append(i * n + j)
            left_out += dropped
    if left_out:
        text = "%d pairs beyond %d an item are left out: many resemble many others"
        log.warning(text, left_out, MOST)
    # A pair is one integer, i * n + j, so that np.unique drops pairs that several
    # clusters found.
    numbered = np.stack(np.divmod(np.unique(np.concatenate(codes)), max(n, 1)), axis=1)
    return _measured(rows, groups, numbered, threshold)


def choose(
    n: int,
    pairs: Int64[ndarray, "m 2"],
    similarities: Float[ndarray, " m"],
    rank: Sequence[int] | ndarray,
) -> list[Duplicate]:
    """Choose which of n items to remove: those similar to a kept one of a lower rank.

    Greedy, lowest rank first, then by index. An item that resembles only removed items
    is kept, so that similarity does not chain.
    """
    near = [[] for _ in range(n)]
    for (i, j), similarity in zip(pairs.tolist(), similarities.tolist()):
        near[i].append((similarity, j))
        near[j].append((similarity, i))
    kept, removed = np.zeros(n, bool), {}
    for index in sorted(range(n), key=lambda i: (rank[i], i)):
        kept[index] = not any(kept[other] for _, other in near[index])
    for index in np.flatnonzero(~kept).tolist():
        alike = [(similarity, -other) for similarity, other in near[index]]
        similarity, other = max(row for row in alike if kept[-row[1]])
        removed[index] = Duplicate(index, -other, similarity)
    return list(removed.values())


def default_clusters(n: int) -> int:
    return 1 if n <= FEW else round(np.sqrt(n) / 2)


def _units(embeddings):
    x = np.ascontiguousarray(embeddings, np.float32)
    length = np.linalg.norm(x, axis=1, keepdims=True)
    return x / np.where(length > 0, length, 1)


def _distinct(units):
    """Rows without exact copies, and the indices of the copies of each."""
    # 10,000 copies of one white square would be 5 * 10^7 pairs.
    groups = {}
    for index, row in enumerate(units):
        groups.setdefault(hashlib.blake2b(row, digest_size=16).digest(), []).append(
            index
        )
    groups = list(map(np.array, groups.values()))
    if len(groups) == len(units):
        return units, groups
    return units[[group[0] for group in groups]], groups


def _clustered(rows, clusters, probes) -> Iterator[ndarray]:
    """The members of each cluster, in order; each row is in `probes` clusters."""
    n, d = rows.shape
    if clusters <= 1:
        yield np.arange(n)
        return
    faiss = _faiss()
    rng = np.random.default_rng(SEED)
    sample = rng.choice(n, min(n, SAMPLE * clusters), replace=False)
    kmeans = faiss.Kmeans(
        d,
        clusters,
        niter=ROUNDS,
        spherical=True,
        seed=SEED,
        min_points_per_centroid=1,
        max_points_per_centroid=SAMPLE,
    )
    kmeans.train(rows[np.sort(sample)])
    nearest = kmeans.index.search(rows, probes)[1].ravel()
    order = np.argsort(nearest, kind="stable")
    ends = np.searchsorted(nearest[order], np.arange(clusters + 1))
    for start, end in zip(ends, ends[1:]):
        yield order[start:end] // probes


def _within(rows, members, threshold) -> Iterator[tuple[ndarray, ndarray, int]]:
    """(earlier, later, number of dropped pairs) for blocks of the members."""
    # Blocks bound memory whatever a cluster's size: products of ROWS x COLUMNS, and
    # hits cut to MOST an item after each.
    x = rows[members]
    for start in range(0, len(x), ROWS):
        block, dropped = x[start : start + ROWS], 0
        hits = np.zeros((2, 0), np.int64), np.zeros(0, np.float32)
        for at in range(0, start + len(block), COLUMNS):
            new_hits = _hits(block, x, start, at, threshold)
            hits = [np.concatenate(columns, axis=-1) for columns in zip(hits, new_hits)]
            stays = _kept(*hits)
            dropped += int((~stays).sum())
            hits = [columns[..., stays] for columns in hits]
        later, earlier = hits[0]
        yield members[earlier], members[later], dropped


def _hits(block, x, start, at, threshold):
    """(later, earlier) and cosines between a block and the columns from `at` on."""
    product = block @ x[at : min(at + COLUMNS, start + len(block))].T
    row, column = np.nonzero(product >= threshold)
    # A pair once, the earlier item as the column; not an item with itself.
    is_earlier = column + at < row + start
    row, column = row[is_earlier], column[is_earlier]
    return np.stack([row + start, column + at]), product[row, column]


def _kept(between, cosine):
    """Which hits stay, of each later item: MOST / 2 first, MOST / 2 most similar."""
    later, earlier = between
    keep = np.ones(len(later), bool)
    if len(later) > MOST and np.bincount(later - later.min()).max() > MOST:
        keep[:] = False
        alike = -np.round(cosine, 3)  # the last bits are not the same on any machine
        for order in np.lexsort((earlier, later)), np.lexsort((earlier, alike, later)):
            first = np.searchsorted(later[order], later[order])
            keep[order[np.arange(len(order)) - first < MOST // 2]] = True
    return keep


def _measured(rows, groups, between, threshold):
    """Pairs of items, copies included, with cosines that do not depend on threads."""
    # Products of matrices round by the number of threads. The pairs that they find,
    # down to SLACK below the threshold, are measured again in float64.
    cosines = np.zeros(len(between), np.float32)
    for at in range(0, len(between), ROWS):
        i, j = between[at : at + ROWS].T
        product = np.einsum("md,md->m", rows[i], rows[j], dtype=np.float64)
        cosines[at : at + ROWS] = product
    at_least = cosines >= np.float32(threshold)
    between, cosines = between[at_least], cosines[at_least]
    first = np.array([group[0] for group in groups], np.int64)
    several = np.array([len(group) > 1 for group in groups], bool)
    pair_lists, values = [first[between]], [cosines]
    copied = several[between].any(axis=1)
    for (i, j), cosine in zip(between[copied].tolist(), cosines[copied]):
        pair_lists.append(_crossed(groups[i], groups[j]))
        values.append(np.full(len(pair_lists[-1]), cosine, np.float32))
    for i in np.flatnonzero(several):
        pair_lists.append(_crossed(groups[i], groups[i]))
        values.append(np.ones(len(pair_lists[-1]), np.float32))
    i, j = np.sort(np.concatenate(pair_lists), axis=1).T
    n = sum(map(len, groups))
    # The same pair may come about in several of the ways above.
    between, at = np.unique(i * n + j, return_index=True)
    return np.stack(np.divmod(between, max(n, 1)), 1), np.concatenate(values)[at]


def _crossed(a, b):
    """Pairs of each item of one group with the first COPIES of the other's."""
    grid = lambda x, y: np.stack(np.meshgrid(x, y), -1).reshape(-1, 2)
    crossed_pairs = np.concatenate([grid(a[:COPIES], b), grid(a, b[:COPIES])])
    return crossed_pairs[crossed_pairs[:, 0] != crossed_pairs[:, 1]]


def _faiss():
    try:
        import faiss
    except ImportError:
        raise UserError(
            f"more than {FEW} pictures or clusters need faiss, which is not installed;"
            " run pip install faiss-cpu"
        ) from None
    return faiss
