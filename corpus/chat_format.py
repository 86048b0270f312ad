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


def iter_conversations(data_path: str, parse) -> Iterator:
    """parse(record) for every record of the files. A FormatError gets its file and line."""
    for path in find_data(data_path):
        for portion in iter_portions(path):
            yield from usable_items(parse, portion, Counter())


@dataclass(slots=True)
class Turn:
    """One rendered message, as arrays of ids: header (`<|im_start|>role\\n`), content, end.

    Tool results that follow each other are one turn.
    """

    role: str
    header: np.ndarray
    content: np.ndarray
    end: np.ndarray

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
            [Turn(role, self.headers[role], next(encoded), self.end) for role, _ in conversation]
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


def key_of(messages: list[dict]) -> str:
    """A text that only equal messages share."""
    return "".join([f"{m['role']} {len(m['content'])} {m['content']}" for m in messages])


def as_prompt(tokenizer: PreTrainedTokenizerBase, text: str) -> str:
    """A question rendered up to where the answer begins."""
    messages = [{"role": "user", "content": text}]
    return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))


def flatten(turns: list[Turn]) -> tuple[np.ndarray, np.ndarray]:
    """(ids, mask): mask is True on an assistant's words and on their end token."""
    parts: list[np.ndarray] = []
    spoken: list[bool] = []
    for turn in turns:
        by_assistant = turn.role == "assistant"
        parts += [turn.header, turn.content, turn.end[:1], turn.end[1:]]
        spoken += [False, by_assistant, by_assistant, False]
    return np.concatenate(parts), np.repeat(spoken, list(map(len, parts)))


def total_length(turns: list[Turn]) -> int:
    return sum([len(turn.header) + len(turn.content) + len(turn.end) for turn in turns])


def truncate(turns: list[Turn], max_length: int) -> bool:
    """Shorten a conversation in place to max_length tokens, keeping its last reply.

    The oldest exchanges go first. An exchange is a user's turn and all up to the next one, with
    tool calls and their results. Then goes the beginning of the last question, then the system
    message. The reply is cut at its end only when it is too long by itself.

    Returns whether the reply was cut.
    """

    def excess() -> int:
        return total_length(turns) - max_length

    if excess() <= 0:
        return False
    reply = turns[-1]
    first = 1 if turns[0].role == "system" else 0
    asked = [number for number, turn in enumerate(turns[:-1]) if turn.role == "user"]
    kept = len(turns) - asked[-1] if asked else 2  # turns from the last question on
    while excess() > 0 and len(turns) - first > kept:
        del turns[first]
        while len(turns) - first > kept and turns[first].role != "user":
            del turns[first]
    question = turns[-kept] if len(turns) >= kept else None
    if excess() > 0 and question:
        length = max(len(question.content) - excess(), min(SHORTEST_PROMPT, len(question.content)))
        question.content = question.content[len(question.content) - length :]
    # The system message defines the tools: no call is learned without it.
    if excess() > 0 and first and len(turns) > 2 and all(turn.role != "tool" for turn in turns):
        del turns[0]
    if excess() <= 0:
        return False
    room = max(0, max_length - total_length(turns[:-1]) - len(reply.header))
    cut = len(reply.content) + len(reply.end) > room
    if cut:  # without its end token, so that no model learns to stop in mid-sentence
        reply.content, reply.end = reply.content[:room], reply.end[:0]
    return cut
