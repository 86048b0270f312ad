"""Conversations: plain messages (corpus/records.py makes them) -> ids with a loss mask.

A message is {"role", "content"}; its role is system, user, assistant or tool. It becomes ChatML:

    <|im_start|>user\\n…<|im_end|>\\n<|im_start|>assistant\\n…<|im_end|>\\n

Ids and mask are built together, message by message, so that they always agree. Text is encoded
without control tokens, so that nothing a user types becomes one.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from corpus.readers import find_files, input_error, iter_records
from corpus.records import FormatError
from tokenizer import IM_END, IM_START, encode_plain

SHORTEST_PROMPT = 16  # tokens of the question that are kept when an answer is too long by itself
# The header of each role. To a model a tool's result is said by the user, as in Qwen3's template.
HEADERS = {"system": "system\n", "user": "user\n", "assistant": "assistant\n", "tool": "user\n"}


def iter_conversations(data_path: str, parse) -> Iterator:
    """parse(record) for every record of the files. A FormatError gets its file and line."""
    for path in find_files(data_path):
        for line, record in iter_records(Path(path)):
            try:
                yield parse(record)
            except FormatError as error:
                raise input_error(path, line, f"{error}.") from error


@dataclass
class Turn:
    """One rendered message: header ids (`<|im_start|>role\\n`), content ids, and end ids.

    Tool results that follow each other are one turn.
    """

    role: str
    header: list[int]
    content: list[int]
    end: list[int]

    def __len__(self) -> int:
        return len(self.header) + len(self.content) + len(self.end)


class Renderer:
    """Renders messages to turns of token ids, many conversations at a time."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self.tokenizer = tokenizer
        vocabulary = tokenizer.get_vocab()
        self.start, self.stop = vocabulary[IM_START], vocabulary[IM_END]
        plain = encode_plain(tokenizer, ["\n", *HEADERS.values()])
        self.newline = plain[0]
        self.headers = dict(zip(HEADERS, plain[1:], strict=True))

    def render(self, conversations: list[list[dict]]) -> list[list[Turn]]:
        turns = [_join_tool_results(messages) for messages in conversations]
        contents = [content for conversation in turns for _, content in conversation]
        encoded = iter(encode_plain(self.tokenizer, contents))
        return [
            [self._turn(role, next(encoded)) for role, _ in conversation] for conversation in turns
        ]

    def _turn(self, role: str, content: list[int]) -> Turn:
        return Turn(role, [self.start, *self.headers[role]], content, [self.stop, *self.newline])


def _join_tool_results(messages: list[dict]) -> list[tuple[str, str]]:
    """(role, content) of each turn."""
    turns: list[tuple[str, str]] = []
    for message in messages:
        role, content = message["role"], message["content"]
        if role == "tool":
            content = f"<tool_response>\n{content}\n</tool_response>"
            if turns and turns[-1][0] == "tool":
                content = f"{turns.pop()[1]}\n{content}"
        turns.append((role, content))
    return turns


def as_prompt(tokenizer: PreTrainedTokenizerBase, text: str) -> str:
    """A question rendered up to where the answer begins."""
    messages = [{"role": "user", "content": text}]
    return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))


def flatten(turns: list[Turn]) -> tuple[list[int], list[bool]]:
    """(ids, mask): mask is True on an assistant's words and on their end token."""
    ids: list[int] = []
    mask: list[bool] = []
    for turn in turns:
        ids += turn.header + turn.content + turn.end
        spoken = turn.role == "assistant"
        end_mask = [spoken, *[False] * (len(turn.end) - 1)] if turn.end else []
        mask += [False] * len(turn.header) + [spoken] * len(turn.content) + end_mask
    return ids, mask


def truncate(turns: list[Turn], max_length: int) -> bool:
    """Shorten a conversation in place to max_length tokens, keeping its last reply.

    The oldest exchanges go first. An exchange is a user's turn and all up to the next one, with
    tool calls and their results. Then goes the beginning of the last question, then the system
    message. The reply is cut at its end only when it is too long by itself.

    Returns whether the reply was cut.
    """
    reply = turns[-1]

    def excess() -> int:
        return sum(map(len, turns)) - max_length

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
    room = max(0, max_length - sum(map(len, turns[:-1])) - len(reply.header))
    cut = len(reply.content) + len(reply.end) > room
    if cut:  # without its end token, so that no model learns to stop in mid-sentence
        reply.content, reply.end = reply.content[:room], []
    return cut
