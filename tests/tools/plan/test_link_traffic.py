"""Collectives read off HLO: bytes, groups, and the links that can carry them."""

import math
from types import SimpleNamespace

import pytest

from sd3_jax.tools.plan import hlo, link_traffic, slices

MESH = {"data": 2, "fsdp": 4, "context": 1, "tensor": 1}
GROUPS = "replica_groups={{0,1,2,3},{4,5,6,7}}"


def collective(line: str, *before: str, name: str = "main"):
    body = "\n".join(f"  {x}" for x in (*before, f"ROOT %x = {line}"))
    module = hlo.parse(f"ENTRY %{name} (p: f32[1]) -> f32[1] {{\n{body}\n}}\n")
    return link_traffic.collective(module[name].root, module[name], MESH)


PART = "%p = bf16[16,96]{1,0:T(8,128)(2,1)} parameter(0)"
WHOLE = "%p = bf16[64,96]{1,0:T(8,128)(2,1)} parameter(0)"
SIZE = 64 * 128 * 2  # of whole tiles


@pytest.mark.parametrize(
    "line, before, kind, sent",
    [
        (f"bf16[64,96]{{1,0:T(8,128)(2,1)}} all-gather(%p), {GROUPS}", PART)
        + ("all-gather", SIZE * 3 / 4),
        (f"bf16[16,96]{{1,0:T(8,128)(2,1)}} reduce-scatter(%p), {GROUPS}", WHOLE)
        + ("reduce-scatter", SIZE * 3 / 4),
        (f"bf16[64,96]{{1,0:T(8,128)(2,1)}} all-reduce(%p), {GROUPS}", WHOLE)
        + ("all-reduce", 2 * SIZE * 3 / 4),
        (f"bf16[64,96]{{1,0:T(8,128)(2,1)}} all-to-all(%p), {GROUPS}", WHOLE)
        + ("all-to-all", SIZE * 3 / 4),
        (
            "(bf16[64,96]{1,0:T(8,128)(2,1)}, bf16[64,96]{1,0:T(8,128)(2,1)}, u32[])"
            " collective-permute-start(%p), source_target_pairs={{0,1},{1,0}}",
            *(WHOLE, "collective-permute", SIZE),
        ),
    ],
)
def test_bytes_that_a_device_sends(line, before, kind, sent):
    found = collective(line, before)
    assert (found.kind, found.wire) == (kind, sent)


def test_an_all_reduce_of_which_each_keeps_its_part():
    line = f"bf16[64,96]{{1,0:T(8,128)(2,1)}} all-reduce(%p), {GROUPS}"
    found = collective(line, WHOLE, name="all-reduce-scatter.3")
    assert (found.kind, found.wire) == ("reduce-scatter", SIZE * 3 / 4)


@pytest.mark.parametrize(
    "text, axes",
    [
        ("replica_groups=[4,2]<=[2,4]T(1,0)", ("data",)),
        ("replica_groups=[1,8]<=[8]", ("data", "fsdp")),
        ("replica_groups=mesh['a'=2,'b'=4] {'b'}", ("fsdp",)),
        ("replica_groups=mesh['a'=2,'b'=4] {'a'}", ("data",)),
        ("replica_groups={{0,4},{1,5},{2,6},{3,7}}", ("data",)),
        ("source_target_pairs={{0,4},{4,0},{1,5},{5,1}}", ("data",)),
        ("dimensions={0}", ("data", "fsdp")),
    ],
)
def test_every_way_that_groups_are_written(text, axes):
    found = collective(f"bf16[64,96] all-gather(%p), {text}", PART)
    assert found.axes == axes


@pytest.mark.parametrize(
    "kind, slices_, sent",
    [("ALL_REDUCE", 2, 1.0), ("ALL_REDUCE", 4, 1.5), ("ALL_GATHER", 2, 1.0)],
)
def test_what_goes_to_other_slices(kind, slices_, sent):
    ids = ",".join(str(i + 1) for i in range(slices_))
    attributes = (
        'frontend_attributes={_xla_host_transfer_handler_name="xla_megascale_runtime",'
        f'_xla_megascale_target="{{{ids}}}x{{0:15}}",'
        f'_xla_megascale_transfer_type="{kind}"}}'
    )
    found = collective(
        f"(bf16[64,96]{{1,0:T(8,128)(2,1)}}, u32[], token[]) send(%p), {attributes}",
        WHOLE,
    )
    assert found.outside and found.axes == ("data",)
    assert found.wire == sent * SIZE


