"""The denoiser against diffusers', with random weights, in float32."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import SD3Transformer2DModel
from parity import convert

from sd3_jax.models.mmdit import MMDiT
from sd3_jax.weights import mmdit_keys

KINDS = {
    "sd3_medium": dict(),
    "sd35_medium": dict(qk_norm="rms_norm", dual_attention_layers=(0, 1)),
    "sd35_large": dict(qk_norm="rms_norm"),
}
SIZES = dict(num_layers=5, num_attention_heads=2, attention_head_dim=8)
H, W, TEXT = 6, 10, 7


@pytest.fixture(scope="module", params=KINDS)
def pair(request):
    """A diffusers model, ours, and ours' variables, of one published kind."""
    options = dict(
        sample_size=32,
        in_channels=16,
        joint_attention_dim=24,
        caption_projection_dim=16,
        pooled_projection_dim=20,
        out_channels=16,
        pos_embed_max_size=13,  # odd: the crop must round down
    )
    theirs = SD3Transformer2DModel(**SIZES, **options, **KINDS[request.param])
    convert.randomise(theirs.eval())
    table = theirs.pos_embed.pos_embed
    table.copy_(torch.randn(table.shape, generator=torch.Generator().manual_seed(1)))
    ours = MMDiT(
        depth=5,
        width=16,
        num_heads=2,
        qk_norm="qk_norm" in KINDS[request.param],
        dual_blocks=len(KINDS[request.param].get("dual_attention_layers", ())),
        pos_size=13,
        dtype=jnp.float32,
        remat="none",
    )
    shapes = jax.eval_shape(ours.init, jax.random.key(0), *inputs())
    shapes["buffers"] = {"pos_embed": jax.ShapeDtypeStruct(table.shape, jnp.float32)}
    state = theirs.state_dict()
    return theirs, ours, convert.from_torch(shapes, mmdit_keys.table(ours), state)


def inputs(b=2):
    draw = np.random.default_rng(0).standard_normal
    shapes = (b, H, W, 16), (b, TEXT, 24), (b, 20)
    xt, context, pooled = (draw(shape).astype(np.float32) for shape in shapes)
    t = np.linspace(0.313, 0.999, b, dtype=np.float32)
    return tuple(map(jnp.asarray, (xt, t, context, pooled)))


def run(model, variables, *given, **kwargs):
    return jax.jit(lambda v, *x: model.apply(v, *x, **kwargs))(variables, *given)


def run_theirs(model, xt, t, context, pooled, **kwargs):
    with torch.no_grad():
        v = model(
            torch.tensor(np.asarray(xt)).permute(0, 3, 1, 2),
            timestep=torch.tensor(np.asarray(t)) * 1000,
            encoder_hidden_states=torch.tensor(np.asarray(context)),
            pooled_projections=torch.tensor(np.asarray(pooled)),
            **kwargs,
        ).sample
    return v.permute(0, 2, 3, 1).numpy()


def test_the_velocity(pair):
    theirs, ours, variables = pair
    wanted = run_theirs(theirs, *inputs())
    assert convert.error(run(ours, variables, *inputs()), wanted) < 2e-5


@pytest.mark.parametrize("skip", [(0,), (1, 3), (2, 4)])
def test_skipped_layers(pair, skip):
    theirs, ours, variables = pair
    wanted = run_theirs(theirs, *inputs(), skip_layers=list(skip))
    found = run(ours, variables, *inputs(), skip=skip)
    assert convert.error(found, wanted) < 2e-5
    assert convert.error(wanted, run_theirs(theirs, *inputs())) > 0.1


@pytest.fixture
def to_themselves(monkeypatch):
    """perturb(attention): its image tokens attend to themselves and to the text."""
    attend, images = torch.nn.functional.scaled_dot_product_attention, H * W // 4

    def masked(q, k, v, **kwargs):
        mask = torch.zeros(q.shape[2], k.shape[2])
        mask[:images, :images] = float("-inf")
        mask[:images, :images].fill_diagonal_(0)
        return attend(q, k, v, attn_mask=mask)

    def perturb(module):
        forward = module.forward

        def perturbed(*args, **kwargs):
            with monkeypatch.context() as patch:
                patch.setattr(torch.nn.functional, attend.__name__, masked)
                return forward(*args, **kwargs)

        monkeypatch.setattr(module, "forward", perturbed)

    return perturb


