"""Votes without a server: sources, storage, the choice of pairs, statistics, export."""

import contextlib
import json
import math
import sqlite3
import threading
from collections import Counter

import choix
import numpy as np
import pytest
from etils import epath
from sklearn.metrics import cohen_kappa_score
from vote_folders import painted, picture, plain_folder, sample_folder

from sd3_jax.data import records, shards
from sd3_jax.data.prompt_sheet import PromptRow
from sd3_jax.errors import UserError
from sd3_jax.tools.votes import (
    ballot_box,
    picture_sources,
    preference_export,
    vote_results,
    vote_statistics,
    voters,
)
from sd3_jax.tools.votes.ballot_box import BallotBox, Conflict, StorageFailed, Vote
from sd3_jax.tools.votes.pair_choice import PairChoice, left_side
from sd3_jax.tools.votes.picture_sources import Pair

PROMPTS = [f"a picture of {i}" for i in range(6)]


def ballot(pair: Pair, winner="first", *, voter="anna", id="", **changes) -> Vote:
    id = id or f"{pair.id}{voter}{changes}"
    vote = Vote(id, voter, pair.id, *pair, "prompt", 0, winner, "first", 1.0)
    return vote._replace(**changes)


def read(*folders, rows=()):
    """Sources, pairs and problems of folders."""
    named = picture_sources.named_folders([str(folder) for folder in folders])
    sources = [picture_sources.read_source(k, x, rows) for k, x in named.items()]
    pairs, problems = picture_sources.pairs(sources, rows)
    return sources, pairs, [x for s in sources for x in s.problems] + problems


# --- sources


def test_sources_are_paired_by_prompt_and_number(tmp_path):
    a = sample_folder(tmp_path / "a", PROMPTS[:3], per_prompt=2)
    b = sample_folder(tmp_path / "b", PROMPTS[2:4], per_prompt=1)
    _, pairs, problems = read(a, b)
    assert pairs == [Pair(PROMPTS[2], 0, "a", "b")]
    # 5 of a without a partner in b, 1 of b without one in a.
    assert len(problems) == 6 and f'a: no picture 0 of "{PROMPTS[3]}"' in problems


def test_a_plain_folder_has_its_prompts_in_files_or_in_numbers(tmp_path):
    rows = [PromptRow(prompt) for prompt in PROMPTS]
    a = plain_folder(tmp_path / "a", PROMPTS[:2], captions=True)
    b = plain_folder(tmp_path / "b", PROMPTS[:2], captions=False)
    picture(b / "0099.png")
    _, pairs, problems = read(a, b, rows=rows)
    assert [pair.prompt for pair in pairs] == PROMPTS[:2]
    assert "b: 0099.png: prompt 99 of 6 in config.vote.prompts" in problems
    assert sum("no picture 0" in x for x in problems) == 2 * 4  # prompts 2 to 5


def test_pictures_that_cannot_be_compared_are_named(tmp_path):
    a = sample_folder(tmp_path / "a", PROMPTS)
    b = sample_folder(tmp_path / "b", PROMPTS)
    (b / "samples/0000.png").unlink()
    lines = (b / "samples.jsonl").read_text().split("\n")
    lines[1] = json.dumps(json.loads(lines[1]) | {"filtered": "nudity"})
    lines[2] = json.dumps(json.loads(lines[2]) | {"file": "../a/samples/0002.png"})
    lines[3] = lines[3][:40]  # as a kill leaves it
    (b / "samples.jsonl").write_text("\n".join(lines))
    _, pairs, problems = read(a, b)
    assert [pair.prompt for pair in pairs] == PROMPTS[4:]
    text = "\n".join(problems)
    for complaint in (
        *("0000.png: no such picture", "0001.png: black, because sample.filter"),
        *("line 3: file ../a/samples/0002.png: expected a path below", "line 4: "),
    ):
        assert complaint in text


def test_a_vote_needs_two_folders_with_the_same_prompts(tmp_path):
    a = sample_folder(tmp_path / "a", PROMPTS[:2])
    b = sample_folder(tmp_path / "b", PROMPTS[2:])
    for folders, complaint in (
        ([a], "1 folder of pictures; a vote compares two"),
        ([a, a], 'two sources are called "a"'),
        ([a, f"again={a}"], "the same folder twice"),
        ([a, tmp_path / "none"], "no such folder"),
        ([a, b], "no prompt has a picture in two sources"),
        ([a, tmp_path], "holds no picture with a prompt"),
    ):
        with pytest.raises(UserError, match=complaint):
            read(*folders)


