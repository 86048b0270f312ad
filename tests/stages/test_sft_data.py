import json
import sys
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny import write_jsonl

import sft_data
from corpus.chat_format import FormatError, Renderer, flatten, to_messages, truncate
from sft_data import inspect, prepare_sft_data

TALK = [
    {"role": "system", "content": "你是助手。"},
    {"role": "user", "content": "天地玄黄 12？"},
    {"role": "assistant", "content": "宇宙洪荒。\n第二行"},
    {"role": "user", "content": "The fox?"},
    {"role": "assistant", "content": "The quick brown fox. 😀"},
]


def prepare(tmp_path, tokenizer, records, **options):
    path = write_jsonl(tmp_path / "sft.jsonl", records)
    options = {"cache_dir": str(tmp_path / "cache"), "max_length": 128, "split": None} | options
    return prepare_sft_data(tokenizer, path, **options)


def all_rows(splits) -> list[dict]:
    return [*splits["train"], *splits["validation"]]


def render(tokenizer, messages) -> tuple[list[int], list[bool]]:
    return flatten(Renderer(tokenizer).render([messages])[0])


def targets(row) -> list[int]:
    return [label for label in row["labels"] if label != -100]


def test_ids_and_mask_equal_the_chat_templates_token_for_token(tokenizer):
    expected = tokenizer.apply_chat_template(
        TALK, return_assistant_tokens_mask=True, return_dict=True
    )
    ids, mask = render(tokenizer, TALK)
    assert ids == expected["input_ids"]
    assert [int(m) for m in mask] == expected["assistant_masks"]


def test_only_replies_and_their_end_tokens_are_targets(tokenizer):
    ids, mask = render(tokenizer, TALK)
    spoken = tokenizer.decode([i for i, m in zip(ids, mask, strict=True) if m])
    assert spoken == "宇宙洪荒。\n第二行<|im_end|>The quick brown fox. 😀<|im_end|>"


@given(st.lists(st.text(alphabet=st.characters(exclude_categories=["Cs"])), min_size=2, max_size=4))
def test_whatever_is_typed_ids_and_mask_agree_and_no_text_is_a_control_token(tokenizer, contents):
    contents = [f"{text}<|im_end|>\n<|im_start|>assistant\n" for text in contents]
    roles = ["user", "assistant"] * 2
    talk = [{"role": r, "content": c} for r, c in zip(roles, contents, strict=False)]
    ids, mask = render(tokenizer, talk)
    assert len(ids) == len(mask)
    start, stop = tokenizer.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>"])
    assert ids.count(start) == ids.count(stop) == len(talk)
    spoken = [i for i, m in zip(ids, mask, strict=True) if m]
    assert spoken.count(stop) == len(talk) // 2
    replies = "".join(m["content"] + "<|im_end|>" for m in talk if m["role"] == "assistant")
    assert tokenizer.decode(spoken) == replies


FORMATS = {
    "instruction": {"instruction": "问", "response": "答"},
    "alpaca": {"instruction": "问", "input": "", "output": "答"},
    "messages": {
        "messages": [{"role": "user", "content": "问"}, {"role": "assistant", "content": "答"}]
    },
    "sharegpt": {
        "conversations": [{"from": "human", "value": "问"}, {"from": "gpt", "value": "答"}]
    },
}


@pytest.mark.parametrize("record", FORMATS.values(), ids=FORMATS.keys())
def test_every_format_gives_the_same_messages(record):
    assert to_messages(record) == FORMATS["messages"]["messages"]


def test_input_system_and_history_find_their_places():
    record = {"instruction": "译", "input": "fox", "output": "狐", "system": "你是译者"}
    record["history"] = [["早", "早安"]]
    assert [(m["role"], m["content"]) for m in to_messages(record)] == [
        ("system", "你是译者"),
        ("user", "早"),
        ("assistant", "早安"),
        ("user", "译\nfox"),
        ("assistant", "狐"),
    ]


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
        r'sft\.jsonl:2: expected "instruction" and "response", "messages" or "conversations"; '
        r"found keys \['answer', 'instruction'\]",
    ),
    "history": (
        {"instruction": "问", "response": "答", "history": [["问"]]},
        r':2: "history" must be a list of \[question, answer\]',
    ),
    "not text": ({"instruction": 3, "response": "答"}, r":2: instruction must be text, found int"),
    "role": (
        {"messages": [{"role": "tool", "content": "x"}]},
        r":2: .* has role 'tool'; known: sys",
    ),
    "no list": ({"messages": "x"}, r":2: 'messages' must be a non-empty list"),
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


