"""Whatever is read of a record is used, counted or refused: random records of every format."""

import json
from collections import Counter

import pytest
from fuzz import cases
from hypothesis import given
from hypothesis import strategies as st

from corpus.messages import REASONING
from corpus.preparation import Parts
from corpus.readers import Dropped, FormatError
from corpus.records import DPO, FORMATS, MEANT, SFT, Format
from dpo_data import PairRecipe
from sft_data import ConversationRecipe
from train_data import DocumentRecipe

# Each text is told from the others by its number, so that none is taken for another.
LETTERS = st.text(alphabet="天地玄黄 az\n", min_size=1, max_size=12)
MISSING: st.SearchStrategy = st.sampled_from([None, "", float("nan")])
NAMES = {"system": "system", "user": "human", "assistant": "gpt", "tool": "observation"}
# What is said of text that is read and stands in no row.
LOSSES = ("dropped", "shortened", "replies cut", "answers cut", "not shown", "not read", "left off")


class Writer:
    """Draws the fields of a record and remembers every text that it writes."""

    def __init__(self, draw):
        self.draw, self.texts = draw, []

    def text(self, may_miss: bool = True):
        if may_miss and self.draw(st.integers(0, 9)) == 0:
            return self.draw(MISSING)
        self.texts.append(f"{len(self.texts)}号{self.draw(LETTERS)}")
        return self.texts[-1]

    def message(self, role: str) -> dict:
        if self.draw(st.booleans()):
            return {"from": NAMES[role], "value": self.text()}
        message = {"role": role, "content": self.text()}
        if role == "assistant" and self.draw(st.integers(0, 4)) == 0:
            message[self.draw(st.sampled_from(REASONING))] = self.text()
        return message

    def messages(self, roles: st.SearchStrategy) -> list:
        start = ["system"] if self.draw(st.booleans()) else []
        return [self.message(role) for role in [*start, *self.draw(st.lists(roles, max_size=5))]]

    def history(self):
        kind = self.draw(st.integers(0, 3))
        if kind == 0:
            return self.draw(MISSING)
        if kind == 1:
            return self.messages(st.sampled_from(["user", "assistant"]))
        return [[self.text(), self.text()] for _ in range(kind)]

    def field(self, key: str, row: Format):
        """The value of a key; what an answer holds is drawn in `answers`."""
        if key in ("messages", "conversations"):
            talk = self.messages(st.sampled_from(["user", "assistant", "tool"]))
            return json.dumps(talk) if self.draw(st.integers(0, 4)) == 0 else talk
        if key == "history":
            return self.history()
        if key == "tools":
            return [{"name": self.text(may_miss=False).replace("\n", " ")}]
        return self.text()

    def answers(self, row: Format) -> dict:
        """The answers of a DPO record: texts, messages, or messages with the question."""
        if len(row.answers) == 1:
            found = [self.text() for _ in range(self.draw(st.integers(0, 4)))]
            if row.answers == ("completions",):
                scores = st.sampled_from([1, 2.5, 4, None])
                found = [{"response": text, "overall_score": self.draw(scores)} for text in found]
            return {row.answers[0]: found}
        before = self.messages(st.sampled_from(["user", "assistant"])) if not row.question else []
        kind = self.draw(st.sampled_from(["text", "message"]))
        values = [self.text() for _ in row.answers]
        if before or kind == "message":
            values = [[*before, {"role": "assistant", "content": value}] for value in values]
        return dict(zip(row.answers, values, strict=True))


@st.composite
def records(draw, row: Format) -> tuple[dict, list[str]]:
    """(a record of a format, perhaps with a key of another one; all texts in it)."""
    writer = Writer(draw)
    keys = [key for key in row.optional if draw(st.booleans())]
    record = {key: writer.field(key, row) for key in (*row.question, *keys)}
    if row.stage == DPO and "messages" not in row.answers:
        record |= writer.answers(row)
    elif row.stage == DPO:
        talk = writer.messages(st.sampled_from(["user", "assistant"]))
        record["messages"] = [*talk, writer.message("assistant")]
        rejected = writer.text()
        if row.answers[1] == "rejected_messages":
            rejected = [*talk, {"role": "assistant", "content": rejected}]
        record[row.answers[1]] = rejected
    else:
        record |= {key: writer.field(key, row) for key in row.answers}
    if draw(st.integers(0, 3)) == 0:
        record[draw(st.sampled_from(sorted(MEANT[row.stage] - record.keys())))] = writer.text()
    return record, writer.texts


def rows_of(recipe, record) -> tuple[list, Counter]:
    """(examples, counts) as both passes make them."""
    counts: Counter = Counter()
    try:
        item = recipe.parse(record)
    except Dropped as reason:
        return [], Counter({f"dropped: {reason}": 1})
    items = item.items if isinstance(item, Parts) else [item]
    counts.update(item.counts if isinstance(item, Parts) else {})
    examples = recipe.encode(items, counts) if items else []
    return [example for example in examples if example is not None], counts


def squeezed(text: str) -> str:
    """Without spaces, which templates and formats add and take away."""
    return "".join(text.split())


@pytest.mark.parametrize("row", FORMATS, ids=lambda row: f"{row.stage} {' '.join(row.keys)}")
@pytest.mark.parametrize("max_length", [64, 8192])
@cases(60)
@given(data=st.data())
def test_every_text_of_a_record_stands_in_its_rows_or_the_record_is_counted_or_refused(
    tokenizer, row, max_length, data
):
    record, texts = data.draw(records(row))
    recipe = (ConversationRecipe if row.stage == SFT else PairRecipe)(tokenizer, max_length, 0)
    try:
        examples, counts = rows_of(recipe, record)
    except FormatError:
        return
    if any(count and any(loss in reason for loss in LOSSES) for reason, count in counts.items()):
        return
    shown = ""
    for example in examples:
        columns = [example[0]] if row.stage == SFT else [ids for part in example for ids in part]
        shown += "".join(tokenizer.decode(ids) for ids in columns)
    missing = [text for text in texts if squeezed(text) not in squeezed(shown)]
    assert missing == [], (record, counts, shown)


@pytest.mark.parametrize("row", [r for r in FORMATS if r.stage == SFT], ids=lambda r: r.keys[0])
@cases(60)
@given(data=st.data())
def test_no_target_is_empty_or_without_words_before_it(tokenizer, row, data):
    record, _ = data.draw(records(row))
    max_length = data.draw(st.sampled_from([48, 64, 8192]))
    try:
        examples, _ = rows_of(ConversationRecipe(tokenizer, max_length, 0), record)
    except FormatError:
        return
    for ids, labels in examples:
        text = "".join(
            tokenizer.decode([i]) if label < 0 else f"\x01{tokenizer.decode([i])}"
            for i, label in zip(ids.tolist(), labels.tolist(), strict=True)
        )
        before, _, _ = text.partition("\x01")
        assert "user\n" in before, "the question went, and a reply stayed"
        assert "assistant\n\x01<|im_end|>" not in text


@cases(60)
@given(text=LETTERS | MISSING | st.integers())
def test_a_document_is_used_or_counted(tokenizer, text):
    examples, counts = rows_of(DocumentRecipe(None, tokenizer, 64), {"text": text})
    if not counts.total() or not any(reason.startswith("dropped") for reason in counts):
        assert tokenizer.decode(examples[0][:-1]) == text
