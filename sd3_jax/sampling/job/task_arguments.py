"""generate's arguments for tasks of a job, and what tells their programs apart."""

from collections.abc import Mapping, Sequence
from typing import Any

from ml_collections import ConfigDict

from sd3_jax.diffusion import guidance, solvers
from sd3_jax.sampling import guidance_arguments
from sd3_jax.sampling.bundle import Prompt
from sd3_jax.sampling.job.prompt_file import Task


def generate_arguments(tasks: Sequence[Task]) -> dict[str, Any]:
    """sd3_jax.generate's arguments for tasks that share a shape and settings."""
    # Tasks of one batch share all settings but negative prompt and seed (Task.group).
    s = tasks[0].settings
    return dict(
        prompts=[prompt_of(task) for task in tasks],
        negative_prompts=[x.settings["negative"] for x in tasks],
        # A seed for each picture: it does not depend on the batch that it falls into.
        seed=[x.settings["seed"] + x.number for x in tasks],
        height=s["height"],
        width=s["width"],
        steps=s["steps"],
        guidance=s["cfg"],
        guidance_interval=(s["cfg_start"], s["cfg_stop"]),
        guidance_rescale=s["rescale"],
        guidance_method=s["guidance_method"],
        guidance_options=guidance_arguments.options_of(s["guidance_options"]),
        guidance_schedule=s["guidance_schedule"],
        **solver_options(s),
        max_sequence_length=s["max_length"],
        clip_skip=s["clip_skip"],
        prompt_weighting=s["prompt_weighting"] or None,
        skip_layers=s["skip_layers"],
        skip_scale=s["skip_scale"],
        skip_start=s["skip_start"],
        skip_stop=s["skip_stop"],
        **cache_options(s),
    )


def prompt_of(task: Task) -> str | Prompt:
    """A task's prompt: one text, or one for each of the three encoders."""
    return task.prompt if isinstance(task.prompt, str) else Prompt(*task.prompt)


def solver_options(settings: Mapping[str, Any] | ConfigDict) -> dict[str, Any]:
    """A task's solver, grid and shift; None stands for the model's default."""
    # Recipes write "" or 0 for "the model's own", which the API spells None.
    return {name: settings[name] or None for name in ("solver", "grid", "shift")}


def cache_options(settings: Mapping[str, Any] | ConfigDict) -> dict[str, Any]:
    """A task's step cache, as sd3_jax.generate takes it; {} for none."""
    if not settings.get("cache"):
        return {}
    text = settings.get("cache_options", "")
    return dict(
        cache=settings["cache"],
        cache_options=guidance_arguments.options_of(text, "cache_options"),
        cache_calibration=settings.get("cache_calibration") or None,
    )


def guidance_options(settings: Mapping[str, Any] | ConfigDict) -> dict[str, Any]:
    """A task's guidance, as guidance_arguments.checked takes it."""
    return dict(
        scale=settings["cfg"],
        interval=(settings["cfg_start"], settings["cfg_stop"]),
        rescale=settings["rescale"],
        method=settings["guidance_method"],
        options=guidance_arguments.options_of(settings["guidance_options"]),
        schedule=settings["guidance_schedule"],
        negative=bool(settings["negative"]),
    )


def program(task: Task) -> tuple[str, ...]:
    """What tells the program of a task from others, in words."""
    s = task.settings
    guided = guidance.guides(s["cfg"], s["guidance_method"])
    # Groups are ordered and logged by these words. Programs that share them may still
    # differ, as by the layers of their ControlNets, and then compile each.
    nets = len(s.get("control", ()))
    words = (
        f"{s['height']} x {s['width']} pixels",
        solvers.same_program(s["solver"])[0] if s["solver"] else "",
        s["guidance_method"] if guided else "no guidance",
        f"without layers {s['skip_layers']}" if guided and s["skip_layers"] else "",
        "image" if "image" in s else "",
        "mask" if {"mask", "outpaint"} & s.keys() else "",
        f"{nets} ControlNet{'s' * (nets > 1)}" if nets else "",
        # Adapters of other ranks are another program; one file has one rank.
        f"lora {', '.join(x.rpartition('=')[0] for x in s['lora'])}"
        if s.get("lora")
        else "",
        f"cache {s['cache']}" if s.get("cache") else "",
        f"{s['max_length']} tokens",
        f"clip_skip {s['clip_skip']}" if s["clip_skip"] else "",
    )
    return tuple(word for word in words if word)
