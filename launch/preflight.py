"""Check every host before a job starts: one line per check, exit code 1 if one fails.

    python launch/preflight.py [train] --config=configs/sd3_2b.py --workdir=gs://…

Takes the flags of `train`. Start it on all hosts, as the launchers do:
`launch/tpu_vm.sh preflight …`. Every host sends its facts to all, and all judge the
same list.

    devices   each host has as many
    mesh      config.mesh fits the devices, the batch and every weight
    rows      each device gets the rows of the batch that its shard holds
    code      the sources are the same
    config    the settings and the workdir are the same
    versions  Python, JAX, libtpu and the other packages are the same
    flags     LIBTPU_INIT_ARGS, XLA_FLAGS and JAX_ENABLE_X64 are the same
    workdir   all write to one folder
    clocks    at most 30 s apart
    space     the disk has room for the checkpoints
"""

import hashlib
import importlib.metadata
import json
import os
import platform
import shutil
import socket
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np
from etils import epath
from jax.experimental import multihost_utils
from ml_collections import ConfigDict

import sd3_jax
from sd3_jax import main
from sd3_jax.assembly import model_parts
from sd3_jax.config import command_line
from sd3_jax.distributed import processes, sharding
from sd3_jax.errors import UserError
from sd3_jax.training import optimizer
from sd3_jax.training.run_checks import require_trainable_dtype
from sd3_jax.training.state import abstract_state

CLOCKS = 30.0  # seconds between hosts
PACKAGES = ("jax", "jaxlib", "libtpu", "flax", "optax", "orbax-checkpoint", "grain")
FLAGS = ("LIBTPU_INIT_ARGS", "XLA_FLAGS", "JAX_ENABLE_X64")  # each changes the program
SIZE = 4096  # bytes of a host's facts


def run(argv: Sequence[str]) -> int:
    if {"-h", "--help"} & set(argv):
        print(__doc__, end="")
        return 0
    try:
        job = [] if argv[:1] == ["train"] else ["train"]
        _, config, workdir = command_line.parse([*job, *argv])
        main.join_processes()
    except UserError as error:
        print("preflight: error:", *str(error).split(), file=sys.stderr)
        return 2
    hosts = gather(facts(config, epath.Path(workdir)))
    failed = False
    for name, check in CHECKS.items():
        wrong, detail = check(hosts)
        failed = failed or wrong
        if hosts[0]["here"]:
            print(f"{'FAIL' if wrong else 'ok':4}  {name:9} {detail}", flush=True)
    return int(failed)


# A host's facts


def facts(config: ConfigDict, workdir: epath.Path) -> dict:
    flags = " ".join(f"{name}={os.environ.get(name, '')}" for name in FLAGS)
    mesh, need = plan(config)
    told = dict(
        host=socket.gethostname()[:64],
        devices=len(jax.local_devices()),
        kind=jax.devices()[0].device_kind,
        index=jax.process_index(),
        mesh=mesh,
        rows="" if mesh else misplaced_rows(config),
        code=sources(),
        config=digest(config.to_json_best_effort(sort_keys=True) + str(workdir)),
        versions=versions(),
        flags=digest(flags),
        workdir=place(workdir),
        free=free(workdir),
        need=need - held(model_parts.checkpoints(workdir)),
    )
    processes.meet("the clocks")  # so that all read theirs at once
    return told | dict(clock=time.time())


def plan(config: ConfigDict) -> tuple[str, int]:
    """What does not fit the mesh, and the bytes of all checkpoints that are kept."""
    try:
        require_trainable_dtype(config)
        mesh = sharding.make_mesh(**config.mesh)
        sharding.local_rows(mesh, config.data.batch_size)
        optim = config.optim.to_dict()
        del optim["accumulate"]
        tx, _ = optimizer.make(**optim, steps=config.train.steps)
        init = model_parts.build_parts(config).objective.init
        state = abstract_state(jax.random.key(0), init, tx, mesh)
    except UserError as error:
        return " ".join(str(error).split())[:1000], 0
    one = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state))
    return "", one * (
        config.checkpoint.keep + 1
    )  # one is written before one is deleted


def misplaced_rows(config: ConfigDict) -> str:
    """Which of this host's devices gets other rows of a batch than its shard's.

    The numbers of the rows are loaded and placed as a batch of training is.
    """
    mesh, size = sharding.make_mesh(**config.mesh), config.data.batch_size
    try:
        mine = sharding.local_rows(mesh, size)
        batch = sharding.put({"row": mine.astype(np.int32)}, mesh, size)
    except ValueError as error:  # jax counts the rows
        return " ".join(str(error).split())[:300]
    for shard in batch["row"].addressable_shards:
        wanted, placed = np.arange(size)[shard.index], np.asarray(shard.data)
        if not np.array_equal(placed, wanted):
            return f"device {shard.device.id} holds {placed}, not {wanted}"[:300]
    return ""


