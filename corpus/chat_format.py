"""Conversations: plain messages (corpus/records.py makes them) -> ids with a loss mask.

A message is {"role", "content"}; its role is system, user, assistant or tool. It becomes ChatML:

    <|im_start|>user\\n…<|im_end|>\\n<|im_start|>assistant\\n…<|im_end|>\\n

Ids and mask are built together, message by message, so that they always agree. Text is encoded
without control tokens, so that nothing a user types becomes one.
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from transformers import PreTrainedTokenizerBase

from corpus.encoder import Encoder
from corpus.preparation import usable_items
from corpus.readers import iter_portions
from corpus.sources import find_data
from tokenizer import IM_END, IM_START, encode_plain

SHORTEST_PROMPT = 16  # tokens of the question that are kept when an answer is too long by itself
# The header of each role. To a model a tool's result is said by the user, as in Qwen3's template.
HEADERS = {"system": "system\n", "user": "user\n", "assistant": "assistant\n", "tool": "user\n"}


def iter_conversations(data_path: str, parse, counts: Counter | None = None) -> Iterator:
    """parse(record) for every record of the files. A FormatError gets its file and line.

    counts: counts the records, and what is dropped, by reason.
    """
    counts = Counter() if counts is None else counts
    for path in find_data(data_path):
        for portion in iter_portions(path):
            yield from usable_items(parse, portion, counts)


@dataclass(slots=True)
class Turn:
    """One rendered message, as arrays of ids: header (`<|im_start|>role\\n`), content, end.

    Tool results that follow each other are one turn.

    is_target: a reply from which there is something to learn; teaches says which.
    """

    role: str
    header: np.ndarray
    content: np.ndarray
    end: np.ndarray
    is_target: bool = False

    def __len__(self) -> int:
        return len(self.header) + len(self.content) + len(self.end)


class Renderer:
    """Renders messages to turns of token ids, many conversations at a time.

    size: bytes of text that there are to render.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, size: int = 0):
        self.encode = Encoder(tokenizer, size)
        vocabulary = tokenizer.get_vocab()
        start, stop = vocabulary[IM_START], vocabulary[IM_END]
        newline, *names = encode_plain(tokenizer, ["\n", *HEADERS.values()])
        ids = [np.array([start, *name], dtype=np.uint32) for name in names]
        self.headers = dict(zip(HEADERS, ids, strict=True))
        self.end = np.array([stop, *newline], dtype=np.uint32)

    def render(self, conversations: list[list[dict]]) -> list[list[Turn]]:
        turns = [_join_tool_results(messages) for messages in conversations]
        contents = [content for conversation in turns for _, content in conversation]
        encoded = iter(self.encode(contents))
        return [
            [
                Turn(role, self.headers[role], next(encoded), self.end, is_target)
                for (role, _), is_target in zip(conversation, teaches(conversation), strict=True)
            ]
            for conversation in turns
        ]


def _join_tool_results(messages: list[dict]) -> list[tuple[str, str]]:
    """(role, content) of each turn."""
    plain = [(message["role"], message["content"]) for message in messages]
    if all(role != "tool" for role, _ in plain):
        return plain
    turns: list[tuple[str, str]] = []
    for role, content in plain:
        if role == "tool":
            content = f"<tool_response>\n{content}\n</tool_response>"
            if turns and turns[-1][0] == "tool":
                content = f"{turns.pop()[1]}\n{content}"
        turns.append((role, content))
    return turns


def teaches(turns: list[tuple[str, str]]) -> list[bool]:
    """Whether each (role, content) is a reply to learn: it has words, and a question before it.

    An empty reply would teach to say nothing, and one that nobody asked for, to speak first. Both
    stay where they are, as what later replies answer to.
    """
    asked, targets = False, []
    for role, content in turns:
        has_words = bool(content) and not content.isspace()
        targets.append(asked and has_words and role == "assistant")
        asked = asked or (has_words and role != "assistant" and role != "system")
    return targets


def key_of(messages: list[dict]) -> str:
    """A text that only equal messages share."""
    return "".join([f"{m['role']} {len(m['content'])} {m['content']}" for m in messages])


def as_prompt(tokenizer: PreTrainedTokenizerBase, text: str) -> str:
    """A question rendered up to where the answer begins."""
    messages = [{"role": "user", "content": text}]
    return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))


def flatten(turns: list[Turn]) -> tuple[np.ndarray, np.ndarray]:
    """(ids, mask): mask is True on the words of a reply to learn and on their end token."""
    parts: list[np.ndarray] = []
    spoken: list[bool] = []
    for turn in turns:
        parts += [turn.header, turn.content, turn.end[:1], turn.end[1:]]
        spoken += [False, turn.is_target, turn.is_target, False]
    return np.concatenate(parts), np.repeat(spoken, list(map(len, parts)))


def total_length(turns: list[Turn]) -> int:
    return sum([len(turn.header) + len(turn.content) + len(turn.end) for turn in turns])


def truncate(turns: list[Turn], max_length: int) -> bool:
    """Shorten a conversation in place to max_length tokens, keeping its last reply.

    The oldest exchanges go first. An exchange is a user's turn and all up to the next one, with
    tool calls and their results. Then go earlier answers to the last question, where several follow
    each other; then the beginning of that question, then the system message. The reply is cut at
    its end only when it is too long by itself.

    Returns whether the reply to the last question was cut, or lost an earlier part.
    """

    def excess() -> int:
        return total_length(turns) - max_length

    if excess() <= 0:
        return False
    first = 1 if turns[0].role == "system" else 0
    worded = [(turn.role, number) for number, turn in enumerate(turns[:-1]) if len(turn.content)]
    asked = [number for role, number in worded if role == "user"]
    asked = asked or [number for role, number in worded if role == "tool"]
    kept = len(turns) - asked[-1] if asked else 2  # turns from the last question on
    while excess() > 0 and len(turns) - first > kept:
        del turns[first]
        while len(turns) - first > kept and turns[first].role != "user":
            del turns[first]
    lost = False
    while excess() > 0 and (place := _earlier_answer(turns)):
        del turns[place]
        kept, lost = kept - 1, True
    question = turns[-kept] if len(turns) >= kept else None
    if excess() > 0 and question and question.role != "assistant":
        length = max(len(question.content) - excess(), min(SHORTEST_PROMPT, len(question.content)))
        question.content = question.content[len(question.content) - length :]
    # The system message defines the tools: no call is learned without it.
    if excess() > 0 and first and len(turns) > 2 and all(turn.role != "tool" for turn in turns):
        del turns[0]
    if excess() <= 0:
        return lost
    reply = turns[-1]
    room = max(0, max_length - total_length(turns[:-1]) - len(reply.header))
    cut = len(reply.content) + len(reply.end) > room
    if cut:  # without its end token, so that no model learns to stop in mid-sentence
        reply.content, reply.end = reply.content[:room], reply.end[:0]
    return cut or lost


def _earlier_answer(turns: list[Turn]) -> int:
    """The place of the first answer that another answer follows directly; 0: there is none."""
    for place in range(1, len(turns) - 1):
        if turns[place].role == turns[place + 1].role == "assistant":
            return place
    return 0