def test_every_collective_of_a_program_and_how_often():
    text = f"""%body (w: f32[1]) -> f32[1] {{
  {PART}
  ROOT %g = bf16[64,96]{{1,0:T(8,128)(2,1)}} all-gather(%p), {GROUPS}
}}

ENTRY %main (p: f32[1]) -> f32[1] {{
  %l = bf16[64,96] while(%t), condition=%c, body=%body, backend_config={{"known_trip_count":{{"n":"5"}}}}
  ROOT %f = bf16[64,96] fusion(%l), kind=kCustom, calls=%body
}}
"""  # noqa: E501
    found = list(link_traffic.collectives(hlo.parse(text), MESH))
    assert [(x.kind, times) for x, times in found] == [
        ("all-gather", 5),
        ("all-gather", 1),
    ]


# Links


def links(name: str, order=None) -> link_traffic.Links:
    each = slices.find(name)
    places = [()]
    for size in each.shape:
        places = [(*place, i) for place in places for i in range(size)]
    devices = [
        SimpleNamespace(coords=place, slice_index=0)
        for place in places
        for _ in range(each.generation.devices)
    ]
    return link_traffic.Links(each, devices)


def groups(size: int, stride: int = 1, count: int = 1):
    return tuple(tuple(range(i, i + size * stride, stride)) for i in range(count or 1))


@pytest.mark.parametrize(
    "name, members, stride, usable",
    [
        ("v5e-16", 16, 1, 2),  # no rings: a corner has two links
        ("v5e-16", 4, 1, 1),  # a row, whose ends have one
        ("v5e-16", 4, 4, 1),  # a column
        ("v5e-16", 2, 2, 1 / 2),  # every other chip: two groups on each link
        ("v5e-256", 256, 1, 4),
        ("v5e-256", 16, 1, 2),  # a row closes to a ring
        ("v5e-256", 8, 1, 1),  # half a row does not
        ("v5e-256", 8, 2, 1),  # every other chip of a ring
        ("v5p-128", 64, 1, 6),
        ("v5p-128", 16, 1, 4),
        ("v5p-128", 4, 16, 2),
        ("v5p-8", 4, 1, 2),  # 2 x 2: one link along each axis
        ("tpu7x-128", 32, 1, 4),  # 16 chips of two devices each, that share
        ("tpu7x-128", 4, 2, 1),  # a device of each: the others want the links too
        ("tpu7x-128", 2, 1, math.inf),  # within a chip
    ],
)
def test_links_that_a_group_can_use(name, members, stride, usable):
    assert links(name).usable(groups(members, stride)) == usable


def test_time_is_of_links_or_of_the_network():
    x = link_traffic.Collective("all-gather", ("fsdp",), 9e9, groups(16), "", "")
    assert links("v5e-16").seconds(x) == pytest.approx(9e9 / (2 * 4.5e10))
    outside = x._replace(outside=True)
    assert links("v5e-16").seconds(outside) == pytest.approx(9e9 / 3.125e9)


def test_a_ring_whose_neighbours_are_apart():
    pairs = tuple((i, (i + 1) % 4) for i in range(4))  # a row without a ring: 1 1 1 3
    x = link_traffic.Collective("collective-permute", (), 1e9, groups(4), "", "", pairs)
    assert links("v5e-16").seconds(x) == pytest.approx(1.5 * 1e9 / 4.5e10)


@pytest.mark.parametrize(
    "name, devices, usable",
    [
        ("v5e-16", 16, 2),
        ("v5e-256", 64, 3),
        ("v5p-128", 16, 4),
        ("v5p-128", 64, 6),
        ("tpu7x-128", 32, 4),
        ("v5e-16", 1, math.inf),
    ],
)
def test_links_before_a_mesh_is_made(name, devices, usable):
    assert slices.find(name).links(devices) == usable
