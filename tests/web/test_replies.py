import os
from itertools import islice, pairwise
from pathlib import Path

import pytest
from tiny import pretrain_config, write_jsonl

from engine.conversation import Chat
from engine.generation import Sampling
from train_llm import train
from web.replies import Models, stream

GREEDY = Sampling(24, 0, 1, 1)


def test_the_runs_are_listed_from_the_last_stage_and_the_newest_run(tmp_path):
    for age, name in enumerate(["pretrain/a", "sft/old", "dpo/c", "sft/new"]):
        final = tmp_path / name / "final"
        final.mkdir(parents=True)
        os.utime(final, (1000 + age, 1000 + age))
    (tmp_path / "sft/unfinished/step_00000001").mkdir(parents=True)
    models = Models(str(tmp_path))
    assert list(models.folders()) == ["dpo/c", "sft/new", "sft/old", "pretrain/a"]
    assert models.folders()["sft/old"] == tmp_path / "sft/old/final"


def test_a_named_folder_comes_first_and_stands_there_once(tmp_path, base_model):
    run = Path(base_model).parent
    first, *others = Models(str(run.parent.parent), [base_model]).folders()
    assert first == f"pretrain/{run.name}"
    assert first not in others and base_model not in others
    assert list(Models(str(tmp_path), [base_model]).folders()) == [base_model]


def test_a_model_that_went_away_is_named(tmp_path):
    with pytest.raises(ValueError, match="sft/gone is not among the models any more"):
        Models(str(tmp_path)).chat("sft/gone", GREEDY, None, None)
    with pytest.raises(ValueError, match="nowhere: no model folder there"):
        Models(str(tmp_path), ["nowhere"])


def test_a_model_is_loaded_once(tmp_path, base_model):
    models = Models(str(tmp_path), [base_model])
    one, other = (models.chat(base_model, GREEDY, seed, None) for seed in (1, 2))
    assert one.model is other.model
    assert (one.seed, other.seed) == (1, 2)


def test_the_stream_grows_to_the_reply_of_the_terminal(base_model):
    *before, reply = stream(Chat(base_model, GREEDY, 1, None), "天地")
    assert reply == Chat(base_model, GREEDY, 1, None).reply("天地")
    assert all(reply.startswith(known.strip()) for known in before)


def test_the_stream_grows_while_the_model_generates(tmp_path, base_model):
    records = [{"text": "天地玄黄" * (800 + number)} for number in range(8)]
    data = {"dataset": write_jsonl(tmp_path / "endless.jsonl", records), "max_steps": 60}
    learned = {"tokenizer_path": base_model, "learning_rate": 0.01, "num_epochs": 50}
    never_ends = train(wandb_config=pretrain_config(tmp_path) | data | learned)
    replies = stream(Chat(never_ends, Sampling(10**6, 0, 1, 1), 1, None), "天地")
    known = list(islice(replies, 4))  # a reply of a few tokens can end before its second update
    replies.close()
    assert len(known) == 4
    assert all(after.startswith(before) for before, after in pairwise(known))
    assert len(known[0]) < len(known[3])


def test_closing_the_stream_ends_generation(base_model):
    chat = Chat(base_model, Sampling(10**6, 0, 1, 1), 1, None)
    replies = stream(chat, "天地")
    next(replies)
    replies.close()  # waits for the thread: a million tokens would take hours
    assert list(stream(Chat(base_model, GREEDY, 1, None), "天地"))


def test_an_error_of_the_model_reaches_the_reader(base_model):
    with pytest.raises(ValueError, match="Prompt 1 of 1 has no tokens"):
        list(stream(Chat(base_model, GREEDY, 1, None), ""))
