"""Damage of every kind to every file of the newest checkpoint, one at a time."""

import json
import logging
import random
import shutil
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checkpoints.checkpoint_worker import (
    CONFIG,
    POLICY,
    abstract_state,
    assert_bits,
    damage,
    files,
    flip,
    host_state,
    make_state,
    write,
)
from jax.sharding import PartitionSpec as P

import sd3_jax
from sd3_jax import tree
from sd3_jax.checkpoints import integrity, restoring, step_folders
from sd3_jax.checkpoints.manager import Checkpoints, UnreadableCheckpoint
from sd3_jax.errors import RunFailed, UserError


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Steps 1 and 2, to be copied."""
    directory = tmp_path_factory.mktemp("saved")
    abstract = write(directory, 1, 2, abstract=abstract_state(2))
    return SimpleNamespace(directory=directory, abstract=abstract)


@pytest.fixture
def copy(saved, tmp_path):
    return shutil.copytree(saved.directory, tmp_path / "copy")


def restored_step(directory, abstract):
    with Checkpoints(directory, **POLICY) as checkpoints:
        state, data, config = checkpoints.restore(abstract)
    assert_bits(state, abstract, seed=data["next_step"])  # whichever: exactly that
    assert config == CONFIG
    return data["next_step"]


def test_every_single_bit_is_guarded(saved, tmp_path):
    """Bits drawn over all bytes of the newest step: make chaos draws 200."""
    rng = random.Random(0)
    every = files(saved.directory / "2")
    sizes = [path.stat().st_size for path in every]
    for n in range(25):
        work = shutil.copytree(saved.directory, tmp_path / str(n))
        (path,) = rng.choices(every, sizes)
        damaged = work / path.relative_to(saved.directory)
        flip(damaged, rng.randrange(8 * damaged.stat().st_size))
        assert restored_step(work, saved.abstract) == 1, damaged
        reason = (work / "damaged-2" / "damaged.txt").read_text()
        assert str(damaged.relative_to(work / "2")) in reason


# Without this file a step loads, and what it holds is checked by the leaves.
HARMLESS = "sums/0.json"


@pytest.mark.parametrize("how", ["cut", "deleted", "emptied"])
def test_every_file_is_guarded(saved, tmp_path, how):
    for n, path in enumerate(files(saved.directory / "2")):
        if path.stat().st_size == 0 and how != "deleted":
            continue
        name = str(path.relative_to(saved.directory / "2"))
        work = shutil.copytree(saved.directory, tmp_path / str(n))
        damage(work / "2" / name, how)
        lost = how == "deleted" and name == HARMLESS
        assert restored_step(work, saved.abstract) == (2 if lost else 1), name
        if not lost and name != step_folders.COMMIT:  # without it it is no step at all
            assert name in (work / "damaged-2" / "damaged.txt").read_text()


def test_a_leaf_is_named_where_no_sum_knows(copy, saved, caplog):
    """Values that were wrong before they were written: the files are as written."""
    with Checkpoints(copy, **POLICY) as checkpoints:
        state = make_state(saved.abstract, 3)
        about = integrity.about(3, tree.fingerprints(state), {"next_step": 3}, CONFIG)
        head = state.ema["head"]["kernel"]
        ema = state.ema | {"head": {"kernel": head.at[0, 0].set(-head[0, 0])}}
        real, integrity.about = integrity.about, lambda *_: about
        try:
            checkpoints.save(3, state.replace(ema=ema), {"next_step": 3}, CONFIG)
            checkpoints.wait()
        finally:
            integrity.about = real
        with pytest.raises(UnreadableCheckpoint, match="3 is damaged: ema/head/kernel"):
            checkpoints.restore(saved.abstract, step=3)
        with caplog.at_level(logging.WARNING):
            state, data, _ = checkpoints.restore(saved.abstract)
        assert data == {"next_step": 2} and checkpoints.latest() == 2
        assert_bits(state, saved.abstract, seed=2)
    assert "renamed it to damaged-3; step 2 is the newest now" in caplog.text


def test_the_run_goes_on_from_the_step_before(copy, saved):
    flip(copy / "2" / "data" / "data.json", 3)
    with Checkpoints(copy, **POLICY) as checkpoints:
        checkpoints.restore(saved.abstract)
        state = make_state(saved.abstract, 2)
        assert checkpoints.save(2, state, {"next_step": 2}, CONFIG)
    assert restored_step(copy, saved.abstract) == 2
    flip(copy / "2" / "data" / "data.json", 3)  # a step may be damaged twice
    assert restored_step(copy, saved.abstract) == 1
    assert {"damaged-2", "damaged-2-2"} < {path.name for path in copy.iterdir()}


def test_the_only_step_stays_where_it_is(copy, saved):
    """A run must not begin anew because its last checkpoint cannot be read."""
    shutil.rmtree(copy / "1")
    flip(copy / "2" / "config" / "data.json", 3)
    for _ in range(2):
        with pytest.raises(UnreadableCheckpoint, match="config/data.json"):
            with Checkpoints(copy, **POLICY) as checkpoints:
                checkpoints.restore(saved.abstract)
    assert (copy / "2" / step_folders.COMMIT).exists()


def test_readers_pass_over_a_damaged_step_and_leave_it(copy, saved, caplog):
    (data,) = (copy / "2" / "state" / "ocdbt.process_0" / "d").iterdir()
    flip(data, 8 * (data.stat().st_size // 2))
    for which in "ema", "params":
        abstract = getattr(saved.abstract, which)
        weights, step = restoring.restore_params(copy, abstract, which=which)
        wanted = getattr(host_state(saved.abstract, step), which)
        for a, b in zip(*map(jax.tree.leaves, (weights, wanted))):
            assert np.asarray(a).tobytes() == b.tobytes()
    assert (copy / "2" / step_folders.COMMIT).exists()


@pytest.mark.parametrize("how", ["cut", "deleted", "emptied"])
@pytest.mark.parametrize("item", ["about", "config", "data"])
def test_config_and_data_are_of_the_newest_sound_step(copy, item, how, caplog):
    """Where no sum says which file it is, too."""
    shutil.rmtree(copy / "2" / integrity.FOLDER)
    damage(copy / "2" / item / "data.json", how)
    read = lambda step: (step, restoring.saved_config(copy, step))
    assert restoring.read_newest(copy, read) == (1, CONFIG)
    assert "using an earlier step" in caplog.text
    with pytest.raises(UnreadableCheckpoint):
        restoring.read_newest(copy, read, step=2)


def test_a_step_killed_before_its_sums_is_checked_by_its_leaves(copy, saved):
    shutil.rmtree(copy / "2" / integrity.FOLDER)
    assert restored_step(copy, saved.abstract) == 2


def test_a_newer_format_is_refused_with_both_versions(copy, saved):
    path = copy / "2" / "about" / "data.json"
    about = json.loads(path.read_text())
    about["made"]["sd3_jax"], about["format"] = "7.0", integrity.FORMAT + 1
    path.write_text(json.dumps(about))
    shutil.rmtree(copy / "2" / integrity.FOLDER)
    versions = f"written by sd3_jax 7.0; this is sd3_jax {sd3_jax.__version__}"
    wanted = f"format {integrity.FORMAT + 1}, {versions}"
    with pytest.raises(UserError, match=wanted) as error:
        restored_step(copy, saved.abstract)
    assert not isinstance(error.value, UnreadableCheckpoint)
    assert (copy / "2").exists()  # it is sound


def test_a_state_with_a_nan_is_not_saved(tmp_path):
    state = {"good": jnp.ones(3), "bad": jnp.array([1.0, jnp.nan])}
    with Checkpoints(tmp_path, **POLICY) as checkpoints:
        with pytest.raises(
            RunFailed, match="step 1 is not saved: 1 .* infinities: bad"
        ):
            checkpoints.save(1, state, {}, {}, finite=True)
        assert checkpoints.latest() is None
        assert checkpoints.save(1, {"good": state["good"]}, {}, {}, finite=True)


def test_no_room_is_told_before_the_start(tmp_path, monkeypatch):
    abstract = abstract_state()
    size = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(abstract))
    usage = lambda path: SimpleNamespace(free=2 * size - 1)
    monkeypatch.setattr(step_folders.shutil, "disk_usage", usage)
    with Checkpoints(tmp_path, **POLICY) as checkpoints:
        with pytest.raises(UserError, match=f"{tmp_path} has .* GB free but two"):
            checkpoints.require_space(abstract)


# Fingerprints


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int32", "int8", "bool"])
def test_a_fingerprint_knows_every_bit(dtype):
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.integers(0, 2, (4, 6)), dtype)
    word = lambda x: tree.fingerprints({"x": x})["x"].word
    before, seen = word(x), set()
    for i in range(x.size):
        for bit in range(1 if dtype == "bool" else 8 * x.dtype.itemsize):
            raw = bytearray(np.asarray(x).tobytes())
            raw[i * x.dtype.itemsize + bit // 8] ^= 1 << bit % 8
            seen.add(word(np.frombuffer(raw, x.dtype).reshape(x.shape)))
    assert before not in seen


def test_a_fingerprint_knows_signs_and_places():
    """Sums alone do not: two flips of a highest bit cancel, as does an exchange."""
    x = jax.random.normal(jax.random.key(0), (6, 8))
    changed = [-x, x.at[:2, 0].multiply(-1), x[::-1], x.T.reshape(6, 8), x.at[0].set(0)]
    words = {tree.fingerprints([y])["0"].word for y in [x, *changed]}
    assert len(words) == 1 + len(changed)


@pytest.mark.parametrize("spec", [P("fsdp"), P(None, "fsdp"), P()])
@pytest.mark.parametrize("devices", [1, 2, 8])
def test_a_fingerprint_does_not_depend_on_the_mesh(devices, spec):
    prints = [
        tree.fingerprints(make_state(abstract_state(n, spec=s), 5))
        for n, s in ((8, P("fsdp")), (devices, spec))
    ]
    assert prints[0] == prints[1]


def test_fingerprints_count_what_is_not_finite():
    x = jnp.array([1, jnp.nan, jnp.inf, -jnp.inf, 3e38], "float32")
    prints = tree.fingerprints({"a": {"x": x}, "n": jnp.arange(3)})
    assert {k: v.strange for k, v in prints.items()} == {"a/x": 3, "n": 0}
