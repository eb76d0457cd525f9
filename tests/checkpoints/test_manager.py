import contextlib
import errno
import json
import resource
import shutil
import sys
import types
from concurrent.futures import Future
from pathlib import Path

import jax
import multiprocess
import pytest
from checkpoints.checkpoint_worker import (
    CONFIG,
    POLICY,
    abstract_state,
    assert_bits,
    flip,
    make_state,
    write,
)
from jax.sharding import PartitionSpec as P

from sd3_jax.checkpoints import manager, restoring, step_folders
from sd3_jax.checkpoints.integrity import UnreadableCheckpoint
from sd3_jax.checkpoints.manager import Checkpoints
from sd3_jax.errors import RetryableError, UserError

WORKER = Path(__file__).with_name("checkpoint_worker.py")


def steps_of(directory):
    return sorted(int(path.name) for path in directory.iterdir())


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A directory with step 3, to be read only."""
    directory = tmp_path_factory.mktemp("saved")
    write(directory, 3)
    return directory


def test_restores_every_bit_and_says_nothing(tmp_path, capfd):
    abstract = write(tmp_path, 3)
    with Checkpoints(tmp_path, **POLICY) as checkpoints:
        state, data, config = checkpoints.restore(abstract)
    assert_bits(state, abstract, seed=3)
    assert (data, config) == ({"next_step": 3}, CONFIG)
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize(
    "devices, spec", [(4, P("fsdp")), (2, P(None, "fsdp")), (1, P())]
)
def test_restores_onto_another_mesh(saved, devices, spec):
    abstract = abstract_state(devices, spec=spec)
    with Checkpoints(saved, **POLICY) as checkpoints:
        state, _, _ = checkpoints.restore(abstract, step=3)
    assert_bits(state, abstract, seed=3)


@pytest.mark.parametrize("which", ["ema", "params"])
def test_restores_weights_alone(saved, which):
    abstract = abstract_state(2)
    weights, step = restoring.restore_params(
        saved, getattr(abstract, which), which=which
    )
    whole, _, _ = Checkpoints(saved, **POLICY).restore(abstract)
    for a, b in zip(*map(jax.tree.leaves, (weights, getattr(whole, which)))):
        assert step == 3 and a.sharding == b.sharding
        assert jax.device_get(a).tobytes() == jax.device_get(b).tobytes()


@pytest.mark.skipif(sys.platform != "linux", reason="counts bytes in /proc")
def test_weights_alone_cost_their_own_bytes(tmp_path):
    abstract = abstract_state(width=1 << 15)
    with Checkpoints(tmp_path, **POLICY) as checkpoints:
        checkpoints.save(1, make_state(abstract, 1), {}, {})
    read = lambda: int(Path("/proc/self/io").read_text().split()[1])
    before = read()
    jax.block_until_ready(restoring.restore_params(tmp_path, abstract.ema))
    size = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(abstract.ema))
    assert size < read() - before < 1.5 * size  # the state has four times as much


def test_buffers_may_be_donated_right_after_save(tmp_path, key):
    sharding = abstract_state().params["head"]["kernel"].sharding
    draw = jax.jit(lambda k: jax.random.normal(k, (1 << 20,)), out_shardings=sharding)
    negate = jax.jit(lambda x: -x, donate_argnums=0)
    state = {"x": draw(key)}  # in buffers that XLA owns
    with Checkpoints(tmp_path, **POLICY) as checkpoints:
        checkpoints.save(1, state, {}, {})
        for _ in range(3):
            state = jax.tree.map(negate, state)
        jax.block_until_ready(state)
        abstract = {"x": jax.ShapeDtypeStruct((1 << 20,), "float32", sharding=sharding)}
        restored, _, _ = checkpoints.restore(abstract)
    assert (restored["x"] == draw(key)).all()


def test_later_changes_of_data_do_not_reach_the_save(tmp_path):
    abstract = abstract_state()
    data = {"next_step": 1}
    with Checkpoints(tmp_path, **POLICY) as checkpoints:
        checkpoints.save(1, make_state(abstract, 1), data, {})
        data["next_step"] = 2
        assert checkpoints.restore(abstract)[1] == {"next_step": 1}


def test_keeps_the_newest_and_every_nth(tmp_path):
    write(tmp_path, *range(1, 10), keep=2, keep_every=4)
    assert steps_of(tmp_path) == [4, 8, 9]


def test_saves_when_due_and_never_before_step_1(tmp_path):
    state = {"x": jax.numpy.ones(3)}
    with Checkpoints(tmp_path, every=2, keep=9, keep_every=None) as checkpoints:
        save = lambda step, **kw: checkpoints.save(step, state, {}, {}, **kw)
        assert [save(s) for s in (-2, 0, 1, 2, 3, 4)] == [False] * 3 + [
            True,
            False,
            True,
        ]
        assert not save(-1, force=True) and not save(0, force=True)
        assert save(5, force=True) and not save(5, force=True)
        checkpoints.wait()
        with pytest.raises(UserError, match="holds step 5 and this run is at 3"):
            save(3)


@pytest.mark.parametrize("policy", [dict(every=0), dict(keep=0), dict(keep_every=-1)])
def test_policy_must_be_positive(tmp_path, policy):
    with pytest.raises(UserError, match="at least 1"):
        Checkpoints(tmp_path, **(POLICY | policy))


def test_incomplete_steps_do_not_count(tmp_path):
    abstract = write(tmp_path, 4)
    (tmp_path / "7").mkdir()  # empty
    shutil.copytree(tmp_path / "4", tmp_path / "6")  # rsync had not finished
    (tmp_path / "6" / step_folders.COMMIT).unlink()
    (tmp_path / f"8{step_folders.TMP}").mkdir()  # a killed save
    with Checkpoints(tmp_path, every=1, keep=1, keep_every=None) as checkpoints:
        assert checkpoints.latest() == 4
        assert not (tmp_path / f"8{step_folders.TMP}").exists()
        assert_bits(checkpoints.restore(abstract)[0], abstract, seed=4)
        with pytest.raises(UserError, match="6 is not a complete .* steps: 4"):
            checkpoints.restore(abstract, step=6)
        for step in (5, 6):  # keep=1 must count neither 6 nor 7 as the newest
            checkpoints.save(step, make_state(abstract, step), {}, CONFIG)
            checkpoints.wait()
            assert checkpoints.latest() == step
        assert_bits(checkpoints.restore(abstract)[0], abstract, seed=6)
    assert steps_of(tmp_path) == [6, 7]


def test_no_checkpoint_is_told(tmp_path):
    with pytest.raises(UserError, match="no complete checkpoint in .*nowhere"):
        restoring.saved_config(tmp_path / "nowhere")


def test_config_can_be_read_alone(saved):
    assert restoring.saved_config(saved) == CONFIG
    assert restoring.saved_config(saved, step=3) == CONFIG


def test_mismatch_names_the_leaves(saved):
    abstract = abstract_state()
    kernel = abstract.params["head"]["kernel"]
    params = {"head": {"kernel": kernel.update(dtype="bfloat16")}, "new": kernel}
    with pytest.raises(UserError) as error:
        Checkpoints(saved, **POLICY).restore(abstract.replace(params=params))
    message = str(error.value)
    assert "1 missing, 2 extra, 1 of another dtype or shape" in message
    assert "params/new is missing" in message
    assert "params/block/bias is not known" in message
    assert "params/head/kernel is float32[16, 24], expected bfloat16[16, 24]" in message


def test_mismatch_is_one_line_of_at_most_ten_names(saved):
    with pytest.raises(UserError) as error:
        Checkpoints(saved, **POLICY).restore(abstract_state(width=32))
    message = str(error.value)
    assert "0 missing, 0 extra, 12 of another dtype or shape" in message
    assert message.count("expected") == 10 and "\n" not in message


def test_weights_are_compared_too(saved):
    with pytest.raises(UserError, match="3 of another dtype or shape"):
        restoring.restore_params(saved, abstract_state(width=32).ema)


@pytest.mark.parametrize(
    "file", ["state/_METADATA", "state/manifest.ocdbt", "data/data.json"]
)
def test_damage_is_told_in_one_line(tmp_path, file):
    abstract = write(tmp_path, 3)
    (tmp_path / "3" / file).write_text("")
    with pytest.raises(UnreadableCheckpoint) as error:
        Checkpoints(tmp_path, **POLICY).restore(abstract)
    message = str(error.value)
    assert str(tmp_path / "3") in message and "\n" not in message and len(message) < 500


@contextlib.contextmanager
def full_disk():
    """No file may grow beyond 10 kB."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_full_disk_ends_the_next_save(tmp_path, capfd):
    abstract = write(tmp_path, 1)
    state = make_state(abstract_state(width=1 << 12), 2)
    checkpoints = Checkpoints(tmp_path, **POLICY)
    with full_disk():
        assert checkpoints.save(2, state, {}, CONFIG)
        with pytest.raises(UserError) as error:
            checkpoints.save(3, state, {}, CONFIG)
    message = str(error.value)
    assert f"saving {tmp_path / '2'} failed" in message and "\n" not in message
    assert capfd.readouterr().err == ""
    assert checkpoints.latest() == 1
    assert_bits(checkpoints.restore(abstract)[0], abstract, seed=1)
    assert checkpoints.save(4, state, {}, CONFIG)
    checkpoints.close()
    assert checkpoints.latest() == 4


