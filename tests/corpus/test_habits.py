"""What others' files hold: ranks, scores, labels, transcripts, parts, names, missing values."""

import json
from collections import Counter

import pytest
from accepted import POEM, said

from corpus.labelled import UNKNOWN_LABEL, Example, Labels, example_of
from corpus.readers import Dropped, FormatError
from corpus.records import to_messages, to_pair, to_pairs
from corpus.transcripts import holds_transcript, split_question, split_transcript

ASKED = said("问")


def scored(*scores) -> dict:
    answers = [
        {"response": f"答{number}", "overall_score": score} for number, score in enumerate(scores)
    ]
    return {"instruction": "问", "completions": answers}


def answers_of(record: dict) -> list[tuple[str, str]]:
    pairs = to_pairs(record)
    assert all(prompt == ASKED for prompt, _, _ in pairs)
    return [(chosen, rejected) for _, chosen, rejected in pairs]


def test_the_best_of_a_ranked_list_is_better_than_each_other():
    record = {"instruction": "问", "output": ["好", "中", "坏"]}
    assert answers_of(record) == [("好", "中"), ("好", "坏")]
    assert to_pair(record) == (ASKED, "好", "中")


def test_answers_with_scores_are_all_used():
    assert answers_of(scored(3, 9, 5)) == [("答1", "答2"), ("答1", "答0")]
    assert answers_of(scored(9, 1, 9)) == [("答2", "答1"), ("答0", "答1")]
    small = {"instruction": "问", "completions": [{"response": a, "score": len(a)} for a in "ab"]}
    small["completions"][0]["response"] = "abc"
    small["completions"][0]["score"] = 3
    assert answers_of(small) == [("abc", "b")]


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        (scored(4, 4), "equal scores"),
        (scored(4, None), "no score"),
        (scored(4, float("nan")), "no score"),
        (scored(4), "fewer than two answers"),
        ({"instruction": "问", "output": []}, "fewer than two answers"),
        ({"instruction": "问", "output": None}, "fewer than two answers"),
        ({"instruction": "问", "completions": float("nan")}, "fewer than two answers"),
    ],
)
def test_answers_that_cannot_be_compared_are_dropped_for_a_reason(record, reason):
    with pytest.raises(Dropped, match=reason):
        to_pairs(record)


def hh(*texts: str) -> str:
    marks = ("Human", "Assistant") * len(texts)
    return "".join(f"\n\n{mark}: {text}" for mark, text in zip(marks, texts, strict=False))


def test_hh_rlhf_s_transcripts_are_messages():
    record = {"chosen": hh("一", "二", "三", "四\n\n五"), "rejected": hh("一", "二", "三", "六")}
    assert to_pair(record) == (said("一", "二", "三"), "四\n\n五", "六")
    twice = {"chosen": hh("问", "好"), "rejected": "\n\nHuman: 问\n\nHuman: 在吗\n\nAssistant: 坏"}
    with pytest.raises(Dropped, match="answers to different questions"):
        to_pair(twice)
    with pytest.raises(Dropped, match="no answer at the end"):
        to_pair({"chosen": hh("问", "好", "再问"), "rejected": hh("问", "坏")})
    nothing = {"chosen": hh("问", ""), "rejected": hh("问", "坏")}
    with pytest.raises(Dropped, match="no answer at the end"):
        to_pair(nothing)


def test_an_answer_with_a_question_of_its_own_is_no_transcript():
    record = {"prompt": "问", "chosen": hh("别的", "好"), "rejected": "坏"}
    assert to_pair(record) == (ASKED, hh("别的", "好"), "坏")
    with pytest.raises(FormatError, match="no question before the answers"):
        to_pair({"chosen": hh("问", "好"), "rejected": "坏"})


def test_a_question_that_is_a_transcript_becomes_its_messages():
    text = "Human:一\nAssistant:二\nHuman:三\nAssistant:\n"  # BELLE's multiturn_chat
    expected = said("一", "二", "三", "四")
    assert to_messages({"instruction": text, "input": "", "output": "四"}) == expected
    assert split_question("Human: 一\nAssistant:") == said("一")
    assert split_question("User: 一\nAssistant: 二\nUser: 三") == said("一", "二", "三")
    assert split_question("### Human: 一\n### Assistant: 二\n### Human: 三") == said(
        "一", "二", "三"
    )
    assert split_question(hh("一", "二", "三")) == said("一", "二", "三")


