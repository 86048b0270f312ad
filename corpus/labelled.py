"""A prompt with one answer, perhaps labelled as good or bad, and pairs of such answers."""

from collections import Counter, defaultdict
from dataclasses import dataclass

from corpus.messages import is_missing
from corpus.readers import Dropped
from corpus.records import MARKS, to_messages

GOOD = {"true": True, "1": True, "false": False, "0": False, "-1": False}
UNKNOWN_LABEL = "noted: labels that are neither true nor false, not used"


@dataclass(frozen=True)
class Example:
    """prompt: plain messages up to the question. is_good: the label; None where there is none."""

    prompt: list[dict]
    answer: str
    is_good: bool | None


def example_of(record, counts: Counter | None = None) -> Example:
    """The last question of an SFT record and all that the assistant says to it.

    counts: as in records.to_messages.

    Raises:
        Dropped: nothing is asked, or nothing is answered.
        FormatError: as records.to_messages.
    """
    messages = to_messages(record, counts)
    found = [record[key] for key in MARKS if not is_missing(record.get(key))]
    labels = [label for value in found if (label := label_of(value)) is not None]
    if found and not labels and counts is not None:
        counts[UNKNOWN_LABEL] += 1
    while messages and messages[-1]["role"] != "assistant":
        messages = messages[:-1]
    asked = [n for n, message in enumerate(messages) if message["role"] in ("user", "tool")]
    start = asked[-1] + 1 if asked else 0
    answer = "\n".join(m["content"] for m in messages[start:] if m["content"].strip())
    if not answer:
        raise Dropped("no reply")
    if not any(messages[number]["content"].strip() for number in asked):
        raise Dropped("no question")
    return Example(messages[:start], answer, labels[0] if labels else None)


def label_of(value) -> bool | None:
    """Good or bad: a truth value, 1 or 0 (or -1), also as text. None of anything else."""
    return GOOD.get(str(value).strip().lower().removesuffix(".0"))


class Labels:
    """The labelled answers of a file by their prompt. They are all in memory."""

    def __init__(self):
        self.answers: dict[str, tuple[list[str], list[str]]] = defaultdict(lambda: ([], []))

    def add(self, example: Example):
        if example.is_good is not None:
            self.answers[repr(example.prompt)][example.is_good].append(example.answer)

    def pairs(self, example: Example, counts: Counter) -> list[tuple[str, str]]:
        """(good, bad) of a prompt, each answer once; [] where it has not both.

        Where a prompt has no bad answer, its first good one is paired with the model's sample.
        """
        bad, good = self.answers.get(repr(example.prompt), ([], []))
        counts["good answer without a bad one"] += max(0, len(good) - max(len(bad), 1))
        counts["bad answer without a good one"] += max(0, len(bad) - len(good))
        return list(zip(good, bad, strict=False))