def test_close_reports_a_failed_save(tmp_path):
    state = make_state(abstract_state(width=1 << 12), 1)
    with full_disk(), pytest.raises(UserError, match=f"saving {tmp_path}/1 failed"):
        with Checkpoints(tmp_path, **POLICY) as checkpoints:
            checkpoints.save(1, state, {}, {})


def test_the_first_error_is_the_one_shown(tmp_path):
    state = make_state(abstract_state(width=1 << 12), 1)
    with full_disk(), pytest.raises(ZeroDivisionError) as error:
        with Checkpoints(tmp_path, **POLICY) as checkpoints:
            checkpoints.save(1, state, {}, {})
            raise ZeroDivisionError
    assert f"saving {tmp_path}/1 failed" in error.value.__notes__[0]


def test_a_vanished_directory_is_told_at_once(tmp_path):
    directory = tmp_path / "run"
    checkpoints = Checkpoints(directory, **POLICY)
    directory.rmdir()
    directory.write_text("")
    with pytest.raises(UserError, match=f"saving {directory}/1 failed"):
        checkpoints.save(1, {"x": jax.numpy.ones(3)}, {}, {})


def test_a_directory_that_another_took_the_place_of_has_vanished(tmp_path):
    """As a save in flight makes one, where a disk came back empty."""
    directory, state = tmp_path / "run", {"x": jax.numpy.ones(3)}
    checkpoints = Checkpoints(directory, **POLICY)
    assert checkpoints.save(1, state, {}, {})
    checkpoints.wait()
    directory.rename(tmp_path / "gone")
    directory.mkdir()
    with pytest.raises(UserError, match=f"saving {directory}/2 failed: .* vanished"):
        checkpoints.save(2, state, {}, {})


