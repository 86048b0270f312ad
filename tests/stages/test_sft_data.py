"""Conversations to packed rows: what is a target, what is held out, what is dropped."""

import json
import re
import sys
from collections import Counter
from itertools import pairwise

import pytest
import torch
from tiny import no_training, sft_config, tiny_model, write_jsonl

import sft_data
from corpus.cache import check_splits
from corpus.chat_format import Renderer, flatten
from corpus.records import to_messages
from sft_data import inspect, prepare_sft_data
from sft_train import train_sft


def prepare(tmp_path, tokenizer, records, **options):
    path = write_jsonl(tmp_path / "sft.jsonl", records)
    options = {"cache_dir": str(tmp_path / "cache"), "max_length": 128, "split": None} | options
    return prepare_sft_data(tokenizer, path, **options)


def all_rows(splits) -> list[dict]:
    return [*splits["train"], *splits["validation"]]


def render(tokenizer, messages) -> tuple[list[int], list[bool]]:
    ids, mask = flatten(Renderer(tokenizer).render([messages])[0])
    return ids.tolist(), mask.tolist()


def targets(row) -> list[int]:
    return [label for label in row["labels"] if label != -100]


def test_a_json_array_and_json_lines_give_the_same_rows(tmp_path, tokenizer):
    records = [{"instruction": f"问{i}", "response": f"答{i}"} for i in range(5)]
    lines = all_rows(prepare(tmp_path, tokenizer, records)[0])
    path = tmp_path / "array.json"
    path.write_text(json.dumps(records, ensure_ascii=False, indent=1), encoding="utf-8")
    array, _ = prepare_sft_data(tokenizer, str(path), 128, None, cache_dir=str(tmp_path / "cache"))
    assert all_rows(array) == lines


BAD = {
    "missing key": (
        {"instruction": "问", "answer": "答"},
        r'sft\.jsonl:2: "response" is missing beside "instruction"; '
        r"found keys \['answer', 'instruction'\]; accepted: .*\"conversations\" \| ",
    ),
    "history": (
        {"instruction": "问", "response": "答", "history": [["问"]]},
        r':2: "history" must be a list of \[question, answer\]',
    ),
    "not text": ({"instruction": 3, "response": "答"}, r":2: instruction must be text, found int"),
    "role": (
        {"messages": [{"role": "narrator", "content": "x"}]},
        r":2: .* has role 'narrator'; known: sys",
    ),
    "no list": ({"messages": {"role": "user"}}, r":2: 'messages' must be a non-empty list"),
    "no JSON": ({"messages": "x"}, r":2: 'messages' is text that is no JSON"),
    "no object": ([1], r":2: expected an object, found list"),
    "no message": ({"messages": ["x"]}, r':2: message 1 of .* must be {"role": …, .*, found str'),
    "late system": (
        {"messages": [{"role": r, "content": "x"} for r in ("user", "system")]},
        r":2: message 2 .* only the first may be",
    ),
    "surrogate": (
        {"instruction": "\ud800", "response": "答"},
        ":2: .* has a lone surrogate, which",
    ),
}


