"""The first losses and the parameters of every recipe that trains, as they are today.

    python tests/golden/record.py            # what differs from the recorded values
    python tests/golden/record.py --update   # record today's

Update only when a change is meant to move numbers or weights, and say so in
CHANGELOG.md. Losses of the same code differ by about 1e-6 from one kind of CPU to
another, so tests compare to 1e-4; on one machine they are the same to the last bit,
which is what this command prints.
"""

import functools
import importlib
import json
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).parent
FILE = HERE / "recipes.json"
TRAINABLE = (
    *("quickstart", "digits", "backbones", "sd3_2b", "sd3_8b", "sd35_medium"),
    *("sd35_large", "finetune", "quality", "lora", "dreambooth", "dpo"),
)
STEPS = 5
BASE = "sd35_medium"  # what the LoRAs' :tiny recipes start from
FLAGS = {
    "lora": ("--config.tune.base={base}",),
    "dreambooth": ("--config.tune.base={base}", "--config.tune.prior=0"),
    "dpo": ("--config.tune.base={base}",),
}


def first_losses(recipe: str) -> list[float]:
    """The losses of five steps of the recipe's :tiny, on the tests' eight devices."""
    if recipe == BASE:
        return base_run()[1]
    with tempfile.TemporaryDirectory() as folder:
        extra = FLAGS.get(recipe, ())
        if extra:
            base, _ = base_run()
            extra = [flag.format(base=base.name) for flag in extra]
        return train(recipe, f"{folder}/run", *extra)


@functools.cache
def base_run() -> tuple[tempfile.TemporaryDirectory, list[float]]:
    """The folder and the losses of the run that LoRAs start from."""
    folder = tempfile.TemporaryDirectory()  # it lives as long as the process
    return folder, train(BASE, folder.name)


def train(recipe: str, workdir: str, *extra: str) -> list[float]:
    """Each step's loss; RuntimeError if the run fails."""
    from sd3_jax import main

    flags = [
        *extra,
        f"--config={recipe}:tiny",
        f"--workdir={workdir}",
        f"--config.train.steps={STEPS}",
        "--config.train.log_every=1",
        "--config.train.eval_every=1000",
        "--config.train.sample_every=1000",
        "--config.checkpoint.every=1000",
    ]
    if main.main(["train", *flags]) != 0:
        raise RuntimeError(f"{recipe}:tiny did not train")
    lines = (Path(workdir) / "metrics.jsonl").read_text().splitlines()
    rows = map(json.loads, lines)
    return [row["loss"] for row in rows if row["kind"] == "train"]


def parameters(recipe: str) -> dict[str, list[int]]:
    """Name to shape of every parameter of the recipe's :tiny."""
    import jax

    from sd3_jax import tree
    from sd3_jax.assembly import model_parts

    config = importlib.import_module(f"configs.{recipe}").get_config("tiny")
    objective = model_parts.build_parts(config).objective
    params = tree.unbox(jax.eval_shape(objective.init, jax.random.key(0)))
    leaves = jax.tree_util.tree_leaves_with_path(params)
    return {"/".join(tree.names(path)): list(x.shape) for path, x in leaves}


def recorded() -> dict[str, dict]:
    return json.loads(FILE.read_text())


def main(update: bool) -> None:
    values = {
        recipe: {"losses": first_losses(recipe), "parameters": parameters(recipe)}
        for recipe in TRAINABLE
    }
    before = recorded() if FILE.exists() else {}
    for recipe, value in values.items():
        for part in value:
            same = before.get(recipe, {}).get(part) == value[part]
            print(f"{recipe} {part}: {'the same' if same else 'differ'}")
    if update:
        text = json.dumps(values, indent=1)
        FILE.write_text(text + "\n")


if __name__ == "__main__":
    sys.path[:0] = [str(HERE.parent), str(HERE.parents[1])]
    importlib.import_module("conftest")  # the tests' devices and compiler flags
    main("--update" in sys.argv)
