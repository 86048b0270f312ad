"""Records of every accepted format -> messages (SFT), or a question with two answers (DPO).

FORMATS is the one list of what is accepted. A record has the first format all of whose keys it has.
A key with null (or NaN) is one that is not there; where no format is found without it, it is empty
text. A further data set with known kinds of keys is one line.
"""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache, cached_property

from corpus.messages import (
    MEDIA,
    from_json,
    is_missing,
    parse_messages,
    parse_tools,
    render,
    text_of,
)
from corpus.ranked import pairs_of
from corpus.readers import Dropped, FormatError
from corpus.transcripts import split_question, split_transcript

SFT, DPO = "SFT", "DPO"
LISTS = ("messages", "conversations")  # keys that hold a list of messages, never text


@dataclass(frozen=True)
class Format:
    """One kind of record. README prints these rows.

    name: the public data sets and tools that write it.
    question: keys of the question, text or messages; () where the answers hold it.
    answers: SFT: the key of the reply, text; () where the messages hold it. DPO: the keys of the
        chosen and of the rejected one: text, a message, or messages that begin with the question.
        One key: a list of answers, the best first, or each with its score.
    optional: keys that are used where they are there. `input` and `context` are put behind the
        question.
    """

    name: str
    stage: str
    question: tuple[str, ...]
    answers: tuple[str, ...]
    optional: tuple[str, ...]

    @cached_property
    def keys(self) -> tuple[str, ...]:
        return *self.question, *self.answers

    @cached_property
    def used(self) -> frozenset[str]:
        return frozenset((*self.keys, *self.optional))


AROUND = ("system", "tools")  # of a list of messages
CONTEXT = ("system", "history", "tools")  # of a question that is text
REPLY = (*CONTEXT, "reasoning_content")
PAIR = ("chosen", "rejected")
FORMATS = (
    Format("OpenAI, ms-swift", SFT, ("messages",), (), AROUND),
    Format(
        "ShareGPT, minimind `sft_t2t_mini.jsonl`, Infinity-Instruct",
        SFT,
        ("conversations",),
        (),
        AROUND,
    ),
    Format(
        "`data/sft_sample.jsonl`, Dolly",
        SFT,
        ("instruction",),
        ("response",),
        ("input", "context", *REPLY),
    ),
    Format(
        "Alpaca, BELLE, COIG-CQIA, DeepCtrl",
        SFT,
        ("instruction",),
        ("output",),
        ("input", *REPLY),
    ),
    Format("ms-swift", SFT, ("query",), ("response",), REPLY),
    Format("Firefly", SFT, ("input",), ("target",), REPLY),
    Format("Chinese-DeepSeek-R1-Distill", SFT, ("input",), ("content",), REPLY),
    Format("Alpaca, `instruction` = null", SFT, ("input",), ("output",), REPLY),
    Format("TRL", SFT, ("prompt",), ("completion",), REPLY),
    Format("GSM8K", SFT, ("question",), ("answer",), ("context", *REPLY)),
    Format("ms-swift", DPO, (), ("messages", "rejected_response"), AROUND),
    Format("ms-swift", DPO, (), ("messages", "rejected_messages"), AROUND),
    Format("ms-swift 2", DPO, ("query",), ("response", "rejected_response"), CONTEXT),
    Format("MedicalGPT", DPO, ("question",), ("response_chosen", "response_rejected"), CONTEXT),
    Format("zhihu_rlhf_3k, TRL", DPO, ("prompt",), PAIR, CONTEXT),
    Format("orca_dpo_pairs", DPO, ("question",), PAIR, CONTEXT),
    Format("`data/dpo_sample.jsonl`, Alpaca", DPO, ("instruction",), PAIR, ("input", *CONTEXT)),
    Format("OpenAI", DPO, ("messages",), PAIR, AROUND),
    Format("DPO-En-Zh-20k, ShareGPT", DPO, ("conversations",), PAIR, AROUND),
    Format("minimind `dpo.jsonl`, hh-rlhf", DPO, (), PAIR, AROUND),
    Format("LLaMA-Factory, ranked", DPO, ("instruction",), ("output",), ("input", *CONTEXT)),
    Format("UltraFeedback, scored", DPO, ("instruction",), ("completions",), CONTEXT),
)
# Labels such as `kind`, `id` or `score` are not read. These would be missed: a record with one of
# them that its format does not use is refused.
ROWS = {stage: [row for row in FORMATS if row.stage == stage] for stage in (SFT, DPO)}
# These may be labels too, beside the messages that they were taken from. What of them does not
# stand in the messages is counted.
LABELS = {
    SFT: {"prompt", "completion", "question", "answer"},
    DPO: {"output", "completions", "query", "response"},
}
MEANT = {stage: MEDIA.union(*(row.used for row in rows)) for stage, rows in ROWS.items()}
# What `dpo_data.py --make_pairs` makes pairs of: one answer, and whether it is good.
MARKS = ("label", "kto_tag")


