"""A study's results as the paper's tables: ranks (1), scores (2), steps (6), sizes."""

import math
from collections.abc import Iterable, Sequence

import numpy as np

from sd3_jax.reports.text_table import Table
from sd3_jax.tools.study import ranking, scaling_laws

Result = dict
LOWER = ("loss", "fid")  # better when lower; "score" is better when higher


def merit(result: Result, by: str) -> float:
    """A run's validation loss, or a score with its sign such that lower is better;
    infinite for NaN."""
    rows = [result] if by == "loss" else result["scores"]
    value = float(np.mean([row[by] for row in rows]))
    value = value if by in LOWER else -value
    return math.inf if math.isnan(value) else value


def best(results: Iterable[Result]) -> list[Result]:
    return [x for x in results if x["best"]]


def names(results: Sequence[Result]) -> list[str]:
    return list(dict.fromkeys(x["variant"] for x in results))


def of(results: Iterable[Result], variant: str) -> list[Result]:
    return [x for x in results if x["variant"] == variant]


def samplers(results: Sequence[Result]) -> list[tuple[int, float]]:
    """(steps, cfg) of all settings, by rising steps."""
    return sorted({(s["steps"], s["cfg"]) for x in results for s in x["scores"]})


# --- ranks and scores


def controls(results: Sequence[Result], steps: int | None = None, seed=None):
    """The control settings, {variant: (-score, fid)} each: a seed, a set of weights, a
    sampler."""
    groups: dict[tuple, dict[str, tuple[float, float]]] = {}
    for x in results:
        for s in x["scores"]:
            if steps in (None, s["steps"]) and seed in (None, x["seed"]):
                key = x["seed"], s["weights"], s["setting"]
                # Scores are negated, because fronts() takes lower as better.
                groups.setdefault(key, {})[x["variant"]] = (-s["score"], s["fid"])
    return list(groups.values())


def ranks(results: Sequence[Result]) -> list[dict]:
    """Table 1: the mean rank over all control settings, and over those of the fewest
    and of the most steps; with its spread over the seeds. Best first."""
    results = best(results)
    every = [steps for steps, _ in samplers(results)]
    seeds = sorted({x["seed"] for x in results})
    overall = ranking.mean_ranks(controls(results))
    few = ranking.mean_ranks(controls(results, every[0]))
    many = ranking.mean_ranks(controls(results, every[-1]))
    # Ranks of single seeds show how far the order of variants depends on the seed.
    by_seed = [ranking.mean_ranks(controls(results, seed=seed)) for seed in seeds]
    rows = [
        {
            "variant": name,
            "all": rank,
            "few": few[name],
            "many": many[name],
            "spread": spread([x[name] for x in by_seed if name in x]),
        }
        for name, rank in overall.items()
    ]
    return sorted(rows, key=lambda row: row["all"])


def scores(results: Sequence[Result], sampler: tuple[int, float], weights: str):
    """Table 2: each variant's scores at a sampler setting, over its seeds."""
    rows = []
    for name in names(best(results)):
        row = {"variant": name}
        for kind in ("score", "fid"):
            values = values_of(of(best(results), name), kind, sampler, weights)
            row |= {kind: float(np.mean(values)), f"{kind}_spread": spread(values)}
        rows.append(row)
    return rows


def scored(
    results: Iterable[Result], sampler: tuple[int, float], weights: str
) -> list[tuple[Result, dict]]:
    """Runs with their scores at a sampler setting."""
    return [
        (x, s)
        for x in results
        for s in x["scores"]
        if (s["steps"], s["cfg"], s["weights"]) == (*sampler, weights)
    ]


def values_of(results: Iterable[Result], kind: str, sampler, weights) -> list[float]:
    return [s[kind] for _, s in scored(results, sampler, weights)]


def _mean(*args) -> float:
    return float(np.mean(values_of(*args)))


def middle(results: Sequence[Result]) -> tuple[int, float]:
    """The sampler of Table 2: the most steps below the most of all."""
    settings = samplers(results)
    below = [x for x in settings if x[0] < settings[-1][0]]
    return (below or settings)[-1]


def few_steps(results: Sequence[Result], weights: str) -> tuple[list[int], list[dict]]:
    """Table 6: how much of the score at the most steps is lost at fewer, in %, at the
    guidance that has most of them; and the length of the way at the most."""
    results = best(results)
    settings = samplers(results)
    cfg = max(
        {c for _, c in settings}, key=lambda c: (sum(x[1] == c for x in settings), c)
    )
    every = [steps for steps, c in settings if c == cfg]
    rows = []
    for name in names(results):
        mine = of(results, name)
        mean = [_mean(mine, "score", (steps, cfg), weights) for steps in every]
        # A score of 0 at the most steps has no relative loss.
        top = mean[-1] or math.nan
        drops = [100 * (1 - value / top) for value in mean[:-1]]
        path = _mean(mine, "path", (every[-1], cfg), weights)
        rows.append({"variant": name, "drops": drops, "path": path})
    return every, rows


# --- sizes and losses


def sizes(results: Sequence[Result]) -> list[dict]:
    """Parameters, training FLOPs, validation loss and what won a sweep."""
    rows = []
    for name in names(best(results)):
        mine = of(best(results), name)
        losses = [x["loss"] for x in mine]
        rows.append(
            {
                "variant": name,
                "option": mine[0]["option"],
                "parameters": mine[0]["parameters"],
                "flops": mine[0]["flops"] * mine[0]["validation"][-1]["step"],
                "loss": float(np.mean(losses)),
                "loss_spread": spread(losses),
                "seeds": len(mine),
            }
        )
    return rows