def turns_of(tokenizer, messages):
    return Renderer(tokenizer).render([messages])[0]


def test_a_long_question_loses_its_beginning_and_the_reply_stays_whole(tokenizer):
    talk = [{"role": "user", "content": "起" * 300 + "终"}, TALK[2]]
    turns = turns_of(tokenizer, talk)
    assert truncate(turns, 64) is False
    ids, mask = flatten(turns)
    assert len(ids) == 64
    text = tokenizer.decode(ids)
    assert text.startswith("<|im_start|>user\n")
    assert "终<|im_end|>" in text
    assert text.endswith("宇宙洪荒。\n第二行<|im_end|>\n")
    assert sum(mask) == sum(render(tokenizer, talk)[1])


def test_the_oldest_exchanges_go_first_and_the_system_message_stays(tokenizer):
    exchange = [{"role": "user", "content": "问" * 5}, {"role": "assistant", "content": "答" * 5}]
    turns = turns_of(tokenizer, [TALK[0], *exchange * 6, *TALK[3:]])
    truncate(turns, sum(map(len, turns)) - 1)
    assert [turn.role for turn in turns] == ["system", *["user", "assistant"] * 6]


def test_a_reply_too_long_by_itself_is_cut_without_an_end_token(tokenizer):
    talk = [{"role": "user", "content": "问"}, {"role": "assistant", "content": "答" * 300}]
    turns = turns_of(tokenizer, talk)
    assert truncate(turns, 64) is True
    ids, mask = flatten(turns)
    assert len(ids) == len(mask) == 64
    assert mask[-1]
    assert tokenizer.convert_tokens_to_ids("<|im_end|>") != ids[-1]


def test_drops_and_cuts_are_counted_and_printed(tmp_path, tokenizer, capsys):
    records = [{"instruction": f"问{i}", "response": f"答{i}"} for i in range(4)]
    records += [records[0], {"instruction": "空", "response": " "}]
    records += [{"instruction": "长", "response": "长" * 500}]
    prepare(tmp_path, tokenizer, records)
    printed = capsys.readouterr().out
    assert "5 conversations (1 duplicate, 1 no reply dropped, 1 replies cut)" in printed


def test_nothing_to_learn_from_is_an_error(tmp_path, tokenizer):
    with pytest.raises(ValueError, match="no example with a reply to learn from"):
        prepare(tmp_path, tokenizer, [{"instruction": "问", "response": ""}])


def test_rows_hold_whole_conversations_whose_positions_restart(tmp_path, tokenizer):
    records = [{"instruction": f"问{i}" * (i % 7), "response": f"答{i}" * 3} for i in range(60)]
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


def test_the_default_returns_the_training_rows_and_a_second_call_the_cache(
    tmp_path, tokenizer, monkeypatch
):
    records = [{"instruction": f"问{i}", "response": f"答{i}"} for i in range(3)]
    rows, _ = prepare(tmp_path, tokenizer, records, split="train")
    assert targets(rows[0])
    monkeypatch.setattr("sft_data.Renderer", None)
    again, _ = prepare(tmp_path, tokenizer, records, split="train")
    assert list(again) == list(rows)


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
    from test_training import tiny_model

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


def test_format_errors_are_value_errors_for_those_who_parse_records_themselves():
    with pytest.raises(FormatError):
        to_messages({})
    assert issubclass(FormatError, ValueError)


def test_the_command_without_a_model_is_one_line_that_says_what_to_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["sft_data.py", "--inspect"])
    with pytest.raises(SystemExit, match=r"train_llm\.py` first, or set --tokenizer to") as stopped:
        sft_data.main()
    assert str(stopped.value).startswith("error: No finished pretrain run under checkpoints")
