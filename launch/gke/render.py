"""Print a JobSet for GKE: python launch/gke/render.py … | kubectl apply -f -

    python launch/gke/render.py --name sd3 --slices 2 --topology 16x16 \\
        --accelerator tpu-v5-lite-podslice --chips-per-vm 4 --image IMAGE \\
        train --config=configs/sd3_2b.py --workdir=gs://…

JOB is one of `sd3-jax --help`, or preflight; it and its flags come last. --command
takes any shell command in their place.
"""

import argparse
import json
import math
import os
import re
import shlex
import string
import sys
from pathlib import Path
from typing import NamedTuple

TEMPLATE = Path(__file__).with_name("jobset.yaml.template")
JOBS = Path(__file__).parents[2] / "sd3_jax" / "jobs" / "__init__.py"


class Accelerator(NamedTuple):
    """What GKE publishes of a value of its label gke-tpu-accelerator."""

    generation: str  # the file in launch/flags
    machine: str  # type, without the chips that end it: ct6e-standard-4t
    chips: tuple[int, ...]  # per VM; slices of several VMs have 4
    axes: int  # of a topology


ACCELERATORS = {
    "tpu-v5-lite-podslice": Accelerator("v5e", "ct5lp-hightpu", (1, 4, 8), 2),
    "tpu-v5-lite-device": Accelerator("v5e", "ct5l-hightpu", (1, 4, 8), 2),
    "tpu-v5p-slice": Accelerator("v5p", "ct5p-hightpu", (1, 2, 4), 3),
    "tpu-v6e-slice": Accelerator("v6e", "ct6e-standard", (1, 4, 8), 2),
    "tpu7x": Accelerator("tpu7x", "tpu7x-standard", (1, 4), 3),
}
TOPOLOGIES = {  # by their axes; for three, sides that are multiples of 4 as well
    2: "1x1 2x2 2x4 4x4 4x8 8x8 8x16 16x16".split(),
    3: "1x1x1 2x1x1 2x2x1 2x2x2 2x2x4 2x4x4 4x4x4".split(),
}
GRACE = 300  # seconds for the last checkpoint, as in launch/job.sh
SPOT_GRACE = 15  # what GKE leaves to pods of the 30 s that a Spot VM has
SPOT_EVERY = "200"  # steps between checkpoints on Spot; or CHECKPOINT_EVERY
MARGIN = 15  # seconds from job.sh's SIGKILL to Kubernetes's
RUN = ["-m", "sd3_jax.main"]
MAIN = r"(?:\bsd3_jax\.main|\bsd3-jax)"  # in a command


