"""Every accepted record to messages or to a pair, and every refusal by name.

The records are made up. Their keys are those of the data sets that FORMATS names.
"""

import re

import pytest
from conftest import ROOT
from tiny import write_jsonl

from corpus.documents import iter_documents
from corpus.records import DPO, FORMATS, SFT, FormatError, to_messages, to_pair


def said(*texts: str, system: str = "") -> list[dict]:
    """Messages of a user and an assistant in turns, perhaps behind a system message."""
    roles = ("user", "assistant") * len(texts)
    messages = [{"role": role, "content": text} for role, text in zip(roles, texts, strict=False)]
    return [{"role": "system", "content": system}, *messages] if system else messages


def shared(*texts: str, system: str = "") -> list[dict]:
    """The same in ShareGPT's words."""
    names = {"system": "system", "user": "human", "assistant": "gpt"}
    return [
        {"from": names[message["role"]], "value": message["content"]}
        for message in said(*texts, system=system)
    ]


POEM = said("写一句诗", "春眠不觉晓")
# (stage, keys of the format) -> [(record, what it becomes)]
ACCEPTED: dict[tuple, list] = {
    (SFT, "messages"): [
        ({"messages": POEM}, POEM),
        (
            {"messages": POEM, "system": "你是诗人", "id": 7},
            said("写一句诗", "春眠不觉晓", system="你是诗人"),
        ),
    ],
    (SFT, "conversations"): [
        ({"conversations": shared("写一句诗", "春眠不觉晓")}, POEM),
        (  # minimind: fields without a value are empty or null
            {
                "conversations": [
                    {**message, "reasoning_content": "", "tools": None, "tool_calls": ""}
                    for message in POEM
                ]
            },
            POEM,
        ),
        (  # Infinity-Instruct
            {
                "id": 12,
                "conversations": shared("一加一？", "二", "再加一？", "三"),
                "label": {"ability_zh": ["数学"]},
                "langdetect": "zh-cn",
                "source": "made",
                "reward": 1.5,
            },
            said("一加一？", "二", "再加一？", "三"),
        ),
    ],
    (SFT, "instruction response"): [
        ({"instruction": "译", "input": "fox", "response": "狐"}, said("译\nfox", "狐")),
        ({"instruction": "译", "input": None, "response": "狐", "output": None}, said("译", "狐")),
    ],
    (SFT, "instruction output"): [
        ({"instruction": "写一句诗", "input": "", "output": "春眠不觉晓"}, POEM),  # BELLE
        (  # COIG-CQIA
            {
                "instruction": "写一句诗",
                "input": "",
                "output": "春眠不觉晓",
                "task_type": {"major": ["创作"], "minor": ["写诗"]},
                "domain": ["文学"],
                "metadata": None,
                "answer_from": "human",
                "human_verified": True,
                "copyright": "made",
            },
            POEM,
        ),
        (  # DeepCtrl
            {
                "id": 1,
                "instruction": "",
                "input": "那明天呢？",
                "output": "有雨。",
                "history": [["今天天气如何？", "晴。"]],
                "language": "chinese",
                "num_utter": 2,
            },
            said("今天天气如何？", "晴。", "那明天呢？", "有雨。"),
        ),
        (
            {"instruction": "三", "output": "四", "history": '[["一", "二"]]', "system": "数数"},
            said("一", "二", "三", "四", system="数数"),
        ),
        (
            {"instruction": "三", "output": "四", "history": said("一", "二", system="数数")},
            said("一", "二", "三", "四", system="数数"),
        ),
    ],
    (SFT, "query response"): [
        (
            {"query": "三", "response": "四", "history": [["一", "二"]], "system": "数数"},
            said("一", "二", "三", "四", system="数数"),
        ),
    ],
    (SFT, "input target"): [
        ({"kind": "Composition", "input": "写一句诗", "target": "春眠不觉晓"}, POEM),
    ],
    (SFT, "input content"): [
        (
            {
                "input": "一加一？",
                "reasoning_content": "先数一，再数一。\n",
                "content": "\n\n等于二。",
                "repo_name": "made",
                "score": 9,
            },
            said("一加一？", "<think>\n先数一，再数一。\n</think>\n\n等于二。"),
        ),
        ({"input": "写一句诗", "content": "春眠不觉晓"}, POEM),
    ],
    (SFT, "input output"): [
        ({"instruction": None, "input": "写一句诗", "output": "春眠不觉晓"}, POEM),
    ],
    (DPO, "messages rejected_response"): [
        ({"messages": POEM, "rejected_response": "不会"}, (POEM[:1], "春眠不觉晓", "不会")),
        (
            {"system": "数数", "messages": said("一", "二", "三", "四"), "rejected_response": "八"},
            (said("一", "二", "三", system="数数"), "四", "八"),
        ),
    ],
    (DPO, "messages rejected_messages"): [
        (
            {"messages": POEM, "rejected_messages": said("写一句诗", "不会")},
            (POEM[:1], "春眠不觉晓", "不会"),
        ),
    ],
    (DPO, "question response_chosen response_rejected"): [
        (
            {
                "system": "你是医生",
                "history": [["头疼", "多久了？"]],
                "question": "三天了",
                "response_chosen": "请去医院。",
                "response_rejected": "没事。",
            },
            (said("头疼", "多久了？", "三天了", system="你是医生"), "请去医院。", "没事。"),
        ),
        (
            {
                "system": "",
                "history": [],
                "question": "三天了",
                "response_chosen": "请去医院。",
                "response_rejected": "没事。",
            },
            (said("三天了"), "请去医院。", "没事。"),
        ),
    ],
    (DPO, "prompt chosen rejected"): [
        ({"prompt": "问", "chosen": "好", "rejected": "坏"}, (said("问"), "好", "坏")),
        (
            {"prompt": said("问", system="短"), "chosen": "好", "rejected": "坏"},
            (said("问", system="短"), "好", "坏"),
        ),
        (
            {"system": "短", "prompt": "问", "chosen": "好", "rejected": "坏"},
            (said("问", system="短"), "好", "坏"),
        ),
        (  # the question stands in the answers once more, and in messages
            {
                "prompt": "问",
                "chosen": said("问", "好"),
                "rejected": said("问", "坏"),
                "messages": said("问", "好"),
                "score_chosen": 8.0,
            },
            (said("问"), "好", "坏"),
        ),
    ],
    (DPO, "question chosen rejected"): [
        (
            {"system": "答得短些", "question": "问", "chosen": "好", "rejected": "坏"},
            (said("问", system="答得短些"), "好", "坏"),
        ),
    ],
    (DPO, "instruction chosen rejected"): [
        (
            {"instruction": "译", "input": "fox", "chosen": "狐", "rejected": "狗"},
            (said("译\nfox"), "狐", "狗"),
        ),
        (
            {"instruction": "", "input": "问", "chosen": "好", "rejected": "坏"},
            (said("问"), "好", "坏"),
        ),
    ],
    (DPO, "messages chosen rejected"): [
        (
            {"messages": said("一", "二", "三"), "chosen": "四", "rejected": "八"},
            (said("一", "二", "三"), "四", "八"),
        ),
    ],
    (DPO, "conversations chosen rejected"): [
        (
            {
                "conversations": shared("一", "二", "三", system="数数"),
                "chosen": {"from": "gpt", "value": "四"},
                "rejected": {"from": "gpt", "value": "八"},
            },
            (said("一", "二", "三", system="数数"), "四", "八"),
        ),
    ],
    (DPO, "chosen rejected"): [
        (
            {"chosen": said("问", "好"), "rejected": said("问", "坏")},
            (said("问"), "好", "坏"),
        ),
        ({"chosen": said("问", "好"), "rejected": "坏"}, (said("问"), "好", "坏")),
    ],
}
CASES = [(*key, *case) for key, cases in ACCEPTED.items() for case in cases]
READ = {SFT: to_messages, DPO: to_pair}


