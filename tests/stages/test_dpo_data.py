"""Preference records to pairs: formats, truncation, what is held out, and how pairs are packed."""

import json
import re
import sys
from collections import Counter
from itertools import pairwise

import pytest
import torch
from tiny import dpo_config, no_training, write_jsonl

import dpo_data
from corpus.cache import check_splits
from corpus.records import FormatError, to_pair
from dpo_data import PairCollator, inspect, prepare_dpo_data
from dpo_train import train_dpo
from engine.preference import shared_question_mask

USER = {"role": "user", "content": "问"}
RECORD = {"instruction": "问", "chosen": "好", "rejected": "坏"}
FORMATS = {
    "instruction": RECORD,
    "prompt text": {"prompt": "问", "chosen": "好", "rejected": "坏"},
    "prompt messages": {
        "prompt": [USER],
        "chosen": [{"role": "assistant", "content": "好"}],
        "rejected": [{"role": "assistant", "content": "坏"}],
    },
    "whole conversations": {
        "chosen": [USER, {"role": "assistant", "content": "好"}],
        "rejected": [USER, {"role": "assistant", "content": "坏"}],
    },
    "sharegpt": {
        "conversations": [{"from": "human", "value": "问"}],
        "chosen": {"from": "gpt", "value": "好"},
        "rejected": {"from": "gpt", "value": "坏"},
    },
}


def prepare(tmp_path, tokenizer, records, **options):
    path = write_jsonl(tmp_path / "dpo.jsonl", records)
    options = {"cache_dir": str(tmp_path / "cache"), "max_length": 64, "split": None} | options
    return prepare_dpo_data(tokenizer, path, **options)


def records(count: int) -> list[dict]:
    return [
        {"instruction": f"问{i}", "chosen": f"好{i}", "rejected": f"坏坏{i}"} for i in range(count)
    ]


def pairs_of(splits) -> list[dict]:
    return [*splits["train"], *splits["validation"]]


@pytest.mark.parametrize("record", FORMATS.values(), ids=FORMATS.keys())
def test_every_format_gives_the_same_pair(record):
    assert to_pair(record) == ([USER], "好", "坏")


def test_a_multi_turn_question_with_a_system_message_is_shared():
    talk = [
        {"role": "system", "content": "s"},
        USER,
        {"role": "assistant", "content": "答"},
        {"role": "user", "content": "再问"},
    ]
    prompt, _, _ = to_pair({"messages": talk, "chosen": "好", "rejected": "坏"})
    assert prompt == talk


BAD = {
    "no rejected": (
        {"instruction": "问", "chosen": "好"},
        r"""dpo\.jsonl:1: "rejected" is missing beside "instruction" \+ "chosen"; found keys """,
    ),
    "no question": (
        {"chosen": "好", "rejected": "坏"},
        r":1: no question before the answers; found",
    ),
    "other questions": (
        {
            "chosen": [USER, {"role": "assistant", "content": "好"}],
            "rejected": [{"role": "assistant", "content": "坏"}],
        },
        "must begin with the same messages",
    ),
    "no answer": (
        {"prompt": "问", "chosen": [USER], "rejected": "坏"},
        "'chosen' must end with an ass",
    ),
    "answer first": (
        {"prompt": [{"role": "assistant", "content": "x"}], "chosen": "好", "rejected": "坏"},
        "the prompt must end with a user's message",
    ),
}


@pytest.mark.parametrize(("record", "message"), BAD.values(), ids=BAD.keys())
def test_a_bad_record_names_file_line_and_what_was_found(tmp_path, tokenizer, record, message):
    with pytest.raises(ValueError, match=message):
        prepare(tmp_path, tokenizer, [record])
    assert issubclass(FormatError, ValueError)