def to_messages(record: dict, counts: Counter | None = None) -> list[dict]:
    """Plain messages, {role, content}, of any SFT record.

    counts: counts what of them is not shown.

    Raises:
        FormatError: names what is missing and what was found.
    """
    fields, row = _recognise(record, SFT)
    messages = _question(fields, row)
    for key in row.answers:
        if key == "completion" and isinstance(fields[key], list):
            messages += parse_messages(fields[key], key)
            continue
        reply = {"role": "assistant", "content": text_of(fields[key], key)}
        if reasoning := fields.get("reasoning_content"):
            reply["reasoning_content"] = text_of(reasoning, "reasoning_content")
        messages.append(reply)
    _account_for_unused(fields, row, messages, counts)
    return render(_with_system(fields, messages), counts)


def to_pair(record: dict) -> tuple[list[dict], str, str]:
    """The first of to_pairs. There is only one, unless answers are ranked or have scores."""
    return to_pairs(record)[0]


def to_pairs(record: dict, counts: Counter | None = None) -> list[tuple[list[dict], str, str]]:
    """(plain messages of the question, chosen text, rejected text) of each pair of a DPO record.

    counts: counts what of the question is not shown.

    Raises:
        FormatError: names what is missing and what was found.
        Dropped: there is nothing to compare, or no question.
    """
    fields, row = _recognise(record, DPO)
    if len(row.answers) == 2:
        answers = [(fields[row.answers[0]], fields[row.answers[1]])]
    else:
        answers = pairs_of(fields[row.answers[0]], row.answers[0])
    return [_pair(fields, row, chosen, rejected, counts) for chosen, rejected in answers]


def _pair(fields: dict, row: Format, chosen, rejected, counts) -> tuple[list[dict], str, str]:
    keys = row.answers * 2  # of ranked answers both have one key
    if not (row.question and fields[row.question[0]]):
        chosen, rejected = _from_transcripts(chosen, rejected)
    before, chosen = _answer(chosen, keys[0])
    before_rejected, rejected = _answer(rejected, keys[1])
    if before is None or before_rejected is None:  # an answer that is text asks what the other asks
        before = before_rejected = before or before_rejected or []
    if before != before_rejected:
        raise FormatError("chosen and rejected must begin with the same messages")
    question = _question(fields, row)
    if before:
        question = _joined(before, question, row)
    if not question and row.question:
        raise Dropped("no question")
    if not question:
        raise FormatError(f"no question before the answers; {_found_and_accepted(fields, DPO)}")
    if question[-1]["role"] not in ("user", "tool"):
        raise FormatError("the prompt must end with a user's message or a tool's result")
    _account_for_unused(fields, row, [*question, chosen], counts)
    question = _with_system(fields, question)
    *prompt, chosen = render([*question, chosen], counts)
    return prompt, chosen["content"], render([*question, rejected])[-1]["content"]


def _joined(before: list[dict], question: list[dict], row: Format) -> list[dict]:
    """One question of what the answers begin with and what stands in the record's own keys.

    A public set's `prompt` is often only the first or the last of the messages before the answer.
    """
    if not any(message["content"].strip() for message in question):
        return before
    known, asked = _compared(before), _compared(question)
    if any(known[start:][: len(asked)] == asked for start in range(len(known))):
        return before
    if asked[-len(known) :] == known:
        return question
    raise FormatError(f"{row.answers[0]!r} begins with another question than {row.keys[0]!r}")


def _compared(messages: list[dict]) -> list[dict]:
    """Messages as they are compared: without the spaces around their words."""
    return [message | {"content": message["content"].strip()} for message in messages]


def _from_transcripts(chosen, rejected) -> tuple:
    """hh-rlhf's answers, "\n\nHuman: …\n\nAssistant: …", as messages. Others stay as they are."""
    if not isinstance(chosen, str) or not isinstance(rejected, str):
        return chosen, rejected
    talks = [split_transcript(text) for text in (chosen, rejected)]
    if not all(talks):
        return chosen, rejected
    if any(talk[-1]["role"] != "assistant" for talk in talks):
        raise Dropped("no answer at the end")
    if talks[0][:-1] != talks[1][:-1]:
        raise Dropped("answers to different questions")
    return tuple(talks)


def _recognise(record, stage: str) -> tuple[dict, Format]:
    """(fields that are not missing, the format that has these keys)."""
    if not isinstance(record, dict):
        raise FormatError(f"expected an object, found {type(record).__name__}")
    fields = {key: value for key, value in record.items() if not is_missing(value)}
    row = _row_of(frozenset(fields), stage)
    if len(fields) < len(record) and not (row and row.question):
        row_of_all = _row_of(frozenset(record), stage)  # null is missing text, as "" is
        if row_of_all and (row is None or row_of_all.question):
            return dict.fromkeys(row_of_all.keys, "") | fields, row_of_all
    if row:
        return fields, row
    if stage == DPO and any(key in fields for key in MARKS):
        raise FormatError(
            "one answer with a label is no pair; make pairs of them with "
            "`python dpo_data.py --make_pairs FILE --output pairs.jsonl`"
        )
    nearest = max(ROWS[stage], key=lambda row: sum(key in fields for key in row.keys))
    missing = _names(key for key in nearest.keys if key not in fields)
    there = _names(key for key in nearest.keys if key in fields)
    what = f"{missing} is missing beside {there}" if there else f"no {stage} record"
    raise FormatError(f"{what}; {_found_and_accepted(fields, stage)}")


