"""A program's time in the order in which it runs, worked out by hand."""

from types import SimpleNamespace

import pytest

from sd3_jax.tools.plan import hlo, link_traffic, schedule, slices

MESH = {"data": 1, "fsdp": 4, "context": 1, "tensor": 1}
CHIP = slices.find("v5e-4").generation._replace(
    peak=1e12, hbm_rate=1e12, link_rate=1e12
)
EACH = slices.find("v5e-4")._replace(generation=CHIP)
GROUPS = "replica_groups={{0,1,2,3}}"
BIG = "bf16[4096,4096]{1,0:T(8,128)(2,1)}"
VMEM = "bf16[4096,4096]{1,0:T(8,128)(2,1)S(1)}"
SIZE = 2 * 4096**2 / 1e12  # seconds of one array's bytes
PRODUCT = 2 * 4096**3 / 1e12
GATHER = SIZE * 3 / 4 / 2  # by two links


def account(*lines, more=""):
    body = "\n".join(f"  {line}" for line in lines)
    text = f"{more}\nENTRY %main (p: bf16[1]) -> bf16[1] {{\n{body}\n}}\n"
    devices = [SimpleNamespace(coords=(i % 2, i // 2, 0)) for i in range(4)]
    links = link_traffic.Links(EACH, devices)
    return schedule.Schedule(hlo.parse(text), CHIP, MESH, links).run()


X = f"%x = {VMEM} parameter(0)"
DOT = f"%y = {VMEM} convolution(%x, %x), dim_labels=bf_io->bf"


def test_an_operation_takes_its_products_or_its_bytes():
    found = account(X, DOT)
    assert found.seconds == found.by_kind["matmul"] == PRODUCT
    found = account(f"%x = {BIG} parameter(0)", f"%y = {BIG} negate(%x)")
    assert found.seconds == found.by_kind["elementwise"] == 2 * SIZE
    assert found.hbm == 2 * SIZE * 1e12


def test_a_collective_without_a_start_is_waited_for():
    gather = f"%g = {VMEM} all-gather(%q), {GROUPS}"
    part = "%q = bf16[1024,4096]{1,0:T(8,128)(2,1)S(1)} parameter(1)"
    found = account(X, part, gather, DOT)
    assert found.seconds == pytest.approx(GATHER + PRODUCT)
    assert found.by_kind["ICI"] == pytest.approx(GATHER)
    assert found.hidden == found.beside == 0
    assert found.sent == pytest.approx(SIZE * 3 / 4 * 1e12)


def test_a_collective_beside_a_product_is_hidden():
    pair = f"({VMEM}, {VMEM})"
    found = account(
        X,
        f"%g = {pair} all-gather-start(%x), {GROUPS}",
        DOT,
        f"%d = {VMEM} all-gather-done(%g)",
    )
    assert found.seconds == pytest.approx(PRODUCT)
    assert found.hidden == found.beside == pytest.approx(found.sent)


def test_links_carry_one_after_another():
    """Three gathers begin before one product, which is shorter than they are."""
    pair = f"({VMEM}, {VMEM})"
    small = "bf16[1,4096]{1,0:T(1,128)(2,1)S(1)}"
    found = account(
        X,
        f"%s = {small} parameter(1)",
        *(f"%g{i} = {pair} all-gather-start(%x), {GROUPS}" for i in range(3)),
        f"%y = {small} convolution(%s, %x), dim_labels=bf_io->bf",
        *(f"%d{i} = {VMEM} all-gather-done(%g{i})" for i in range(3)),
    )
    assert 0 < found.by_kind["matmul"] < 3 * GATHER
    assert found.seconds == pytest.approx(3 * GATHER)


def test_a_prefetch_takes_what_products_leave_of_hbm():
    copy = f"%s = ({VMEM}, {BIG}, u32[]{{:S(2)}}) copy-start(%x)"
    done = f"%d = {VMEM} copy-done(%s)"
    x = f"%x = {BIG} parameter(0)"
    found = account(x, copy, done)
    assert found.seconds == found.by_kind["prefetch"] == SIZE
    found = account(x, f"%w = {VMEM} parameter(1)", copy, DOT.replace("x", "w"), done)
    assert found.seconds == PRODUCT and not found.by_kind["prefetch"]


LOOP = f"""%body (w: (s32[], bf16[1])) -> (s32[], bf16[1]) {{
  %w = (s32[], {VMEM}) parameter(0)
  %x = {VMEM} get-tuple-element(%w), index=1
  ROOT {DOT}
}}

%short (p: bf16[1]) -> bf16[1] {{
  ROOT %x = {VMEM} parameter(0)
}}
"""


def test_loops_and_branches():
    times = 'backend_config={"known_trip_count":{"n":"7"}}'
    found = account(
        f"%l = (s32[], {VMEM}) while(%t), condition=%c, body=%body, {times}", more=LOOP
    )
    assert found.seconds == pytest.approx(7 * PRODUCT)
    line = "%l = bf16[1] conditional(%i, %a, %b), branch_computations={%short, %body}"
    assert account(line, more=LOOP).seconds == PRODUCT
    seldom = ', metadata={op_name="jit(step)/ema/cond"}'
    assert account(line + seldom, more=LOOP).seconds == 0


def test_a_branch_is_as_long_as_what_it_calls():
    line = "%l = bf16[1] conditional(%i, %a, %b), branch_computations={%idle, %calls}"
    more = f"""{LOOP}
%idle (p: bf16[1]) -> bf16[1] {{
  %x = {VMEM} parameter(0)
  %a = {VMEM} bitcast(%x)
  ROOT %b = {VMEM} bitcast(%a)
}}

%calls (p: bf16[1]) -> bf16[1] {{
  %x = {VMEM} parameter(0)
  ROOT %y = {VMEM} call(%x), to_apply=%body
}}
"""
    assert account(line, more=more).seconds == PRODUCT


def test_what_goes_to_the_host_takes_its_own_way():
    host = VMEM.replace("S(1)", "S(5)")
    found = account(
        f"%x = {BIG} parameter(0)",
        f"%s = ({host}, {BIG}, u32[]{{:S(2)}}) copy-start(%x)",
        f"%d = {host} copy-done(%s)",
    )
    assert found.seconds == found.by_kind["host"] == SIZE * 1e12 / CHIP.host_rate
    assert found.read == found.host and not found.written and not found.sent


def test_what_is_not_counted_is_named():
    kernel = f'%k = {VMEM} custom-call(%x), custom_call_target="tpu_custom_call"'
    loop = "%l = (s32[]) while(%t), condition=%ask, body=%body"
    asked = """%ask (p: s32[]) -> pred[] {
  %p = (s32[], pred[]) parameter(0)
  %go = pred[] get-tuple-element(%p), index=1
  ROOT %r = pred[] compare(%go, %go), direction=NE
}
"""
    text = f"{LOOP}\n{asked}\nENTRY %main (p: s32[]) -> s32[] {{\n  {X}\n  {kernel}\n"
    module = hlo.parse(f"{text}  {loop}\n}}\n")
    links = link_traffic.Links(EACH, [SimpleNamespace(coords=(0, 0, 0))] * 4)
    program = schedule.Schedule(module, CHIP, MESH, links)
    assert program.run().seconds == PRODUCT
    assert program.unknown == {"turns of l", "FLOPs of k"}
    # The caller knows the trip count of a loop over a solver's steps.
    program = schedule.Schedule(module, CHIP, MESH, links, turns=28)
    assert program.run().seconds == pytest.approx(28 * PRODUCT)
    assert program.unknown == {"FLOPs of k"}


def test_a_collective_that_runs_through_several_operations():
    """libtpu's fused form: a start, a step beside a product, an end; sent once."""
    gather = (
        f"%g = {VMEM} all-gather(%a), channel_id=5, {GROUPS},"
        ' frontend_attributes={chain_id="8"}'
    )
    call = lambda name: f'custom-call(%g), custom_call_target="AsyncCollective{name}"'
    more = "\n\n".join(
        f"%{name} (a: bf16[1]) -> bf16[1] {{\n  %a = {VMEM} parameter(0)\n  {gather}\n"
        f"  ROOT {root}\n}}"
        for name, root in {
            "begin": f"%r = ({VMEM}, {VMEM}) {call('Start')}",
            "step": f"{DOT.replace('x', 'a')}",
            "finish": f"%r = {VMEM} {call('Done')}",
        }.items()
    )
    found = account(
        X,
        f"%b = ({VMEM}, {VMEM}) fusion(%x), kind=kCustom, calls=%begin",
        f"%s = {VMEM} fusion(%x), kind=kOutput, calls=%step",
        f"%f = {VMEM} fusion(%x), kind=kCustom, calls=%finish",
        more=more,
    )
    assert found.sent == pytest.approx(SIZE * 3 / 4 * 1e12)
    assert found.seconds == pytest.approx(PRODUCT)
    assert found.hidden == pytest.approx(found.sent)
