"""FLOPs and bytes of single operations, each worked out by hand."""

import jax
import jax.numpy as jnp
import pytest

from sd3_jax.tools.plan import hlo, matmul_costs, operation_costs

TILES = "{1,0:T(8,128)(2,1)}"


def cost(*lines, fused=(), name=None):
    """Of the last of an entry's lines, or of `name`; parameters p0, p1, … in bf16."""
    body = "\n".join(f"  {line}" for line in lines)
    inside = "\n".join(f"  {line}" for line in fused)
    text = f"%f (a: bf16[1]) -> bf16[1] {{\n{inside}\n}}\n\n" if fused else ""
    module = hlo.parse(f"{text}ENTRY %main (p: bf16[1]) -> bf16[1] {{\n{body}\n}}\n")
    home = module["main"]
    x = home.by_name[name] if name else home.root
    return operation_costs.cost(x, home, module, 128)


def test_a_product():
    given = cost(
        f"%x = bf16[512,256]{TILES} parameter(0)",
        f"%w = bf16[256,1024]{TILES} parameter(1)",
        f"ROOT %y = bf16[512,1024]{TILES} convolution(%x, %w), dim_labels=bf_io->bf",
    )
    assert given.kind == "matmul" and given.flops == 2 * 512 * 256 * 1024
    assert given.read == 2 * (512 * 256 + 256 * 1024)
    assert given.written == 2 * 512 * 1024


@pytest.mark.parametrize(
    "window, labels, right, result, flops",
    [
        # A batch of 6 products as XLA writes it: 6 of 11 places meet the input.
        (
            *("{size=6 pad=5_5 rhs_reversal=1}", "bf0_i0o->b0f", (64, 6, 32)),
            *((8, 6, 32), 2 * 8 * 32 * 64 * 21),
        ),
        ("{size=6}", "bf0_o0i->bf0", (32, 6, 64), (8, 32, 1), 2 * 8 * 32 * 6 * 64),
    ],
)
def test_products_with_padding_are_left_out(window, labels, right, result, flops):
    shape = lambda sides: f"bf16[{','.join(map(str, sides))}]"
    given = cost(
        f"%x = {shape((8, 64, 6))} parameter(0)",
        f"%w = {shape(right)} parameter(1)",
        f"ROOT %y = {shape(result)} convolution(%x, %w), window={window},"
        f" dim_labels={labels}",
    )
    assert given.flops == flops


@pytest.mark.parametrize(
    "groups", [{}, {"batch_group_count": 2}, {"feature_group_count": 4}]
)
def test_convolutions_are_counted_as_xla_does(groups):
    dims = ("NHWC", "HWIO", "NHWC")
    conv = lambda x, w: jax.lax.conv_general_dilated(
        x, w, (2, 2), "SAME", dimension_numbers=dims, **groups
    )
    inputs = 8 // groups.get("feature_group_count", 1)
    shapes = (2, 17, 16, 8), (3, 3, inputs, 4)
    args = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    lowered = jax.jit(conv).lower(*args)
    module = hlo.parse(lowered.compile().as_text())
    entry = module[module.entry]
    counted = lowered.cost_analysis()["flops"]
    assert matmul_costs.products(entry, module).total() == counted > 0


def test_a_slice_is_all_that_a_fusion_reads():
    stack = "bf16[24,512,256]{2,1,0:T(8,128)(2,1)}"
    layer = "bf16[1,512,256]{2,1,0:T(8,128)(2,1)}"
    given = cost(
        f"%stack = {stack} parameter(0)",
        "%i = s32[]{:T(128)S(6)} parameter(1)",
        f"ROOT %y = {layer} fusion(%stack, %i), kind=kLoop, calls=%f",
        fused=(
            f"%a = {stack} parameter(0)",
            "%i = s32[] parameter(1)",
            f"%c = {stack} convert(%a)",
            f"%d = {layer} dynamic-slice(%c, %i, %i, %i)",
            f"ROOT %e = {layer} negate(%d)",
        ),
    )
    assert given.read == given.written == 2 * 512 * 256
    assert given.kind == "elementwise"


def test_an_update_in_place_is_all_that_a_fusion_writes():
    stack = "bf16[24,512,256]{2,1,0:T(8,128)(2,1)}"
    layer = "bf16[1,512,256]{2,1,0:T(8,128)(2,1)}"
    given = cost(
        f"%stack = {stack} parameter(0)",
        f"%new = {layer} parameter(1)",
        "%i = s32[]{:T(128)S(6)} parameter(2)",
        f"ROOT %y = {stack} fusion(%stack, %new, %i), kind=kLoop, calls=%f",
        fused=(
            f"%a = {stack} parameter(0)",
            f"%b = {layer} parameter(1)",
            "%i = s32[] parameter(2)",
            f"ROOT %e = {stack} dynamic-update-slice(%a, %b, %i, %i, %i)",
        ),
    )
    assert given.read == given.written == 2 * 512 * 256  # of the source, in place


