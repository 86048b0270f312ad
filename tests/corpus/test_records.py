"""Every accepted record to messages or to a pair, and every refusal by name."""

import re

import pytest
from accepted import ACCEPTED, POEM, said
from conftest import ROOT
from tiny import write_jsonl

from corpus.documents import iter_documents
from corpus.records import DPO, FORMATS, SFT, FormatError, to_messages, to_pair

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
    "no answer": (SFT, {"instruction": "问"}, r'"response" is missing beside "instruction"; found'),
    "a label": (
        DPO,
        {"prompt": "问", "completion": "好", "label": True},
        "one answer with a label is no pair; make pairs of them with `python dpo_data.py --make_p",
    ),
    "no ranks": (DPO, ANSWER, "'output' must be a list of answers, the best first, found str"),
    "no scores": (
        DPO,
        {"instruction": "问", "completions": ["好", "坏"]},
        "'completions' must be a list of {.response.: …, .overall_score.: …}",
    ),
    "another part": (
        SFT,
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": "a"}]}]},
        "message 1 of 'messages' must be text, found image_url",
    ),
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
