"""The saved template gives what the data was rendered to, and the text of Qwen3's own template."""

import functools
import json

import pytest
from fuzz import TEXT, cases
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer

from corpus.chat_format import Renderer, flatten, teaches
from corpus.records import to_messages
from tokenizer import CHAT_TEMPLATE, SPECIAL_TOKENS, create_tokenizer

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "天气",
            "description": '查询"今天"的天气 <b>',
            "parameters": {"type": "object", "properties": {"城市": {"type": "string"}}},
        },
    },
    {"name": "时间", "parameters": {}},
]
SYSTEM = {"role": "system", "content": "你是助手。"}
USER = {"role": "user", "content": "北京天气？"}
AGAIN = {"role": "user", "content": "谢谢，上海呢？"}


def called(*cities: str, content="", **fields) -> dict:
    calls = [
        {"type": "function", "function": {"name": "天气", "arguments": {"城市": c}}} for c in cities
    ]
    return {"role": "assistant", "content": content, "tool_calls": calls, **fields}


def result(text: str) -> dict:
    return {"role": "tool", "content": text}


def reply(text: str, **fields) -> dict:
    return {"role": "assistant", "content": text, **fields}


STEPS = [USER, called("北京", reasoning_content="先查。\n"), result('{"天气": "晴"}')]
PLAIN = {
    "two questions": [SYSTEM, USER, reply("晴。"), AGAIN, reply("雨。")],
    "a question": [SYSTEM, USER, reply("晴。"), AGAIN],
    "reasoning in the content": [
        USER,
        reply("<think>\n想\n</think>\n\n晴。"),
        AGAIN,
        reply("<think>\n\n再想\n</think>\n雨。"),
    ],
    "an empty block in the content": [
        USER,
        reply("晴。"),
        AGAIN,
        reply("<think>\n\n</think>\n\n雨。"),
    ],
}
WITH_TOOLS = {
    "tools": [SYSTEM, USER],
    "no system message": [USER, called("北京"), result("晴"), reply("晴。"), AGAIN],
    "one step": [*STEPS, reply("晴。", reasoning_content="是晴天。")],
    "a call is last": [SYSTEM, USER, called("北京", content="我查。")],
    "two calls": [
        USER,
        called("北京", "上海", content="我查。", reasoning_content="两个。"),
        result("晴"),
        result("雨"),
        reply("一晴一雨。", reasoning_content="好了。"),
    ],
    "many steps": [
        SYSTEM,
        *STEPS,
        called("上海", reasoning_content="再查。"),
        result("雨"),
        called("广州"),
        result("阴"),
        reply("晴，雨，阴。", reasoning_content="\n\n齐了"),
    ],
    "reasoning of an earlier question": [
        *STEPS,
        reply("晴。", reasoning_content="是晴天。"),
        AGAIN,
        reply("雨。", reasoning_content="看天。"),
    ],
    "flat calls, arguments as text": [
        USER,
        reply("", tool_calls=[{"name": "时间", "arguments": '{"zone":8}'}]),
        result("八点"),
    ],
    "a result in a user's name": [
        USER,
        called("北京", reasoning_content="查。"),
        {"role": "user", "content": "<tool_response>\n晴\n</tool_response>"},
        reply("晴。", reasoning_content="是晴天。"),
    ],
}
TALKS: dict[str, tuple] = {name: (talk, None) for name, talk in PLAIN.items()}
TALKS |= {name: (talk, TOOLS) for name, talk in WITH_TOOLS.items()}
# Here Qwen3's template adds a block of reasoning that is empty.
WITHOUT_REASONING = ("two questions", "a call is last")
EMPTY_BLOCK = "<think>\n\n</think>\n\n"
every_talk = pytest.mark.parametrize("name", TALKS)


@functools.cache
def load_qwen3(folder: str) -> tuple:
    """(Qwen3's tokenizer with its own template, the same with ours)."""
    return AutoTokenizer.from_pretrained(folder), create_tokenizer(model_path=folder)


@pytest.fixture
def qwen3(real_data) -> tuple:
    return load_qwen3(str(real_data("qwen3_tokenizer")))