@cache
def _row_of(keys: frozenset[str], stage: str) -> Format | None:
    """The first format all of whose keys are there."""
    return next((row for row in ROWS[stage] if keys >= set(row.keys)), None)


def _names(keys: Iterable[str]) -> str:
    return " + ".join(f'"{key}"' for key in keys)


def _found_and_accepted(fields: dict, stage: str) -> str:
    accepted = " | ".join(_names(row.keys) for row in ROWS[stage])
    return f"found keys {sorted(fields)}; accepted: {accepted}"


def _question(fields: dict, row: Format) -> list[dict]:
    """Parsed messages up to the reply; [] where the answers hold the question."""
    has_history = "history" in fields and "history" in row.optional
    messages = _history(fields["history"]) if has_history else []
    for key in row.question:
        value = fields[key]
        if key in LISTS or (key == "prompt" and isinstance(value, list)):
            if not value and row.stage == DPO:  # the answers may begin with the question
                continue
            messages += parse_messages(value, key)
            continue
        text = text_of(value, key)
        for more in ("input", "context"):
            if fields.get(more) and more in row.optional and (words := text_of(fields[more], more)):
                text += ("\n" if text else "") + words
        messages += split_question(text) or [{"role": "user", "content": text}]
    if len(messages) > 1 and any(message["role"] == "system" for message in messages[1:]):
        raise FormatError("a system message stands behind 'history': only the first may be one")
    return messages


def _history(value) -> list[dict]:
    """Earlier turns: a list of [question, answer] or of messages, or JSON text of either."""
    turns = (from_json(value, "'history'") or []) if value else []
    if turns and isinstance(turns, list) and all(isinstance(turn, dict) for turn in turns):
        return parse_messages(turns, "history")
    is_list = isinstance(turns, list)
    if not is_list or any(not isinstance(turn, list) or len(turn) != 2 for turn in turns):
        raise FormatError('"history" must be a list of [question, answer] or of messages')
    return [
        {"role": role, "content": text_of(text, "history")}
        for turn in turns
        for role, text in zip(("user", "assistant"), turn, strict=True)
    ]


def _answer(value, key: str) -> tuple[list[dict] | None, dict]:
    """(messages before it, answer) of an answer given as text (None), message or messages."""
    if isinstance(value, str) or is_missing(value):
        return None, {"role": "assistant", "content": text_of(value, key)}
    messages = parse_messages([value] if isinstance(value, dict) else value, key)
    if messages[-1]["role"] != "assistant":
        raise FormatError(f"{key!r} must end with an assistant's message")
    return messages[:-1], messages[-1]


def _with_system(fields: dict, messages: list[dict]) -> list[dict]:
    """Messages that begin with the record's own `system` and `tools`, where it has them."""
    if "system" not in fields and "tools" not in fields:
        return messages
    system = text_of(fields.get("system", ""), "system")
    tools = parse_tools(fields["tools"], "'tools'") if fields.get("tools") else []
    if not system and not tools:
        return messages
    stated: dict = {"role": "system", "content": system} | ({"tools": tools} if tools else {})
    if messages[0]["role"] != "system":
        return [stated, *messages]
    first = messages[0]
    for key, field in (("system", "content"), ("tools", "tools")):
        if first.get(field) and stated.get(field) and first[field] != stated[field]:
            raise FormatError(f"{key!r} differs from the system message: keep one of them")
        if first.get(field):
            stated[field] = first[field]
    return [stated, *messages[1:]]


def _account_for_unused(fields: dict, row: Format, messages: list[dict], counts: Counter | None):
    """Nothing that was meant for the model is dropped in silence."""
    for key in _unused(frozenset(fields), row):
        if not fields[key] or _is_said(fields[key], messages):
            continue
        if key not in LABELS[row.stage]:
            raise FormatError(f"{key!r} is not used beside {_names(row.keys)}: take it out")
        if counts is not None:
            counts[f"noted: {key!r} beside {_names(row.keys)}, not read"] += 1


@cache
def _unused(keys: frozenset[str], row: Format) -> list[str]:
    return sorted((keys - row.used) & MEANT[row.stage])


def _is_said(value, messages: list[dict]) -> bool:
    """Whether a text, or each of a list of messages, stands in the messages already."""
    said = [message["content"] for message in messages]
    if isinstance(value, list) and all(isinstance(item, dict) for item in value):
        return all(item.get("content", item.get("value")) in said for item in value)
    return value in said