@pytest.mark.parametrize(("record", "message"), BAD.values(), ids=BAD.keys())
def test_a_bad_record_names_file_line_and_what_was_found(tmp_path, tokenizer, record, message):
    path = tmp_path / "sft.jsonl"
    good = json.dumps({"instruction": "问", "response": "答"})
    path.write_text(f"{good}\n{json.dumps(record)}\n", encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        prepare_sft_data(tokenizer, str(path), 128, cache_dir=str(tmp_path / "cache"))
    assert not list((tmp_path / "cache").glob("sft-*"))


def test_drops_and_cuts_are_counted_and_printed(tmp_path, tokenizer, capsys):
    records = [{"instruction": f"问{i}", "response": f"答{i}"} for i in range(4)]
    records += [records[0], {"instruction": "空", "response": " "}]
    records += [{"instruction": "长", "response": "长" * 500}]
    splits, _ = prepare(tmp_path, tokenizer, records)
    printed = capsys.readouterr().out
    tokens = sum(len(row["input_ids"]) for row in all_rows(splits))
    count = sum(len(targets(row)) for row in all_rows(splits))
    assert 0 < count < tokens
    assert f"{tokens:,} tokens, {count:,} of them targets" in printed
    assert "5 conversations (1 no reply, 1 duplicate dropped, 1 replies cut)" in printed


def test_nothing_to_learn_from_is_an_error(tmp_path, tokenizer):
    with pytest.raises(ValueError, match="no example with a reply to learn from"):
        prepare(tmp_path, tokenizer, [{"instruction": "问", "response": ""}])


def test_rows_hold_whole_conversations_whose_positions_restart(tmp_path, tokenizer):
    records = [{"instruction": f"问{i}" * (1 + i % 7), "response": f"答{i}" * 3} for i in range(60)]
    splits, collator = prepare(tmp_path, tokenizer, records)
    expected = sorted(tuple(render(tokenizer, to_messages(record))[0]) for record in records)
    found = []
    for row in all_rows(splits):
        assert len(row["input_ids"]) <= 128
        starts = [i for i, p in enumerate(row["position_ids"]) if p == 0] + [len(row["input_ids"])]
        for start, end in pairwise(starts):
            found.append(tuple(row["input_ids"][start:end]))
            assert row["position_ids"][start:end] == list(range(end - start))
    assert sorted(found) == expected
    batch = collator([splits["train"][0]])
    assert batch["labels"].shape == (1, 128)
    length = len(splits["train"][0]["labels"])
    assert batch["labels"][0, :length].tolist() == splits["train"][0]["labels"]
    assert all(batch["labels"][0, length:] == -100)


def test_the_split_of_a_question_does_not_change_when_data_is_added(tmp_path, tokenizer):
    def held_out(count):
        records = [{"instruction": f"问{i}", "response": f"答{i}"} for i in range(count)]
        splits, _ = prepare(tmp_path, tokenizer, records, validation_ratio=0.2)
        return {tokenizer.decode(targets(row)) for row in splits["validation"]}

    few = "".join(sorted(held_out(100)))
    many = "".join(sorted(held_out(200)))
    replies = set(few.split("<|im_end|>")) - {""}
    assert 5 < len(replies) < 40
    assert replies <= set(many.split("<|im_end|>"))


# --- which conversations are held out -----------------------------------------------------------


def numbered(questions: int, answers: int = 1, start: int = 0) -> list[dict]:
    """Questions that are numbers. A question's second answer comes when all have their first."""
    return [
        {"instruction": str(question), "response": letter}
        for letter in "abcdef"[:answers]
        for question in range(start, start + questions)
    ]


def questions_of(rows, tokenizer) -> Counter:
    """How often each numbered question is in the rows."""
    texts = tokenizer.batch_decode(list(rows["input_ids"]))
    return Counter(int(number) for text in texts for number in re.findall(r"user\n(\d+)<", text))


def splits_of(folder, tokenizer, records, **options) -> tuple[Counter, Counter]:
    folder.mkdir(exist_ok=True)
    splits, _ = prepare(folder, tokenizer, records, max_length=512, **options)
    return questions_of(splits["train"], tokenizer), questions_of(splits["validation"], tokenizer)


def test_the_split_is_a_function_of_the_question_whatever_stands_around_it(tmp_path, tokenizer):
    """4,096 records are rendered at a time: here there are two such batches."""
    records = numbered(1400, answers=3)
    train, held_out = splits_of(tmp_path, tokenizer, records, validation_ratio=0.002)
    assert train + held_out == dict.fromkeys(range(1400), 3)
    assert not set(train) & set(held_out), "a question with all its answers is on one side"
    assert 1 <= len(held_out) <= 10
    # In another order and with 3,000 more, no question of the second batch is below the ratio.
    records.sort(key=lambda record: int(record["instruction"]) not in held_out)
    records[held_out.total() : held_out.total()] = numbered(3000, start=1400)
    more_train, more_held_out = splits_of(tmp_path, tokenizer, records, validation_ratio=0.002)
    assert train <= more_train
    assert held_out <= more_held_out
    assert (more_train + more_held_out).total() == len(records)


@pytest.mark.parametrize("ratio", [1e-9, 1 - 1e-9], ids=["all training", "all validation"])
def test_few_questions_on_one_side_give_both_splits_by_the_smallest_share(
    tmp_path, tokenizer, ratio
):
    records = numbered(40, answers=2)
    train, held_out = splits_of(tmp_path, tokenizer, records, validation_ratio=ratio)
    assert train + held_out == dict.fromkeys(range(40), 2)
    assert list(held_out.values()) == [2], "one question, with both its answers"
    for larger in (0.1, 0.3):  # the smallest share is the first that a ratio holds out
        _, more = splits_of(tmp_path, tokenizer, records, validation_ratio=larger)
        assert len(more) < 40
        assert held_out <= more


def test_one_question_is_all_training_and_is_refused_before_anything_is_trained(
    tmp_path, tokenizer, base_model
):
    records = numbered(1, answers=5)
    path = write_jsonl(tmp_path / "one.jsonl", records)
    for ratio in (1e-9, 0.5, 1 - 1e-9):
        splits, _ = prepare(tmp_path, tokenizer, records, validation_ratio=ratio)
        assert questions_of(splits["train"], tokenizer) == {0: 5}
        assert len(splits["validation"]) == 0
        with pytest.raises(ValueError, match=r"one\.jsonl: every usable record asks the same"):
            check_splits(splits, path)
    message = r"one\.jsonl: every usable record asks the same question, .* one other question\.$"
    with no_training(), pytest.raises(ValueError, match=message):
        train_sft(wandb_config=sft_config(tmp_path, base_model, dataset=path))


# --- the cache, and what is shown ---------------------------------------------------------------


def test_the_default_returns_the_training_rows_and_a_second_call_the_cache(
    tmp_path, tokenizer, capsys
):
    records = [{"instruction": f"问{i}", "response": f"答{i}"} for i in range(3)]
    rows, _ = prepare(tmp_path, tokenizer, records, split="train")
    assert targets(rows[0])
    again, _ = prepare(tmp_path, tokenizer, records, split="train")
    assert list(again) == list(rows)
    assert capsys.readouterr().out.count("Tokenizing") == 1


def test_inspect_marks_targets_with_brackets_or_in_colour(tmp_path, tokenizer):
    splits, _ = prepare(tmp_path, tokenizer, [{"instruction": "问一", "response": "答一"}] * 1)
    plain = "\n".join(inspect(splits["train"], tokenizer, 1, colour=False))
    assert "<|im_start|>assistant\n[答一<|im_end|>]\n" in plain
    assert "\033[32m答一<|im_end|>\033[0m" in "\n".join(
        inspect(splits["train"], tokenizer, 1, colour=True)
    )


def test_real_instruction_data_packs_with_less_than_two_percent_padding(
    tmp_path, tokenizer, real_data, capsys
):
    path = str(real_data("sft_alpaca_zh_demo.jsonl"))
    splits, _ = prepare_sft_data(tokenizer, path, 512, None, cache_dir=str(tmp_path))
    places = 512 * len(all_rows(splits))
    assert sum(len(row["input_ids"]) for row in all_rows(splits)) > 0.98 * places


def test_packed_and_separate_conversations_have_equal_loss_and_gradients(tmp_path, tokenizer):
    records = [{"instruction": f"问{i}" * (i % 4 + 1), "response": f"答{i}"} for i in range(12)]
    splits, collator = prepare(tmp_path, tokenizer, records, split=None)
    model = tiny_model(vocab_size=320).train()

    def gradients(batches):
        model.zero_grad()
        count = sum(int((b["labels"][:, 1:] >= 0).sum()) for b in batches)
        losses = [model(**batch, num_items_in_batch=count).loss for batch in batches]
        sum(losses).backward()
        return sum(float(loss.detach()) for loss in losses), [
            p.grad.clone() for p in model.parameters()
        ]

    packed = gradients([collator(all_rows(splits))])
    separate = []
    for record in records:
        ids, mask = render(tokenizer, to_messages(record))
        labels = [i if m else -100 for i, m in zip(ids, mask, strict=True)]
        separate.append({"input_ids": torch.tensor([ids]), "labels": torch.tensor([labels])})
    alone = gradients(separate)
    assert packed[0] == pytest.approx(alone[0], abs=1e-5)
    for one, other in zip(packed[1], alone[1], strict=True):
        assert torch.allclose(one, other, atol=1e-6)


def test_the_command_without_a_model_is_one_line_that_says_what_to_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["sft_data.py", "--inspect"])
    with pytest.raises(SystemExit, match=r"train_llm\.py` first, or set --tokenizer to") as stopped:
        sft_data.main()
    assert str(stopped.value).startswith("error: No finished pretrain run under checkpoints")