def test_what_a_fusion_passes_on_costs_nothing():
    given = cost(
        f"%x = bf16[512,256]{TILES} parameter(0)",
        f"%y = (bf16[512,256]{TILES}, bf16[512,256]{TILES}) fusion(%x), kind=kLoop,"
        " calls=%f",
        f"ROOT %z = bf16[512,256]{TILES} get-tuple-element(%y), index=1",
        fused=(
            f"%a = bf16[512,256]{TILES} parameter(0)",
            f"%b = bf16[512,256]{TILES} negate(%a)",
            f"ROOT %t = (bf16[512,256]{TILES}, bf16[512,256]{TILES}) tuple(%a, %b)",
        ),
        name="y",
    )
    assert given.written == 2 * 512 * 256 and given.read == 2 * 512 * 256


VMEM = "{1,0:T(8,128)(2,1)S(1)}"


@pytest.mark.parametrize(
    "source, target, read, written",
    [(TILES, VMEM, 1, 0), (VMEM, TILES, 0, 1), (TILES, TILES, 1, 1)],
)
def test_copies_that_run_beside(source, target, read, written):
    """copy-start's tuple is (destination, source): a prefetch reads."""
    given = cost(
        f"%x = bf16[512,256]{source} parameter(0)",
        f"%s = (bf16[512,256]{target}, bf16[512,256]{source}, u32[]{{:S(2)}})"
        " copy-start(%x)",
        f"ROOT %d = bf16[512,256]{target} copy-done(%s)",
        name="s",
    )
    size = 2 * 512 * 256
    assert (given.read, given.written) == (read * size, written * size)


def test_slices_that_run_beside():
    given = cost(
        f"%x = bf16[512,256]{TILES} parameter(0)",
        f"%s = ((bf16[512,256]{TILES}), bf16[128,256]{VMEM}, s32[]{{:S(2)}})"
        " async-start(%x), calls=%f",
        f"ROOT %d = bf16[128,256]{VMEM} async-done(%s)",
        fused=(
            f"%a = bf16[512,256]{TILES} parameter(0)",
            f"ROOT %e = bf16[128,256]{VMEM} slice(%a), slice={{[0:128], [0:256]}}",
        ),
        name="s",
    )
    assert (given.read, given.written) == (2 * 128 * 256, 0)


def test_a_slice_that_xla_writes_without_a_computation():
    given = cost(
        f"%x = bf16[512,256]{TILES} parameter(0)",
        f"%s = (bf16[512,256]{TILES}, bf16[128,256]{VMEM}, u32[]) slice-start(%x)",
        f"ROOT %d = bf16[128,256]{VMEM} slice-done(%s)",
        name="s",
    )
    assert (given.read, given.written) == (2 * 128 * 256, 0)


@pytest.mark.parametrize("target", ["AllocateBuffer", "ConcatBitcast"])
def test_buffers_cost_nothing(target):
    given = cost(
        f'ROOT %x = bf16[512,256]{TILES} custom-call(), custom_call_target="{target}"'
    )
    assert not given.bytes


@pytest.mark.parametrize(
    "name, results, products",
    [
        ("splash_mha_fwd_residuals.1", "bf16[4,24,512,64]", 2),
        ("splash_mha_dq.1", "bf16[4,24,512,64]", 3),
        ("splash_mha_dkv.1", "(bf16[4,24,384,64], bf16[4,24,384,64])", 4),
        ("splash_mha_dkv.1", "(bf16[4,3,24,512,64], bf16[4,24,384,64])", 5),
    ],
)
def test_attention_kernels(name, results, products):
    given = cost(
        "%mask = s8[1,1,1] parameter(0)",
        "%q = bf16[4,24,512,64] parameter(1)",
        "%k = bf16[4,24,384,64] parameter(2)",
        "%v = bf16[4,24,384,64] parameter(3)",
        f"ROOT %{name} = {results} custom-call(%mask, %q, %k, %v),"
        ' custom_call_target="tpu_custom_call"',
    )
    assert given.flops == 2 * products * 4 * 24 * 512 * 384 * 64
    assert given.narrow == 0.5 and given.kind == "attention"


def test_attention_kernels_that_have_tokens_last():
    given = cost(
        "%q = bf16[4,24,64,512] parameter(1)",
        "%k = bf16[4,24,64,384] parameter(2)",
        "ROOT %splash_mha_fwd.1 = bf16[4,24,64,512] custom-call(%q, %k, %k),"
        ' custom_call_target="tpu_custom_call"',
    )
    assert given.flops == 4 * 4 * 24 * 512 * 384 * 64 and given.narrow == 0.5