@pytest.mark.parametrize(("stage", "keys", "record", "expected"), CASES)
def test_every_accepted_record_becomes_its_messages_or_its_pair(stage, keys, record, expected):
    assert READ[stage](record) == expected


def test_every_row_of_the_table_is_read_here():
    rows = [(row.stage, " ".join(row.keys)) for row in FORMATS]
    assert len(set(rows)) == len(rows)
    assert set(rows) == ACCEPTED.keys()


@pytest.mark.parametrize("readme", ["README.md", "README_en.md"])
def test_both_readmes_print_the_table(readme):
    def cell(keys) -> str:
        return " ".join(f"`{key}`" for key in keys)

    rows = [f"| {r.stage} | {r.name} | {cell(r.keys)} | {cell(r.optional)} |" for r in FORMATS]
    text = (ROOT / readme).read_text(encoding="utf-8")
    assert re.findall(r"^\| (?:SFT|DPO) \| .* \| .* \| .* \|$", text, re.M) == rows


def test_minimind_s_pretraining_file_is_read_as_it_is(tmp_path):
    path = write_jsonl(tmp_path / "pretrain_t2t_mini.jsonl", [{"text": "天地玄黄"}])
    assert list(iter_documents(path)) == ["天地玄黄"]


ANSWER = {"instruction": "问", "output": "答"}
REFUSED = {
    "no object": (SFT, [1], "expected an object, found list"),
    "no pair": (DPO, "x", "expected an object, found str"),
    "nothing known": (
        SFT,
        {"text": "文", "id": 1},
        r"no SFT record; found keys \['id', 'text'\]; accepted: \"messages\" \| \"conver",
    ),
    "null": (SFT, ANSWER | {"output": None}, r'"response" is missing beside "instruction"; found'),
    "half a pair": (
        DPO,
        {"question": "问", "response_chosen": "好"},
        '"response_rejected" is missing beside "question" [+] "response_chosen"; found keys',
    ),
    "system not text": (SFT, ANSWER | {"system": 3}, "system must be text, found int"),
    "input not text": (SFT, ANSWER | {"input": 3}, "input must be text, found int"),
    "reasoning": (SFT, ANSWER | {"reasoning_content": [1]}, "reasoning_content must be text"),
    "history": (SFT, ANSWER | {"history": [["一"]]}, '"history" must be a list of .question, ans'),
    "history text": (SFT, ANSWER | {"history": "早"}, "'history' is text that is no JSON"),
    "history object": (SFT, ANSWER | {"history": {"一": 2}}, '"history" must be a list'),
    "system twice": (
        SFT,
        {"messages": said("问", "答", system="甲"), "system": "乙"},
        "'system' differs from the system message: keep one",
    ),
    "late system": (
        DPO,
        {
            "history": [["一", "二"]],
            "prompt": said("问", system="甲"),
            "chosen": "好",
            "rejected": "坏",
        },
        "a system message stands behind 'history'",
    ),
    "unused history": (
        SFT,
        {"messages": POEM, "history": [["一", "二"]]},
        "'history' is not used beside \"messages\": take it out",
    ),
    "unused question": (SFT, ANSWER | {"query": "别的"}, "'query' is not used beside"),
    "unused messages": (
        DPO,
        {"prompt": "问", "messages": said("别的"), "chosen": "好", "rejected": "坏"},
        "'messages' is not used beside \"prompt\"",
    ),
    "images": (SFT, {"messages": POEM, "images": ["a.png"]}, "'images' is not used beside"),
    "another question": (
        DPO,
        {"prompt": "问", "chosen": said("别的", "好"), "rejected": said("别的", "坏")},
        "'chosen' begins with another question than 'prompt'",
    ),
    "two beginnings": (
        DPO,
        {"chosen": said("问", "好"), "rejected": said("别的", "坏")},
        "must begin with the same messages",
    ),
    "no question": (DPO, {"chosen": "好", "rejected": "坏"}, "no question before the answers"),
    "answer first": (
        DPO,
        {"prompt": said("问", "答"), "chosen": "好", "rejected": "坏"},
        "the prompt must end with a user's message",
    ),
    "number": (
        DPO,
        {"prompt": "问", "chosen": 3, "rejected": "坏"},
        "'chosen' must be a non-empty",
    ),
}


@pytest.mark.parametrize(("stage", "record", "message"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_read_is_refused_by_name(stage, record, message):
    with pytest.raises(FormatError, match=message):
        READ[stage](record)


def test_what_stands_in_the_messages_already_is_not_missed():
    assert to_messages({"messages": POEM, "input": "写一句诗", "output": ""}) == POEM
    assert to_messages({"messages": POEM, "system": "", "images": [], "video": None}) == POEM


def test_the_same_system_message_twice_is_one():
    talk = said("问", "答", system="甲")
    assert to_messages({"messages": talk, "system": "甲"}) == talk
    empty = [{"role": "system", "content": ""}, *talk[1:]]
    assert to_messages({"messages": empty, "system": "甲"}) == talk
