"""Tool calls, their results, reasoning: to plain messages, to turns, and what is refused.

tests/test_chat_template.py holds the words against Qwen3's own template.
"""

import json

import numpy as np
import pytest

from corpus.chat_format import Renderer, flatten, truncate
from corpus.records import FormatError, to_messages, to_pair

WEATHER = {
    "type": "function",
    "function": {"name": "天气", "parameters": {"type": "object", "properties": {}}},
}
CALL = {"name": "天气", "arguments": {"城市": "北京"}}
CALLED = '<tool_call>\n{"name": "天气", "arguments": {"城市": "北京"}}\n</tool_call>'
USER = {"role": "user", "content": "北京天气？"}
RESULT = {"role": "tool", "content": "晴"}
REPLY = {"role": "assistant", "content": "晴天。"}


def talk(*messages, **fields) -> list[dict]:
    return to_messages({"messages": list(messages), **fields})


def call(**fields) -> dict:
    return {"role": "assistant", "content": "", **fields}


def as_text(value) -> str:
    return json.dumps(value, ensure_ascii=False)


SAME_CALL = {
    "OpenAI": call(content=None, tool_calls=[{"id": "1", "type": "function", "function": CALL}]),
    "OpenAI, arguments as text": call(
        tool_calls=[{"function": {"name": "天气", "arguments": as_text(CALL["arguments"])}}]
    ),
    "OpenAI's older": call(content=None, function_call=CALL),
    "plain": call(tool_calls=[CALL]),
    "minimind, as text": call(tool_calls=as_text([CALL]), reasoning_content="", tools=""),
    "texts in a list": call(tool_calls=[as_text(CALL)]),
    "ShareGPT": {"from": "function_call", "value": as_text(CALL)},
    "ms-swift": {"role": "tool_call", "content": as_text(CALL)},
}


@pytest.mark.parametrize("message", SAME_CALL.values(), ids=SAME_CALL)
def test_a_call_is_the_same_however_it_is_written(message):
    assert talk(USER, message, RESULT, REPLY) == [
        USER,
        {"role": "assistant", "content": CALLED},
        RESULT,
        REPLY,
    ]


@pytest.mark.parametrize("role", ["tool", "observation", "function", "tool_response"])
def test_a_tools_result_keeps_a_role_of_its_own(role):
    message = {"from": role, "value": "晴"}
    assert talk(USER, SAME_CALL["ShareGPT"], message, REPLY)[2] == RESULT


def test_calls_that_follow_each_other_are_one_turn_of_the_assistant():
    shown = SAME_CALL["ms-swift"]
    assert talk(USER, {"role": "assistant", "content": "我查。"}, shown, shown, RESULT, REPLY)[
        1
    ] == {
        "role": "assistant",
        "content": f"我查。\n{CALLED}\n{CALLED}",
    }


def test_arguments_that_are_missing_are_none():
    words = '<tool_call>\n{"name": "f", "arguments": {}}\n</tool_call>'
    for arguments in ({}, {"arguments": None}, {"arguments": ""}):
        assert talk(USER, call(tool_calls=[{"name": "f", **arguments}]))[1]["content"] == words


DEFINED = (
    "# Tools\n\nYou may call one or more functions to assist with the user query.\n\n"
    "You are provided with function signatures within <tools></tools> XML tags:\n<tools>\n"
    + as_text(WEATHER)
    + "\n</tools>\n\nFor each function call, return a json object with function name and arguments"
    ' within <tool_call></tool_call> XML tags:\n<tool_call>\n{"name": <function-name>, '
    '"arguments": <args-json-object>}\n</tool_call>'
)


@pytest.mark.parametrize(
    "tools",
    [[WEATHER], WEATHER, as_text([WEATHER]), [as_text(WEATHER)]],
    ids=["list", "one", "text", "list of texts"],
)
def test_tools_are_defined_in_the_system_message_wherever_they_were_given(tools):
    system = {"role": "system", "content": "你是助手。"}
    expected = [{"role": "system", "content": f"你是助手。\n\n{DEFINED}"}, USER, REPLY]
    assert talk(system, USER, REPLY, tools=tools) == expected
    assert talk({**system, "tools": tools}, USER, REPLY) == expected
    assert talk({**system, "functions": tools}, USER, REPLY) == expected
    assert talk({**system, "tools": tools}, USER, REPLY, tools=as_text([WEATHER])) == expected
    for before in ([], [{"role": "system", "content": ""}]):
        alone = talk(*before, USER, REPLY, tools=tools)
        assert alone == [{"role": "system", "content": DEFINED}, USER, REPLY]
    record = {"instruction": "北京天气？", "output": "晴天。", "system": "你是助手。"}
    assert to_messages(record | {"tools": tools}) == expected


