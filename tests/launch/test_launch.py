"""The launchers: their commands, their JobSet, their flags, and what runs locally."""

import importlib.util
import json
import os
import re
import runpy
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import device_orders
import jsonschema
import multiprocess
import numpy as np
import pytest
import yaml

from configs import quickstart
from sd3_jax.distributed import sharding
from sd3_jax.jobs import JOBS
from sd3_jax.monitoring import metrics

ROOT = Path(__file__).parents[2]
LAUNCH = ROOT / "launch"
SCHEMA = Path(__file__).with_name("jobset_schema.yaml")  # what the template uses of it
CRD = ROOT.parent / "shared" / "jobset-crd.yaml"  # the whole, where it lies there
SCRIPTS = sorted([*LAUNCH.glob("*.sh"), LAUNCH / "slurm.sbatch"])
JOB = ["train", "--config=configs/sd3_2b.py", "--config.sample.prompt=a red fox"]
TOLD = "-m sd3_jax.main train --config=configs/sd3_2b.py '--config.sample.prompt=a"


def shell(script, *args, timeout=60, **variables):
    """A script's result, in an environment that names nothing but the variables."""
    kept = ("PATH", "HOME", "JAX_COMPILATION_CACHE_DIR", "XLA_FLAGS")
    return subprocess.run(
        ["bash", str(LAUNCH / script), *map(str, args)],
        env={name: os.environ[name] for name in kept if name in os.environ} | variables,
        capture_output=True,
        text=True,
        timeout=timeout,
    )


