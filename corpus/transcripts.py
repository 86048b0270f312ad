"""A whole conversation in one text, "Human: … Assistant: …", as hh-rlhf and BELLE write it.

Others write "User:", and guanaco "### Human:".
"""

import re

ROLE_OF = {"Human": "user", "User": "user", "Assistant": "assistant"}
MARK = re.compile(r"(?:^|\n)[ \t]*(?:### ?)?(Human|User|Assistant)[ \t]*[:：]")
BEGINS = re.compile(r"\s*(?:### ?)?(?:Human|User)[ \t]*[:：]")
WHOLE_TALKS = 'noted: messages that hold a whole talk ("Human: … Assistant: …")'


def split_transcript(text: str) -> list[dict]:
    """The messages of a text that begins with the user's mark; [] of any other text.

    A last "Assistant:" without words asks for the answer, and is no message.
    """
    if not BEGINS.match(text):
        return []
    _, *pieces = MARK.split(text.lstrip())
    messages = [
        {"role": ROLE_OF[name], "content": content.strip()}
        for name, content in zip(pieces[::2], pieces[1::2], strict=True)
    ]
    if messages[-1] == {"role": "assistant", "content": ""}:
        messages.pop()
    return messages


def split_question(text: str) -> list[dict]:
    """The messages of a question that is a transcript up to its last question; [] of another."""
    if "Assistant" not in text:
        return []
    messages = split_transcript(text)
    has_answer = any(message["role"] == "assistant" for message in messages)
    asks_last = messages[-1:] and messages[-1]["role"] == "user"
    is_prompted = text.rstrip().endswith((":", "：")) and len(MARK.findall(text.lstrip())) > len(
        messages
    )
    return messages if asks_last and (has_answer or is_prompted) else []


def holds_transcript(text: str) -> bool:
    """Whether both speakers' marks stand at the beginnings of lines."""
    return "Assistant" in text and len({ROLE_OF[mark] for mark in MARK.findall(text)}) == 2


def pair_record(prompt: list[dict], chosen: str, rejected: str) -> dict:
    """A DPO record: the question as text where it is one, otherwise its messages."""
    answers = {"chosen": chosen, "rejected": rejected}
    is_text = len(prompt) == 1 and prompt[0]["role"] == "user"
    if is_text and not split_question(prompt[0]["content"]):
        return {"instruction": prompt[0]["content"], **answers}
    return {"prompt": prompt, **answers}