def check_rendering(tokenizer, messages, tools):
    """Data and template agree in ids and mask; rendered messages need no tools any more.

    The template marks every reply. An empty one, or one that nobody asked for, is no target.
    """
    expected = tokenizer.apply_chat_template(
        messages, tools=tools, return_dict=True, return_assistant_tokens_mask=True
    )
    plain = to_messages({"messages": messages, "tools": tools})
    ids, mask = (array.tolist() for array in flatten(Renderer(tokenizer).render([plain])[0]))
    assert ids == expected["input_ids"]
    turns = [(message["role"], message["content"]) for message in plain]
    marked = [bool(target) for target in expected["assistant_masks"]]
    if teaches(turns) == [role == "assistant" for role, _ in turns]:
        assert mask == marked
    assert not any(target and not mark for target, mark in zip(mask, marked, strict=True))
    assert tokenizer.apply_chat_template(plain, return_dict=True)["input_ids"] == ids


@every_talk
def test_the_template_gives_what_the_data_gives_token_for_token(tokenizer, name):
    assert tokenizer.chat_template == CHAT_TEMPLATE
    check_rendering(tokenizer, *TALKS[name])


@every_talk
def test_with_qwen3s_vocabulary_too(qwen3, name):
    check_rendering(qwen3[1], *TALKS[name])


@every_talk
def test_the_text_is_that_of_qwen3s_template_but_for_empty_reasoning(qwen3, name):
    messages, tools = TALKS[name]
    theirs, ours = (
        tokenizer.apply_chat_template(messages, tools=tools, tokenize=False) for tokenizer in qwen3
    )
    if name in WITHOUT_REASONING:
        assert theirs.count(EMPTY_BLOCK) == 1
        theirs = theirs.replace(EMPTY_BLOCK, "")
    assert ours == theirs


def test_the_generation_prompt_is_qwen3s_too(qwen3):
    messages, tools = TALKS["many steps"]
    theirs, ours = (
        tokenizer.apply_chat_template(
            messages[:-1], tools=tools, tokenize=False, add_generation_prompt=True
        )
        for tokenizer in qwen3
    )
    assert ours == theirs
    assert ours.endswith("</tool_response><|im_end|>\n<|im_start|>assistant\n")


def test_a_message_without_content_is_an_empty_one(tokenizer):
    silent = called("北京") | {"content": None, "reasoning_content": None}
    check_rendering(tokenizer, [USER, silent, result("晴"), reply("晴。", tool_calls=None)], TOOLS)


def test_a_folder_saved_before_the_template_knew_tools_gets_the_new_one(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    older = (
        "{%- for message in messages %}{{- '<|im_start|>' + message['role'] + '\\n' }}"
        "{% generation %}{{- message['content'] + '<|im_end|>\\n' }}{% endgeneration %}"
        "{%- endfor %}"
    )
    (tmp_path / "chat_template.jinja").write_text(older)
    assert AutoTokenizer.from_pretrained(tmp_path).chat_template == older
    assert create_tokenizer(model_path=str(tmp_path)).chat_template == CHAT_TEMPLATE


WORDS = TEXT.filter(lambda text: not any(token in text for token in SPECIAL_TOKENS))
WORDS = WORDS.filter(lambda text: not text[:1].isspace())  # it would join the header's line feed
CALLS = st.dictionaries(WORDS, WORDS | st.integers() | st.booleans(), max_size=2).map(
    lambda arguments: {"name": "f", "arguments": arguments}
)


@st.composite
def any_talks(draw) -> list[dict]:
    messages = [{"role": "user", "content": draw(WORDS)}]
    for role in draw(st.lists(st.sampled_from(["user", "assistant", "tool"]), max_size=6)):
        message = {"role": role, "content": draw(WORDS)}
        if role == "assistant":
            thought = draw(st.sampled_from(["", "想", "\n想\n一想\n"]))
            message |= {"reasoning_content": thought}
            message |= {"tool_calls": draw(st.lists(CALLS, max_size=2))}
        messages.append(message)
    return messages


@cases(60)
@given(messages=any_talks(), tools=st.sampled_from([None, TOOLS]))
def test_any_talk_with_tools_and_reasoning_is_the_templates(tokenizer, messages, tools):
    check_rendering(tokenizer, messages, tools)
    as_text = [
        m | {"tool_calls": json.dumps(m["tool_calls"])} if "tool_calls" in m else m
        for m in messages
    ]
    again = to_messages({"conversations": as_text, "tools": json.dumps(tools)})
    assert again == to_messages({"messages": messages, "tools": tools})