def test_a_pair_is_the_rendered_question_and_two_answers_with_their_end_tokens(tmp_path, tokenizer):
    splits, _ = prepare(tmp_path, tokenizer, records(5))
    pair = next(p for p in pairs_of(splits) if tokenizer.decode(p["chosen_ids"]).startswith("好3"))
    template = tokenizer.apply_chat_template(
        [{"role": "user", "content": "问3"}], add_generation_prompt=True, return_dict=True
    )
    assert pair["prompt_ids"] == template["input_ids"]
    assert tokenizer.decode(pair["chosen_ids"]) == "好3<|im_end|>"
    assert tokenizer.decode(pair["rejected_ids"]) == "坏坏3<|im_end|>"
    assert pair["chosen_bytes"] == len("好3".encode())


def test_useless_pairs_are_dropped_and_counted(tmp_path, tokenizer, capsys):
    rows = [*records(3), records(1)[0]]
    rows += [RECORD | {"rejected": " 好 "}, RECORD | {"chosen": ""}]
    rows += [{"instruction": "长", "chosen": "长" * 200 + "甲", "rejected": "长" * 200 + "乙"}]
    splits, _ = prepare(tmp_path, tokenizer, rows)
    assert len(pairs_of(splits)) == 3
    printed = capsys.readouterr().out
    for part in ("1 duplicate", "1 equal answers", "1 empty answer", "1 equal after truncation"):
        assert part in printed
    with pytest.raises(ValueError, match="no pair with two different answers"):
        prepare(tmp_path, tokenizer, [RECORD | {"rejected": "好"}])


def test_truncation_shortens_the_shared_question_for_the_longer_answer(tmp_path, tokenizer):
    row = {"instruction": "起" * 100 + "终", "chosen": "好" * 5, "rejected": "坏" * 8}
    splits, _ = prepare(tmp_path, tokenizer, [row, *records(2)])
    pair = next(p for p in pairs_of(splits) if len(p["prompt_ids"]) > 20)
    assert "终<|im_end|>" in tokenizer.decode(pair["prompt_ids"])
    assert tokenizer.decode(pair["chosen_ids"]) == "好" * 5 + "<|im_end|>"
    assert tokenizer.decode(pair["rejected_ids"]) == "坏" * 8 + "<|im_end|>"
    assert 60 <= len(pair["prompt_ids"]) + len(pair["rejected_ids"]) <= 64


def test_few_pairs_still_give_both_splits_and_the_default_is_the_training_one(tmp_path, tokenizer):
    splits, _ = prepare(tmp_path, tokenizer, records(3))
    assert (len(splits["train"]), len(splits["validation"])) == (2, 1)
    rows, _ = prepare(tmp_path, tokenizer, records(3), split="train")
    assert list(rows) == list(splits["train"])


def numbered(questions: int, answers: int = 1, start: int = 0) -> list[dict]:
    """Questions that are numbers. A question's second pair comes when all have their first."""
    return [
        {"instruction": str(question), "chosen": letter, "rejected": "x"}
        for letter in "abcdef"[:answers]
        for question in range(start, start + questions)
    ]


def splits_of(folder, tokenizer, rows, **options) -> tuple[Counter, Counter]:
    """How often each numbered question is in the training and in the validation split."""
    splits, _ = prepare(folder, tokenizer, rows, **options)
    texts = {
        name: "\n".join(tokenizer.batch_decode(list(splits[name]["prompt_ids"])))
        for name in ("train", "validation")
    }
    train, held_out = (
        Counter(map(int, re.findall(r"user\n(\d+)<", texts[name]))) for name in texts
    )
    return train, held_out


