"""HLO text as XLA writes it for TPUs: shapes in tiles, loops' turns, broken lines."""

import pytest

from sd3_jax.tools.plan import hlo, loop_trips

TEXT = """HloModule jit_step, is_scheduled=true, num_partitions=8

%region_0.1 (a.1: f32[], b.1: f32[]) -> f32[] {
  %a.1 = f32[]{:T(128)} parameter(0)
  %b.1 = f32[]{:T(128)} parameter(1)
  ROOT %add.1 = f32[]{:T(128)} add(%a.1, %b.1)
}

%async_computation.2 (p.2: bf16[8,128]) -> bf16[8,128] {
  %p.2 = bf16[8,128]{1,0:T(8,128)(2,1)} parameter(0)
  ROOT %copy.2 = bf16[8,128]{1,0:T(8,128)(2,1)} copy(%p.2)
}, execution_thread="sparsecore"

%body.5 (w.5: (s32[], bf16[64,32])) -> (s32[], bf16[64,32]) {
  %w.5 = (s32[]{:T(128)}, /*index=1*/bf16[64,32]{1,0:T(8,128)(2,1)}) parameter(0)
  %i.5 = s32[]{:T(128)} get-tuple-element(%w.5), index=0
  %x.5 = bf16[64,32]{1,0:T(8,128)(2,1)} get-tuple-element(%w.5), index=1
  %two.5 = s32[]{:T(128)} constant(2)
  %next.5 = s32[]{:T(128)} add(%i.5, %two.5)
  ROOT %out.5 = (s32[]{:T(128)}, bf16[64,32]{1,0:T(8,128)(2,1)}) tuple(%next.5, %x.5)
}

%cond.5 (w.6: (s32[], bf16[64,32])) -> pred[] {
  %w.6 = (s32[], bf16[64,32]{1,0}) parameter(0)
  %i.6 = s32[] get-tuple-element(%w.6), index=0
  %end.6 = s32[] constant(10)
  ROOT %less.6 = pred[] compare(%i.6, %end.6), direction=LT
}

ENTRY %main.9 (p.9: bf16[64,32], g.9: f32[1024]) -> f32[1024] {
  %p.9 = bf16[64,32]{1,0:T(8,128)(2,1)} parameter(0)
  %g.9 = f32[1024]{0:T(1024)S(1)} parameter(1)
  %loop.9 = (s32[], bf16[64,32]{1,0}) while(%t.9), condition=%cond.5, body=%body.5
  %two.9 = s32[] constant(2)
  %first.9 = s32[] copy(%two.9)
  %state.9 = (s32[], bf16[64,32]{1,0}) tuple(%first.9, %p.9)
  %peeled.9 = (s32[], bf16[64,32]{1,0}) while(%state.9), condition=%cond.5, body=%body.5
  %counted.9 = (s32[], bf16[64,32]{1,0}) while(%t.9), condition=%cond.5, body=%body.5, backend_config={"known_trip_count":{"n":"37"}}
  %kernel.9 = bf16[64,32]{1,0} custom-call(%p.9), custom_call_target="tpu_custom_call", frontend_attributes={kernel_metadata={
"xprof_metadata":"{}"
}}, metadata={op_name="jit(step)/kernel"}
  ROOT %sum.9 = f32[1024]{0:T(1024)S(1)} all-reduce(%g.9), channel_id=7, to_apply=%region_0.1
}
"""  # noqa: E501


@pytest.fixture(scope="module")
def module():
    return hlo.parse(TEXT)


def test_computations_and_their_instructions(module):
    assert module.entry == "main.9"
    assert [x.name for x in module["body.5"]][-1] == "out.5"
    assert module["body.5"].root.operands == ("next.5", "x.5")
    copy = module["async_computation.2"]  # its last line names a thread
    assert [x.opcode for x in copy] == ["parameter", "copy"]


