"""The T5 encoder's parts and the byte tower's words."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sd3_jax.distributed import sharding
from sd3_jax.models.t5 import ByteTower, T5Stack, relative_buckets, words
from sd3_jax.weights import components


def ids(*captions, length=40):
    rows = [[b + 3 for b in c.encode()] + [1] for c in captions]
    return jnp.array([row + [0] * (length - len(row)) for row in rows])


def test_buckets_are_exact_near_and_logarithmic_far():
    table = relative_buckets(300, 32, 128)
    from_first = table[0]  # keys to the right of query 0
    assert from_first[:8].tolist() == [0, *range(17, 24)]
    assert from_first[8:17].tolist() == [24, 24, 24, 24, 25, 25, 25, 25, 26]
    assert from_first[200] == 31 and table[200, 0] == 15
    assert (table[1:, 1:] == table[:-1, :-1]).all()  # a function of the distance


def test_words_are_runs_of_letters_and_single_marks():
    caption = 'the number "42" in größe'
    member = np.asarray(words(ids(caption), 10))[0]
    raw = caption.encode()
    found = [bytes(raw[i] for i in np.flatnonzero(row[: len(raw)])) for row in member]
    wanted = ["the", "number", '"', "4", "2", '"', "in", "größe", "", ""]
    assert [word.decode() for word in found] == wanted


def test_padding_is_not_looked_at(key):
    stack = T5Stack(2, 2, 8, 32, dtype=jnp.float32)
    x = jax.random.normal(key, (1, 6, 16))
    mask = jnp.arange(6)[None] < 4
    params = stack.init(key, x, mask)
    far = x.at[:, 4:].add(5.0)
    same = stack.apply(params, x, mask)[:, :4], stack.apply(params, far, mask)[:, :4]
    chex.assert_trees_all_close(*same, atol=1e-6)
    open_ = stack.apply(params, x), stack.apply(params, far)
    assert not np.allclose(open_[0][:, :4], open_[1][:, :4], atol=1e-3)


def test_the_tower_tells_captions_apart_by_order(key):
    tower = ByteTower(2, 32, 2, 8, 24, 20, dtype=jnp.float32)
    batch = ids("a red one above a blue two", "a blue two above a red one", "")
    params = tower.init(key, batch)
    context, pooled = tower.apply(params, batch)
    chex.assert_shape([context, pooled], [(3, 8, 24), (3, 20)])
    assert not np.allclose(context[0, 1:3], context[1, 5:7], atol=1e-3)
    chex.assert_trees_all_equal(context[:, 7], jnp.zeros((3, 24)))  # no eighth word


XXL = dict(
    vocab_size=32_128, num_layers=24, d_model=4096, num_heads=64, d_kv=64, d_ff=10_240
)


@pytest.mark.parametrize("sizes", [dict(fsdp=4), dict(fsdp=2, tensor=2)], ids=str)
def test_no_large_weight_of_t5_xxl_is_on_every_device(sizes):
    component = components.COMPONENTS["t5"]
    config = XXL | {"feed_forward_proj": "gated-gelu"}
    mesh = sharding.make_mesh(**sizes, devices=jax.devices()[:4])
    module = component.build(config, jnp.bfloat16)
    shapes = components.abstract(component, module, config, mesh, jnp.bfloat16)
    for path, x in jax.tree_util.tree_leaves_with_path(shapes):
        whole = x.sharding.shard_shape(x.shape) == x.shape
        assert x.size < sharding.LARGE or not whole, path
