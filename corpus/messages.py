"""Messages of every chat format -> plain messages, worded as Qwen3's template words them.

A parsed message is {"role", "content"}, where role is system, user, assistant or tool. A system
message may also have "tools", an assistant's "reasoning_content" and "tool_calls". `render` writes
these into the content. The chat template in tokenizer.py does the same to messages it is given.
"""

import json
from collections import Counter

from corpus.readers import Dropped, FormatError
from tokenizer import TOOLS_BEGIN, TOOLS_END

ROLES = {"system": "system", "user": "user", "human": "user", "prompter": "user"}
ROLES |= {"assistant": "assistant", "gpt": "assistant", "bot": "assistant", "chatgpt": "assistant"}
ROLES |= {"model": "assistant", "ai": "assistant", "developer": "system"}
ROLES |= dict.fromkeys(("tool", "observation", "function", "tool_response", "ipython"), "tool")
CALLS = ("function_call", "tool_call")  # ShareGPT's and ms-swift's: the content is the call itself
KNOWN = ROLES | dict.fromkeys(CALLS, "assistant")
PLAIN = {"role", "content", "from", "value"}
OWNERS = {"tools": "system", "functions": "system"}  # which role alone may have a field
# The reasoning of DeepSeek and Qwen, of vLLM, and of gpt-oss.
REASONING = ("reasoning_content", "reasoning", "thinking")
OWNERS |= dict.fromkeys((*REASONING, "tool_calls", "function_call"), "assistant")
MEDIA = {"image", "images", "video", "videos", "audio", "audios"}
TEXT_PARTS = ("text", "input_text", "output_text")  # OpenAI's kinds of a part that is text
NOT_A_TARGET = ("loss", "weight")  # ms-swift's and OpenAI's marks of a reply, where they are 0
HIDDEN = "noted: reasoning before the last question, not shown"


def is_missing(value) -> bool:
    """Whether a value is null, or the NaN that pandas writes for it."""
    return value is None or value != value


def text_of(value, where: str) -> str:
    """Text as it is. What is missing is empty text."""
    if not isinstance(value, str):
        if is_missing(value):
            return ""
        value = _joined_parts(value, where)
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise FormatError(
            f"{where} has a lone surrogate, which is no character: take it out"
        ) from error
    return value


def _joined_parts(value, where: str) -> str:
    """OpenAI's content in parts, [{"type": "text", "text": …}], as one text."""
    parts = value if isinstance(value, list) and value else [value]
    kinds = [part.get("type") if isinstance(part, dict) else None for part in parts]
    if not all(kind in TEXT_PARTS for kind in kinds):
        found = ", ".join(sorted({str(kind) for kind in kinds if kind})) or type(value).__name__
        raise FormatError(f"{where} must be text, found {found}")
    return "".join(text_of(part.get("text", ""), where) for part in parts)


def from_json(value, where: str):
    """The value of JSON text. What is no text stays as it is."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{where} is text that is no JSON") from error


def to_json(value, where: str) -> str:
    """One line of JSON, with the spaces that the template's `tojson` writes."""
    return text_of(json.dumps(value, ensure_ascii=False), where)


def parse_messages(value, key: str) -> list[dict]:
    """A list of {role, content} or of ShareGPT's {from, value}, or JSON text of one.

    Raises:
        FormatError: names the message and what is wrong with it.
    """
    if value != "":
        value = from_json(value, f"{key!r}")
    if is_missing(value) or value in ("", []):
        raise Dropped("no messages")
    if not isinstance(value, list):
        raise FormatError(f"{key!r} must be a non-empty list of messages")
    messages: list[dict] = []
    for number, item in enumerate(value, start=1):
        where = f"message {number} of {key!r}"
        message, only_calls = _parse_message(item, where)
        if message["role"] == "system" and messages:
            raise FormatError(f"{where} is a system message: only the first may be")
        if only_calls and messages and messages[-1]["role"] == "assistant":
            calls = messages[-1].get("tool_calls", [])
            messages[-1]["tool_calls"] = calls + message["tool_calls"]
        else:
            messages.append(message)
    return messages


def _parse_message(item, where: str) -> tuple[dict, bool]:
    """(message, whether it is nothing but a call, which belongs to the assistant's turn)."""
    if not isinstance(item, dict):
        wanted = '{"role": …, "content": …}'
        raise FormatError(f"{where} must be {wanted}, found {type(item).__name__}")
    has_content = "content" in item or "value" in item  # null is there, as "" is
    item = {key: value for key, value in item.items() if not is_missing(value)}
    name = item.get("role", item.get("from"))
    if not isinstance(name, str) or name not in KNOWN:
        raise FormatError(f"{where} has role {name!r}; known: {', '.join(KNOWN)}")
    content = item.get("content", item.get("value", ""))
    role = KNOWN[name]
    fields = _fields(item, role, where) if item.keys() - PLAIN else {}
    if name in CALLS:
        calls = [*fields.get("tool_calls", []), *parse_calls(content, where)]
        if not calls:
            raise FormatError(f"{where} is a tool call and has none")
        return {"role": role, "content": "", **fields, "tool_calls": calls}, not fields
    if not fields and not has_content:
        raise FormatError(f"{where} has no content")
    return {"role": role, "content": text_of(content, where), **fields}, False


