"""What of a conversation is a target, what of it is left out, and how that is printed."""

import json

import numpy as np
import pytest
from accepted import said
from tiny import dpo_config, pretrain_config, write_jsonl

from corpus.chat_format import Renderer, flatten, truncate
from corpus.make_pairs import make_pairs
from dpo_data import prepare_dpo_data
from dpo_train import train_dpo
from sft_data import prepare_sft_data
from tokenizer import create_tokenizer
from train_llm import train

GOOD = [{"instruction": f"问{number}", "output": f"答{number}"} for number in range(4)]


def targets_of(tokenizer, *messages: dict) -> str:
    ids, mask = flatten(Renderer(tokenizer).render([list(messages)])[0])
    return tokenizer.decode(ids[np.array(mask)])


def prepare(tmp_path, tokenizer, records, max_length=256) -> str:
    """All rows of records, decoded."""
    path = write_jsonl(tmp_path / "sft.jsonl", records)
    splits, _ = prepare_sft_data(tokenizer, path, max_length, None, cache_dir=tmp_path / "cache")
    return "".join(tokenizer.decode(row["input_ids"]) for rows in splits.values() for row in rows)


def reply(text: str) -> dict:
    return {"role": "assistant", "content": text}


def test_an_empty_reply_stays_as_context_and_is_no_target(tokenizer):
    for nothing in ("", " \n"):
        talk = said("一", nothing, "二", "三")
        assert targets_of(tokenizer, *talk) == "三<|im_end|>"
        ids, _ = flatten(Renderer(tokenizer).render([talk])[0])
        assert f"assistant\n{nothing}<|im_end|>\n<|im_start|>user\n二" in tokenizer.decode(ids)


def test_who_speaks_first_is_context_and_no_target(tokenizer):
    greeting = [reply("您好！"), *said("一", "二")]
    assert targets_of(tokenizer, *greeting) == "二<|im_end|>"
    system = {"role": "system", "content": "客服"}
    assert targets_of(tokenizer, system, *greeting) == "二<|im_end|>"
    assert targets_of(tokenizer, system, *said("", "二")) == ""
    assert targets_of(tokenizer, *said("", "二")) == ""


def test_what_is_no_target_or_left_off_is_printed(tmp_path, tokenizer, capsys):
    talks = [
        said("一", "", "二", "三"),
        [reply("您好！"), *said("四", "五")],
        said("六", "七", "八"),
        said("九", "十\nHuman: 还有？\nAssistant: 有"),
        said("末", "答", "空", ""),
    ]
    prepare(tmp_path, tokenizer, [*GOOD, *({"messages": talk} for talk in talks)])
    printed = capsys.readouterr().out
    assert "9 conversations (none dropped, 0 replies cut), 0 shortened to the row" in printed
    assert "noted: 3 messages behind the last reply, left off, 1 empty replies" in printed
    assert "1 replies before any question, no targets" in printed
    assert '1 messages that hold a whole talk ("Human: … Assistant: …")' in printed


def test_records_without_a_question_or_a_reply_are_dropped_and_counted(tmp_path, tokenizer, capsys):
    records = [
        {"instruction": "", "output": "没有问题的回答"},
        {"instruction": None, "input": None, "output": "没有问题的回答"},
        {"messages": [reply("没有问题的回答")]},
        {"instruction": "空", "output": None},
        {"instruction": "空", "output": ""},
        {"messages": None},
    ]
    shown = prepare(tmp_path, tokenizer, [*GOOD, *records])
    printed = capsys.readouterr().out
    assert "没有问题" not in shown
    assert "4 conversations (3 no question, 2 no reply, 1 no messages dropped" in printed
    assert "noted" not in printed


