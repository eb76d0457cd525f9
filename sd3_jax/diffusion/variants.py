"""The variants of the paper's study of formulations (sec. 5.1), by its names.

Nothing here imports jax, since recipes import this module.
"""


def _variants() -> dict[str, dict]:
    """The 61 variants of the study (sec. 5.1.1): keys and values of config.flow."""
    normal = lambda mean, std: dict(density="logit_normal", mean=mean, std=std)
    variants: dict[str, dict] = {
        "eps/linear": dict(path="eps/linear", density="linear"),
        "v/linear": dict(path="v/linear", density="linear"),
        "eps/cos": dict(path="eps/cos", density="cosmap"),
        "v/cos": dict(path="v/cos", density="cosmap"),
        "rf": dict(path="rf", density="uniform"),
        "rf/cosmap": dict(path="rf", density="cosmap"),
        "edm/rf": dict(path="edm", density="uniform"),
        "edm/cos": dict(path="edm", density="cosmap"),
    }
    # Seven scales from -1 to 1.75, evenly spaced, and 1.
    for scale in sorted([*(-1 + 2.75 * i / 6 for i in range(7)), 1.0]):
        # The name rounds the scale, the value does not.
        mode = dict(path="rf", density="mode", mode_scale=scale)
        variants[f"rf/mode({scale:.2f})"] = mode
    # rf/lognorm(m, s): logit t ~ N(m, s^2).
    for mean in (-1.0, -0.5, 0.0, 0.5, 1.0):
        for std in (0.2, 0.6, 1.0, 1.4, 1.8, 2.2):
            name = f"rf/lognorm({mean:.2f},{std:.2f})"
            variants[name] = dict(path="rf", **normal(mean, std))
    # edm(P_m, P_s): ln sigma = logit t ~ N(P_m, P_s^2) (Karras et al. 2022).
    for mean in (-1.2, -0.6, 0.0, 0.6, 1.2):
        for std in (0.6, 1.2, 1.8):
            name = f"edm({mean:.2f},{std:.2f})"
            variants[name] = dict(path="edm", **normal(mean, std))
    return variants


VARIANTS = _variants()