def sources() -> str:
    """A hash of the sources that run: no host need have git."""
    root = Path(sd3_jax.__file__).parents[1]
    paths = [p for top in ("sd3_jax", "configs") for p in (root / top).rglob("*.py")]
    named = {str(p.relative_to(root)): digest(p.read_bytes()) for p in paths}
    return digest(json.dumps(named, sort_keys=True))


def digest(text: str | bytes) -> str:
    text = text.encode() if isinstance(text, str) else text
    return hashlib.sha256(text).hexdigest()[:12]


def versions() -> str:
    found = [f"python {platform.python_version()}"]
    for name in PACKAGES:
        try:
            found.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            continue  # libtpu, on what is no TPU
    return ", ".join(found)


def place(workdir: epath.Path) -> str:
    """What is wrong with workdir here; nothing, if all hosts write to one."""
    mark = lambda index: workdir / f".preflight-{index}"
    mine, wrong = mark(jax.process_index()), ""
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        mine.write_text("written")
    except Exception as error:  # of whichever file system
        wrong = f"not writable: {type(error).__name__}"
    processes.meet("the marks are written")
    if not wrong and not mark(0).exists():
        wrong = "not shared: process 0's file is not there"
    processes.meet("the marks are seen")
    if mine.exists():
        mine.unlink()
    return wrong


def free(workdir: epath.Path) -> int | None:
    """Bytes; None for an object store, and where there is no workdir."""
    local = Path(os.fspath(workdir))
    return shutil.disk_usage(local).free if local.is_dir() else None


def held(checkpoints: epath.Path) -> int:
    """Bytes of earlier ones, which make room for those to come."""
    local = Path(os.fspath(checkpoints))
    return sum(path.stat().st_size for path in local.rglob("*") if path.is_file())


def gather(told: dict) -> list[dict]:
    """Every host's facts, in the order in which devices are gathered."""
    text = json.dumps(told).encode()
    if len(text) > SIZE:
        raise ValueError(f"a host's facts are {len(text)} bytes, more than {SIZE}")
    mine = np.frombuffer(text.ljust(SIZE), np.uint8)
    rows = np.asarray(multihost_utils.process_allgather(mine)).reshape(-1, SIZE)
    hosts = [json.loads(row.tobytes()) for row in rows]
    for host in hosts:
        host |= dict(here=jax.process_index() == host["index"])
    return hosts


# Judgements of all hosts' facts: (wrong, detail)


def devices(hosts):
    counts = {host["devices"] for host in hosts}
    total = sum(host["devices"] for host in hosts)
    detail = f"{total} {hosts[0]['kind']} on {len(hosts)} hosts"
    odd = [h for h in hosts if h["devices"] != hosts[0]["devices"]]
    return len(counts) > 1, detail + "".join(
        f"; {h['devices']} on {at(h)}" for h in odd
    )


def mesh(hosts):
    wrong = next((host["mesh"] for host in hosts if host["mesh"]), "")
    return bool(wrong), wrong or "fits the devices, the batch and every weight"


def rows(hosts):
    order = [host["index"] for host in hosts]
    if order != sorted(order):  # evaluations gather by process
        return True, f"arrays of hosts are gathered in the order {order}"
    if any(host["mesh"] for host in hosts):
        return False, "not checked: the mesh does not fit"
    bad = [f"{host['rows']} on {at(host)}" for host in hosts if host["rows"]]
    return bool(bad), "; ".join(bad[:3]) or "each device gets those of its shard"


def equal(key):
    def check(hosts):
        odd = [host for host in hosts if host[key] != hosts[0][key]]
        others = "".join(f"; {host[key]} on {at(host)}" for host in odd[:3])
        return bool(odd), hosts[0][key] + others

    return check


def workdir(hosts):
    bad = [f"{host['workdir']} on {at(host)}" for host in hosts if host["workdir"]]
    return bool(bad), "; ".join(bad[:3]) or "one for all, and writable"


def clocks(hosts):
    first, last = (pick(hosts, key=lambda h: h["clock"]) for pick in (min, max))
    apart = last["clock"] - first["clock"]
    ends = f": {at(first)} is behind {at(last)}" if apart > CLOCKS else ""
    return apart > CLOCKS, f"{apart:.1f} s apart, {CLOCKS:.0f} allowed{ends}"


def space(hosts):
    known = [host for host in hosts if host["free"] is not None]
    if not known:
        return False, "no local disk to measure"
    least = min(known, key=lambda host: host["free"])
    need = max(0, least["need"])
    detail = f"{least['free'] / 1e9:.1f} GB free, {need / 1e9:.1f} for checkpoints"
    return least["free"] < need, f"{detail} on {at(least)}"


def at(host):
    return f"host {host['index']} ({host['host']})"


CHECKS = {
    "devices": devices,
    "mesh": mesh,
    "rows": rows,
    "code": equal("code"),
    "config": equal("config"),
    "versions": equal("versions"),
    "flags": equal("flags"),
    "workdir": workdir,
    "clocks": clocks,
    "space": space,
}


if __name__ == "__main__":
    code = run(sys.argv[1:])
    sys.stdout.flush()
    os._exit(code)  # at exit jax waits for its peers, as in sd3_jax.main
