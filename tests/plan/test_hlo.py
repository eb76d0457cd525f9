"""Collectives read off compiled programs, by hand and as libtpu writes them."""

import importlib.util
import os
import subprocess
import sys

import pytest

from sd3_jax.plan import hlo

MESH = {"data": 2, "fsdp": 4, "context": 1, "tensor": 1}
TEXT = """HloModule jit_step, num_partitions=8

%region_0.1 (a.1: f32[], b.1: f32[]) -> f32[] {
  %a.1 = f32[] parameter(0)
  %b.1 = f32[] parameter(1)
  ROOT %add.1 = f32[] add(%a.1, %b.1)
}

%all-reduce-scatter.3 (p.3: f32[1024]) -> f32[256] {
  %p.3 = f32[1024]{0:T(1024)} parameter(0)
  %all-reduce.4 = f32[1024]{0:T(1024)} all-reduce(%p.3), channel_id=4, replica_groups=[2,4]<=[8], to_apply=%region_0.1
  ROOT %slice.4 = f32[256]{0} dynamic-slice(%all-reduce.4), dynamic_slice_sizes={256}
}

%body.5 (w.5: (s32[], bf16[64,32])) -> (s32[], bf16[64,32]) {
  %w.5 = (s32[], /*index=1*/bf16[64,32]{1,0}) parameter(0)
  %i.5 = s32[] get-tuple-element(%w.5), index=0
  %x.5 = bf16[64,32]{1,0} get-tuple-element(%w.5), index=1
  %two.5 = s32[] constant(2)
  %next.5 = s32[] add(%i.5, %two.5)
  %gather.5 = bf16[64,32]{1,0} all-gather(%x.5), channel_id=5, replica_groups={{0,1,2,3},{4,5,6,7}}, dimensions={0}, metadata={op_name="jit(step)/blocks/qkv"}
  %hop.5 = (bf16[64,32]{1,0}, bf16[64,32]{1,0}, u32[], u32[]) collective-permute-start(%gather.5), channel_id=6, source_target_pairs={{0,4},{4,0},{1,5},{5,1},{2,6},{6,2},{3,7},{7,3}}
  %done.5 = bf16[64,32]{1,0} collective-permute-done(%hop.5)
  ROOT %out.5 = (s32[], bf16[64,32]{1,0}) tuple(%next.5, %done.5)
}

%cond.5 (w.6: (s32[], bf16[64,32])) -> pred[] {
  %w.6 = (s32[], bf16[64,32]{1,0}) parameter(0)
  %i.6 = s32[] get-tuple-element(%w.6), index=0
  %end.6 = s32[] constant(10)
  ROOT %less.6 = pred[] compare(%i.6, %end.6), direction=LT
}

ENTRY %main.9 (p.9: bf16[64,32], g.9: f32[1024]) -> f32[256] {
  %p.9 = bf16[64,32]{1,0} parameter(0)
  %g.9 = f32[1024]{0} parameter(1)
  %loop.9 = (s32[], bf16[64,32]{1,0}) while(%t.9), condition=%cond.5, body=%body.5
  %kernel.9 = bf16[64,32]{1,0} custom-call(%p.9), backend_config={"config":
"xprof_metadata":"{}"
}}, metadata={op_name="kernel"}
  %sum.9 = f32[1024]{0} all-reduce(%g.9), channel_id=7, replica_groups=mesh['data'=2,'fsdp'=4] {'data','fsdp'}, to_apply=%region_0.1
  ROOT %part.9 = f32[256]{0} fusion(%sum.9), kind=kCustom, calls=%all-reduce-scatter.3
}
"""  # noqa: E501


def test_kinds_axes_bytes_and_turns():
    found = {x.kind: x for x in hlo.collectives(TEXT, MESH)}
    gather = found["all-gather"]
    assert (gather.axes, gather.count) == (("fsdp",), 5)  # 10 by twos
    assert gather.wire == 64 * 32 * 2 * 3 / 4 and gather.source.endswith("qkv")
    assert not gather.asynchronous
    hop = found["collective-permute"]
    assert (hop.axes, hop.count, hop.wire) == (("data",), 5, 64 * 32 * 2)
    assert hop.asynchronous
    whole = found["all-reduce"]
    assert (whole.axes, whole.count) == (("data", "fsdp"), 1)
    assert whole.wire == 2 * 4096 * 7 / 8
    scatter = found["reduce-scatter"]
    assert (scatter.axes, scatter.wire) == (("fsdp",), 4096 * 3 / 4)


@pytest.mark.parametrize(
    "told, axes",
    [
        ("replica_groups=[4,2]<=[2,4]T(1,0)", ("data",)),
        ("replica_groups=[1,8]<=[8]", ("data", "fsdp")),
        ("replica_groups=mesh['a'=2,'b'=4] {'b'}", ("fsdp",)),
        ("replica_groups=mesh['a'=2,'b'=4] {'a'}", ("data",)),
        ("replica_groups={{0,4},{1,5},{2,6},{3,7}}", ("data",)),
    ],
)
def test_every_way_that_groups_are_told(told, axes):
    text = TEXT.replace("replica_groups={{0,1,2,3},{4,5,6,7}}", told)
    gather = next(x for x in hlo.collectives(text, MESH) if x.kind == "all-gather")
    assert gather.axes == axes


CODE = """
import jax, jax.numpy as jnp, numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
devices = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2").devices
mesh = Mesh(np.array(devices).reshape(1, 4, 1, 1), ("data", "fsdp", "context", "tensor"))
def step(w, x):
    return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, w)[0]
w = jax.ShapeDtypeStruct((6, 512, 512), "bfloat16", sharding=NamedSharding(mesh, P(None, "fsdp")))
x = jax.ShapeDtypeStruct((4096, 512), "bfloat16", sharding=NamedSharding(mesh, P("fsdp")))
print(jax.jit(step).lower(w, x).compile().as_text())
"""  # noqa: E501


def test_a_program_that_libtpu_compiled():
    """Six layers' weights are gathered, in rings or at once, each once."""
    if importlib.util.find_spec("libtpu") is None:
        pytest.skip("libtpu is not installed")
    env = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "TPU_SKIP_MDS_QUERY": "1",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    }
    run = [sys.executable, "-c", CODE]
    done = subprocess.run(run, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    mesh = {"data": 1, "fsdp": 4, "context": 1, "tensor": 1}
    found = hlo.collectives(done.stdout, mesh)
    sent = sum(x.total for x in found)
    once = 6 * 512 * 512 * 2 * 3 / 4
    assert once <= sent <= 1.4 * once
    assert {x.axes for x in found} == {("fsdp",)}