def points(results: Sequence[Result]) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Validation loss over training FLOPs, by variant, each mean over the seeds."""
    curves = {}
    for name in names(best(results)):
        mine = of(best(results), name)
        flops = [row["step"] * mine[0]["flops"] for row in mine[0]["validation"]]
        losses = [[row["loss"] for row in x["validation"]] for x in mine]
        # A seed that was stopped early has fewer validations; the mean ends there.
        least = min(map(len, losses))
        curves[name] = (
            np.array(flops[:least], float),
            np.mean([x[:least] for x in losses], axis=0),
        )
    return curves


def law(results: Sequence[Result]) -> scaling_laws.PowerLaw | None:
    """Of the least validation loss for training FLOPs, where variants differ in size
    and have one loss."""
    sizes = [x["parameters"] for x in results]
    if not comparable(results) or max(sizes) < 1.5 * min(sizes):
        return None
    # All variants' points together: the law is of the best loss at each compute.
    x, loss = (np.concatenate(z) for z in zip(*points(results).values()))
    # A power law is a line in logarithms: NaN and 0 have none.
    usable = np.isfinite(loss) & (loss > 0) & (x > 0)
    x, loss = x[usable], loss[usable]
    at = scaling_laws.frontier(x, loss)
    return scaling_laws.power_law(x[at], loss[at]) if len(at) > 1 else None


def comparable(results: Sequence[Result]) -> bool:
    """Whether a validation loss says the same of all: of one target."""
    # Losses of different paths have different targets and scales.
    return len({x["path_of_flow"] for x in results}) == 1


def correlations(results: Sequence[Result], weights: str) -> dict[str, float]:
    """Of validation loss with each score at the middle sampler, over all runs."""
    rows = scored(results, middle(results), weights)
    kinds = [k for k in rows[0][1] if k.startswith(("score", "fid"))] if rows else []
    losses = np.array([x["loss"] for x, _ in rows])
    by_kind = {
        kind: scaling_laws.correlation(losses, np.array([s[kind] for _, s in rows]))
        for kind in kinds
        if all(kind in s for _, s in rows)
    }
    return {kind: value for kind, value in by_kind.items() if not math.isnan(value)}


def spread(values: Sequence[float]) -> float:
    """Standard deviation over seeds."""
    return float(np.std(values, ddof=1)) if len(values) > 1 else math.nan


# As text


def markdown(results: Sequence[Result]) -> str:
    """All tables in Markdown."""
    parts = [
        part if isinstance(part, str) else f"{part.caption}\n\n{part.markdown()}"
        for part in contents(results)
    ]
    return "\n\n".join(parts)


def contents(results: Sequence[Result]) -> list[Table | str]:
    """Tables, and sentences on what is fitted to them."""
    weights = results[0]["scores"][0]["weights"]
    parts: list[Table | str] = [ranks_table(results), scores_table(results, weights)]
    if len({steps for steps, _ in samplers(results)}) > 1:
        parts.append(steps_table(results, weights))
    parts.append(sizes_table(results))
    if fitted := law(results):
        parts.append(f"Least loss for x FLOPs: {fitted}, off by {fitted.error:.2%}")
    if comparable(results) and (rows := correlations(results, weights)):
        words = ", ".join(f"{name} {value:+.2f}" for name, value in rows.items())
        parts.append(f"Rank correlation of validation loss with {words}")
    return parts


def ranks_table(results: Sequence[Result]) -> Table:
    every = [n for n, _ in samplers(results)]
    return Table(
        "Mean rank by non-dominated sorting on (score, FID), lower is better",
        ["variant", "all", f"{every[0]} steps", f"{every[-1]} steps", "± seeds"],
        [
            (
                r["variant"],
                *(f"{r[k]:.2f}" for k in ("all", "few", "many")),
                plus(r["spread"]),
            )
            for r in ranks(results)
        ],
    )


def scores_table(results: Sequence[Result], weights: str) -> Table:
    steps, cfg = sampler = middle(results)
    return Table(
        f"At {steps} steps, guidance {cfg:g}, weights {weights}",
        ["variant", "score", "± seeds", "FID", "± seeds"],
        [
            (
                *(r["variant"], f"{r['score']:.3f}", plus(r["score_spread"], 3)),
                *(f"{r['fid']:.3f}", plus(r["fid_spread"], 3)),
            )
            for r in scores(results, sampler, weights)
        ],
    )


def steps_table(results: Sequence[Result], weights: str) -> Table:
    counts, rows = few_steps(results, weights)
    return Table(
        f"Loss of score against {counts[-1]} steps in %, and length of the way",
        ["variant", *(f"{n} steps" for n in counts[:-1]), "path length"],
        [
            (r["variant"], *(f"{d:.2f}" for d in r["drops"]), f"{r['path']:.2f}")
            for r in rows
        ],
    )


def sizes_table(results: Sequence[Result]) -> Table:
    swept = any(x["option"] for x in results)
    head = [
        *("variant", "parameters", "training FLOPs", "validation loss"),
        *("± seeds", "seeds"),
    ]
    return Table(
        "Size and validation loss",
        [*head, "chosen"] if swept else head,
        [
            (
                *(r["variant"], f"{r['parameters']:,}", f"{r['flops']:.3g}"),
                *(f"{r['loss']:.4f}", plus(r["loss_spread"], 4), str(r["seeds"])),
                *([r["option"]] if swept else []),
            )
            for r in sizes(results)
        ],
    )


def plus(value: float, digits: int = 2) -> str:
    return "" if math.isnan(value) else f"{value:.{digits}f}"
