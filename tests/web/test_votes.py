import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path

import pytest
from conftest import ROOT
from tiny import write_jsonl

from corpus.readers import iter_records
from corpus.records import to_pair
from engine.disk import DiskFullError
from engine.generation import Sampling
from web.votes import CHOICES, Comparison, Side, Standing, Votes, record_of, shuffle_sides

QUESTION = [{"role": "user", "content": "红烧肉怎么做？"}]
VOTE = """
import sys
from pathlib import Path
from web.votes import Comparison, Side, Votes
votes = Votes(Path(sys.argv[1]))
for number in range(int(sys.argv[2])):
    sides = Side("a", 1, f"好{number}" * 2000), Side("b", 2, "乙")
    asked = Comparison([{"role": "user", "content": "问"}], {}, *sides)
    votes.add(asked, "left", sides[0].reply, sides[1].reply)
    print(asked.id, flush=True)
"""


def comparison(models=("sft/a", "dpo/b"), left="甲", right="乙", question=QUESTION) -> Comparison:
    one, other = models
    sampling = asdict(Sampling(9))
    return Comparison(question, sampling, Side(one, 1, left), Side(other, 2, right))


def vote(votes: Votes, asked: Comparison, choice: str):
    votes.add(asked, choice, asked.left.reply, asked.right.reply)


def lines(path: Path) -> list[dict]:
    return [record for _, record in iter_records(path)]


@pytest.fixture
def votes(tmp_path) -> Votes:
    return Votes(tmp_path / "pairs.jsonl")


@pytest.mark.parametrize(("choice", "pair"), [("left", ("甲", "乙")), ("right", ("乙", "甲"))])
def test_a_winner_makes_a_pair_that_training_reads(votes, choice, pair):
    asked = comparison()
    vote(votes, asked, choice)
    [record] = lines(votes.path)
    assert record["instruction"] == "红烧肉怎么做？"
    assert to_pair(record) == (QUESTION, *pair)
    label = record["vote"]
    assert label["choice"] == choice
    assert label["left"] == "sft/a"
    assert label["right"] == "dpo/b"
    assert label["seeds"] == {"left": 1, "right": 2}
    assert label["sampling"] == asked.sampling
    assert not label["edited"]
    assert label["time"].startswith(time.strftime("%Y-", time.gmtime()))


def test_a_system_message_and_a_question_like_a_transcript_stay_what_they_are(votes):
    question = [{"role": "system", "content": "简短。"}, *QUESTION]
    transcript = [{"role": "user", "content": "Human: 一\nAssistant: 二\nHuman: 三"}]
    for messages in (question, transcript):
        vote(votes, comparison(question=messages), "left")
    assert [to_pair(record)[0] for record in lines(votes.path)] == [question, transcript]


@pytest.mark.parametrize("choice", ["both_good", "both_bad"])
def test_without_a_winner_there_is_no_pair_but_a_vote(votes, choice):
    vote(votes, comparison(), choice)
    assert not votes.path.exists()
    assert json.loads(votes.ties.read_text("utf-8"))["vote"]["choice"] == choice
    assert votes.standings() == [Standing(("dpo/b", "sft/a"), 0, 0, 1)]


@pytest.mark.parametrize(
    ("choice", "texts", "expected"),
    [
        ("left", ("改", "乙"), ("改", "乙", True)),
        ("left", ("甲", "改"), ("甲", "乙", False)),  # the loser's own reply is rejected
        ("both_bad", ("改", "乙"), ("改", "甲", True)),
        ("both_good", ("甲", "改"), ("改", "乙", True)),
    ],
)
def test_a_reply_that_was_changed_by_hand_is_the_chosen_one(choice, texts, expected):
    record = record_of(comparison(), choice, *texts)
    assert (record["chosen"], record["rejected"], record["vote"]["edited"]) == expected


def test_a_text_box_changes_ends_of_lines_and_that_is_no_change_by_hand():
    record = record_of(comparison(left="一\r\n二\r三"), "both_bad", "一\n二\n三", "乙")
    assert "chosen" not in record
    record = record_of(comparison(left="一\r\n二"), "left", "一\n二", "乙")
    assert record["chosen"] == "一\r\n二"


def test_two_changed_replies_need_a_winner(votes):
    with pytest.raises(ValueError, match="Both replies were changed: say which is better"):
        votes.add(comparison(), "both_bad", "改", "改")
    assert votes.standings() == []


def test_a_comparison_has_one_vote(votes):
    asked = comparison()
    vote(votes, asked, "both_good")
    with pytest.raises(ValueError, match="This comparison has its vote already"):
        vote(votes, asked, "left")
    assert votes.standings()[0].count == 1