def test_the_split_is_a_function_of_the_question_whatever_stands_around_it(tmp_path, tokenizer):
    """4,096 records are rendered at a time: here there are two such batches."""
    rows = numbered(1400, answers=3)
    train, held_out = splits_of(tmp_path, tokenizer, rows, validation_ratio=0.002)
    assert train + held_out == dict.fromkeys(range(1400), 3)
    assert not set(train) & set(held_out), "a question with all its pairs is on one side"
    assert 1 <= len(held_out) <= 10
    # In another order and with 3,000 more, no question of the second batch is below the ratio.
    rows.sort(key=lambda record: int(record["instruction"]) not in held_out)
    rows[held_out.total() : held_out.total()] = numbered(3000, start=1400)
    more_train, more_held_out = splits_of(tmp_path, tokenizer, rows, validation_ratio=0.002)
    assert train <= more_train
    assert held_out <= more_held_out
    assert (more_train + more_held_out).total() == len(rows)


@pytest.mark.parametrize("ratio", [1e-9, 1 - 1e-9], ids=["all training", "all validation"])
def test_few_questions_on_one_side_give_both_splits_by_the_smallest_share(
    tmp_path, tokenizer, ratio
):
    rows = numbered(40, answers=2)
    train, held_out = splits_of(tmp_path, tokenizer, rows, validation_ratio=ratio)
    assert train + held_out == dict.fromkeys(range(40), 2)
    assert list(held_out.values()) == [2], "one question, with both its pairs"
    for larger in (0.1, 0.3):  # the smallest share is the first that a ratio holds out
        _, more = splits_of(tmp_path, tokenizer, rows, validation_ratio=larger)
        assert len(more) < 40
        assert held_out <= more


def test_one_question_is_all_training_and_is_refused_before_anything_is_trained(
    tmp_path, tokenizer, base_model
):
    rows = numbered(1, answers=5)
    path = write_jsonl(tmp_path / "one.jsonl", rows)
    for ratio in (1e-9, 0.5, 1 - 1e-9):
        assert splits_of(tmp_path, tokenizer, rows, validation_ratio=ratio) == ({0: 5}, {})
        splits, _ = prepare(tmp_path, tokenizer, rows, validation_ratio=ratio)
        with pytest.raises(ValueError, match=r"one\.jsonl: every usable record asks the same"):
            check_splits(splits, path)
    message = r"one\.jsonl: every usable record asks the same question, .* one other question\.$"
    with no_training(), pytest.raises(ValueError, match=message):
        train_dpo(wandb_config=dpo_config(tmp_path, base_model, dataset=path))


def test_a_second_call_uses_the_cache_and_a_changed_file_is_noticed(tmp_path, tokenizer, capsys):
    before = pairs_of(prepare(tmp_path, tokenizer, records(4))[0])
    assert len(pairs_of(prepare(tmp_path, tokenizer, records(5))[0])) == 5
    assert capsys.readouterr().out.count("Tokenizing") == 2
    assert pairs_of(prepare(tmp_path, tokenizer, records(4))[0]) == before
    assert "Tokenizing" not in capsys.readouterr().out


def test_collated_answers_are_predicted_by_the_token_before_them():
    pairs = [
        {"prompt_ids": [1, 2], "chosen_ids": [3, 4, 5], "rejected_ids": [6]},
        {"prompt_ids": [7], "chosen_ids": [8], "rejected_ids": [9, 10]},
    ]
    batch = PairCollator(pad_token_id=0, multiple=16)(pairs)
    ids = batch["input_ids"].flatten()
    before = ids[batch["predictor_index"]].tolist()
    found = list(
        zip(batch["sequence_index"].tolist(), before, batch["target_ids"].tolist(), strict=True)
    )
    expected = [(0, 2, 3), (0, 3, 4), (0, 4, 5), (1, 2, 6), (2, 7, 8), (3, 7, 9), (3, 9, 10)]
    assert sorted(found) == expected
    assert batch["answer_lengths"].tolist() == [3, 1, 1, 2]
    assert batch["input_ids"].shape == (1, 16), "both pairs fit into one row"
    rejected = (batch["branch_ids"] == 2) & (batch["pair_ids"] == 0)
    assert batch["position_ids"][rejected].tolist() == [2], "as if chosen were not there"
    unfolded, bounds = ids[batch["unfold_index"]].tolist(), batch["cu_seq_lens_q"].tolist()
    documents = [unfolded[start:end] for start, end in pairwise(bounds)]
    assert documents == [[1, 2, 3, 4, 5], [1, 2, 6], [7, 8], [7, 9, 10]]
    folded = torch.tensor(unfolded)[batch["fold_index"]]
    real = batch["pair_ids"].flatten() >= 0
    assert folded[real].tolist() == ids[real].tolist(), "each token gets its own output"