def test_a_save_that_waits_for_a_vanished_directory_ends(tmp_path, monkeypatch):
    monkeypatch.setattr(manager, "LOOK", 0.05)
    checkpoints = Checkpoints(tmp_path / "run", **POLICY)
    checkpoints._saving = Future()  # its processes wait for each other
    (tmp_path / "run").rmdir()
    with pytest.raises(UserError, match="saving failed: .*run has vanished"):
        checkpoints.close()


def test_a_place_that_cannot_be_written_is_told_at_once(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write checkpoints to .*file"):
        Checkpoints(tmp_path / "file", **POLICY)


def test_killed_while_saving_leaves_the_step_before(tmp_path):
    (process,) = multiprocess.run([WORKER, "die", tmp_path], processes=1, devices=8)
    assert process.returncode == -9, process.stderr
    assert (tmp_path / f"2{step_folders.TMP}").exists()
    abstract = write(tmp_path)  # opens and closes
    assert steps_of(tmp_path) == [1]
    with Checkpoints(tmp_path, **POLICY) as checkpoints:
        state, data, _ = checkpoints.restore(abstract)
        assert_bits(state, abstract, seed=1)
        assert data == {"next_step": 1}
        assert checkpoints.save(2, make_state(abstract, 2), {}, CONFIG)
    assert checkpoints.latest() == 2


def answers(results):
    """The last line each process printed; gloo prints before it."""
    assert [r.returncode for r in results] == [0, 0], results[0].stderr
    return [json.loads(r.stdout.splitlines()[-1]) for r in results]


def test_two_processes_restore_and_save(tmp_path):
    write(tmp_path, 3)
    results = multiprocess.run([WORKER, "exchange", tmp_path])
    expected = dict(latest=3, data={"next_step": 3}, config=CONFIG, saved=True)
    assert answers(results) == [expected, expected]
    abstract = abstract_state(4)
    with Checkpoints(tmp_path, **POLICY) as checkpoints:
        assert checkpoints.latest() == 5
        assert_bits(checkpoints.restore(abstract)[0], abstract, seed=5)


@pytest.mark.parametrize("part", ["state/ocdbt.process_0/d/*", "about/data.json"])
def test_two_processes_go_back_together(tmp_path, part):
    write(tmp_path, 1, 2)
    (path,) = (tmp_path / "2").glob(part)
    flip(path, 8 * (path.stat().st_size // 2) + 2)
    results = multiprocess.run([WORKER, "fall_back", tmp_path])
    expected = dict(data={"next_step": 2}, saved=True)
    assert answers(results) == [expected, expected]
    assert {path.name for path in tmp_path.iterdir()} == {"1", "2", "damaged-2"}


@pytest.mark.parametrize("verb", ["preempt", "run_out_of_time"])
def test_processes_that_are_to_stop_save_the_same_step(verb, tmp_path):
    results = multiprocess.run([WORKER, verb, tmp_path])
    a, b = answers(results)
    assert a == b and a["saved"] and a["step"] > 5
    assert steps_of(tmp_path) == [a["step"]]


@pytest.mark.parametrize(("grace", "warnings"), [(None, 0), (3600.0, 0), (0.0, 1)])
def test_it_says_how_long_a_save_takes_and_warns_once(
    tmp_path, caplog, grace, warnings
):
    """With SIGKILL that soon after SIGTERM, the last save of a run would not fit."""
    state = {"x": jax.numpy.ones(3)}
    policy = dict(every=1, keep=9, keep_every=None, grace=grace)
    with caplog.at_level("INFO"), Checkpoints(tmp_path, **policy) as checkpoints:
        for step in (1, 2):
            checkpoints.save(step, state, {}, {})
        checkpoints.wait()
    seconds = [r.args[1] for r in caplog.records if "saved step" in r.msg]
    assert all(0 < x < 60 for x in seconds)
    texts = [record.getMessage() for record in caplog.records]
    assert sum("saved step" in text for text in texts) == 2
    assert sum("lower --config.checkpoint.every" in text for text in texts) == warnings


@pytest.mark.parametrize(("grace", "warns"), [(11.0, False), (10.9, True)])
def test_two_saves_and_a_step_must_fit(tmp_path, caplog, grace, warns):
    """SIGTERM may come just after a save began."""
    policy = dict(every=2, keep=9, keep_every=None, grace=grace)
    with Checkpoints(tmp_path, **policy) as checkpoints:
        checkpoints.step_seconds = 3.0
        checkpoints._log_seconds(tmp_path / "2", 4.0)
    assert ("two saves of 4.0 s and a step of 3.0 s" in caplog.text) == warns


def test_it_measures_the_time_of_a_step(tmp_path, monkeypatch):
    state = {"x": jax.numpy.ones(3)}
    now = 0.0
    clock = types.SimpleNamespace(monotonic=lambda: now)
    monkeypatch.setattr(manager, "time", clock)
    with Checkpoints(tmp_path, every=4, keep=9, keep_every=None) as checkpoints:
        for step in range(1, 5):
            now += 10.0
            checkpoints.save(step, state, {}, {})
        assert checkpoints.step_seconds == 10.0


def test_storage_that_does_not_answer_is_no_mistake(tmp_path, monkeypatch):
    checkpoints = Checkpoints(tmp_path, **POLICY)

    def unreachable(*_, **__):
        raise OSError(errno.ESTALE, "stale file handle")

    monkeypatch.setattr(manager.ocp, "save_checkpointables_async", unreachable)
    with pytest.raises(RetryableError, match="saving .*stale file handle"):
        checkpoints.save(POLICY["every"], {"x": jax.numpy.ones(3)}, {}, {})
