"""Every accepted record to messages, and messages to ids, a mask of the replies, and a length."""

import inspect

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny import write_jsonl

from corpus.chat_format import Renderer, flatten, iter_conversations, truncate
from corpus.records import FormatError, to_messages

TALK = [
    {"role": "system", "content": "你是助手。"},
    {"role": "user", "content": "天地玄黄 12？"},
    {"role": "assistant", "content": "宇宙洪荒。\n第二行"},
    {"role": "user", "content": "The fox?"},
    {"role": "assistant", "content": "The quick brown fox. 😀"},
]


def turns_of(tokenizer, messages):
    return Renderer(tokenizer).render([messages])[0]


def render(tokenizer, messages) -> tuple[list[int], list[bool]]:
    ids, mask = flatten(turns_of(tokenizer, messages))
    return ids.tolist(), mask.tolist()


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


def test_a_prompt_that_was_shortened_for_a_long_reply_stays_so_for_a_shorter_one(tokenizer):
    question = {"role": "user", "content": "起" * 100 + "终"}
    long, short = ({"role": "assistant", "content": "答" * length} for length in (8, 1))
    longer, shorter = turns_of(tokenizer, [question, long]), turns_of(tokenizer, [short])
    assert truncate(longer, 64) is False
    ids, _ = flatten(longer)
    assert len(ids) == 64
    conversation = [longer[0], *shorter]
    assert truncate(conversation, 64) is False
    expected = [*flatten(longer[:1])[0], *flatten(shorter)[0]]
    assert flatten(conversation)[0].tolist() == expected
    assert list(inspect.signature(truncate).parameters) == ["turns", "max_length"]


def test_format_errors_are_value_errors_for_those_who_parse_records_themselves():
    with pytest.raises(FormatError):
        to_messages({})
    assert issubclass(FormatError, ValueError)


def test_a_record_of_a_prompt_file_that_is_broken_is_named_by_file_and_line(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", [{"instruction": "问", "response": "答"}, {"a": 1}])
    found = []
    with pytest.raises(ValueError, match=r"a\.jsonl:2: .*found keys \['a'\]"):
        found.extend(iter_conversations(path, to_messages))
    assert len(found) == 1