def test_reasoning_before_the_last_question_is_counted(tmp_path, tokenizer, capsys):
    """The template does not show it, whether it is a field or stands in the words."""
    talk = said("一", "二", "三", "四")
    talk[1]["reasoning_content"], talk[3]["reasoning_content"] = "早先", "最后"
    in_words = said("五", "<think>早先</think>六", "七", "八")
    shown = prepare(tmp_path, tokenizer, [*GOOD, {"messages": talk}, {"messages": in_words}])
    assert "早先" not in shown
    assert "最后" in shown
    hidden = "noted: 2 reasoning before the last question, not shown"
    assert hidden in capsys.readouterr().out
    pair = {"messages": [*talk[:2], *talk[:1]], "chosen": "好", "rejected": "坏"}
    path = write_jsonl(tmp_path / "dpo.jsonl", [pair | {"system": f"{n}"} for n in range(2)])
    prepare_dpo_data(tokenizer, path, 96, None, cache_dir=tmp_path / "cache")
    assert f"0 shortened to max_length; {hidden}" in capsys.readouterr().out


# --- too long -----------------------------------------------------------------------------------


def test_of_answers_in_a_row_the_earlier_goes_and_the_question_stays(tokenizer):
    talk = [*said("在吗"), *said("茶叶怎么保存？", "在的，" * 60), reply("放在干燥处。")]
    [turns] = Renderer(tokenizer).render([talk])
    assert truncate(turns, 128) is True, "a reply that lost its beginning is cut"
    text = tokenizer.decode(flatten(turns)[0])
    assert "茶叶怎么保存？" in text
    assert text.endswith("assistant\n放在干燥处。<|im_end|>\n")
    assert "在的" not in text


def test_a_tools_result_is_the_question_where_nobody_else_asks(tokenizer):
    talk = [{"role": "tool", "content": "晴" * 5}, *[reply("天" * 20)] * 3]
    [turns] = Renderer(tokenizer).render([talk])
    assert truncate(turns, 120) is True
    assert turns[0].role == "tool"


def test_a_blank_question_leaves_the_one_before_it_in_place(tokenizer):
    talk = said("问" * 20, "答", "", "好")
    [turns] = Renderer(tokenizer).render([talk])
    assert truncate(turns, 64) is False
    assert [turn.role for turn in turns] == ["user", "assistant"] * 2
    assert tokenizer.decode(turns[0].content).endswith("问")


def test_shortened_conversations_and_cut_replies_are_counted(tmp_path, tokenizer, capsys):
    rows = [said("在吗", "说来话长" * 9, "茶叶？", "干燥")]
    rows += [[*said("茶叶？", "说来话长" * 9), reply("干燥")]]
    rows += [said("长" * 60, "短")]
    prepare(tmp_path, tokenizer, [*GOOD, *({"messages": talk} for talk in rows)], 96)
    assert "(none dropped, 1 replies cut), 3 shortened to the row" in capsys.readouterr().out


def test_shortened_pairs_are_counted(tmp_path, tokenizer, capsys):
    records = [{"prompt": f"问{n}", "chosen": "好", "rejected": "坏"} for n in range(4)]
    records += [{"prompt": "长" * 60, "chosen": "好", "rejected": "坏"}]
    path = write_jsonl(tmp_path / "dpo.jsonl", records)
    prepare_dpo_data(tokenizer, path, 64, None, cache_dir=tmp_path / "cache")
    assert "(none dropped, 0 answers cut), 1 shortened to max_length" in capsys.readouterr().out


# --- pairs --------------------------------------------------------------------------------------


def test_useless_pairs_of_a_ranked_list_are_counted_and_the_others_used(
    tmp_path, tokenizer, capsys
):
    records = [{"instruction": f"问{n}", "output": ["好", "中", "", "好"]} for n in range(3)]
    records += [{"instruction": "", "output": ["好", "坏"]}]
    path = write_jsonl(tmp_path / "dpo.jsonl", records)
    splits, _ = prepare_dpo_data(tokenizer, path, 64, None, cache_dir=tmp_path / "cache")
    assert sum(map(len, splits.values())) == 3
    printed = capsys.readouterr().out
    assert "3 empty answer" in printed and "3 equal answers" in printed
    assert "1 no question" in printed


