"""A JobSet for GKE, printed: python launch/gke/render.py … | kubectl apply -f -

python launch/gke/render.py --name sd3 --slices 2 --topology 16x16 \
    --accelerator tpu-v5-lite-podslice --chips-per-vm 4 --image IMAGE \
    --command 'python -m sd3_jax.main train --config=configs/sd3_2b.py --workdir=gs://…'
"""

import argparse
import json
import math
import re
import string
from pathlib import Path

TEMPLATE = Path(__file__).with_name("jobset.yaml.template")
GENERATIONS = {  # by GKE's name, the file in launch/flags
    "tpu-v5-lite-podslice": "v5e",
    "tpu-v5-lite-device": "v5e",
    "tpu-v5p-slice": "v5p",
    "tpu-v6e-slice": "v6e",
    "tpu7x": "tpu7x",
}
GRACE = 330  # seconds: launch/job.sh's 300 for the last checkpoint, and some


def main(argv=None) -> None:
    args = parser().parse_args(argv)
    try:
        print(render(**vars(args)), end="")
    except ValueError as error:
        parser().error(str(error))


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    p.add_argument("--name", required=True)
    p.add_argument("--slices", type=int, default=1)
    p.add_argument("--topology", required=True, help="of a slice: 16x16, 4x4x8")
    p.add_argument("--accelerator", required=True, choices=GENERATIONS)
    p.add_argument("--chips-per-vm", type=int, default=4)
    p.add_argument("--image", required=True, help="launch/Dockerfile.tpu, pushed")
    p.add_argument("--command", required=True, help="what bash runs on every VM")
    p.add_argument("--max-restarts", type=int, default=10)
    p.add_argument("--retry", default="42,127-255", help="exit codes worth a restart")
    p.add_argument("--queue", default="", help="a Kueue LocalQueue")
    return p


def render(
    *, name, slices, topology, accelerator, image, command, queue, **rest
) -> str:
    """The manifest; a ValueError says which flag is wrong."""
    if not re.fullmatch(r"[a-z]([a-z0-9-]{0,38}[a-z0-9])?", name):
        raise ValueError(f"--name {name}: wanted a-z, 0-9 and -, 40 at most")
    if slices < 1:
        raise ValueError(f"--slices {slices}: wanted 1 or more")
    # JSON strings are YAML strings, whatever is in them.
    label = f"\n  labels:\n    kueue.x-k8s.io/queue-name: {json.dumps(queue)}"
    return string.Template(TEMPLATE.read_text()).substitute(
        name=json.dumps(name),
        labels=label if queue else "",
        slices=slices,
        vms=vms_per_slice(topology, rest["chips_per_vm"]),
        chips=rest["chips_per_vm"],
        accelerator=json.dumps(accelerator),
        topology=json.dumps(topology),
        generation=json.dumps(GENERATIONS[accelerator]),
        image=json.dumps(image),
        command=json.dumps(command, ensure_ascii=False),
        max_restarts=rest["max_restarts"],
        retryable=json.dumps(exit_codes(rest["retry"])),
        grace=GRACE,
    )


def vms_per_slice(topology: str, chips_per_vm: int) -> int:
    if not re.fullmatch(r"[1-9]\d*(x[1-9]\d*){1,2}", topology):
        raise ValueError(f"--topology {topology}: wanted 16x16 or 4x4x8")
    chips = math.prod(map(int, topology.split("x")))
    if chips_per_vm < 1 or chips % chips_per_vm:
        raise ValueError(
            f"--chips-per-vm {chips_per_vm} does not divide {topology}'s {chips} chips"
        )
    return chips // chips_per_vm


def exit_codes(text: str) -> list[int]:
    """42,127-130 is [42, 127, 128, 129, 130]."""
    codes = set()
    for part in text.split(","):
        low, _, high = part.partition("-")
        if not low.isdecimal() or not (high or low).isdecimal():
            raise ValueError(f"--retry {text}: wanted codes and ranges, 42,127-255")
        codes |= set(range(int(low), int(high or low) + 1))
    return sorted(codes)


if __name__ == "__main__":
    main()