def _fields(item: dict, role: str, where: str) -> dict:
    """What a message has beside its content: tools, reasoning, calls. Empty ones are left out."""
    for key, owner in OWNERS.items():
        if item.get(key) and role != owner:
            raise FormatError(f"{where} has {key!r}, which only the {owner}'s message may have")
    for key in MEDIA & item.keys():
        if item[key]:
            raise FormatError(f"{where} has {key!r}, and only text is learned: take it out")
    for key in NOT_A_TARGET:
        if item.get(key) == 0:
            raise FormatError(f"{where} has {key!r}: {item[key]!r}, which is not supported")
    tools = item.get("tools") or item.get("functions") or []
    calls = item.get("tool_calls") or item.get("function_call") or []
    reasoning = next((item[key] for key in REASONING if item.get(key)), "")
    fields = {
        "tools": parse_tools(tools, f"'tools' of {where}"),
        "reasoning_content": text_of(reasoning, f"reasoning of {where}"),
        "tool_calls": parse_calls(calls, where),
    }
    return {key: value for key, value in fields.items() if value}


def parse_calls(value, where: str) -> list[dict]:
    """Tool calls as a list, one call, or JSON text of either -> [{name, arguments}]."""
    where = f"'tool_calls' of {where}"
    calls = from_json(value, where) or []
    return [_parse_call(c, where) for c in (calls if isinstance(calls, list) else [calls])]


def _parse_call(call, where: str) -> dict:
    call = from_json(call, where)
    if isinstance(call, dict):
        call = call.get("function") or call
    if not isinstance(call, dict) or not isinstance(call.get("name"), str):
        wanted = '{"name": …, "arguments": {…}}'
        raise FormatError(f"{where} must be {wanted}")
    arguments = call.get("arguments") or {}
    if not isinstance(from_json(arguments, f"'arguments' in {where}"), dict):
        raise FormatError(f"'arguments' in {where} must be an object")
    return {"name": text_of(call["name"], where), "arguments": arguments}


def parse_tools(value, where: str) -> list[dict]:
    """Definitions of tools as a list, one definition, or JSON text of either."""
    tools = from_json(value, where) or []
    tools = [from_json(tool, where) for tool in (tools if isinstance(tools, list) else [tools])]
    if not all(isinstance(tool, dict) for tool in tools):
        raise FormatError(f"{where} must be a list of objects, each the definition of a tool")
    return tools


def render(messages: list[dict], counts: Counter | None = None) -> list[dict]:
    """Parsed messages -> {role, content} and nothing else: tools, reasoning, calls become words.

    As in Qwen3's template, only what was thought since the last question is shown. Unlike there,
    a reply without reasoning gets no empty `<think>` block. Rendering twice changes nothing.

    counts: counts the earlier reasoning that is not shown.
    """
    if all(len(m) == 2 and "</think>" not in m["content"] for m in messages):
        return messages  # nothing but roles and words
    question = max((i for i, message in enumerate(messages) if _asks(message)), default=-1)
    plain = []
    for number, message in enumerate(messages):
        content = message["content"]
        if message["role"] == "assistant":
            if counts is not None and number < question and _split_reasoning(message)[0]:
                counts[HIDDEN] += 1
            content = _assistant_words(message, number > question, message is messages[-1])
        elif "tools" in message:
            content = f"{content}\n\n" if content else ""
            content += tools_words(message["tools"])
        plain.append({"role": message["role"], "content": content})
    return plain


def _asks(message: dict) -> bool:
    """Whether a message is a user's question, and not a tool's result in a user's name."""
    content = message["content"]
    is_result = content.startswith("<tool_response>") and content.endswith("</tool_response>")
    return message["role"] == "user" and not is_result


def _split_reasoning(message: dict) -> tuple[str, str, bool]:
    """(reasoning, words, whether the reasoning stands in the words) of an assistant's message."""
    content, reasoning = message["content"], message.get("reasoning_content", "")
    in_content = False
    if not reasoning and "</think>" in content and content.lstrip("\n").startswith("<think>"):
        reasoning, _, content = content.lstrip("\n").partition("</think>")
        reasoning, content = reasoning.removeprefix("<think>"), content.lstrip("\n")
        in_content = True
    return reasoning.strip("\n"), content, in_content


def _assistant_words(message: dict, shows_reasoning: bool, is_last: bool) -> str:
    reasoning, content, in_content = _split_reasoning(message)
    words = content
    if shows_reasoning and (reasoning or (in_content and is_last)):
        words = f"<think>\n{reasoning}\n</think>\n\n" + content.lstrip("\n")
    for number, call in enumerate(message.get("tool_calls", [])):
        words += "\n" if content or number else ""
        words += f"<tool_call>\n{_call_words(call)}\n</tool_call>"
    return words


def _call_words(call: dict) -> str:
    arguments = call["arguments"]
    if isinstance(arguments, str):
        text_of(arguments, "'arguments' of a tool call")
    else:
        arguments = to_json(arguments, "'arguments' of a tool call")
    return f'{{"name": "{call["name"]}", "arguments": {arguments}}}'


def tools_words(tools: list[dict]) -> str:
    """The part of the system message that tells which tools there are and how to call them."""
    lines = [f"\n{to_json(tool, 'the definition of a tool')}" for tool in tools]
    return f"{TOOLS_BEGIN}{''.join(lines)}{TOOLS_END}"
