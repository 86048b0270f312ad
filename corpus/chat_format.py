"""Conversations: records of every accepted format -> messages -> ids with a loss mask.

A message is {"role": "system" | "user" | "assistant", "content": text}. Rendering is ChatML:

    <|im_start|>user\\n…<|im_end|>\\n<|im_start|>assistant\\n…<|im_end|>\\n

Ids and mask are built together, message by message, so that they always agree. Text is encoded
without control tokens, so that nothing a user types becomes one.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from corpus.readers import FormatError, find_files, input_error, iter_records
from tokenizer import IM_END, IM_START, encode_plain

ROLES = {"system": "system", "user": "user", "human": "user", "prompter": "user"}
ROLES |= {"assistant": "assistant", "gpt": "assistant", "bot": "assistant", "chatgpt": "assistant"}
SHORTEST_PROMPT = 16  # tokens of the question that are kept when an answer is too long by itself


def to_messages(record: dict, response_keys=("response", "output")) -> list[dict]:
    """messages | conversations (ShareGPT) | instruction (+ input, system, history) and a reply.

    Raises:
        FormatError: names what is missing and what was found.
    """
    if not isinstance(record, dict):
        raise FormatError(f"expected an object, found {type(record).__name__}")
    for key in ("messages", "conversations"):
        if key in record:
            messages = parse_messages(record[key], key)
            break
    else:
        messages = _from_instruction(record, response_keys)
    system = record.get("system")
    if isinstance(system, str) and system and messages[0]["role"] != "system":
        messages.insert(0, {"role": "system", "content": text_of(system, "system")})
    return messages


def parse_messages(value, key: str) -> list[dict]:
    """A list of {role, content} or ShareGPT's {from, value}, with the three roles of ChatML."""
    if not isinstance(value, list) or not value:
        raise FormatError(f"{key!r} must be a non-empty list of messages")
    messages = []
    for number, item in enumerate(value, start=1):
        if not isinstance(item, dict):
            wanted = '{"role": …, "content": …}'
            found = type(item).__name__
            raise FormatError(f"message {number} of {key!r} must be {wanted}, found {found}")
        role, content = item.get("role", item.get("from")), item.get("content", item.get("value"))
        if not isinstance(role, str) or role not in ROLES:
            raise FormatError(
                f"message {number} of {key!r} has role {role!r}; known: {', '.join(ROLES)}"
            )
        messages.append({"role": ROLES[role], "content": text_of(content, f"message {number}")})
        if messages[-1]["role"] == "system" and number > 1:
            raise FormatError(
                f"message {number} of {key!r} is a system message: only the first may be"
            )
    return messages


def _from_instruction(record: dict, response_keys: tuple[str, ...]) -> list[dict]:
    response_key = next((key for key in response_keys if key in record), None)
    if "instruction" not in record or (response_keys and response_key is None):
        wanted = f'"instruction" and "{response_keys[0]}"' if response_keys else '"instruction"'
        raise FormatError(
            f'expected {wanted}, "messages" or "conversations"; found keys {sorted(record)}'
        )
    question = text_of(record["instruction"], "instruction")
    if record.get("input"):
        question += "\n" + text_of(record["input"], "input")
    messages = _from_history(record.get("history") or [])
    messages.append({"role": "user", "content": question})
    if response_key:
        reply = text_of(record[response_key], response_key)
        messages.append({"role": "assistant", "content": reply})
    return messages


def _from_history(turns) -> list[dict]:
    is_list = isinstance(turns, list)
    if not is_list or any(not isinstance(turn, list) or len(turn) != 2 for turn in turns):
        raise FormatError('"history" must be a list of [question, answer]')
    return [
        {"role": role, "content": text_of(text, "history")}
        for turn in turns
        for role, text in zip(("user", "assistant"), turn, strict=True)
    ]


def text_of(value, where: str) -> str:
    if not isinstance(value, str):
        raise FormatError(f"{where} must be text, found {type(value).__name__}")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise FormatError(
            f"{where} has a lone surrogate, which is no character: take it out"
        ) from error
    return value


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
    """One rendered message: header ids (`<|im_start|>role\\n`), content ids, and end ids."""

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
        plain = encode_plain(tokenizer, ["\n", *(f"{role}\n" for role in set(ROLES.values()))])
        self.newline = plain[0]
        self.headers = dict(zip(set(ROLES.values()), plain[1:], strict=True))

    def render(self, conversations: list[list[dict]]) -> list[list[Turn]]:
        contents = [message["content"] for messages in conversations for message in messages]
        encoded = iter(encode_plain(self.tokenizer, contents))
        return [
            [self._turn(m["role"], next(encoded)) for m in messages] for messages in conversations
        ]

    def _turn(self, role: str, content: list[int]) -> Turn:
        return Turn(role, [self.start, *self.headers[role]], content, [self.stop, *self.newline])


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

    The oldest exchanges go first, then the beginning of the last question, then the system
    message. The reply is cut at its end only when it is too long by itself.

    Returns whether the reply was cut.
    """
    reply = turns[-1]

    def excess() -> int:
        return sum(map(len, turns)) - max_length

    first = 1 if turns[0].role == "system" else 0
    while excess() > 0 and len(turns) - first > 2:
        del turns[first]
        while len(turns) - first > 2 and turns[first].role != "user":
            del turns[first]
    question = turns[-2] if len(turns) > 1 else None
    if excess() > 0 and question:
        kept = max(len(question.content) - excess(), min(SHORTEST_PROMPT, len(question.content)))
        question.content = question.content[len(question.content) - kept :]
    if excess() > 0 and first and len(turns) > 2:
        del turns[0]
    if excess() <= 0:
        return False
    room = max(0, max_length - sum(map(len, turns[:-1])) - len(reply.header))
    cut = len(reply.content) + len(reply.end) > room
    if cut:  # without its end token, so that no model learns to stop in mid-sentence
        reply.content, reply.end = reply.content[:room], []
    return cut