# --- storage


def test_a_vote_is_stored_once_by_its_id_and_once_by_its_pair(tmp_path):
    box, pair = BallotBox(tmp_path), Pair("a fox", 0, "a", "b")
    vote = ballot(pair, id="1")
    assert box.cast(vote) and not box.cast(vote._replace(seconds=2.0))
    with pytest.raises(Conflict, match="judged the pair already"):
        box.cast(vote._replace(id="2", winner="tie"))
    with pytest.raises(Conflict, match="another vote"):
        box.cast(vote._replace(winner="second"))
    assert box.withdraw("anna", "1") == (vote, True)
    assert box.withdraw("anna", "1") == (vote, False)  # the request again
    assert box.withdraw("ben", "1") is None
    assert not box.cast(vote) and not box.votes()  # a late repeat does not vote again
    assert box.cast(vote._replace(id="2", winner="tie"))
    assert [x.winner for x in BallotBox(tmp_path).votes()] == ["tie"]


def test_every_vote_is_synced_to_the_disk(tmp_path):
    box = BallotBox(tmp_path)
    pragma = lambda name: box._connection.execute(f"PRAGMA {name}").fetchone()[0]
    assert pragma("journal_mode") == "wal" and pragma("synchronous") == 2  # FULL


def test_a_full_disk_refuses_the_vote_and_loses_none(tmp_path):
    box, stored = BallotBox(tmp_path), []
    pages = box._connection.execute("PRAGMA page_count").fetchone()[0]
    box._connection.execute(f"PRAGMA max_page_count = {pages + 2}")
    with pytest.raises(StorageFailed, match="disk is full"):
        for i in range(10_000):
            pair = Pair("a fox " * 50, i, "a", "b")
            box.cast(ballot(pair))
            stored.append(pair.id)
    assert [vote.pair for vote in box.votes()] == stored
    box._connection.execute("PRAGMA max_page_count = 100000")
    assert box.cast(ballot(Pair("a fox " * 50, len(stored), "a", "b")))


def test_threads_lose_no_vote_and_store_none_twice(tmp_path):
    box = BallotBox(tmp_path)
    pairs = [Pair("a fox", i, "a", "b") for i in range(40)]
    outcomes = Counter()

    def voter(name, tag):
        for pair in pairs:
            try:
                outcomes[box.cast(ballot(pair, voter=name, id=f"{tag}{pair.id}"))] += 1
            except Conflict:
                outcomes["conflict"] += 1

    # Two windows of anna's race for each pair; ben has one.
    names = [("anna", 1), ("anna", 2), ("ben", 3)]
    threads = [threading.Thread(target=voter, args=x) for x in names]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert outcomes == {True: 80, "conflict": 40}
    assert Counter(vote.voter for vote in box.votes()) == {"anna": 40, "ben": 40}


def test_a_database_of_another_version_is_refused(tmp_path):
    with contextlib.closing(sqlite3.connect(tmp_path / ballot_box.FILE)) as connection:
        connection.execute("PRAGMA user_version = 9")
    with pytest.raises(UserError, match="version 9"):
        BallotBox(tmp_path)
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / ballot_box.FILE).write_bytes(b"not a database" * 100)
    with pytest.raises(UserError, match="not a database"):
        BallotBox(tmp_path / "b")
    with pytest.raises(UserError, match="no votes.sqlite"):
        ballot_box.read_votes(tmp_path / "none")


# --- the choice of pairs

THREE = [
    Pair(prompt, number, a, b)
    for prompt in PROMPTS
    for number in (0, 1)
    for a, b in (("a", "b"), ("a", "c"), ("b", "c"))
]


def judge(choice: PairChoice, voter: str, skipped=(), held=()):
    """The voter's next (pair, again), after which all its questions are answered."""
    chosen = choice.next(voter, skipped, held)
    if chosen:
        for question in choice.open_questions(voter, chosen[0].id, chosen[1]):
            vote = ballot(chosen[0], voter=voter, question=question, again=chosen[1])
            choice.count(vote)
    return chosen