def test_either_side_counts_for_the_same_model(votes):
    for choice in ("left", "right", "both_bad"):
        vote(votes, comparison(("a", "b")), choice)
        vote(votes, comparison(("b", "a")), choice)
    vote(votes, comparison(("b", "a")), "right")
    [standing] = votes.standings()
    assert standing == Standing(("a", "b"), wins=3, losses=2, ties=2)
    rate, low, high = standing.win_rate
    assert rate == pytest.approx(4 / 7)
    assert low == pytest.approx(0.2505, abs=1e-3)
    assert high == pytest.approx(0.8418, abs=1e-3)


def test_a_model_against_itself_has_no_losses(votes):
    for choice in CHOICES:
        vote(votes, comparison(("a", "a")), choice)
    assert votes.standings() == [Standing(("a", "a"), wins=2, losses=0, ties=2)]


def test_undo_takes_out_that_vote_and_no_other(tmp_path):
    own = {"instruction": "问", "chosen": "好", "rejected": "坏", "vote": 3}
    votes = Votes(Path(write_jsonl(tmp_path / "pairs.jsonl", [own])))
    asked = [comparison() for _ in range(4)]
    for one, choice in zip(asked, ("left", "both_bad", "right", "left"), strict=True):
        vote(votes, one, choice)
    assert votes.count_pairs() == 4
    assert votes.undo(asked[2].id)
    assert votes.undo(asked[1].id)
    assert not votes.undo(asked[2].id)
    left = [record["vote"] for record in lines(votes.path)]
    assert left[0] == 3
    assert [label["id"] for label in left[1:]] == [asked[0].id, asked[3].id]
    assert votes.standings() == [Standing(("dpo/b", "sft/a"), 0, 2, 0)]


def test_the_sides_are_drawn():
    drawn = {tuple(shuffle_sides(["a", "b"])) for _ in range(60)}
    assert drawn == {("a", "b"), ("b", "a")}


def test_a_file_of_another_kind_is_refused_before_anything_loads(tmp_path):
    with pytest.raises(ValueError, match=r"votes.txt: votes are JSON lines, name it .jsonl"):
        Votes(tmp_path / "votes.txt")
    (tmp_path / "pairs.jsonl").write_text('{"a": 1}\n{"a": ', encoding="utf-8")
    with pytest.raises(ValueError, match=r"pairs.jsonl, line 2: broken JSON"):
        Votes(tmp_path / "pairs.jsonl")


def test_a_vote_begins_a_line_of_its_own(tmp_path):
    path = tmp_path / "pairs.jsonl"
    path.write_text('{"instruction": "问", "chosen": "好", "rejected": "坏"}', encoding="utf-8")
    vote(Votes(path), comparison(left="半个\ud800字"), "left")
    assert [record["chosen"] for record in lines(path)] == ["好", "半个?字"]


def test_a_full_disk_is_an_error_and_leaves_no_half_line(votes):
    resource = pytest.importorskip("resource")
    vote(votes, comparison(), "left")
    before = votes.path.read_bytes()
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, resource.RLIM_INFINITY))
    try:
        with pytest.raises(DiskFullError, match=r"pairs\.jsonl could not be written"):
            vote(votes, comparison(left="长" * 3000), "left")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)
    assert votes.path.read_bytes() == before


def start_voting(votes: Votes, count: int) -> subprocess.Popen:
    """Print each vote's id when it is counted."""
    command = [sys.executable, "-c", VOTE, str(votes.path), str(count)]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, encoding="utf-8")


@pytest.mark.slow
def test_200_votes_of_two_processes_lose_none(votes):
    voters = [start_voting(votes, 100) for _ in range(2)]
    said = [name for voter in voters for name in voter.communicate()[0].split()]
    assert len(set(said)) == 200
    assert {record["vote"]["id"] for record in lines(votes.path)} == set(said)
    assert votes.standings()[0].count == 200


@pytest.mark.slow
def test_a_kill_leaves_every_vote_that_was_counted(votes):
    said = set()
    for votes_before_the_kill in (1, 7, 20):
        with start_voting(votes, 10**6) as voter:
            said |= {voter.stdout.readline().strip() for _ in range(votes_before_the_kill)}
            os.kill(voter.pid, signal.SIGKILL)
            said |= {line.strip() for line in voter.stdout if line.endswith("\n")}
    written = [record["vote"]["id"] for record in lines(votes.path)]
    assert said <= set(written)
    assert len(written) <= len(said) + 3  # a vote on the disk that nobody was told of
