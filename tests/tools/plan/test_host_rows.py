"""Rows of a batch by host, on the real device order of every slice: no compilation."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import device_orders
import pytest

ROOT = Path(__file__).parents[3]
MESHES = (
    dict(),
    dict(data=2),
    dict(context=2),
    dict(tensor=2),
    dict(data=2, context=2, tensor=2),
)
# Fails at the first host, mesh and slice that is wrong; prints the slices' orders.
CODE = """
import collections, json, sys
import numpy as np
from sd3_jax.distributed import sharding
from sd3_jax.tools.plan import aot, slices

aot.prepare()
meshes, orders = json.loads(sys.argv[1]), {}
names = [
    f"{kind}-{chips * one.named}"
    for kind, one in slices.GENERATIONS.items()
    for chips in (slices.FLAT if one.dims == 2 else slices.SOLID)
]
names += "2xv5e-16 2xv5e-256 4xv6e-256 2xv5p-128 4xtpu7x-64".split()
count = interleaved = 0
for name in names:
    one = slices.find(name)
    devices = aot.devices(one)
    hosts = [device.process_index for device in devices]
    assert hosts == sorted(hosts), f"{name}: process_allgather wants hosts in order"
    for sizes in meshes:
        sizes = sizes | {"data": one.slices * sizes.get("data", 1)}
        if len(devices) % int(np.prod([*sizes.values()])):
            continue
        mesh = sharding.make_mesh(**sizes, devices=devices)
        size = 3 * sharding.batch_shards(mesh)
        wanted = collections.defaultdict(set)
        # By the definition of the mesh: rows go over data, then over fsdp.
        shards = mesh.devices.reshape(sharding.batch_shards(mesh), -1)
        for shard, replicas in enumerate(shards):
            for device in replicas:
                wanted[device.process_index] |= {3 * shard + i for i in range(3)}
        crossed = any(len({d.process_index for d in row}) > 1 for row in shards)
        rows = {}
        for host in sorted({*hosts}):
            rows[host] = sharding.local_rows(mesh, size, process=host)
            assert rows[host].tolist() == sorted(wanted[host]), (name, sizes, host)
        every = np.concatenate([*rows.values()])
        assert {*every.tolist()} == {*range(size)}, (name, sizes)
        assert crossed or len(every) == size, (name, sizes)
        count += 1
        interleaved += any(np.any(np.diff(x) != 1) for x in rows.values())
    if name in ("v5p-16", "v5e-16", "2xv5e-16"):
        mesh = sharding.make_mesh(data=one.slices, devices=devices)
        orders[name] = [devices.index(device) for device in mesh.devices.flat]
print(json.dumps([count, interleaved, orders]))
"""


@pytest.fixture(scope="module")
def orders():
    if importlib.util.find_spec("libtpu") is None:
        pytest.skip("libtpu is not installed")
    args = [sys.executable, "-c", CODE, json.dumps(MESHES)]
    done = subprocess.run(args, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    count, interleaved, orders = json.loads(done.stdout.splitlines()[-1])
    assert count > 150 and interleaved > 50  # else nothing was tested
    return orders


def test_each_host_loads_the_rows_of_its_devices(orders):
    assert len(orders) == 3


def test_the_cpu_tests_have_the_order_of_the_real_slices(orders):
    ours = device_orders.ORDERS
    assert ours["v5p-16"] == orders["v5p-16"] and ours["v5e-16"] == orders["v5e-16"]
    real = [(i // 16, i // 4 % 2) for i in orders["2xv5e-16"][::4]]  # slice, host
    assert [(i // 4, i // 2 % 2) for i in ours["2xv5e-16"]] == real