def test_the_least_judged_pair_comes_first():
    choice, shown = PairChoice(THREE, ["prompt", "aesthetics"]), Counter()
    matches, cells = Counter(), Counter()
    for turn in range(72):
        pair, _ = judge(choice, ("anna", "ben", "cleo", "dora")[turn % 4])
        shown[pair] += 1
        matches[pair[2:]] += 1
        cells[pair.prompt, *pair[2:]] += 1
        # At any time the numbers of judgements differ by one at most.
        assert max(matches.values()) - min(matches[x[2:]] for x in THREE) <= 1
        least = min(cells[x.prompt, *x[2:]] for x in THREE)
        assert max(cells.values()) - least <= 1
    # Two pictures of a prompt may differ by more: a voter does not see one twice.
    assert len(shown) == len(THREE) and max(shown.values()) <= 3


def test_a_voter_sees_each_pair_once_and_in_an_order_of_their_own():
    orders = {}
    for voter in "anna", "ben":
        choice = PairChoice(THREE, ["prompt"], seed=1)
        orders[voter] = [judge(choice, voter)[0] for _ in THREE]
        assert sorted(orders[voter]) == sorted(THREE)
        assert judge(choice, voter) is None
    assert orders["anna"] != orders["ben"]


def test_what_a_page_has_is_not_offered_again_and_half_judged_pairs_come_first():
    choice = PairChoice(THREE, ["prompt", "aesthetics"])
    pair, _ = choice.next("anna", (), ())
    choice.count(ballot(pair))
    assert choice.next("anna", (), ()) == (pair, 0)  # as after a reload
    assert choice.open_questions("anna", pair.id, 0) == ("aesthetics",)
    other, _ = choice.next("anna", {(pair.id, 0)}, ())
    assert other != pair
    # Ben gets another match: anna looks at this one.
    assert choice.next("ben", (), [other.id, pair.id])[0][2:] != other[2:]
    choice.count(ballot(pair), -1)
    assert choice.open_questions("anna", pair.id, 0) == ("prompt", "aesthetics")


def test_a_share_of_pairs_is_judged_again():
    pairs = [Pair("a fox", i, "a", "b") for i in range(100)]
    choice, order = PairChoice(pairs, ["prompt"], again=0.1), []
    while chosen := judge(choice, "anna"):
        order.append(chosen)
    repeats = [pair for pair, again in order if again]
    assert len(repeats) == len(set(repeats)) == 10
    for pair in repeats:
        assert order.index((pair, 1)) - order.index((pair, 0)) > 10


def test_sides_are_a_fair_coin():
    sides = Counter(
        left_side(0, "anna", pair.id, again) for pair in THREE * 9 for again in (0, 1)
    )
    assert set(sides) == {"first", "second"}
    many = [left_side(0, "anna", str(i), 0) == "first" for i in range(4_000)]
    assert abs(np.mean(many) - 0.5) < 4 * 0.5 / math.sqrt(4_000)


def test_tokens_are_kept_and_secret(tmp_path):
    first = voters.load(tmp_path, ["anna", "ben"])
    again = voters.load(tmp_path, ["anna"])
    assert again.tokens == {"anna": first.tokens["anna"]}
    assert (tmp_path / voters.FILE).stat().st_mode & 0o777 == 0o600
    assert first.name(first.tokens["ben"]) == "ben"
    assert (
        first.name("") is first.name("ben") is again.name(first.tokens["ben"]) is None
    )
    assert voters.load(tmp_path, []).name("Zoë") == "Zoë"
    for bad in "", "a/b", " a", "a" * 49, "a\ud800", "<b>":
        with pytest.raises(UserError, match="expected names of letters"):
            voters.load(tmp_path, [bad])


# --- statistics


def test_strengths_of_two_sources_are_the_log_odds():
    strengths = vote_statistics.bradley_terry(np.array([[0, 300.0], [100, 0]]))
    np.testing.assert_allclose(np.diff(strengths), -np.log(3), atol=1e-3)
    assert abs(strengths.sum()) < 1e-12


def test_strengths_are_choix_s_of_the_single_comparisons():
    truth, names = np.array([1.0, 0.2, -0.3, -0.9]), list("abcd")
    data = choix.generate_pairwise(truth, 400)
    outcomes = [("p", names[i], names[j], "first") for i, j in data]
    expected = choix.ilsr_pairwise(4, data, alpha=vote_statistics.ALPHA)
    wins = vote_statistics.win_matrix(outcomes, names)
    got = vote_statistics.bradley_terry(wins.sum(0))
    np.testing.assert_allclose(got, expected - expected.mean(), atol=1e-6)
    tied = vote_statistics.win_matrix(
        [("p", "a", "d", "tie"), ("p", "a", "d", "bad")], names
    )
    assert tied.sum() == 1 and tied[0, 0, 3] == tied[0, 3, 0] == 0.5


