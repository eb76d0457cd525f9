"""The order of what a search tries, by hand."""

import pytest

from sd3_jax.models.mmdit import MMDiT
from sd3_jax.tools.plan import bounds, mesh_search, slices

PARAMS = {24: 2.03e9, 38: 8.06e9}


def order(depth, name, *, batch=4096, side=1024):
    model = MMDiT(depth=depth, width=64 * depth, num_heads=depth)
    latents, tokens = side // 8, (side // 16) ** 2
    total = model.flops(height=latents, width=latents, text=154, text_dim=4096)
    work = bounds.work(model, tokens=tokens, text=154, padded=tokens + 384, total=total)
    each = slices.find(name)
    return each, mesh_search.ordered(
        model, each, batch=batch, params=PARAMS[depth], work=work, total=total
    )


@pytest.mark.parametrize("depth, name", [(24, "v5e-16"), (38, "v5e-256")])
def test_candidates_divide_and_may_fit(depth, name):
    each, found = order(depth, name)
    assert found
    for x, estimate in found:
        assert x.data * x.fsdp == each.devices and 64 * depth % x.fsdp == 0
        assert 4096 % (x.per_chip * each.chips) == 0
        assert estimate.memory < each.generation.hbm


def test_what_a_chip_cannot_hold_is_not_tried():
    _, found = order(38, "v5e-256")  # 8 B parameters' state: 129 GB over fsdp
    assert min(x.fsdp for x, _ in found) >= 16
    assert max(x.fsdp for x, _ in found) == 128  # 2432 = 2^7 x 19


def test_the_least_recomputation_that_leaves_room_is_first():
    each, found = order(38, "v5p-128")
    first, estimate = found[0]
    assert first.remat == "mlp"
    assert estimate.memory < mesh_search.ROOM * each.generation.hbm
    assert estimate.mfu == max(e.mfu for _, e in found)
    _, found = order(38, "v5e-256")
    assert found[0][0].per_chip == 1


def test_data_alone_crosses_slices():
    _, found = order(24, "2xv5e-16", batch=512, side=256)
    assert all(x.data % 2 == 0 for x, _ in found)


def test_a_candidate_is_the_recipes_keys():
    keys = mesh_search.Candidate(4, 64, 2, "attention").keys(batch=4096, chips=256)
    assert keys["optim.accumulate"] == 8
    assert keys["mesh.data"] * keys["mesh.fsdp"] == 256
