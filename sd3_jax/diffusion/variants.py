"""The names of the paper's study of formulations; nothing here imports jax."""


def _variants() -> dict[str, dict]:
    """The 61 of the paper's study (5.1.1) by name: config.flow's path and density."""
    normal = lambda mean, std: dict(density="logit_normal", mean=mean, std=std)
    variants = {
        "eps/linear": dict(path="eps/linear", density="linear"),
        "v/linear": dict(path="v/linear", density="linear"),
        "eps/cos": dict(path="eps/cos", density="cosmap"),
        "v/cos": dict(path="v/cos", density="cosmap"),
        "rf": dict(path="rf", density="uniform"),
        "rf/cosmap": dict(path="rf", density="cosmap"),
        "edm/rf": dict(path="edm", density="uniform"),
        "edm/cos": dict(path="edm", density="cosmap"),
    }
    for scale in sorted([*(-1 + 2.75 * i / 6 for i in range(7)), 1.0]):
        mode = dict(path="rf", density="mode", mode_scale=scale)
        variants[f"rf/mode({scale:.2f})"] = mode
    for mean in (-1.0, -0.5, 0.0, 0.5, 1.0):
        for std in (0.2, 0.6, 1.0, 1.4, 1.8, 2.2):
            name = f"rf/lognorm({mean:.2f},{std:.2f})"
            variants[name] = dict(path="rf", **normal(mean, std))
    for mean in (-1.2, -0.6, 0.0, 0.6, 1.2):
        for std in (0.6, 1.2, 1.8):
            name = f"edm({mean:.2f},{std:.2f})"
            variants[name] = dict(path="edm", **normal(mean, std))
    return variants


VARIANTS = _variants()