@pytest.mark.parametrize("layers", [(0,), (2, 4)])
def test_image_tokens_that_attend_to_themselves(pair, layers, to_themselves):
    """PAG with qk-norm and dual attention, which diffusers' own processor lacks."""
    theirs, ours, variables = pair
    plain = run_theirs(theirs, *inputs())
    for block in (theirs.transformer_blocks[i] for i in layers):
        to_themselves(block.attn)
        if block.use_dual_attention:
            to_themselves(block.attn2)
    wanted = run_theirs(theirs, *inputs())
    found = run(ours, variables, *inputs(), skip=layers, skipped="attention")
    assert convert.error(found, wanted) < 2e-5
    assert convert.error(wanted, plain) > 1e-2


@pytest.mark.parametrize("count", [2, 3, 5])
def test_residuals_of_a_control_net(pair, count):
    theirs, ours, variables = pair
    shape = (count, 2, H * W // 4, 16)
    residuals = jax.random.normal(jax.random.key(1), shape)
    hidden = [torch.tensor(np.asarray(r)) for r in residuals]
    wanted = run_theirs(theirs, *inputs(), block_controlnet_hidden_states=hidden)
    found = run(ours, variables, *inputs(), residuals=residuals)
    assert convert.error(found, wanted) < 2e-5


def test_the_released_code_adds_the_last_residual_too(pair):
    _, ours, variables = pair
    residuals = jax.random.normal(jax.random.key(1), (1, 2, H * W // 4, 16))
    both = lambda r: [
        run(ours, variables, *inputs(), residuals=r, residual_last=last)
        for last in (True, False)
    ]
    assert convert.error(*both(0 * residuals)) == 0
    assert convert.error(*both(residuals)) > 0.05


@pytest.mark.parametrize("layout_kind", ["image", "text"])
def test_the_last_querys_weights_matter_only_for_the_image(pair, layout_kind):
    """Files hold the last block's text queries; nothing reads their answer."""
    _, ours, variables = pair
    kernel = variables["params"]["last_block"][layout_kind]["attn"]["to_qkv"]["kernel"]
    before = run(ours, variables, *inputs())
    changed = jax.tree.map(np.copy, variables)
    changed["params"]["last_block"][layout_kind]["attn"]["to_qkv"]["kernel"] = (
        kernel + np.array([1, 0, 0], np.float32)[:, None, None]
    )
    gap = convert.error(run(ours, changed, *inputs()), before)
    assert gap == 0 if layout_kind == "text" else gap > 1e-3


def test_epsilon_of_the_norms(pair):
    """Small activations, at which 1e-5 for 1e-6 is far more than rounding."""
    theirs, ours, variables = pair
    state = {k: v.clone() for k, v in theirs.state_dict().items()}
    for name, tensor in state.items():  # the tokens enter the blocks 1e-3 wide
        if name.startswith(("pos_embed", "context_embedder")):
            tensor.mul_(1e-3)
        elif name.endswith(("attn.to_q.weight", "attn.to_k.weight", "to_q.bias")):
            tensor.mul_(1e-2)  # and qk-norm sees small queries
    small = SD3Transformer2DModel.from_config(theirs.config).eval()
    small.load_state_dict(state)
    wanted = run_theirs(small, *inputs())
    weights = convert.from_torch(variables, mmdit_keys.table(ours), state)
    assert convert.error(run(ours, weights, *inputs()), wanted) < 1e-4


def test_times_are_float32_whatever_the_model_computes_in(pair):
    theirs, ours, variables = pair
    wanted = run_theirs(theirs, *inputs())
    half = dataclasses.replace(ours, dtype=jnp.bfloat16)
    assert convert.error(run(half, variables, *inputs()), wanted) < 0.15