def test_no_tools_are_no_words():
    for tools in ("", "[]", "null", [], None):
        assert talk(USER, REPLY, tools=tools) == [USER, REPLY]
        assert talk({"role": "system", "content": "甲", "tools": tools}, USER, REPLY)[0] == {
            "role": "system",
            "content": "甲",
        }


def test_minimind_s_record_with_a_tool_is_read_as_it_is():
    record = {
        "conversations": [
            {"role": "system", "content": "你是助手。", "tools": as_text([WEATHER])},
            {"role": "user", "content": "北京天气？", "reasoning_content": "", "tool_calls": ""},
            call(tool_calls=as_text([CALL]), reasoning_content="要查。"),
            {"role": "tool", "content": "晴"},
            {"role": "assistant", "content": "晴天。", "reasoning_content": "", "tools": ""},
        ]
    }
    assert to_messages(record) == [
        {"role": "system", "content": f"你是助手。\n\n{DEFINED}"},
        USER,
        {"role": "assistant", "content": f"<think>\n要查。\n</think>\n\n{CALLED}"},
        RESULT,
        REPLY,
    ]


def test_reasoning_is_shown_since_the_last_question_only():
    def thinks(thought, content):
        return {"role": "assistant", "content": content, "reasoning_content": thought}

    once = talk(USER, thinks("一", "甲"), USER, thinks("二", "乙"), RESULT, thinks("三", "丙"))
    assert [m["content"] for m in once if m["role"] == "assistant"] == [
        "甲",
        "<think>\n二\n</think>\n\n乙",
        "<think>\n三\n</think>\n\n丙",
    ]
    assert talk(*once) == once, "rendered messages stay as they are"
    assert talk(thinks("一", "甲"))[0]["content"] == "<think>\n一\n</think>\n\n甲"


def test_reasoning_inside_the_content_is_reasoning_and_a_word_about_it_is_not():
    inside = {"role": "assistant", "content": "<think>想</think>甲"}
    about = {"role": "assistant", "content": "用 <think> 和 </think> 包住。"}
    assert [m["content"] for m in talk(USER, inside, USER, inside) if m["role"] == "assistant"] == [
        "甲",
        "<think>\n想\n</think>\n\n甲",
    ]
    assert talk(USER, about, USER, about)[1] == about
    twice = {"role": "assistant", "content": "<think>一</think>二</think>三"}
    assert talk(USER, twice)[1]["content"] == "<think>\n一\n</think>\n\n二</think>三"
    empty = {"role": "assistant", "content": "<think>\n\n</think>\n\n甲"}
    assert talk(USER, empty)[1] == empty, "what the data has stays; nothing empty is added"


def test_a_pair_has_tools_calls_and_reasoning_too():
    record = {
        "tools": [WEATHER],
        "messages": [USER],
        "chosen": {"role": "assistant", "content": "", "tool_calls": [CALL]},
        "rejected": {"role": "assistant", "content": "不知道", "reasoning_content": "懒"},
    }
    prompt, chosen, rejected = to_pair(record)
    assert prompt == [{"role": "system", "content": DEFINED}, USER]
    assert (chosen, rejected) == (CALLED, "<think>\n懒\n</think>\n\n不知道")
    after = {"prompt": [USER, call(tool_calls=[CALL]), RESULT], "chosen": "晴", "rejected": "雨"}
    assert to_pair(after)[0] == [USER, call(content=CALLED), RESULT]


REFUSED = {
    "call no JSON": (call(tool_calls="天气()"), "'tool_calls' of message 2 of 'messages' is text"),
    "call without name": (call(tool_calls=[{"arguments": {}}]), 'must be {"name": …, "arguments'),
    "call no object": (call(tool_calls=[3]), 'must be {"name": …, "arguments": {…}}'),
    "arguments no JSON": (
        call(tool_calls=[{"name": "f", "arguments": "城市=北京"}]),
        "'arguments' in 'tool_calls' of message 2 of 'messages' is text that is no JSON",
    ),
    "arguments a list": (
        call(tool_calls=[{"name": "f", "arguments": [1]}]),
        "'arguments' in 'tool_calls' of message 2 .* must be an object",
    ),
    "ShareGPT's call": (
        {"from": "function_call", "value": "查"},
        "'tool_calls' of message 2 .* no J",
    ),
    "no call": (
        {"from": "function_call", "value": "[]"},
        "message 2 .* is a tool call and has none",
    ),
    "surrogate": (
        call(tool_calls=[{"name": "f", "arguments": {"a": "\ud800"}}]),
        "'arguments' of a tool call has a lone surrogate",
    ),
    "result no text": (
        {"role": "tool", "content": {"a": 1}},
        "message 2 .* must be text, found dict",
    ),
    "no content": (
        {"role": "assistant"},
        "message 2 of 'messages' has no content",
    ),
    "reasoning": (call(reasoning_content=3), "reasoning of message 2 .* must be text, found int"),
    "user's call": (USER | {"tool_calls": [CALL]}, "'tool_calls', which only the assistant's mess"),
    "user's tools": (USER | {"tools": [WEATHER]}, "'tools', which only the system's message may"),
    "no target": (REPLY | {"loss": False}, "has 'loss': False, which is not supported"),
    "no weight": (REPLY | {"weight": 0}, "has 'weight': 0, which is not supported"),
}