def test_an_instruction_of_several_lines(module):
    kernel = module["main.9"].by_name["kernel.9"]
    assert kernel.opcode == "custom-call" and kernel.operands == ("p.9",)
    assert kernel.source == "jit(step)/kernel"


@pytest.mark.parametrize(
    "text, size",
    [
        ("bf16[64,32]{1,0:T(8,128)(2,1)}", 64 * 128 * 2),  # 32 numbers in 128 lanes
        ("bf16[64,32]{0,1:T(8,128)(2,1)}", 32 * 128 * 2),  # 64 numbers in 128 lanes
        ("bf16[154,1536]{1,0:T(8,128)(2,1)}", 160 * 1536 * 2),
        ("f32[24,64,96]{2,0,1:T(8,128)}", 64 * 24 * 128 * 4),
        ("f32[100]{0:T(128)}", 128 * 4),
        ("f32[]{:T(128)}", 128 * 4),
        ("pred[3]", 3),
        ("f8e4m3fn[16,128]{1,0:T(32,128)(4,1)}", 32 * 128),
        ("s4[64,128]{1,0}", 64 * 128 / 2),
    ],
)
def test_bytes_are_of_whole_tiles(text, size):
    (shape,) = hlo._shapes(text)
    assert shape.bytes == size


def test_memory_spaces(module):
    given = module["main.9"].by_name
    assert given["p.9"].hbm == 64 * 128 * 2
    assert given["g.9"].hbm == 0  # S(1) is VMEM


COUNTED = """%body (w: s32[]) -> s32[] {{
  %w = (s32[]) parameter(0)
  %i = s32[] get-tuple-element(%w), index=0
  %step = s32[] constant({step})
  %next = s32[] {op}(%i, %step)
  ROOT %out = (s32[]) tuple(%next)
}}

%cond (w: s32[]) -> pred[] {{
  %w = (s32[]) parameter(0)
  %i = s32[] get-tuple-element(%w), index=0
  %end = s32[] {bound}
  ROOT %go = pred[] compare(%i, %end), direction={direction}
}}

ENTRY %main (p: s32[]) -> s32[] {{
  %first = s32[] constant({start})
  %state = (s32[]) tuple(%first)
  ROOT %loop = (s32[]) while(%state), condition=%cond, body=%body
}}
"""


@pytest.mark.parametrize(
    "start, op, step, direction, bound, turns",
    [
        (0, "add", 1, "LT", "constant(10)", 10),
        (1, "add", 2, "LT", "constant(10)", 5),
        (0, "add", 1, "LE", "constant(10)", 11),
        (-5, "add", 1, "LT", "constant(5)", 10),
        (10, "add", -1, "GT", "constant(0)", 10),
        (10, "subtract", 1, "GE", "constant(0)", 11),
        (0, "add", 1, "NE", "constant(7)", 7),
        (1, "add", 1, "LT", "parameter(1)", None),  # the bound is data
        (0, "multiply", 2, "LT", "constant(10)", None),
    ],
)
def test_turns_that_xla_does_not_say(start, op, step, direction, bound, turns):
    values = dict(start=start, op=op, step=step, direction=direction, bound=bound)
    module = hlo.parse(COUNTED.format(**values))
    entry = module["main"]
    assert loop_trips.trips(entry.root, entry, module) == turns


def test_braces_of_a_kernel_do_not_end_a_computation():
    text = TEXT.replace('"xprof_metadata":"{}"\n}}', '"a": {\n}\n}}')
    kernel, total = list(hlo.parse(text)["main.9"])[-2:]
    assert (kernel.name, total.name) == ("kernel.9", "sum.9")


def test_turns_of_a_loop(module):
    entry = module["main.9"]
    trips = lambda name: loop_trips.trips(entry.by_name[name], entry, module)
    assert trips("loop.9") == 5  # 10 by twos
    assert trips("counted.9") == 37
    assert trips("peeled.9") == 4  # from 2 on


def test_text_that_is_no_module():
    with pytest.raises(ValueError, match="no ENTRY"):
        hlo.parse("not HLO")