def test_shellcheck():
    tool = Path(sys.executable).with_name("shellcheck")
    told = [str(tool), "--external-sources", *map(str, SCRIPTS)]
    done = subprocess.run(told, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    for script in SCRIPTS:
        text = script.read_text()
        assert script.name == "common.sh" or "\nset -euo pipefail\n" in text, script


# Commands

VM = dict(TPU_NAME="box", ZONE="zone-a", PROJECT="mine")
QUEUED = dict(QUEUED_RESOURCE="box", ZONE="zone-a", PROJECT="mine")
KIND = dict(ACCELERATOR_TYPE="v6e-16", RUNTIME_VERSION="v2-alpha-tpuv6e")
V6E = dict(TPU_GENERATION="v6e")
GKE = dict(CLUSTER="big", PROJECT="mine", IMAGE="registry/sd3:1")
XPK = dict(ZONE="zone-a", WORKLOAD="sd3", TPU_TYPE="v6e-256", **GKE)
TOOLKIT = dict(LOCATION="here", JOB_NAME="sd3", COMPUTE_TYPE="ct6e-standard-4t", **GKE)
PLACE = "--zone=zone-a --project=mine"
PLACED = dict(SERVICE_ACCOUNT="me@mine", NETWORK="net", SUBNETWORK="sub")
SPOT = dict(PROVISIONING="spot")
RETRYABLE = [3, *range(128, 256)]
PREFLIGHT = ["preflight", *JOB[:2], "--workdir=gs://ours/run"]
CHECKED = "launch/job.sh .venv/bin/python launch/preflight.py train --config=configs"
CASES = [  # script, arguments, variables, what the dry run prints
    ("tpu_vm.sh", ["create"], VM | KIND, "tpu-vm create box --accelerator-type=v6e-16"),
    ("tpu_vm.sh", ["setup"], VM, "tpu-vm scp"),
    ("tpu_vm.sh", ["run", *JOB], VM | V6E, "tpu-vm ssh box --worker=all '--command="),
    (
        "tpu_vm.sh",
        ["create"],
        VM | KIND | PLACED | dict(PROVISIONING="reserved"),
        "tpu-vm create box --accelerator-type=v6e-16 --version=v2-alpha-tpuv6e"
        " --reserved --service-account=me@mine --network=net --subnetwork=sub " + PLACE,
    ),
    (
        "tpu_vm.sh",
        ["run", *JOB],
        VM | V6E | dict(CACHE_DIR="gs://ours/programs"),
        "TPU_GENERATION=v6e GRACE_S=300 JAX_COMPILATION_CACHE_DIR=gs://ours/programs"
        " JOB_CODE=../job.code launch/job.sh",
    ),
    ("tpu_vm.sh", ["run", *JOB], VM | V6E | SPOT, "GRACE_S=30 JOB_CODE=../job.code"),
    ("tpu_vm.sh", ["stop"], VM, "kill -TERM"),
    ("tpu_vm.sh", ["status"], VM, "echo running"),
    ("tpu_vm.sh", ["logs"], VM, "--worker=0 '--command=tail -n 100 -F job.log'"),
    ("tpu_vm.sh", ["delete"], VM, f"tpu-vm delete box --quiet {PLACE}"),
    ("tpu_vm.sh", ["run", *JOB], VM | KIND, "env TPU_GENERATION=v6e GRACE_S=300"),
    (
        "tpu_vm.sh",
        PREFLIGHT,
        VM | KIND,
        f"env TPU_GENERATION=v6e GRACE_S=300 {CHECKED}",
    ),
    (
        "queued_resources.sh",
        PREFLIGHT,
        QUEUED | V6E | SPOT,
        f"env TPU_GENERATION=v6e GRACE_S=30 {CHECKED}",
    ),
    (
        "queued_resources.sh",
        ["logs"],
        QUEUED | dict(NODE="1", WORKER="3"),
        "ssh box --node=1 --worker=3 '--command=tail -n 100 -F job.log' " + PLACE,
    ),
    ("xpk.sh", PREFLIGHT, XPK, "GRACE_S=300 launch/job.sh python launch/preflight.py "),
    (
        "slurm.sbatch",
        PREFLIGHT,
        dict(SLURM_GPUS_PER_NODE="8"),
        CHECKED,
    ),
    (
        "queued_resources.sh",
        ["create"],
        QUEUED | KIND | SPOT | PLACED | dict(NODE_COUNT="2"),
        "queued-resources create box --node-prefix=box --node-count=2 --spot"
        " --service-account=me@mine --network=net --subnetwork=sub"
        " --accelerator-type=v6e-16 --runtime-version=v2-alpha-tpuv6e " + PLACE,
    ),
    ("queued_resources.sh", ["wait"], QUEUED, "queued-resources describe box"),
    ("queued_resources.sh", ["run", *JOB], QUEUED | V6E, "ssh box --node=all --worker"),
    ("queued_resources.sh", ["resume", *JOB], QUEUED | KIND | V6E, "--node-id=box"),
    ("queued_resources.sh", ["delete"], QUEUED, "delete box --force --quiet " + PLACE),
    (
        "xpk.sh",
        JOB,
        XPK,
        "xpk workload create --cluster=big --zone=zone-a --project=mine --workload=sd3"
        " --tpu-type=v6e-256 --num-slices=1 --docker-image=registry/sd3:1",
    ),
    (
        "xpk.sh",
        JOB,
        XPK,
        "--restart-on-exit-codes=3 --termination-grace-period-seconds=315"
        " '--command=env TPU_GENERATION=v6e GRACE_S=300 launch/job.sh python -m sd3",
    ),
    ("xpk.sh", JOB, XPK | SPOT, "--termination-grace-period-seconds=30 '--command=env"),
    (
        "cluster_toolkit.sh",
        JOB,
        TOOLKIT | dict(TOPOLOGY="4x4", NUM_SLICES="2", QUEUE="ours"),
        "gcluster job submit --cluster=big --location=here --project=mine --name=sd3"
        " --compute-type=ct6e-standard-4t --topology=4x4 --num-slices=2"
        " --image=registry/sd3:1 --restarts=10 --grace-period=315s"
        f" --restart-on-exit-codes={','.join(map(str, RETRYABLE))} --queue=ours",
    ),
    (
        "cluster_toolkit.sh",
        JOB,
        TOOLKIT | SPOT | dict(TOPOLOGY="4x4", SERVICE_ACCOUNT="trainer"),
        "255 --service-account=trainer --gke-nap-provisioning=spot"
        " '--command=env TPU_GENERATION=v6e GRACE_S=15 launch/job.sh",
    ),
    (
        "cluster_toolkit.sh",
        JOB,
        TOOLKIT | dict(TOPOLOGY="4x4", PROVISIONING="reserved", RESERVATION="ours"),
        "--gke-nap-provisioning=reservation --gke-nap-reservation=ours",
    ),
    (
        "slurm.sbatch",
        JOB,
        dict(SLURM_GPUS_PER_NODE="h100:8"),
        "srun --ntasks-per-node=8 --cpus-per-task=1 --gpu-bind=none"
        f" --kill-on-bad-exit=1 launch/job.sh .venv/bin/python {TOLD}",
    ),
    ("local_two_process.sh", [], dict(PORT="5"), "SD3_COORDINATOR=127.0.0.1:5"),
    ("job.sh", JOB, V6E | dict(GRACE_S="30"), "SD3_GRACE_S=30"),
    ("job.sh", JOB, V6E, "LIBTPU_INIT_ARGS=--xla_tpu_scoped_vmem_limit_kib=98304"),
]


@pytest.mark.parametrize("script, args, variables, command", CASES)
def test_a_dry_run_prints_the_command(script, args, variables, command):
    done = shell(script, "--dry-run", *args, **variables)
    assert done.returncode == 0, done.stderr
    assert command in done.stdout
    if args[-3:] == JOB:  # the job's flags survive the quoting
        unquoted = done.stdout.replace("'\\''", "'")
        assert "train --config=configs/sd3_2b.py" in unquoted
        assert "'--config.sample.prompt=a red fox'" in unquoted


@pytest.mark.parametrize(
    "script, args, variables",
    [
        ("tpu_vm.sh", ["create"], VM | dict(ACCELERATOR_TYPE="v6e-16")),
        ("tpu_vm.sh", ["run", *JOB], VM | dict(ACCELERATOR_TYPE="v6e-16")),
        ("queued_resources.sh", ["create"], QUEUED | dict(ACCELERATOR_TYPE="v6e-16")),
        (
            "queued_resources.sh",
            ["resume", *JOB],
            QUEUED | dict(ACCELERATOR_TYPE="v6e-16"),
        ),
        ("xpk.sh", JOB, XPK),
        ("cluster_toolkit.sh", JOB, TOOLKIT | dict(TOPOLOGY="4x4")),
    ],
)
def test_unset_variables_are_named(script, args, variables):
    def message(**rest):
        done = shell(script, "--dry-run", *args, **rest)
        assert done.returncode == 2 and done.stdout == ""
        (line,) = done.stderr.splitlines()
        return line

    for name in variables:
        rest = {key: value for key, value in variables.items() if key != name}
        end = f"{script}: set {name}; see launch/{script} --help"
        assert message(**rest).endswith(end)
    line = message()
    assert re.search(r"set \w+(, \w+)* and \w+; see", line)
    assert all(name in line for name in variables)


@pytest.fixture
def gcloud(tmp_path, monkeypatch):
    """A stand-in on PATH that writes down how it is called."""
    for name in "gcloud", "xpk":
        tool = tmp_path / name
        tool.write_text(f'#!/bin/bash\necho "{name} $*" >>"{tmp_path}/calls"\n')
        tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    return tmp_path / "calls"


TYPES = [
    ("v5e-16", "v5litepod-16", "v2-alpha-tpuv5-lite"),
    ("v5litepod-16", "v5litepod-16", "v2-alpha-tpuv5-lite"),
    ("v5p-8", "v5p-8", "v2-alpha-tpuv5"),
    ("v6e-16", "v6e-16", "v2-alpha-tpuv6e"),
    ("v4-8", "v4-8", "tpu-ubuntu2204-base"),
]


@pytest.mark.parametrize("kind, cloud, version", TYPES)
def test_gcloud_gets_its_own_name_of_a_tpu_and_the_image_for_it(
    gcloud, kind, cloud, version
):
    for script, where, flag in [
        ("tpu_vm.sh", VM, "--version"),
        ("queued_resources.sh", QUEUED, "--runtime-version"),
    ]:
        done = shell(script, "create", **where, ACCELERATOR_TYPE=kind)
        assert done.returncode == 0, done.stderr
        call = gcloud.read_text().splitlines()[-1].split()
        assert call[0] == "gcloud" and "create" in call
        assert f"--accelerator-type={cloud}" in call and f"{flag}={version}" in call
        assert cloud in done.stderr and version in done.stderr
        image = dict(ACCELERATOR_TYPE=kind, RUNTIME_VERSION="my-image")
        assert shell(script, "create", **where, **image).returncode == 0
        assert f"{flag}=my-image" in gcloud.read_text().splitlines()[-1].split()


@pytest.mark.parametrize("kind, cloud, version", TYPES)
def test_an_image_of_other_tpus_is_refused(gcloud, kind, cloud, version):
    for other in {x for *_, x in TYPES} - {version}:
        image = dict(ACCELERATOR_TYPE=kind, RUNTIME_VERSION=other)
        done = shell("tpu_vm.sh", "create", **VM, **image)
        assert done.returncode == 2 and not gcloud.exists()
        assert f"ACCELERATOR_TYPE={cloud}; set {version}" in done.stderr


def test_an_unknown_tpu_wants_its_image(gcloud):
    done = shell("tpu_vm.sh", "create", **VM, ACCELERATOR_TYPE="v9-8")
    assert done.returncode == 2 and "set RUNTIME_VERSION" in done.stderr
    image = dict(ACCELERATOR_TYPE="v9-8", RUNTIME_VERSION="v2-alpha-tpuv5")
    assert shell("tpu_vm.sh", "create", **VM, **image).returncode == 0


def test_xpk_gets_google_s_name_too(gcloud):
    done = shell("xpk.sh", *JOB, **(XPK | dict(TPU_TYPE="v5e-16")))
    assert done.returncode == 0, done.stderr
    call = gcloud.read_text()
    assert "--tpu-type=v5litepod-16" in call and "TPU_GENERATION=v5e" in call


@pytest.mark.parametrize("script", ["tpu_vm.sh", "queued_resources.sh"])
def test_without_arguments_a_launcher_prints_its_usage(gcloud, script):
    for args in ([], ["--dry-run"], ["crate"], ["run"]):
        done = shell(script, *args)
        assert done.returncode == 2 and done.stdout == "" and not gcloud.exists()
        assert f"launch/{script} create" in done.stderr or "create|" in done.stderr
        assert ("crate: expected one of the words" in done.stderr) == ("crate" in args)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_help_comes_before_any_check(script):
    if script.name == "common.sh":
        return
    done = shell(script.name, "--help")
    assert done.returncode == 0 and done.stderr == ""
    assert f"launch/{script.name}" in done.stdout and "#" not in done.stdout
    assert "SBATCH --" not in done.stdout and "set -euo" not in done.stdout


def test_help_of_a_command_is_its_own():
    done = shell("job.sh", "echo", "--help", "--dry-run")
    assert done.stdout == "--help --dry-run\n"


@pytest.mark.parametrize(
    "script, arguments, variables",
    [
        ("tpu_vm.sh", ["run"], VM | KIND),
        ("queued_resources.sh", ["run"], QUEUED | KIND),
        ("queued_resources.sh", ["resume"], QUEUED | KIND),
        ("xpk.sh", [], XPK),
        ("cluster_toolkit.sh", [], TOOLKIT | dict(TOPOLOGY="4x4")),
        ("slurm.sbatch", [], dict(SLURM_GPUS_PER_NODE="8")),
    ],
)
def test_a_job_that_cannot_be_is_refused_here(script, arguments, variables):
    def message(*job):
        done = shell(script, "--dry-run", *arguments, *job, **variables)
        assert done.returncode == 2 and done.stdout == ""
        return done.stderr

    names = ", ".join([*JOBS, "preflight"])
    assert f"unknown job trian: expected one of {names}\n" in message("trian", *JOB[1:])
    assert "--workdir= is empty" in message(*JOB, "--workdir=")
    assert "--config= is empty" in message("train", "--config=", "--workdir=x")


@pytest.mark.parametrize(
    "script, arguments, variables, name, types",
    [
        (
            *("tpu_vm.sh", ["run"], VM, "ACCELERATOR_TYPE"),
            {"v5litepod-16": "v5e", "v5p-16": "v5p", "v6e-8": "v6e"},
        ),
        (
            "queued_resources.sh",
            ["run"],
            QUEUED,
            "ACCELERATOR_TYPE",
            {"v5p-256": "v5p"},
        ),
        ("xpk.sh", [], XPK, "TPU_TYPE", {"tpu7x-4x4x4": "tpu7x", "v6e-256": "v6e"}),
        (
            *("cluster_toolkit.sh", [], TOOLKIT | dict(TOPOLOGY="4x4"), "COMPUTE_TYPE"),
            {"ct5p-hightpu-4t": "v5p", "ct5lp-hightpu-4t": "v5e"},
        ),
    ],
)
def test_the_generation_follows_from_the_type(
    script, arguments, variables, name, types
):
    dry_run = [script, "--dry-run", *arguments, *JOB]
    for kind, generation in types.items():
        told = variables | {name: kind}
        done = shell(*dry_run, **told)
        assert f"TPU_GENERATION={generation} GRACE_S=300" in done.stdout, done.stderr
        wrong = "v5e" if generation == "v6e" else "v6e"
        done = shell(
            script, "--dry-run", *arguments, *JOB, **told, TPU_GENERATION=wrong
        )
        assert done.returncode == 2 and done.stdout == ""
        assert f"{name}={kind} does not match TPU_GENERATION={wrong};" in done.stderr
    done = shell(*dry_run, **variables | {name: "v9-8"})
    assert f"{name}=v9-8: expected v5litepod-N" in done.stderr


@pytest.mark.parametrize(
    "script, arguments, variables, seconds",
    [
        ("tpu_vm.sh", ["run"], VM | V6E, 30),
        ("queued_resources.sh", ["run"], QUEUED | V6E, 30),
        ("queued_resources.sh", ["resume"], QUEUED | KIND | V6E, 30),
        ("xpk.sh", [], XPK, 15),
        ("cluster_toolkit.sh", [], TOOLKIT | dict(TOPOLOGY="4x4"), 15),
    ],
)
def test_spot_saves_more_often_unless_told(script, arguments, variables, seconds):
    """The notice is short whatever GRACE_S says, and the script says so."""
    run = lambda job, **more: shell(
        script, "--dry-run", *arguments, *job, **variables | SPOT | more
    )
    done = run(JOB, GRACE_S="300")
    assert f"GRACE_S={seconds} " in done.stdout
    assert f"after {seconds} s" in done.stderr
    assert "--config.checkpoint.every=200" in done.stdout
    assert "a checkpoint every 200 steps" in done.stderr
    assert "checkpoint.every=50" in run(JOB, CHECKPOINT_EVERY="50").stdout
    done = run([*JOB, "--config.checkpoint.every=700"])
    assert "every=700" in done.stdout and "every=200" not in done.stdout
    assert "checkpoint.every" not in run(["sample", *JOB[1:]]).stdout
    on_demand = shell(script, "--dry-run", *arguments, *JOB, **variables)
    assert "checkpoint.every" not in on_demand.stdout
    assert "spot" not in on_demand.stderr


@pytest.mark.parametrize(
    "variables", [dict(TPU_GENERATION="tpu7x"), dict(ACCELERATOR_TYPE="tpu7x-8")]
)
@pytest.mark.parametrize(
    "script, base", [("tpu_vm.sh", VM), ("queued_resources.sh", QUEUED)]
)
@pytest.mark.parametrize("verb", [["create"], ["run", *JOB]])
def test_tpu7x_is_on_gke_only(script, base, verb, variables):
    done = shell(script, "--dry-run", *verb, **base | KIND | variables)
    assert done.returncode == 2 and done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert "TPU7x is on GKE only; use launch/gke/render.py" in line


def test_other_mistakes():
    assert (
        "expected v5e, v5p"
        in shell("xpk.sh", *JOB, **XPK | {"TPU_GENERATION": "v4"}).stderr
    )
    wrong = VM | KIND | {"PROVISIONING": "cheap"}
    assert "expected on-demand, spot" in shell("tpu_vm.sh", "create", **wrong).stderr
    done = shell("job.sh", "true", GRACE_S="5m")
    assert done.returncode == 2 and "GRACE_S=5m: expected an integer" in done.stderr
    done = shell("tpu_vm.sh", "dance", **VM)
    assert done.returncode == 2 and "create|setup|stop" in done.stderr
    done = shell("slurm.sbatch", *JOB)
    assert done.returncode == 2 and "pass --gpus-per-node to sbatch" in done.stderr
    done = shell("local_two_process.sh", "--dry-run", "--workdir=")
    assert done.returncode == 2 and "--workdir= is empty" in done.stderr


@pytest.mark.parametrize(
    "script, arguments, variables",
    [
        ("job.sh", ["true"], dict(GRACE_S="x")),
        ("tpu_vm.sh", ["run", *JOB], VM | V6E | dict(GRACE_S="x")),
        ("queued_resources.sh", ["resume", *JOB], QUEUED | KIND | dict(GRACE_S="x")),
        ("xpk.sh", JOB, XPK | dict(GRACE_S="x")),
        ("cluster_toolkit.sh", JOB, TOOLKIT | dict(TOPOLOGY="4x4", GRACE_S="x")),
        ("slurm.sbatch", JOB, dict(SLURM_GPUS_PER_NODE="8", GRACE_S="x")),
    ],
)
def test_seconds_to_save_are_an_integer(script, arguments, variables):
    for seconds in ("08", "030", "5m", "-1", "99999999999999999999"):
        done = shell(
            script, "--dry-run", *arguments, **variables | {"GRACE_S": seconds}
        )
        assert done.returncode == 2 and done.stdout == "", seconds
        assert f"GRACE_S={seconds}: expected an integer, 0 or more" in done.stderr


@pytest.mark.parametrize(
    "script, arguments, variables",
    [
        ("queued_resources.sh", ["resume", *JOB], QUEUED | KIND | {"MAX_RESTARTS": ""}),
        ("queued_resources.sh", ["create"], QUEUED | KIND | {"NODE_COUNT": ""}),
        ("queued_resources.sh", ["wait"], QUEUED | {"POLL_S": ""}),
        ("xpk.sh", JOB, XPK | {"MAX_RESTARTS": ""}),
        ("xpk.sh", JOB, XPK | {"NUM_SLICES": ""}),
        ("cluster_toolkit.sh", JOB, TOOLKIT | {"TOPOLOGY": "4x4", "NUM_SLICES": ""}),
        ("slurm.sbatch", JOB, {"SLURM_GPUS_PER_NODE": "8", "MAX_RESTARTS": ""}),
        ("tpu_vm.sh", ["run", *JOB], VM | V6E | SPOT | {"CHECKPOINT_EVERY": ""}),
    ],
)
def test_counts_are_integers(script, arguments, variables):
    (name,) = [name for name, value in variables.items() if not value]
    least = 1 if name in ("NODE_COUNT", "NUM_SLICES", "CHECKPOINT_EVERY") else 0
    for value in ("x", "0" if least else "-1"):
        told = variables | {name: value}
        done = shell(script, "--dry-run", *arguments, **told)
        assert done.returncode == 2 and done.stdout == ""
        assert f"{name}={value}: expected an integer, {least} or more" in done.stderr


@pytest.mark.parametrize(
    "script, tool, variables",
    [
        ("xpk.sh", "xpk", XPK),
        ("cluster_toolkit.sh", "gcluster", TOOLKIT | dict(TOPOLOGY="4x4")),
    ],
)
def test_a_folder_of_programs_may_have_a_space(tmp_path, script, tool, variables):
    run_command = f'cd {tmp_path}; last=${{@: -1}}; bash -c "${{last#--command=}}"'
    program(tmp_path / tool, f"#!/bin/bash\n{run_command}\n")
    print_cache = '#!/bin/bash\necho "$JAX_COMPILATION_CACHE_DIR"\n'
    program(tmp_path / "launch" / "job.sh", print_cache)
    path = f"{tmp_path}:{os.environ['PATH']}"
    done = shell(script, *JOB, **variables | dict(CACHE_DIR="gs://a b", PATH=path))
    assert done.stdout.strip() == "gs://a b", done.stderr


# Extras, and variables that the job gets

SECRETS = dict(WANDB_API_KEY="a'b $c", HF_TOKEN="hf_1234")
PASSING = [
    ("tpu_vm.sh", ["run", *JOB], VM | V6E),
    ("tpu_vm.sh", PREFLIGHT, VM | V6E),
    ("queued_resources.sh", ["run", *JOB], QUEUED | V6E),
    ("queued_resources.sh", ["resume", *JOB], QUEUED | KIND),
    ("xpk.sh", JOB, XPK),
]


@pytest.mark.parametrize("script, args, variables", PASSING)
def test_no_secret_is_printed(script, args, variables):
    done = shell(script, "--dry-run", *args, **variables | SECRETS)
    assert done.returncode == 0, done.stderr
    printed = done.stdout + done.stderr
    assert not any(value in printed for value in SECRETS.values())
    assert "the job gets WANDB_API_KEY HF_TOKEN from your environment" in done.stderr
    assert "job.env" in done.stdout
    none = shell(script, "--dry-run", *args, **variables | SECRETS | {"PASS_ENV": ""})
    assert "job.env" not in none.stdout and "the job gets" not in none.stderr
    assert "job.env" not in shell(script, "--dry-run", *args, **variables).stdout


@pytest.mark.parametrize("script, args, variables", PASSING)
def test_pass_env_names_variables_that_are_set(script, args, variables):
    run = lambda names, **more: shell(
        script, "--dry-run", *args, **variables | SECRETS | dict(PASS_ENV=names) | more
    )
    assert "the job gets MINE from" in run("MINE", MINE="1").stderr
    for names, message, more in [
        ("MINE", "PASS_ENV names MINE, which is not set", {}),
        ("A=b", "PASS_ENV=A=b: expected names of variables", {}),
        ("MINE", "MINE has more than one line", dict(MINE="1\n2")),
    ]:
        done = run(names, **more)
        assert done.returncode == 2 and message in done.stderr and not done.stdout


def test_cluster_toolkit_says_that_it_passes_none():
    job = ["cluster_toolkit.sh", "--dry-run", *JOB]
    toolkit = TOOLKIT | dict(TOPOLOGY="4x4") | SECRETS
    done = shell(*job, **toolkit)
    assert "the job does not get WANDB_API_KEY HF_TOKEN" in done.stderr
    assert done.returncode == 0 and "hf_1234" not in done.stdout + done.stderr
    done = shell(*job, **toolkit, PASS_ENV="HF_TOKEN")
    assert done.returncode == 2 and "use launch/gke/render.py --secret" in done.stderr


def test_xpk_reads_the_variables_from_a_file(tmp_path):
    read = "for word; do\n[[ $word != --env-file=* ]] || file=${word#*=}\ndone\n"
    show = 'stat -c %a "$file"; cat "$file"; echo "$*" >&2\n'
    program(tmp_path / "xpk", f"#!/bin/bash\n{read}{show}")
    path = f"{tmp_path}:{os.environ['PATH']}"
    done = shell("xpk.sh", *JOB, **XPK | SECRETS | dict(PATH=path))
    lines = [f"{name}={value}" for name, value in SECRETS.items()]
    assert done.stdout.splitlines() == ["600", *lines]
    assert "hf_1234" not in done.stderr


@pytest.mark.parametrize(
    "script, variables", [("tpu_vm.sh", VM), ("queued_resources.sh", QUEUED)]
)
def test_extras_are_installed(script, variables):
    setup = lambda **more: shell(script, "setup", "--dry-run", **variables | more)
    unquoted = lambda done: done.stdout.replace("'\\''", "'")
    assert "-e '.[tpu]'" in unquoted(setup())
    assert "-e '.[tpu,wandb,dedup]'" in unquoted(setup(EXTRAS="wandb,dedup"))
    for wrong in "wandb mlflow", "wandb,", "[wandb]":
        done = setup(EXTRAS=wrong)
        assert done.returncode == 2 and "expected extras of setup.py" in done.stderr


def test_an_image_has_its_extras():
    for script, told in ("xpk.sh", XPK), ("cluster_toolkit.sh", TOOLKIT):
        done = shell(script, "--dry-run", *JOB, **told, TOPOLOGY="4x4", EXTRAS="wandb")
        assert "docker build --build-arg EXTRAS=wandb" in done.stderr


# What the hosts are told, on a machine that plays host


def program(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)


@pytest.fixture
def host(tmp_path):
    """Variables with which `gcloud … --command=X` runs X in a folder of ours, and
    `gcloud … scp FILE box:NAME` copies into it."""
    home = tmp_path / "home"
    shutil.copytree(LAUNCH, home / "sd3_jax" / "launch")
    program(
        tmp_path / "bin" / "gcloud",
        "#!/bin/bash\nfor word; do\n"
        "[[ $word != --command=* ]] || told=${word#*=}\ndone\n"
        f'[[ $4 != scp ]] || exec cp -p "$5" "{home}/${{6#*:}}"\n'
        f'cd {home} && bash -c "$told"\n',
    )
    path = f"{tmp_path / 'bin'}:{os.environ['PATH']}"
    yield VM | V6E | dict(PATH=path, HOME=str(home))
    if (home / "job.pid").exists():
        shell("tpu_vm.sh", "stop", **VM, PATH=path)


def settled(host, running="running"):
    for _ in range(100):
        status = shell("tpu_vm.sh", "status", **host).stdout.strip()
        if status != running:
            return status
        time.sleep(0.1)
    return status


def test_a_host_runs_one_job_and_stops_it(host):
    home = Path(host["HOME"])
    python = home / "sd3_jax" / ".venv" / "bin" / "python"
    program(python, '#!/bin/bash\necho "$LIBTPU_INIT_ARGS" "$@"\nexec sleep 60\n')
    assert settled(host) == "none"
    assert shell("tpu_vm.sh", "run", *JOB, **host).returncode == 0
    assert settled(host, "none") == "running"
    again = shell("tpu_vm.sh", "run", *JOB, **host)
    assert again.returncode == 1 and "a job is running" in again.stderr
    assert shell("tpu_vm.sh", "stop", **host).returncode == 0
    assert settled(host) == "none"
    log = (home / "job.log").read_text()
    assert "vmem_limit_kib=98304" in log and "--config.sample.prompt=a red fox" in log


@pytest.mark.parametrize("verb", ["run", "preflight"])
def test_a_host_s_job_gets_the_variables_and_keeps_no_file(host, verb):
    home = Path(host["HOME"])
    python = home / "sd3_jax" / ".venv" / "bin" / "python"
    show = (
        'echo "$WANDB_API_KEY" "$HF_TOKEN"; ls -a ~; tr "\\0" " " </proc/$PPID/cmdline'
    )
    program(python, f"#!/bin/bash\n{show}\n")
    words = ["run", *JOB] if verb == "run" else PREFLIGHT
    done = shell("tpu_vm.sh", *words, **host | SECRETS)
    assert done.returncode == 0, done.stderr
    if verb == "run":
        assert settled(host) == "exit 0"
    log = done.stdout if verb == "preflight" else (home / "job.log").read_text()
    assert log.startswith("a'b $c hf_1234\n") and "job.env" not in log
    assert log.count("hf_1234") == 1 and "launch/job.sh" in log


def test_a_host_is_checked_in_the_foreground(host):
    python = Path(host["HOME"]) / "sd3_jax" / ".venv" / "bin" / "python"
    program(python, '#!/bin/bash\necho "$TPU_GENERATION" "$@"\nexit 1\n')
    done = shell("tpu_vm.sh", *PREFLIGHT, **host)
    assert done.returncode == 1
    assert done.stdout == f"v6e launch/preflight.py {' '.join(PREFLIGHT[1:])}\n"
    assert settled(host) == "none"


def test_a_host_tells_how_its_job_ended(host):
    python = Path(host["HOME"]) / "sd3_jax" / ".venv" / "bin" / "python"
    program(python, "#!/bin/bash\nexit 7\n")
    shell("tpu_vm.sh", "run", *JOB, **host)
    assert settled(host) == "exit 7"


SAVES = """
import signal, sys, time
signal.signal(signal.SIGTERM, lambda *_: (print("saved", flush=True), sys.exit(0)))
print("ready", flush=True)
time.sleep(60)
"""


def test_a_job_told_to_stop_is_not_done():
    """Training saves and ends with 0, which is not to be taken for done."""
    told = [
        "bash",
        LAUNCH / "job.sh",
        "bash",
        "-c",
        f"{sys.executable} -c '{SAVES}'; :",
    ]
    with subprocess.Popen(told, stdout=subprocess.PIPE, text=True) as job:
        assert job.stdout.readline() == "ready\n"
        job.send_signal(signal.SIGTERM)
        assert job.stdout.readline() == "saved\n"
        assert job.wait(10) == 143


def test_a_job_told_to_stop_that_fails_is_not_restarted(tmp_path):
    """Slurm tells all tasks to stop when the first one ends, by a mistake perhaps."""
    body = "trap 'exit 2' TERM; echo ready; while true; do sleep 0.1; done"
    program(tmp_path / "mistaken", f"#!/bin/bash\n{body}\n")
    told = ["bash", LAUNCH / "job.sh", tmp_path / "mistaken"]
    with subprocess.Popen(told, stdout=subprocess.PIPE, text=True) as job:
        assert job.stdout.readline() == "ready\n"
        job.send_signal(signal.SIGTERM)
        assert job.wait(10) == 2


def test_a_job_told_to_stop_that_fails_may_leave_a_child():
    """The child is killed after GRACE_S, and the job's own code is the result."""
    child = "(trap '' TERM; exec sleep 60) &"
    body = f"{child} trap 'exit 1' TERM; echo ready; while true; do sleep 0.1; done"
    told = ["bash", LAUNCH / "job.sh", "bash", "-c", body]
    variables = os.environ | dict(GRACE_S="1")
    with subprocess.Popen(
        told, env=variables, stdout=subprocess.PIPE, text=True
    ) as job:
        assert job.stdout.readline() == "ready\n"
        job.send_signal(signal.SIGTERM)
        assert job.wait(10) == 1


@pytest.mark.parametrize(
    "code, earlier, requeued, failures",
    [(0, 3, False, None), (1, 0, False, None), (2, 0, False, None), (3, 0, True, "1")]
    + [(134, 9, True, "10"), (3, 10, False, None), (143, 10, False, None)]
    + [(143, 0, True, "1"), (127, 0, False, None)],
)
def test_slurm_queues_again_what_a_restart_may_help(
    tmp_path, code, earlier, requeued, failures
):
    count = tmp_path / "slurm-7.failures"
    if earlier:
        count.write_text(f"{earlier}\n")
    done = shell("slurm.sbatch", *JOB, **slurm(tmp_path, f"exit {code}"))
    assert done.returncode == code
    assert done.stdout == ("requeue 7\n" if requeued else "")
    assert (count.read_text().strip() if count.exists() else None) == failures


def slurm(folder, srun):
    """Variables with which slurm.sbatch finds this srun, and a scontrol that prints."""
    program(folder / "srun", f"#!/bin/bash\n{srun}\n")
    program(folder / "scontrol", '#!/bin/bash\necho "$@"\n')
    for name in ("launch", "sd3_jax"):
        (folder / name).symlink_to(ROOT / name)
    # Ten requeues at the time limit are no failures.
    variables = dict(SLURM_JOB_ID="7", SLURM_RESTART_COUNT="10")
    variables |= dict(SLURM_GPUS_PER_NODE="8", SLURM_SUBMIT_DIR=str(folder))
    return variables | dict(PATH=f"{folder}:{os.environ['PATH']}")


# srun of two tasks with --kill-on-bad-exit: the second is told, or killed.
TASKS = """
SLURM_PROCID=0 launch/job.sh bash -c 'sleep 0.5; exit {mistake}' & first=$!
GRACE_S={grace} SLURM_PROCID=1 launch/job.sh bash -c '{slow}' & second=$!
wait $first; kill -{signal} $second; wait $second
"""


@pytest.mark.parametrize("mistake", [1, 2])
@pytest.mark.parametrize("name, code", [("TERM", 143), ("KILL", 137)])
def test_slurm_does_not_queue_again_the_mistake_of_one_task(
    tmp_path, mistake, name, code
):
    """srun returns the highest code, which is that of a task that it stopped."""
    srun = TASKS.format(mistake=mistake, grace=5, slow="exec sleep 3", signal=name)
    variables = slurm(tmp_path, srun + f"(($? == {code})) && exit {code}; exit 99")
    done = shell("slurm.sbatch", *JOB, **variables)
    assert done.returncode == mistake and "requeue" not in done.stdout, done.stderr
    assert not list(tmp_path.glob("slurm-7.*"))


def test_slurm_tells_the_tasks_of_the_time_limit(tmp_path):
    """Slurm tells the batch script, which has the steps told and counts no failure."""
    (tmp_path / "slurm-7.failures").write_text("10\n")
    srun = f"echo $$ >{tmp_path}/pid; trap 'exit 143' TERM\n"
    srun += "echo ready; while true; do sleep 0.1; done"
    variables = slurm(tmp_path, srun)
    asked = f'echo "$@"; kill -TERM $(cat {tmp_path}/pid)'
    program(tmp_path / "scancel", f"#!/bin/bash\n{asked}\n")
    told = ["bash", str(LAUNCH / "slurm.sbatch"), *JOB]
    with subprocess.Popen(
        told, env=variables, stdout=subprocess.PIPE, text=True
    ) as job:
        assert job.stdout.readline() == "ready\n"
        job.send_signal(signal.SIGTERM)
        assert job.stdout.read() == "--signal=TERM 7\nrequeue 7\n"
        assert job.wait(10) == 143
    assert (tmp_path / "slurm-7.failures").read_text() == "10\n"


CLOUD = """#!/bin/bash
# The next line of the script is the answer to the question that it begins with.
echo "$4 ${*##*.tgz}" >>calls
[[ $4 == describe ]] && asked=state
[[ $4 == ssh && $* == *"echo running"* ]] && asked=job && echo "$*" >>asked
[[ ${asked:-} ]] || exit 0
read -r kind answer <script
sed -i 1d script
[[ $kind == "$asked" ]] || { echo "asked $asked, not $kind" >>wrong; exit 1; }
[[ $answer != absent ]] || { echo "NOT_FOUND" >&2; exit 1; }
[[ $answer != denied ]] || { echo "Permission denied (publickey)." >&2; exit 255; }
[[ $answer != *broken* ]] ||
  echo "##### Command execution on worker 1 failed with exit status 255." >&2
echo "WARNING: This command is using service account impersonation." >&2
echo "$answer" | tr "|" "\\n"
"""


def resume(folder, *answers):
    """The exit code of `resume`, and gcloud's verbs, where Google answers like this."""
    done, changes = resumed(folder, *answers)
    return done.returncode, changes


def resumed(folder, *answers, verb=("resume", *JOB)):
    program(folder / "gcloud", CLOUD)
    (folder / "script").write_text("\n".join(answers) + "\n")
    done = subprocess.run(
        ["bash", LAUNCH / "queued_resources.sh", *verb],
        env=QUEUED
        | KIND
        | V6E
        | dict(PATH=f"{folder}:{os.environ['PATH']}", POLL_S="0"),
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert not (folder / "wrong").exists() and not (folder / "script").read_text()
    calls = (folder / "calls").read_text().splitlines()
    changes = [
        c.split()[0] for c in calls if "describe" not in c and "echo running" not in c
    ]
    return done, changes


def test_resume_outlives_preemption(tmp_path):
    code, verbs = resume(
        tmp_path,
        "state absent",  # created
        "state WAITING_FOR_RESOURCES",
        *("state ACTIVE", "job none"),  # set up and started
        *("state ACTIVE", "job running"),
        "state SUSPENDED",  # deleted
        "state absent",  # created
        *("state ACTIVE", "job none"),  # set up and started
        *("state ACTIVE", "job exit 134"),  # a peer was lost: started again
        *("state ACTIVE", "job exit 3"),  # stuck: started again
        *("state ACTIVE", "job exit 143"),  # told to stop
        *("state ACTIVE", "job exit 0"),
    )
    start, again = ["scp", "ssh", "ssh", "ssh"], ["ssh", "ssh"]
    assert code == 0
    assert verbs == ["create", *start, "delete", "create", *start, *again * 3]


@pytest.mark.parametrize("code", [1, 2, 127])
def test_resume_ends_where_a_restart_does_not_help(tmp_path, code):
    assert resume(tmp_path, "state ACTIVE", f"job exit {code}") == (code, [])


@pytest.mark.parametrize(
    "jobs, verbs",
    [
        ("exit 0|exit 143", ["ssh", "ssh"]),  # a host other than the first is preempted
        ("exit 0|exit 0|exit 137", ["ssh", "ssh"]),
        ("exit 0|lost", ["ssh", "ssh"]),
        ("exit 0|none", ["scp", "ssh", "ssh", "ssh"]),
        ("exit 0|running", []),  # it still saves
        ("exit 0|broken", []),  # gcloud did not reach a host
        ("denied", []),
    ],
)
def test_resume_ends_where_all_hosts_are_done(tmp_path, jobs, verbs):
    """SIGTERM to one host stops all, and those that were not told exit with 0."""
    answers = ["state ACTIVE", f"job {jobs}", "state ACTIVE", "job exit 0|exit 0"]
    assert resume(tmp_path, *answers) == (0, verbs)
    questions = (tmp_path / "asked").read_text().splitlines()
    assert all("--node=all --worker=all" in question for question in questions)


def test_resume_ends_with_the_mistake_of_any_host(tmp_path):
    answers = ["state ACTIVE", "job exit 143|exit 137|exit 2|running|lost"]
    assert resume(tmp_path, *answers) == (2, [])


def test_resume_gives_up_where_ssh_never_works(tmp_path):
    done, verbs = resumed(tmp_path, *["state ACTIVE", "job denied"] * 10)
    assert done.returncode == 255 and verbs == []
    reason = "not reachable: Permission denied (publickey)."
    assert done.stderr.count(reason) == 10 and "giving up" in done.stderr


@pytest.mark.parametrize("verb", [("resume", *JOB), ("wait",)], ids=["resume", "wait"])
def test_states_are_printed_when_they_change(tmp_path, verb):
    states = ["WAITING_FOR_RESOURCES"] * 3 + ["PROVISIONING"] * 2 + ["ACTIVE"]
    answers = [f"state {state}" for state in states]
    answers += ["job exit 0"] if verb[0] == "resume" else []
    done, _ = resumed(tmp_path, *answers, verb=verb)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("is WAITING_FOR_RESOURCES") == 1
    assert done.stderr.count("is PROVISIONING") == 1


# GKE

RENDER = ["--name=sd3", "--image=registry/sd3:1"]
V5E = ["--accelerator=tpu-v5-lite-podslice", "--topology=16x16", "--slices=2"]
V5P = ["--accelerator=tpu-v5p-slice", "--topology=4x4x8", "--queue=ours"]
V6E_SPOT = ["--accelerator=tpu-v6e-slice", "--topology=4x8", "--spot"]
V6E_SPOT += ["--service-account=trainer", "--cache-dir=gs://ours/programs"]
TPU7X = ["--accelerator=tpu7x", "--topology=4x4x4", "--reservation=held", "--grace=60"]
TRICKY = "python -m sd3_jax.main train --config.sample.prompt=\"a: 'fox' $HOME\" # é"


def render(*flags, command=TRICKY, **variables):
    script = [sys.executable, LAUNCH / "gke" / "render.py", *RENDER]
    given = [f"--command={command}"] if isinstance(command, str) else command
    return subprocess.run(
        [*script, *flags, *given],
        env=os.environ | variables,
        capture_output=True,
        text=True,
    )


def manifest(*flags):
    done = render(*flags)
    assert done.returncode == 0, done.stderr
    return yaml.safe_load(done.stdout)


def closed(schema):
    """A schema that refuses unknown fields, as the API server's strict validation."""
    if isinstance(schema, dict):
        schema = {key: closed(value) for key, value in schema.items()}
        if isinstance(schema.get("properties"), dict) and "type" in schema:
            schema.setdefault("additionalProperties", False)
    return schema


@pytest.mark.parametrize("path", [SCHEMA, CRD], ids=["vendored", "published"])
def test_the_jobset_obeys_its_definition(path):
    if not path.exists():
        pytest.skip(f"no JobSet definition at {path}")
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    schema = yaml.load(path.read_text(), loader)
    if path == CRD:
        schemas = {v["name"]: v["schema"] for v in schema["spec"]["versions"]}
        schema = schemas["v1alpha2"]["openAPIV3Schema"]
    validator = jsonschema.Draft202012Validator(closed(schema))
    for flags in (V5E, V5P, V6E_SPOT, [*TPU7X, "--secret=sd3"]):
        made = manifest(*flags)
        assert made["apiVersion"] == "jobset.x-k8s.io/v1alpha2"
        validator.validate(made)
    made["spec"]["replicatedJobs"][0]["template"]["spec"]["paralelism"] = 1
    assert not validator.is_valid(made)


@pytest.mark.parametrize(
    "flags, slices, vms, generation", [(V5E, 2, 64, "v5e"), (V5P, 1, 32, "v5p")]
)
def test_the_jobset_has_a_pod_for_every_vm(flags, slices, vms, generation):
    made = manifest(*flags)
    (group,) = made["spec"]["replicatedJobs"]
    job = group["template"]["spec"]
    pod = job["template"]["spec"]
    (container,) = pod["containers"]
    assert group["replicas"] == slices
    assert job["parallelism"] == job["completions"] == vms
    assert container["resources"]["limits"] == {"google.com/tpu": 4}
    assert container["args"] == [TRICKY]
    env = {"TPU_GENERATION": generation, "GRACE_S": "300"}
    assert {x["name"]: x["value"] for x in container["env"]} == env
    assert pod["terminationGracePeriodSeconds"] == 315
    assert [port["containerPort"] for port in container["ports"]] == [8471, 8080]
    assert pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"] in flags[1]
    labels = {"kueue.x-k8s.io/queue-name": "ours"} if flags is V5P else None
    assert made["metadata"].get("labels") == labels


def outcome(made, code=None, condition=None):
    """What becomes of a JobSet whose pod fails: the published rules, played through.

    A Job takes the first podFailurePolicy rule that matches and, at a FailJob, fails
    with the reason PodFailurePolicy and the messages of Kubernetes' job controller.
    """
    (group,) = made["spec"]["replicatedJobs"]
    reason, message = "BackoffLimitExceeded", "Job has reached the backoff limit"
    for index, rule in enumerate(
        group["template"]["spec"]["podFailurePolicy"]["rules"]
    ):
        types = [c["type"] for c in rule.get("onPodConditions", [])]
        codes = rule.get("onExitCodes", {"operator": "In", "values": []})
        within = code in codes["values"]
        if condition in types:
            words = f"Pod default/sd3-0 has condition {condition}"
        elif code and within == (codes["operator"] == "In"):
            words = (
                f"Container sd3-jax for pod default/sd3-0 failed with exit code {code}"
            )
        else:
            continue
        assert rule["action"] == "FailJob"
        reason = "PodFailurePolicy"
        message = f"{words} matching FailJob rule at index {index}"
        break
    for rule in made["spec"]["failurePolicy"]["rules"]:
        patterns = rule.get("onJobFailureMessagePatterns", [""])
        if reason in rule["onJobFailureReasons"] and any(
            re.search(pattern, message) for pattern in patterns
        ):
            return rule["action"]
    return "RestartJobSet"  # JobSet's own, which maxRestarts bounds


@pytest.mark.parametrize(
    "pod, action",
    [
        (dict(code=1), "FailJobSet"),
        (dict(code=2), "FailJobSet"),
        (dict(code=127), "FailJobSet"),  # no such program
        (dict(code=3), "RestartJobSet"),
        (dict(code=134), "RestartJobSet"),  # jax's abort after a lost peer
        (dict(code=137), "RestartJobSet"),  # killed, for memory perhaps
        (dict(code=142), "RestartJobSet"),  # stuck, without the GIL
        (
            dict(code=143, condition="DisruptionTarget"),
            "RestartJobSetAndIgnoreMaxRestarts",
        ),
        (
            dict(code=137, condition="DisruptionTarget"),
            "RestartJobSetAndIgnoreMaxRestarts",
        ),
    ],
)
def test_an_exit_code_decides_over_the_restart(pod, action):
    made = manifest(*V5E)
    rules = made["spec"]["replicatedJobs"][0]["template"]["spec"]["podFailurePolicy"]
    (codes,) = [r["onExitCodes"] for r in rules["rules"] if "onExitCodes" in r]
    assert codes["values"] == RETRYABLE and codes["containerName"] == "sd3-jax"
    assert outcome(made, **pod) == action


def pod_of(made):
    return made["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]


def test_the_jobset_on_spot():
    """GKE leaves pods 15 of a Spot VM's 30 seconds, whatever is asked for."""
    train = "python -m sd3_jax.main train --config=configs/sd3_2b.py"
    done = render(*V6E_SPOT, command=train)
    pod = pod_of(yaml.safe_load(done.stdout))
    (container,) = pod["containers"]
    env = {x["name"]: x["value"] for x in container["env"]}
    assert env["GRACE_S"] == "15" and pod["terminationGracePeriodSeconds"] == 30
    assert env["JAX_COMPILATION_CACHE_DIR"] == "gs://ours/programs"
    assert pod["nodeSelector"]["cloud.google.com/gke-spot"] == "true"
    assert pod["tolerations"] == [{"key": "cloud.google.com/gke-spot", "value": "true"}]
    assert pod["serviceAccountName"] == "trainer"
    flag = "--config.checkpoint.every="
    assert container["args"] == [train.replace("train ", f"train {flag}200 ")]
    assert "15 s to save in; added" in done.stderr
    told = yaml.safe_load(render(*V6E_SPOT, command=f"{train} {flag}50").stdout)
    assert pod_of(told)["containers"][0]["args"] == [f"{train} {flag}50"]
    assert "add --config" in render(*V6E_SPOT, command="bash train.sh").stderr
    done = render(*V6E_SPOT, command=JOB, CHECKPOINT_EVERY="70")
    assert f"train {flag}70 --config=configs/sd3_2b.py" in done.stdout
    done = render(*V6E_SPOT, command=PREFLIGHT)
    assert flag not in done.stdout + done.stderr


def test_the_jobset_takes_variables_from_a_secret_by_its_name():
    done = render(*V5E, "--secret=sd3", **SECRETS)
    (container,) = pod_of(yaml.safe_load(done.stdout))["containers"]
    assert container["envFrom"] == [{"secretRef": {"name": "sd3"}}]
    assert "hf_1234" not in done.stdout + done.stderr
    (container,) = pod_of(manifest(*V5E))["containers"]
    assert "envFrom" not in container


def test_the_jobset_of_a_job():
    """JOB and its flags come last, as with the other launchers; each word survives."""
    args = lambda *words: pod_of(yaml.safe_load(render(*V5E, command=words).stdout))[
        "containers"
    ][0]["args"]
    main = "python -m sd3_jax.main train --config=configs/sd3_2b.py"
    assert args(*JOB) == [f"{main} '--config.sample.prompt=a red fox'"]
    assert args(*JOB[:2], "--dry-run") == [main]
    flags = " ".join(PREFLIGHT[1:])
    assert args(*PREFLIGHT) == [f"python launch/preflight.py {flags}"]
    told = f"--command=python launch/preflight.py {flags}"
    assert args(told) == [f"python launch/preflight.py {flags}"]


@pytest.mark.parametrize(
    "command, message",
    [
        (["trian", *JOB[1:]], "unknown job trian: expected one of train, sample"),
        ("python -m sd3_jax.main trian", "unknown job trian"),
        ([*JOB, "--workdir="], "--workdir= is empty: expected gs://"),
        ("sd3-jax train --workdir='' --config=x", "--workdir= is empty"),
        ([], "expected JOB and its flags, or --command"),
        (["--command=true", *JOB], "not both"),
    ],
)
def test_render_refuses_a_job_that_cannot_be(command, message):
    done = render(*V5E, command=command)
    assert done.returncode == 2 and message in done.stderr and done.stdout == ""


def test_the_jobset_on_a_reservation():
    pod = pod_of(manifest(*TPU7X))
    assert pod["terminationGracePeriodSeconds"] == 75
    assert pod["nodeSelector"] == {
        "cloud.google.com/gke-tpu-accelerator": "tpu7x",
        "cloud.google.com/gke-tpu-topology": "4x4x4",
        "cloud.google.com/reservation-name": "held",
        "cloud.google.com/reservation-affinity": "specific",
    }


@pytest.mark.parametrize(
    "flags, flag",
    [
        ([*V5E, "--topology=4x4x4"], "a slice of v5e has 2 axes"),
        ([*V5P, "--topology=16x16"], "a slice of v5p has 3 axes"),
        ([*TPU7X, "--chips-per-vm=8"], "tpu7x-standard-1t, tpu7x-standard-4t"),
        ([*V5E, "--chips-per-vm=8"], "in a multi-host slice, each VM has four"),
        ([*V6E_SPOT, "--grace=60"], "--grace 60: expected 1 or more, at most 15"),
        ([*V6E_SPOT, "--reservation=held"], "not allowed with argument --spot"),
        ([*V5E, "--topology=15x15"], "--topology 15x15: expected one of 1x1, 2x2"),
        ([*V5E, "--topology=6x6"], "--topology 6x6: expected one of 1x1, 2x2, 2x4"),
        ([*V5P, "--topology=4x8x4"], "4x4x4, or multiples of 4 in ascending order"),
        ([*V5E, "--topology=1x1"], "--chips-per-vm 4 does not divide 1x1's 1"),
        ([*V5E, "--max-restarts=-1"], "--max-restarts -1: expected 0 or more"),
        ([*V5E, "--retry=5-3"], "--retry 5-3: 5-3: expected codes from 1 to 255"),
        ([*V5E, "--retry=3,300"], "--retry 3,300: 300: expected codes from 1 to 255"),
        ([*V5E, "--retry=0"], "--retry 0: 0: expected codes from 1 to 255"),
        ([*V5E, "--chips-per-vm=3"], "ct5lp-hightpu-1t, ct5lp-hightpu-4t"),
        ([*V5E, "--topology=16by16"], "--topology 16by16"),
        ([*V5E, "--name=SD3"], "--name SD3"),
        ([*V5E, "--retry=many"], "--retry many"),
        ([*V5E, "--accelerator=tpu-v9"], "--accelerator"),
    ],
)
def test_render_names_a_wrong_flag(flags, flag):
    done = render(*flags)
    assert done.returncode == 2 and flag in done.stderr and done.stdout == ""


def test_images_hold_what_they_copy_and_what_runs():
    for name, extra in (("tpu", "tpu"), ("gpu", "cuda,gcs")):
        text = (LAUNCH / f"Dockerfile.{name}").read_text()
        copied = [line.split()[1:-1] for line in text.splitlines() if "COPY" in line]
        assert all((ROOT / path).exists() for paths in copied for path in paths)
        assert f'".[{extra}${{EXTRAS:+,$EXTRAS}}]"' in text and 'ARG EXTRAS=""' in text
        entry = text.partition("ENTRYPOINT ")[2]
        assert json.loads(entry) == ["python", "-m", "sd3_jax.main"]


def test_images_and_tpu_hosts_have_gcsfs_and_the_planned_libtpu(monkeypatch):
    extras = {}
    monkeypatch.setattr("setuptools.setup", lambda **about: extras.update(about))
    runpy.run_path(str(ROOT / "setup.py"))
    needs, extras = extras["install_requires"], extras["extras_require"]
    assert "jax>=0.10.1" in needs
    for name in ("tpu", "gcs"):
        assert any(need.startswith("gcsfs") for need in extras[name])
    lines = (ROOT / "docs/how-to/launch.md").read_text().splitlines()
    rows = [line.split("|")[1] for line in lines if line.startswith("| `")]
    assert set(extras) <= set(re.findall("`([a-z]+)`", " ".join(rows)))
    assert set(extras["plan"]) <= set(extras["tpu"])
    # jax[tpu] pins a libtpu, older than the one that plan compiles with.
    assert not any("jax[tpu]" in need for need in extras["tpu"])
    assert "-e '.[tpu${EXTRAS:+,$EXTRAS}]'" in (LAUNCH / "common.sh").read_text()
    for image in LAUNCH.glob("Dockerfile.*"):  # setup.py reads the first of these
        assert "COPY setup.py pyproject.toml README.md LICENSE ./" in image.read_text()


# Flags

COMPILE = """
import sys
import jax, jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec
topology = topologies.get_topology_desc(platform="tpu", topology_name=sys.argv[1])
over = NamedSharding(Mesh(topology.devices, "x"), PartitionSpec("x"))
x = jax.ShapeDtypeStruct((2048, 2048), jnp.bfloat16, sharding=over)
jax.jit(lambda x, w: x @ w, out_shardings=over).lower(x, x).compile()  # all-gathers w
"""
TOPOLOGIES = {
    "v5e": "v5e:2x2",
    "v5p": "v5:2x2x1",
    "v6e": "v6e:2x2",
    "tpu7x": "tpu7x:2x2x1",
}


def compiles(generation, flags):
    told = dict(JAX_PLATFORMS="cpu", TPU_SKIP_MDS_QUERY="1", LIBTPU_INIT_ARGS=flags)
    told |= dict(ALLOW_MULTIPLE_LIBTPU_LOAD="1", JAX_COMPILATION_CACHE_DIR="")
    told |= dict(XLA_FLAGS="")  # libtpu ends where one is for CPUs
    return subprocess.run(
        [sys.executable, "-c", COMPILE, TOPOLOGIES[generation]],
        env=os.environ | told,
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.mark.parametrize("generation", TOPOLOGIES)
def test_libtpu_accepts_the_flags(generation):
    if importlib.util.find_spec("libtpu") is None:
        pytest.skip("libtpu is not installed")
    files = sorted((LAUNCH / "flags").glob(f"{generation}*.env"))  # of jobs as well
    told = "; ".join([*(f". {file}" for file in files), "echo $LIBTPU_INIT_ARGS"])
    flags = subprocess.check_output(["bash", "-euc", told], text=True).strip()
    assert flags.count("--xla") == len(flags.split()) > 5
    done = compiles(generation, flags)
    assert done.returncode == 0, done.stderr[-2000:]


def test_libtpu_refuses_an_unknown_flag():
    """Or the test above shows nothing."""
    if importlib.util.find_spec("libtpu") is None:
        pytest.skip("libtpu is not installed")
    done = compiles("v5e", "--xla_tpu_no_such_flag=true")
    assert done.returncode != 0 and "no_such_flag" in done.stderr


# Two processes

TINY = "--config=configs/quickstart.py:tiny"
QUICK = " ".join(  # compilation is most of the time
    [
        os.environ.get("XLA_FLAGS", ""),
        "--xla_backend_optimization_level=0",
        "--xla_llvm_disable_expensive_passes=true",
    ]
)


def left(mark) -> list[str]:
    """Processes with this in their command line."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = path.read_bytes().decode(errors="replace")
        except OSError:  # it ended meanwhile
            continue
        if str(mark) in words:
            found.append(words)
    return found


def test_two_processes_train_and_none_is_left(tmp_path):
    flags = [TINY, f"--workdir={tmp_path}", "--config.train.steps=3"]
    flags += ["--config.model.depth=1", "--config.mesh.fsdp=1"]
    flags += ["--config.mesh.data=8"]  # refused unless there are eight devices
    variables = dict(PYTHON=sys.executable, XLA_FLAGS=QUICK)
    done = shell("local_two_process.sh", *flags, **variables, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    rows = [row for row in metrics.read(tmp_path) if row["kind"] == "train"]
    assert [row["step"] for row in rows] == [1, 2, 3]
    assert not left(tmp_path)


ONE_FAILS = """
import os, sys, time
time.sleep(0.5)
sys.exit(7) if os.environ["SD3_PROCESS_ID"] == "1" else time.sleep(60)
"""


def test_when_one_of_two_fails_the_other_is_killed(tmp_path):
    python = tmp_path / "python"
    program(python, f"#!{sys.executable}\n{ONE_FAILS}")
    begin = time.monotonic()
    done = shell("local_two_process.sh", PYTHON=str(python), PORT="5")
    assert done.returncode == 7 and time.monotonic() - begin < 20
    assert not left(python)


# Preflight


def test_preflight_passes_on_two_hosts(tmp_path):
    told = [LAUNCH / "preflight.py", TINY, f"--workdir={tmp_path}"]
    first, second = multiprocess.run([*told, "--config.mesh.fsdp=8"])
    assert first.returncode == second.returncode == 0, first.stdout + first.stderr
    lines = [line for line in first.stdout.splitlines() if line.startswith("ok ")]
    assert [line.split()[1] for line in lines] == [*preflight().CHECKS]
    assert not list(tmp_path.iterdir())


def test_preflight_fails_on_one_host_with_the_line(tmp_path):
    told = [sys.executable, LAUNCH / "preflight.py", TINY, f"--workdir={tmp_path}"]
    done = subprocess.run(
        [*told, "--config.mesh.data=3"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 1
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("FAIL")]
    assert "mesh" in line and "3 does not divide" in line


@pytest.mark.parametrize(
    "order, mesh",
    [
        ("v5p-16", ["fsdp=8"]),
        ("v5p-16", ["fsdp=4", "tensor=2"]),  # each row is on both hosts
        # Four processes each. Some rows are on two hosts:
        pytest.param("v5e-16", ["fsdp=8", "context=2"], marks=pytest.mark.slow),
        pytest.param("2xv5e-16", ["data=2", "fsdp=4"], marks=pytest.mark.slow),
    ],
)
def test_preflight_passes_where_hosts_are_interleaved(tmp_path, order, mesh):
    lines = preflight_in(order, tmp_path, mesh)
    assert "ok    rows      each device gets those of its shard" in lines


def test_preflight_fails_where_a_host_loads_other_rows(tmp_path):
    """As far as the last one from the first one on, which was once thought right."""
    lines = preflight_in("v5p-16, contiguous", tmp_path, ["fsdp=8"], code=1)
    (line,) = [line for line in lines if line.startswith("FAIL")]
    assert "rows" in line and "Invalid host data" in line and "on host 0" in line


def test_preflight_help_lists_its_checks(capsys):
    assert preflight().run(["train", "--help"]) == 0
    page = capsys.readouterr().out
    assert re.findall(r"^    (\w+)  ", page, re.MULTILINE) == [*preflight().CHECKS]


def preflight_in(order, workdir, mesh, code=0):
    flags = [TINY, f"--workdir={workdir}", "--config.data.batch_size=16"]
    flags += [f"--config.mesh.{size}" for size in mesh]
    jobs = json.dumps([[str(LAUNCH / "preflight.py"), *flags]])
    processes, devices = device_orders.HOSTS[order.partition(",")[0]]
    results = multiprocess.run(
        ["tests/device_orders.py", order, jobs], processes=processes, devices=devices
    )
    for result in results:
        assert result.returncode == code, result.stdout + result.stderr[-2000:]
    return results[0].stdout.splitlines()


def test_preflight_looks_at_the_rows_of_every_device(monkeypatch):
    check, config = preflight().misplaced_rows, quickstart.get_config("tiny")
    assert check(config) == ""
    monkeypatch.setattr(sharding, "local_rows", lambda mesh, n: np.arange(n)[::-1])
    assert check(config) == "device 0 holds [7], not [0]"


def preflight():
    path = LAUNCH / "preflight.py"
    spec = importlib.util.spec_from_file_location("preflight", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    "name, told",
    [
        ("devices", dict(devices=3)),
        ("mesh", dict(mesh="config.mesh does not fit")),
        ("rows", dict(rows="device 5 holds [1], not [2]")),
        ("code", dict(code="other")),
        ("config", dict(config="other")),
        ("versions", dict(versions="jax 0.1")),
        ("flags", dict(flags="other")),
        ("workdir", dict(workdir="not writable")),
        ("clocks", dict(clock=31.0)),
        ("space", dict(free=4)),
    ],
)
def test_preflight_tells_of_the_odd_host(name, told):
    good = dict(host="a", index=0, devices=4, kind="TPU", mesh="", rows="", code="c")
    good |= dict(config="d", versions="jax 0.2", flags="e", workdir="")
    good |= dict(free=9, need=5, clock=0.0)
    checks = preflight().CHECKS
    odd = good | told | dict(index=1)
    wrong = {key for key, check in checks.items() if check([good, odd])[0]}
    assert wrong == {name}
    assert not any(check([good, good])[0] for check in checks.values())
    assert checks["rows"]([odd | dict(rows=""), good])[0]  # gathered in another order