def test_bootstrap_intervals_cover_the_truth():
    rng, truth, covered = np.random.default_rng(1), np.array([0.6, 0.0, -0.6]), 0
    odds = 1 / (1 + np.exp(truth[None] - truth[:, None]))  # (n, n), i beats j
    for trial in range(8):
        upper = np.triu(rng.binomial(2, odds, (60, 3, 3)), 1).astype(float)
        lower = np.triu(np.full((60, 3, 3), 2.0) - upper, 1).swapaxes(1, 2)
        low, high = vote_statistics.strength_intervals(
            upper + lower, seed=trial, resamples=60
        )
        covered += ((low <= truth) & (truth <= high)).sum()
    assert covered >= 20  # of 24; 95 % are 23


def test_agreement_is_the_published_example_s():
    # Krippendorff 2011, section C: four observers, twelve units; alpha is 0.743.
    observers = (
        "1 2 3 3 2 1 4 1 2 . . .",
        "1 2 3 3 2 2 4 1 2 5 . 3",
        ". 3 3 3 2 3 4 2 2 5 1 .",
        "1 2 3 3 2 4 4 1 2 5 1 .",
    )
    answers = [
        (unit, value)
        for row in observers
        for unit, value in enumerate(row.split())
        if value != "."
    ]
    alpha, units = vote_statistics.krippendorff_alpha(answers)
    assert round(alpha, 3) == 0.743 and units == 11
    assert vote_statistics.krippendorff_alpha([(1, "tie"), (1, "tie")]) == (None, 1)
    assert vote_statistics.krippendorff_alpha([(1, "tie"), (2, "tie")]) == (None, 0)


def test_agreement_of_two_voters_is_near_cohen_s_kappa():
    """With equal marginals and many units the two are the same."""
    rng = np.random.default_rng(0)
    a = rng.integers(0, 3, 5_000)
    b = np.where(rng.random(5_000) < 0.6, a, rng.permutation(a))
    answers = [*enumerate(a.tolist()), *enumerate(b.tolist())]
    alpha, _ = vote_statistics.krippendorff_alpha(answers)
    assert abs(alpha - cohen_kappa_score(a, b)) < 2e-3