def main(argv=None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    # The other launchers take --dry-run; here it would change nothing.
    args = parser().parse_args([word for word in argv if word != "--dry-run"])
    try:
        print(render(**vars(args)), end="")
    except ValueError as error:
        parser().error(str(error))


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        usage="render.py [options] JOB --config=… --workdir=…",
        description=__doc__,
        epilog="It only prints, with --dry-run and without.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.add_argument("--name", required=True)
    p.add_argument("--slices", type=int, default=1)
    p.add_argument("--topology", required=True, help="of a slice: 16x16, 4x4x8")
    p.add_argument("--accelerator", required=True, choices=ACCELERATORS)
    p.add_argument("--chips-per-vm", type=int, default=4)
    p.add_argument("--image", required=True, help="launch/Dockerfile.tpu, pushed")
    p.add_argument("job", nargs=argparse.REMAINDER, help="JOB --config=… --workdir=…")
    p.add_argument("--command", default="", help="a shell command, if no JOB")
    restarts = "restarts allowed, not counting preemptions (10)"
    p.add_argument("--max-restarts", type=int, default=10, help=restarts)
    codes = "exit codes that restart (3,128-255)"
    p.add_argument("--retry", default="3,128-255", help=codes)
    p.add_argument("--queue", default="", help="a Kueue LocalQueue")
    p.add_argument("--service-account", default="", help="a Kubernetes one")
    nodes = p.add_mutually_exclusive_group()
    spot = "Spot VMs: train saves every CHECKPOINT_EVERY (200) steps"
    nodes.add_argument("--spot", action="store_true", help=spot)
    nodes.add_argument("--reservation", default="", help="a reservation's VMs")
    p.add_argument("--grace", type=int, help="seconds to save in (300; --spot: 15)")
    p.add_argument("--cache-dir", default="", help="JAX_COMPILATION_CACHE_DIR")
    secret = "a Kubernetes Secret whose keys the job gets as variables: WANDB_API_KEY"
    p.add_argument("--secret", default="", help=secret)
    return p


def render(
    *, name, slices, topology, accelerator, image, job, command, queue, **rest
) -> str:
    """The manifest; a ValueError says which flag is wrong."""
    if not re.fullmatch(r"[a-z]([a-z0-9-]{0,38}[a-z0-9])?", name):
        raise ValueError(f"--name {name}: expected a-z, 0-9 and -, 40 at most")
    if slices < 1:
        raise ValueError(f"--slices {slices}: expected 1 or more")
    if rest["max_restarts"] < 0:
        raise ValueError(f"--max-restarts {rest['max_restarts']}: expected 0 or more")
    spot, chips = rest["spot"], rest["chips_per_vm"]
    longest = SPOT_GRACE if spot else GRACE
    grace = longest if rest["grace"] is None else rest["grace"]
    if grace < 1 or (spot and grace > SPOT_GRACE):
        raise ValueError(f"--grace {grace}: expected 1 or more, at most 15 with --spot")
    command = job_command(job, command)
    command = spot_command(command) if spot else command
    # JSON strings are YAML strings, whatever is in them.
    label = f"\n  labels:\n    kueue.x-k8s.io/queue-name: {json.dumps(queue)}"
    account = f"serviceAccountName: {json.dumps(rest['service_account'])}"
    account = _lines(14, account)
    cache = f"  value: {json.dumps(rest['cache_dir'])}"
    cache = _lines(20, "- name: JAX_COMPILATION_CACHE_DIR", cache)
    # By name: the values stay in the cluster, and out of the manifest.
    reference = ["- secretRef:", f"    name: {json.dumps(rest['secret'])}"]
    secret = _lines(18, "envFrom:") + _lines(20, *reference)
    return string.Template(TEMPLATE.read_text()).substitute(
        name=json.dumps(name),
        labels=label if queue else "",
        slices=slices,
        vms=vms_per_slice(topology, chips, ACCELERATORS[accelerator]),
        chips=chips,
        accelerator=json.dumps(accelerator),
        topology=json.dumps(topology),
        nodes=node_lines(spot, rest["reservation"]),
        account=account if rest["service_account"] else "",
        generation=json.dumps(ACCELERATORS[accelerator].generation),
        image=json.dumps(image),
        command=json.dumps(command, ensure_ascii=False),
        max_restarts=rest["max_restarts"],
        retryable=json.dumps(exit_codes(rest["retry"])),
        grace=grace,
        termination=grace + MARGIN,
        cache=cache if rest["cache_dir"] else "",
        secret=secret if rest["secret"] else "",
    )


def vms_per_slice(topology: str, chips_per_vm: int, kind: Accelerator) -> int:
    if not re.fullmatch(r"[1-9]\d*(x[1-9]\d*){1,2}", topology):
        raise ValueError(f"--topology {topology}: expected 16x16 or 4x4x8")
    sides = list(map(int, topology.split("x")))
    if len(sides) != kind.axes:
        raise ValueError(
            f"--topology {topology}: a slice of {kind.generation} has {kind.axes} axes"
        )
    if not exists(sides):
        cubes = ", or multiples of 4 in ascending order" if kind.axes == 3 else ""
        names = ", ".join(TOPOLOGIES[kind.axes])
        raise ValueError(f"--topology {topology}: expected one of {names}{cubes}")
    chips = math.prod(sides)
    if chips_per_vm not in kind.chips:
        types = ", ".join(f"{kind.machine}-{n}t" for n in kind.chips)
        raise ValueError(f"--chips-per-vm {chips_per_vm}: {kind.machine}: {types}")
    if chips % chips_per_vm:
        raise ValueError(
            f"--chips-per-vm {chips_per_vm} does not divide {topology}'s {chips} chips"
        )
    if chips > chips_per_vm != 4:
        raise ValueError(
            f"--chips-per-vm {chips_per_vm}: in a multi-host slice, each VM has four"
            " chips"
        )
    return chips // chips_per_vm


def exists(sides: list[int]) -> bool:
    """Whether GKE publishes the topology, or it is one of whole cubes of 4x4x4."""
    if "x".join(map(str, sides)) in TOPOLOGIES[len(sides)]:
        return True
    cubes = len(sides) == 3 and all(side % 4 == 0 for side in sides)
    return cubes and sides == sorted(sides)


def node_lines(spot: bool, reservation: str) -> str:
    """The rest of nodeSelector, and a toleration for pools that taint Spot nodes."""
    if spot:
        taint = ["- key: cloud.google.com/gke-spot", '  value: "true"']
        selector = _lines(16, 'cloud.google.com/gke-spot: "true"')
        return selector + _lines(14, "tolerations:") + _lines(16, *taint)
    if reservation:
        name = f"cloud.google.com/reservation-name: {json.dumps(reservation)}"
        return _lines(16, name, "cloud.google.com/reservation-affinity: specific")
    return ""


def job_command(job: list[str], command: str) -> str:
    """The shell command, once its job and its flags are known to be some."""
    if bool(job) == bool(command):
        raise ValueError("expected JOB and its flags, or --command; not both")
    jobs = re.findall(r'^    "(\w+)": Job\(', JOBS.read_text(), re.MULTILINE)
    names = job[:1] or re.findall(rf"{MAIN}\s+([\w-]+)", command)
    for name in names:
        if name not in jobs and job[:1] != ["preflight"]:
            raise ValueError(f"unknown job {name}: expected one of {', '.join(jobs)}")
    if job:
        preflight = job[0] == "preflight"
        main = ["launch/preflight.py", *job[1:]] if preflight else [*RUN, *job]
        command = shlex.join(["python", *main])
    if match := re.search(r"""--(workdir|config)=(''|"")?(?=\s|$)""", command):
        wanted = dict(workdir="gs://…", config="configs/RECIPE.py")[match[1]]
        raise ValueError(f"--{match[1]}= is empty: expected {wanted}")
    return command


def spot_command(command: str) -> str:
    """The command with a checkpoint interval that suits Spot, if it names none."""
    if "config.checkpoint.every" in command:
        return command
    every = os.environ.get("CHECKPOINT_EVERY") or SPOT_EVERY
    flag = f"--config.checkpoint.every={every}"
    changed, count = re.subn(rf"{MAIN}\s+train(?=\s|$)", rf"\g<0> {flag}", command)
    done = f"; added {flag}" if count else ""
    if not re.search(rf"{MAIN}|preflight\.py", command):
        done = f"; no train in --command: add {flag} yourself"
    print(f"render: --spot: {SPOT_GRACE} s to save in{done}", file=sys.stderr)
    return changed


def _lines(indent: int, *lines: str) -> str:
    return "".join(f"\n{' ' * indent}{line}" for line in lines)


def exit_codes(text: str) -> list[int]:
    """3,128-130 is [3, 128, 129, 130]."""
    codes = set()
    for part in text.split(","):
        low, _, high = part.partition("-")
        if not low.isdecimal() or not (high or low).isdecimal():
            raise ValueError(f"--retry {text}: expected codes and ranges, 3,128-255")
        low, high = int(low), int(high or low)
        if not 1 <= low <= high <= 255:
            raise ValueError(f"--retry {text}: {part}: expected codes from 1 to 255")
        codes |= set(range(low, high + 1))
    return sorted(codes)


if __name__ == "__main__":
    main()
