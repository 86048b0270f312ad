"""One record or more of every accepted format, with the messages or the pair that it becomes.

The records are made up. Their keys are those of the data sets that FORMATS names.
"""

from corpus.records import DPO, SFT


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
        (  # Dolly
            {"instruction": "译", "context": "fox", "response": "狐", "category": "made"},
            said("译\nfox", "狐"),
        ),
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
    (SFT, "prompt completion"): [
        ({"prompt": "写一句诗", "completion": "春眠不觉晓"}, POEM),
        ({"prompt": POEM[:1], "completion": POEM[1:]}, POEM),
    ],
    (SFT, "question answer"): [
        ({"question": "写一句诗", "answer": "春眠不觉晓"}, POEM),
        ({"question": "谁写的？", "context": "春晓", "answer": "孟"}, said("谁写的？\n春晓", "孟")),
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
    (DPO, "query response rejected_response"): [
        (
            {
                "system": "数数",
                "history": [["一", "二"]],
                "query": "三",
                "response": "四",
                "rejected_response": "八",
            },
            (said("一", "二", "三", system="数数"), "四", "八"),
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
        (  # hh-rlhf as Dahoas publishes it
            {
                "prompt": "\n\nHuman: 一\n\nAssistant: 二\n\nHuman: 问\n\nAssistant:",
                "response": " 好",
                "chosen": " 好",
                "rejected": " 坏",
            },
            (said("一", "二", "问"), " 好", " 坏"),
        ),
        (  # only the first of the messages before the answer is the prompt
            {
                "prompt": " 一 ",
                "chosen": said("一", "二", "问", "好", system="短"),
                "rejected": said("一", "二", "问", "坏", system="短"),
            },
            (said("一", "二", "问", system="短"), "好", "坏"),
        ),
        (  # only the last of the prompt's messages is in the answers
            {
                "prompt": said("一", "二", "问"),
                "chosen": said("问", "好"),
                "rejected": said("问", "坏"),
            },
            (said("一", "二", "问"), "好", "坏"),
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
        (  # hh-rlhf
            {
                "chosen": "\n\nHuman: 一\n\nAssistant: 二\n\nHuman: 问\n\nAssistant: 好",
                "rejected": "\n\nHuman: 一\n\nAssistant: 二\n\nHuman: 问\n\nAssistant: 坏",
            },
            (said("一", "二", "问"), "好", "坏"),
        ),
    ],
    (DPO, "instruction output"): [
        ({"instruction": "问", "input": "", "output": ["好", "坏"]}, (said("问"), "好", "坏")),
    ],
    (DPO, "instruction completions"): [
        (
            {
                "source": "made",
                "instruction": "问",
                "completions": [
                    {"model": "a", "response": "坏", "overall_score": 3.0, "critique": "评"},
                    {"model": "b", "response": "好", "overall_score": 8.5},
                ],
            },
            (said("问"), "好", "坏"),
        ),
    ],
}