def test_results_count_each_outcome_once():
    pairs = [Pair(prompt, 0, "a", "b") for prompt in PROMPTS]
    winners = ("first", "first", "first", "second", "tie", "bad")
    votes = [ballot(pair, winner) for pair, winner in zip(pairs, winners)]
    votes += [ballot(pairs[0], "second", again=1), ballot(pairs[1], "first", again=1)]
    votes += [ballot(pairs[0], "first", voter="ben")]
    rows = [PromptRow(x, "Animals" if i < 2 else "Arts") for i, x in enumerate(PROMPTS)]
    results = vote_results.summary(votes, rows)
    (match,) = results["questions"]["prompt"]["matches"]
    everything, animals, arts = match["rates"]
    assert [everything[x] for x in ballot_box.WINNERS] == [4, 1, 1, 1]
    # Wilson's interval of 4 of 5, by its formula.
    n, p, z = 5, 0.8, 1.959964
    middle = (p + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z / (1 + z**2 / n) * math.sqrt(p * (1 - p) / n + z**2 / (4 * n**2))
    rate = everything["rate"]
    np.testing.assert_allclose(
        [rate["low"], rate["high"]], [middle - half, middle + half]
    )
    assert (animals["category"], animals["first"], arts["second"]) == ("Animals", 3, 1)
    assert results["votes"] == 7 and results["voters"] == 2
    assert results["consistency"]["score"] == 0.5
    assert results["questions"]["prompt"]["agreement"]["pairs"] == 1
    assert json.loads(json.dumps(results, allow_nan=False)) == results
    losses = vote_results.clearest_losses(vote_results.verdicts(votes), "b", 9)
    assert [x.margin for x in losses] == [2, 1, 1]


# --- export


def export(tmp_path, votes, **options):
    sources, _, _ = read(tmp_path / "a", tmp_path / "b")
    return preference_export.write_preferences(
        vote_results.verdicts(votes),
        {source.name: source for source in sources},
        epath.Path(tmp_path / "out"),
        **{"held_out": 0.3, **options},
    )


def test_pictures_that_were_not_enlarged_are_as_they_are():
    image = np.arange(8 * 8 * 3, dtype=np.uint8).reshape(8, 8, 3)
    enlarged = image.repeat(4, 0).repeat(4, 1)
    for given, size, small in (
        (enlarged, (8, 8), image),
        (image, (16, 16), image),  # smaller than its line says
        (image, (8, 8), image),
        (image, None, image),
    ):
        painted = preference_export.painted_pixels(given, size)
        np.testing.assert_array_equal(painted, small)


def test_a_repeat_of_a_withdrawn_answer_is_left_out():
    pair, other = (Pair(prompt, 0, "a", "b") for prompt in PROMPTS[:2])
    votes = [ballot(pair, "first"), ballot(pair, "first", again=1)]
    votes += [ballot(other, "first", again=1)]
    rows = [PromptRow(prompt, "Arts") for prompt in PROMPTS]
    assert vote_results.summary(votes, rows)["consistency"]["score"] == 1


def test_export_writes_the_majority_s_picture_first(tmp_path):
    for name in "ab":
        # 8 x 8 pictures, which `sample` writes enlarged by 12.
        sample_folder(tmp_path / name, PROMPTS, per_prompt=2, side=8, enlarged=12)
    _, pairs, _ = read(tmp_path / "a", tmp_path / "b")
    winner = {pair: "first" if i % 3 else "second" for i, pair in enumerate(pairs)}
    votes = [ballot(x, winner[x], voter=v) for x in pairs for v in ("anna", "ben")]
    votes = [x._replace(winner="tie") if x.pair == pairs[0].id else x for x in votes]
    votes[2:4] = [votes[2]._replace(winner="bad"), votes[3]._replace(winner="bad")]
    votes[4:6] = [votes[4]._replace(winner="first"), votes[5]._replace(winner="second")]
    exported = export(tmp_path, votes)
    assert exported.dropped == {
        "ties": 1,
        "both bad": 1,
        "with as many votes for each picture": 1,
    }
    sources, _, _ = read(tmp_path / "a", tmp_path / "b")
    folders, captions = {x.name: x for x in sources}, {}
    for split, paths in exported.shards.items():
        (path,) = paths
        assert path.name == f"{split}-00000-8x8.arecord"
        reader = shards.open_shard(str(path))
        rows = [records.decode(x, "") for x in reader.read_all()]
        assert len(rows) == exported.written[split]
        captions[split] = {row.caption for row in rows}
        for row in rows:
            (pair,) = (x for x in pairs if f"vote {x.id}" == row.source)
            names = pair[2:] if winner[pair] == "first" else pair[:1:-1]
            for field, name in zip(("image", "rejected_image"), names):
                expected = painted(folders[name].pictures[pair.key], 8)
                np.testing.assert_array_equal(row.tensors[field], expected)
    assert captions["train"].isdisjoint(captions["val"])


def test_an_export_without_decided_pairs_says_why(tmp_path):
    for name in "ab":
        sample_folder(tmp_path / name, PROMPTS)
    _, pairs, _ = read(tmp_path / "a", tmp_path / "b")
    with pytest.raises(UserError, match="no preference for train and val.*6 ties"):
        export(tmp_path, [ballot(pair, "tie") for pair in pairs])
    with pytest.raises(UserError, match="no preference for train: of 1 pairs 1"):
        export(tmp_path, [ballot(pairs[0])])
    (tmp_path / "b/samples/0001.png").write_bytes(b"no picture")
    exported = export(tmp_path, [ballot(pair) for pair in pairs], held_out=0.0)
    assert exported.written == {"train": 5, "val": 0}
    assert exported.dropped == {"unreadable": 1} and not exported.shards["val"]


def test_the_split_of_a_prompt_depends_on_few_others():
    few = preference_export.held_out_prompts(PROMPTS * 3, 0.5, seed=0)
    many = [*PROMPTS, *(f"another {i}" for i in range(60))]
    more = preference_export.held_out_prompts(many, 0.5, seed=0)
    assert len(few) == 3 and len(more) == 33
    assert few != preference_export.held_out_prompts(PROMPTS, 0.5, seed=3)
