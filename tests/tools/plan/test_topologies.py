"""Meshes over slices that are not there: libtpu describes them, nothing is compiled."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

CODE = """
from sd3_jax.distributed import sharding
from sd3_jax.errors import UserError
from sd3_jax.tools.plan import aot, slices

aot.prepare()
two = aot.devices(slices.find("2xv5e-16"))
mesh = sharding.make_mesh(data=4, devices=two)
assert dict(mesh.shape) == dict(data=4, fsdp=8, context=1, tensor=1)
rows = [{d.slice_index for d in row.flat} for row in mesh.devices]
assert rows == [{0}, {0}, {1}, {1}], rows  # data alone crosses
try:
    sharding.make_mesh(data=1, devices=two)
except UserError as error:
    print(error)

solid = aot.devices(slices.find("v5p-128"))
assert sharding.make_mesh(data=2, devices=solid).shape["fsdp"] == 32  # of 4 x 4 x 4
# Two squares of four chips, and eight in a ring: each hop is to a neighbour.
eight = aot.devices(slices.find("v6e-8"))
for sizes in dict(data=2, context=4), dict(data=1, context=8):
    ring = sharding.make_mesh(fsdp=1, **sizes, devices=eight).devices
    apart = sharding.distances(ring)
    assert sum(apart[i, i - 1] for i in range(len(apart))) == 8, sizes
flat = aot.devices(slices.find("v6e-256"))
assert sharding.make_mesh(data=2, devices=flat).shape["fsdp"] == 128  # of 16 x 16
"""


def test_meshes_of_many_shapes():
    if importlib.util.find_spec("libtpu") is None:
        pytest.skip("libtpu is not installed")
    run = [sys.executable, "-c", CODE]
    root = Path(__file__).parents[3]
    done = subprocess.run(run, cwd=root, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "config.mesh.data = 1" in done.stdout and "multiple of 2" in done.stdout