@pytest.mark.parametrize(
    "text",
    ["Human: 你好", "Assistant: 一\nHuman: 二", "问 Human: 一\nAssistant:", hh("一", "二")],
)
def test_a_question_that_only_mentions_speakers_stays_as_it_is(text):
    assert split_question(text) == []
    assert to_messages({"instruction": text, "output": "答"})[0]["content"] == text


def test_a_transcript_in_one_message_is_known_by_both_marks():
    assert holds_transcript("好的。\nHuman: 还有呢？\nAssistant: 没有了。")
    assert holds_transcript("好的。\n### User: 还有呢？\n### Assistant: 没有了。")
    assert not holds_transcript("Assistant: 好的。")
    assert not holds_transcript("说 Human: 和 Assistant: 的人")
    assert split_transcript("没有标记") == []


# --- labels -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "record",
    [
        {"prompt": "写一句诗", "completion": "春眠不觉晓", "label": True},
        {"prompt": POEM[:1], "completion": POEM[1:], "label": 1},
        {"messages": POEM, "label": True},
        {"instruction": "写一句诗", "output": "春眠不觉晓", "kto_tag": True},
    ],
)
def test_one_answer_with_a_label_is_known_in_every_format(record):
    assert example_of(record) == Example(POEM[:1], "春眠不觉晓", True)


@pytest.mark.parametrize(
    ("label", "is_good"),
    [("True", True), ("1", True), (1.0, True), ("false", False), ("0", False), (-1, False)],
)
def test_a_label_may_be_text_as_a_csv_has_it(label, is_good):
    assert example_of({"messages": POEM, "label": label}).is_good is is_good


@pytest.mark.parametrize("label", [{"ability": "写诗"}, "诗", 3])
def test_a_label_that_says_something_else_is_none_and_counted(label):
    counts: Counter = Counter()
    assert example_of({"messages": POEM, "label": label}, counts).is_good is None
    assert counts == {UNKNOWN_LABEL: 1}
    assert example_of({"messages": POEM, "label": None, "kto_tag": 0}, counts).is_good is False
    assert counts == {UNKNOWN_LABEL: 1}


def test_all_that_is_said_to_the_last_question_is_the_answer():
    talk = [*said("一", "二", "三", "四"), {"role": "assistant", "content": "五"}]
    assert example_of({"messages": [*talk, *said("六")]}) == Example(
        said("一", "二", "三"), "四\n五", None
    )
    for record, reason in (
        ({"instruction": "问", "output": None}, "no reply"),
        ({"instruction": "", "output": "答"}, "no question"),
        ({"messages": [{"role": "assistant", "content": "答"}]}, "no question"),
    ):
        with pytest.raises(Dropped, match=reason):
            example_of(record)


def test_good_and_bad_answers_to_a_prompt_are_paired_and_the_others_counted():
    labels, counts = Labels(), Counter()
    answers = [("好", True), ("坏", False), ("差", False), ("优", True), ("劣", False)]
    examples = [Example(ASKED, answer, label) for answer, label in answers]
    alone = Example(said("别的"), "好", True)
    for example in (*examples, alone, Example(said("别的"), "没有标签", None)):
        labels.add(example)
    assert labels.pairs(examples[1], counts) == [("好", "坏"), ("优", "差")]
    assert labels.pairs(alone, counts) == []
    assert +counts == {"bad answer without a good one": 1}


# --- names and missing values -------------------------------------------------------------------


def test_content_in_parts_is_their_text():
    parts = [{"type": "text", "text": "写一句"}, {"type": "text", "text": "诗"}]
    assert to_messages({"messages": [{"role": "user", "content": parts}, POEM[1]]}) == POEM


@pytest.mark.parametrize(
    ("name", "role"),
    [("model", "assistant"), ("ai", "assistant"), ("developer", "system"), ("ipython", "tool")],
)
def test_the_roles_of_other_makers_are_known(name, role):
    [message] = to_messages({"messages": [{"role": name, "content": "文"}]})
    assert message["role"] == role


NULL = float("nan"), None, ""