@pytest.mark.parametrize(("message", "error"), REFUSED.values(), ids=REFUSED)
def test_a_message_that_cannot_be_read_is_refused_by_name(message, error):
    with pytest.raises(FormatError, match=error):
        talk(USER, message)


@pytest.mark.parametrize(
    ("tools", "error"),
    [("查天气", "'tools' is text that is no JSON"), ([3], "'tools' must be a list of objects")],
)
def test_tools_that_are_no_definitions_are_refused_by_name(tools, error):
    with pytest.raises(FormatError, match=error):
        talk(USER, REPLY, tools=tools)
    with pytest.raises(FormatError, match="'tools' of message 1 of 'messages'"):
        talk({"role": "system", "content": "", "tools": tools}, USER, REPLY)


def test_marks_of_a_reply_that_is_a_target_are_no_obstacle():
    for mark in ({"loss": True}, {"weight": 1}, {"loss": None}, {"weight": ""}):
        assert talk(USER, REPLY | mark) == [USER, REPLY]


def test_two_lists_of_tools_are_refused():
    system = {"role": "system", "content": "", "tools": [WEATHER]}
    with pytest.raises(FormatError, match="'tools' differs from the system message"):
        talk(system, USER, REPLY, tools=[{"name": "其它"}])


# --- turns --------------------------------------------------------------------------------------


def turns_of(tokenizer, *messages, **fields):
    return Renderer(tokenizer).render([talk(*messages, **fields)])[0]


STEPS = [USER, call(tool_calls=[CALL, CALL]), RESULT, RESULT, REPLY]


def test_a_tools_words_are_no_target_and_its_results_are_one_turn(tokenizer):
    turns = turns_of(tokenizer, *STEPS)
    assert [turn.role for turn in turns] == ["user", "assistant", "tool", "assistant"]
    ids, mask = flatten(turns)
    result = "<tool_response>\n晴\n</tool_response>"
    text = tokenizer.decode(ids)
    assert f"<|im_start|>user\n{result}\n{result}<|im_end|>\n<|im_start|>assistant\n晴天。" in text
    spoken = tokenizer.decode([i for i, target in zip(ids, mask, strict=True) if target])
    assert spoken == f"{CALLED}\n{CALLED}<|im_end|>晴天。<|im_end|>"


def test_an_exchange_goes_whole_with_its_calls_and_results(tokenizer):
    turns = turns_of(tokenizer, *STEPS, *STEPS, *STEPS)
    truncate(turns, sum(map(len, turns)) - 1)
    assert [turn.role for turn in turns] == ["user", "assistant", "tool", "assistant"] * 2


def test_the_question_that_is_kept_is_the_users_and_all_behind_it_stays(tokenizer):
    question = {"role": "user", "content": "起" * 100 + "终"}
    turns = turns_of(tokenizer, *STEPS, question, *STEPS[1:])
    short = turns_of(tokenizer, *STEPS)[1:]
    assert truncate(turns, sum(map(len, short)) + 60) is False
    assert [turn.role for turn in turns] == ["user", "assistant", "tool", "assistant"]
    assert tokenizer.decode(turns[0].content).endswith("终")
    assert all(map(np.array_equal, flatten(turns[1:]), flatten(short)))


def test_definitions_of_tools_stay_where_a_tool_was_used(tokenizer):
    turns = turns_of(tokenizer, *STEPS, tools=[WEATHER])
    assert truncate(turns, 64) is True
    assert [turn.role for turn in turns] == ["system", "user", "assistant", "tool", "assistant"]
    unused = turns_of(tokenizer, USER, REPLY, tools=[WEATHER])
    assert truncate(unused, 64) is False
    assert [turn.role for turn in unused] == ["user", "assistant"]