def test_pairs_that_are_made_are_accepted_whatever_they_are_made_of(tmp_path, base_model, capsys):
    talks = [
        [*said("在吗"), *said("茶叶？", "在的"), reply("干燥处")],
        said("一", "", "二", "三"),
        [reply("您好！"), *said("四", "五")],
        said("六", "七", "八"),
        [{"role": "system", "content": "短"}, *said("九", "十")],
        said("Human: 甲\nAssistant: 乙\nHuman: 丙\nAssistant:", "丁"),
        [reply("没有人问")],
        said("甲", "<think>早先</think>乙", "丙", "丁"),
    ]
    path = write_jsonl(tmp_path / "talks.jsonl", [{"messages": talk} for talk in talks])
    made = tmp_path / "made.jsonl"
    make_pairs(base_model, path, str(made), max_new_tokens=8)
    records = [json.loads(line) for line in made.read_text(encoding="utf-8").splitlines()]
    printed = capsys.readouterr().out
    assert f"{len(records)} pairs -> {made}; without a pair: " in printed
    assert "1 no question" in printed
    assert "noted: 1 reasoning before the last question, not shown" in printed
    assert len(records) > 1
    tokenizer = create_tokenizer(model_path=base_model)
    splits, _ = prepare_dpo_data(tokenizer, str(made), 256, None, cache_dir=tmp_path / "cache")
    assert sum(map(len, splits.values())) == len(records)


def test_a_whole_talk_in_an_answer_is_noted(tmp_path, tokenizer, capsys):
    talk = "Human: 问\n\nAssistant: "
    records = [{"prompt": f"问{n}", "chosen": f"{talk}好", "rejected": "坏"} for n in range(3)]
    path = write_jsonl(tmp_path / "dpo.jsonl", records)
    prepare_dpo_data(tokenizer, path, 96, None, cache_dir=tmp_path / "cache")
    assert "noted: 3 messages that hold a whole talk" in capsys.readouterr().out


def test_labelled_answers_become_pairs_and_a_good_one_alone_has_the_models(
    tmp_path, base_model, capsys
):
    records = [
        {"prompt": "问", "completion": "坏", "label": False},
        {"prompt": "独", "completion": "好", "label": True},
        {"prompt": "问", "completion": "好", "label": True},
        {"prompt": "弃", "completion": "坏", "label": False},
    ]
    path = write_jsonl(tmp_path / "kto.jsonl", records)
    made = tmp_path / "made.jsonl"
    make_pairs(base_model, path, str(made), max_new_tokens=8)
    first, *others = map(json.loads, made.read_text(encoding="utf-8").splitlines())
    assert first == {"instruction": "问", "chosen": "好", "rejected": "坏"}
    assert [(pair["instruction"], pair["chosen"]) for pair in others] == [("独", "好")]
    assert "1 bad answer without a good one" in capsys.readouterr().out


# --- the reference ------------------------------------------------------------------------------


def test_the_reference_is_part_of_the_run_and_must_have_the_policys_tokenizer(tmp_path, base_model):
    other = tmp_path / "other"
    other.mkdir()
    folder = train(wandb_config=pretrain_config(other, max_steps=1, vocab_size=310))
    config = dpo_config(tmp_path, base_model, max_steps=1)
    with pytest.raises(ValueError, match=r"reference_model_path=.*: its tokenizer is not that of"):
        train_dpo(wandb_config=config, reference_model_path=folder)
    with pytest.raises(ValueError, match=r"absent: no model folder there"):
        train_dpo(wandb_config=config, reference_model_path=str(tmp_path / "absent"))
    assert train_dpo(wandb_config=config, run_name="same", reference_model_path=base_model)
    with pytest.raises(ValueError, match=r"reference_model_path: .* -> None"):
        train_dpo(wandb_config=config, run_name="same")