@pytest.mark.parametrize("null", NULL, ids=str)
def test_a_missing_value_is_empty_text_in_every_field(null):
    assert to_messages({"instruction": "写一句诗", "input": null, "output": "春眠不觉晓"}) == POEM
    assert to_messages({"instruction": "问", "output": null}) == said("问", "")
    assert to_messages({"messages": [POEM[0], {"role": "assistant", "content": null}]}) == [
        POEM[0],
        {"role": "assistant", "content": ""},
    ]
    history = {"instruction": "三", "output": "四", "history": [["一", null]]}
    assert to_messages(history) == said("一", "", "三", "四")
    assert to_pair({"prompt": "问", "chosen": "好", "rejected": null}) == (ASKED, "好", "")
    full = {"chosen": said("问", "好"), "rejected": said("问", "坏")}
    for key in ("prompt", "question", "instruction"):
        assert to_pair(full | {key: null}) == (ASKED, "好", "坏")
        assert to_pair({key: null, "chosen": "好", "rejected": "坏"})[0][0]["content"] == ""


@pytest.mark.parametrize("null", [None, "", []], ids=str)
def test_missing_messages_are_dropped_and_no_error(null):
    with pytest.raises(Dropped, match="no messages"):
        to_messages({"messages": null})
    full = {"chosen": said("问", "好"), "rejected": said("问", "坏")}
    assert to_pair(full | {"messages": null}) == (ASKED, "好", "坏")
    with pytest.raises(Dropped, match="no messages"):
        to_pair({"prompt": "问", "chosen": [], "rejected": "坏"})
    with pytest.raises(Dropped, match="no question"):
        to_pair({"messages": null, "chosen": "好", "rejected": "坏"})


@pytest.mark.parametrize("null", NULL, ids=str)
def test_what_is_missing_beside_messages_or_in_one_is_no_error(null):
    with_calls = [POEM[0], POEM[1] | {"tool_calls": null, "reasoning_content": null}]
    assert to_messages({"messages": with_calls, "tools": null, "history": null}) == POEM
    full = {"instruction": POEM[0]["content"], "output": POEM[1]["content"]}
    assert to_messages(full | {"history": null, "system": null, "tools": null}) == POEM
    with pytest.raises(Dropped, match="no messages"):
        to_messages({"conversations": null})


def test_a_label_beside_the_messages_is_no_context_and_counted_where_it_says_more():
    talk = {"messages": POEM, "prompt": "写一句诗", "answer": "42", "question": ""}
    counts: Counter = Counter()
    assert to_messages(talk, counts) == POEM
    assert counts == {"noted: 'answer' beside \"messages\", not read": 1}
    pair = {"prompt": "问", "chosen": "好", "rejected": "坏", "response": "好", "output": "优"}
    counts.clear()
    assert to_pairs(pair, counts) == [(ASKED, "好", "坏")]
    [note] = counts
    assert note.startswith("noted: 'output' beside")
    with pytest.raises(FormatError, match="'context' is not used beside"):
        to_messages({"messages": POEM, "context": "一段要读的话"})


def test_messages_may_be_text_that_is_json():
    assert to_messages({"messages": json.dumps(POEM)}) == POEM
    for nothing in ("[]", "null", '""'):
        with pytest.raises(Dropped, match="no messages"):
            to_messages({"messages": nothing, "system": "你是诗人"})
    with pytest.raises(FormatError, match="'messages' is text that is no JSON"):
        to_messages({"messages": "写一句诗"})


@pytest.mark.parametrize("key", ["reasoning_content", "reasoning", "thinking"])
def test_reasoning_is_known_by_each_of_its_names(key):
    talk = [POEM[0] | {key: None}, POEM[1] | {key: "想"}]
    assert to_messages({"messages": talk})[1]["content"] == "<think>\n想\n</think>\n\n春眠不觉晓"
    with pytest.raises(FormatError, match=f"'{key}', which only the assistant's message may have"):
        to_messages({"messages": [POEM[0] | {key: "想"}, POEM[1]]})


def test_a_picture_in_a_message_is_refused_and_its_absence_is_none():
    assert to_messages({"messages": [POEM[0] | {"images": [], "audio": None}, POEM[1]]}) == POEM
    with pytest.raises(FormatError, match=r"message 1 .* has 'images', and only text is learned"):
        to_messages({"messages": [POEM[0] | {"images": ["a.png"]}, POEM[1]]})