def test_rows_are_as_long_as_leaves_the_least_padding():
    def pair(tokens: int) -> dict:
        return {"prompt_ids": [1], "chosen_ids": [2] * (tokens - 2), "rejected_ids": [3]}

    collate = PairCollator(pad_token_id=0, multiple=16)
    shapes = {(48, 32, 16): (2, 48), (48, 32, 32): (2, 64), (40, 40): (1, 80), (48,): (1, 48)}
    for lengths, shape in shapes.items():
        assert collate([pair(tokens) for tokens in lengths])["input_ids"].shape == shape


def test_an_empty_share_of_a_step_is_one_row_of_padding():
    batch = PairCollator(pad_token_id=0)([])
    assert batch["input_ids"].shape == (1, 64)
    assert len(batch["target_ids"]) == len(batch["answer_lengths"]) == 0
    assert batch["reference_logps"].shape == (0, 2)
    assert batch["chosen_bytes"].shape == (0,)


def test_the_full_batch_that_a_memory_test_runs_is_as_large_as_any_can_be(tmp_path, tokenizer):
    row = {"instruction": "起" * 100, "chosen": "好" * 100, "rejected": "坏" * 100}
    splits, collate = prepare(tmp_path, tokenizer, [row, *records(2)])
    longest = max(pairs_of(splits), key=lambda pair: len(pair["chosen_ids"]))
    largest = collate([longest | {"reference_logps": [0.0, 0.0]}] * 3)
    batch = collate.full_batch(3)
    assert batch.keys() == largest.keys()
    for name, tensor in largest.items():
        assert batch[name].numel() >= tensor.numel(), name
    assert len(batch["answer_lengths"]) == 6


def test_an_answer_sees_the_question_and_itself_but_not_the_other_answer():
    pair_ids = torch.tensor([[0, 0, 0, 0, 1, -1]])
    branch_ids = torch.tensor([[0, 0, 1, 2, 0, -1]])
    seen = shared_question_mask(pair_ids, branch_ids)[0, 0]
    assert [row.nonzero().flatten().tolist() for row in seen] == [
        [0],
        [0, 1],
        [0, 1, 2],
        [0, 1, 3],
        [4],
        [5],
    ]


def test_inspect_shows_both_answers(tmp_path, tokenizer):
    splits, _ = prepare(tmp_path, tokenizer, records(2))
    text = "\n".join(inspect(splits["train"], tokenizer, 1, colour=False))
    assert "  chosen: [好" in text
    assert "rejected: [坏坏" in text
    assert "\033[31m" in "\n".join(inspect(splits["train"], tokenizer, 1, colour=True))


def test_the_real_preference_set_works_unchanged(tmp_path, tokenizer, real_data):
    path = real_data("dpo_zh_demo.jsonl")
    splits, _ = prepare_dpo_data(tokenizer, str(path), 512, None, cache_dir=str(tmp_path))
    lines = path.read_text(encoding="utf-8").splitlines()
    assert len(pairs_of(splits)) > 0.9 * len(lines)
    assert json.loads(lines[0])["chosen"]


def test_the_command_without_a_model_is_one_line_that_says_what_to_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["dpo_data.py", "--inspect"])
    with pytest.raises(SystemExit, match=r"sft_train\.py` first, or set --model to") as stopped:
        dpo_data.main()
    assert str(stopped.value).startswith("error: No finished sft run under checkpoints")
