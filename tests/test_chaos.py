"""Some of what make chaos throws at runs.

The rest is in tests/checkpoints/test_integrity.py.

All are slow. Each promise has a quicker test beside what keeps it: a killed run ends as
the unbroken one (jobs/test_train.py), processes exchange and save together
(checkpoints/test_manager.py), and one that fails ends the others
(distributed/test_processes.py).
"""

import random

import chaos
import pytest

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    folder = tmp_path_factory.mktemp("unbroken")
    chaos.whole(folder)
    return chaos.final(folder)


def held(outcome):
    assert outcome.detected == outcome.recovered == outcome.tries, outcome
    return outcome


def test_killed_at_random_it_ends_as_the_unbroken_run(tmp_path, unbroken):
    outcome = held(chaos.kills(random.Random(5), tmp_path, unbroken, 3))
    assert outcome.lost <= 3 * 2 * chaos.EVERY


def test_told_to_stop_all_save_the_same_step(tmp_path, unbroken):
    assert held(chaos.terms(random.Random(0), tmp_path, unbroken, 1)).lost == 0


def test_told_to_stop_one_process_saves_too(tmp_path):
    assert held(chaos.term_alone(random.Random(0), tmp_path)).lost == 0


def test_a_process_that_stands_still_is_ended_and_its_peer_follows(tmp_path, unbroken):
    held(chaos.stuck(tmp_path, unbroken))


def test_a_nan_stops_the_run_and_is_not_saved(tmp_path):
    held(chaos.nan_stops(tmp_path))


def test_a_nan_may_be_skipped(tmp_path):
    held(chaos.nan_is_skipped(tmp_path))


def test_a_full_disk_leaves_what_was_saved(tmp_path):
    held(chaos.full_disk(tmp_path))


def test_a_folder_that_vanishes_is_told_of(tmp_path):
    held(chaos.vanished(tmp_path))
